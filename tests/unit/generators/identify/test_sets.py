"""Sets of images: identified where single images are not, at any size; copies count once."""

from dataclasses import replace

import numpy as np
import pytest
from support.generators import around, unit
from support.verdicts import groups_and_negatives, judge_from

from attrib.generators.identify.sets import centred, judge_set
from attrib.generators.identify.settings import PrevalenceSettings


@pytest.fixture(scope="module")
def vectors():
    return groups_and_negatives()


def test_sets_are_identified_where_single_images_are_not(vectors):
    """The images are so noisy that few of them are attributed one by one."""
    generator, centres, _, _ = vectors
    noise = 0.4
    groups = [around(centres[c], 40, noise, generator)[None] for c in (0, 1)]
    negatives = around(centres[3], 120, 0.6, generator)
    judge = judge_from(groups, negatives)
    settings = PrevalenceSettings(num_permutations=199)
    images = around(centres[0], 20, noise, generator)
    alone = sum(v.kind == "known" for v in judge.verdicts(images))
    together = judge_set("account", images, judge, settings)
    assert together.verdict == "known" and together.generator == "g0" and together.p_value <= 0.01
    assert together.num_images == 20 and together == judge_set("account", images, judge, settings)
    assert alone < 20
    outside = [judge_set("s", around(centres[3], 20, 0.6, generator), judge, settings) for _ in range(40)]
    assert sum(v.verdict == "known" for v in outside) <= 6
    mixed = judge_set("between", unit(centres[0] * 0.35 + around(centres[3], 20, 0.4, generator)), judge, settings)
    assert mixed.verdict == "unknown"


def test_a_set_names_the_member_of_a_family_that_single_images_do_not():
    generator = np.random.default_rng(9)
    centre = unit(generator.standard_normal(24))
    centres = [unit(centre + 0.25 * unit(generator.standard_normal(24))) for _ in range(2)]
    groups = [around(c, 40, 0.12, generator)[None] for c in centres]
    judge = judge_from(groups, unit(generator.standard_normal((60, 24))), family=np.array([0, 0]))
    settings = PrevalenceSettings(num_permutations=199)
    named = [judge_set("s", around(centres[i % 2], 30, 0.12, generator), judge, settings) for i in range(40)]
    right = sum(v.verdict == "known" and v.generator == f"g{i % 2}" for i, v in enumerate(named))
    lost = sum(v.generator is None or f"g{i % 2}" not in v.generator for i, v in enumerate(named))
    assert right >= 30 and lost <= 7  # the true generator is missing in at most about one of 20 sets
    few = [judge_set("s", around(centres[0], 2, 0.12, generator), judge, settings) for _ in range(20)]
    assert sum(v.generator == "g0|g1" and v.verdict == "family" for v in few) >= 3


def test_centred_scores_depend_on_one_image_only():
    scores = np.random.default_rng(13).standard_normal((9, 4))
    scores[2, 1:3] = np.nan
    family = np.array([0, 1, 1, 3])
    found = centred(scores, family)
    for row, got in zip(scores, found):
        means = [row[0], np.nan if np.isnan(row[1]) else (row[1] + row[2]) / 2, row[3]]
        assert got == pytest.approx(row - np.nanmean(means), nan_ok=True)
    assert centred(scores[4:5], family) == pytest.approx(found[4:5])
    assert np.array_equal(centred(scores, np.zeros(4, int)), scores, equal_nan=True)


def test_a_larger_set_of_one_generator_gets_no_larger_p_value(vectors):
    """More images in the set than there are negatives, and scores that differ little."""
    generator, centres, _, _ = vectors
    groups = [around(centres[c], 20, 0.4, generator)[None] for c in (0, 1)]
    judge = judge_from(groups, around(centres[3], 25, 0.6, generator))
    settings = PrevalenceSettings(num_permutations=199)
    for size in (10, 30, 90):
        found = judge_set("s", around(centres[0], size, 0.4, generator), judge, settings)
        assert found.verdict == "known" and found.generator == "g0" and found.p_value <= 0.05


def test_copies_count_once_in_a_set(vectors):
    generator, centres, groups, negatives = vectors
    judge = judge_from(groups[:2], negatives)
    settings = PrevalenceSettings(num_permutations=199)
    images = around(centres[3], 3, 0.6, generator)
    once = judge_set("s", images, judge, settings)
    stored = unit(np.repeat(images, 20, axis=0).astype(np.float16).astype(np.float32))
    assert judge_set("s", np.repeat(images, 20, axis=0), judge, settings) == replace(once, num_images=60)
    copies = judge_set("s", stored, judge, settings)
    assert (copies.num_images, copies.num_distinct, once.num_distinct) == (60, 3, 3)
    assert copies.p_value == pytest.approx(once.p_value, abs=0.05)
