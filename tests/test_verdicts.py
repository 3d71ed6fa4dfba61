"""P-values against their definitions and in simulations with a known truth; verdicts of images, bad ones included; sets."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from generator_samples import Vectors, around, drawn_samples, spectrum_method, unit

from attrib.errors import AttribError
from attrib.generators.calibration import Calibration
from attrib.generators.conformal import (
    binomial_tail,
    column_means,
    conformal_p_values,
    permutation_p_value,
    source_p_value,
)
from attrib.generators.degradations import parse
from attrib.generators.galleries import Galleries
from attrib.generators.registration import as_sources
from attrib.generators.registry import create_registry, register
from attrib.generators.registry_settings import DumpSettings, RegistryMethodSettings, RegistrySettings, VerdictSettings
from attrib.generators.samples import drawn_sample, recoded
from attrib.generators.sets import judge_set, standing_out
from attrib.generators.standings import first_in, gallery_of
from attrib.generators.verdicts import Judge, assess, judge_of, refusal
from attrib.settings import StorageSettings
from attrib.storage import Storage

STORAGE = Storage(StorageSettings())


SYNTHETIC = 2


def calibration_of(negatives, kind=None, source=None, own=None, owner=None, family=None, **settings) -> Calibration:
    """negatives: [n, G], of one gallery, or [D, n, D, G], synthetic unless kind says otherwise; own, by default: one reference of each generator, which scores 6 for its own."""
    negatives = np.asarray(negatives, np.float32)
    if negatives.ndim == 2:
        negatives = negatives[None, :, None]
    num_degradations, count, _, num_generators = negatives.shape
    if own is None:
        own = np.full((num_degradations, num_generators, num_degradations, num_generators), 6.0)
    return Calibration(
        names=[f"g{g}" for g in range(num_generators)],
        degradations=("none", "jpeg-85", "jpeg-70", "webp-85", "blur-1")[:num_degradations],
        family=np.arange(num_generators) if family is None else family,
        negatives=negatives,
        kind=np.full(count, SYNTHETIC) if kind is None else kind,
        source=np.arange(count) if source is None else source,
        own=own,
        owner=np.arange(own.shape[1]) if owner is None else owner,
        settings=VerdictSettings(**settings),
    )


def p_value_by_definition(
    calibration: Calibration, origins: list[list[int]], scores: np.ndarray, gallery: int, exclude: int | None = None
) -> float:
    """Of one row [G] in a gallery: the largest over origins, each some kinds, one negative at a time."""
    found, by_source = [], calibration.settings.unit == "source"
    same = calibration.source if by_source else np.arange(len(calibration.kind))
    left = [i for i in range(len(same)) if exclude is None or same[i] != same[exclude]]
    weight = {i: 1 / sum(same[j] == same[i] for j in left) if by_source else 1.0 for i in left}
    coming = []  # every negative under every degradation that leads it to this gallery
    for i in range(len(same)):
        for every in calibration.negatives[:, i].astype(float):
            if not np.isnan(every).all() and np.nanargmax(every) // len(scores) == gallery:
                coming.append((i, every[gallery]))
    itself = np.mean([sum(i == j for j, _ in coming) for i, _ in coming])
    rows = [(i, row) for i, row in coming if i in weight]
    num_columns = sum(any(not np.isnan(row[g]) for _, row in coming) for g in range(len(scores)))
    means, spans = [], []
    for g, own in enumerate(scores):
        values = [(row[g], weight[i]) for i, row in rows if not np.isnan(row[g])]
        values += [] if np.isnan(own) else [(float(own), 1.0)]
        means.append(sum(v * w for v, w in values) / sum(w for _, w in values))
        spans.append(np.mean(calibration.own[gallery, calibration.owner == g, gallery, g]) - means[-1])

    def statistic(row):
        best = int(np.nanargmax(row))
        return (float(row[best]) - means[best]) / spans[best] if spans[best] > 0 else 0.0

    for kinds in origins:
        mine = [i for i in left if calibration.kind[i] in kinds]
        reached = sum(
            weight[i] * num_columns / np.count_nonzero(~np.isnan(row))
            for i, row in rows
            if i in mine and statistic(row) >= statistic(scores) - 1e-12
        )
        found.append(min(1, (itself + reached) / (1 + sum(weight[i] for i in mine))))
    return max(found)


@pytest.mark.parametrize(("unit_of", "origins"), [("image", [[0], [1], [2]]), ("source", [[0], [1, 2]])])
def test_p_values_equal_their_definition(unit_of, origins):
    generator = np.random.default_rng(0)
    negatives = generator.standard_normal((2, 60, 2, 3)) * [1, 2, 0.5]
    negatives[1, 7] = np.nan
    negatives[:, 45:, :, 1] = np.nan
    kind = np.repeat([0, 2, 1], [25, 20, 15])
    source = np.concatenate([np.arange(25), 25 + np.arange(20) // 4, 50 + np.arange(15) // 5])
    calibration = calibration_of(negatives, kind, source, unit=unit_of, false_attribution_rate=0.4)
    scores = (generator.standard_normal((30, 3)) * [1, 2, 0.5] + 1).astype(np.float32)
    gallery = np.arange(30) % 2
    expected = [p_value_by_definition(calibration, origins, row, one) for row, one in zip(scores, gallery)]
    assert calibration.p_values(scores, gallery) == pytest.approx(expected)
    chosen = gallery_of(calibration.negatives)
    at = np.array([0, 12, 26, 40, 47])
    rows = calibration.negatives[0, at, chosen[0, at]]
    expected = [
        p_value_by_definition(calibration, origins, row, one, i) for row, one, i in zip(rows, chosen[0, at], at)
    ]
    assert calibration.p_values(rows, chosen[0, at], exclude=at) == pytest.approx(expected)
    assert calibration.units() == {"photographs": 25, "generators": 15 if unit_of == "image" else 3} | {
        "synthetic": 20 if unit_of == "image" else 5
    }
    assert calibration.num_sources == {"photographs": 25, "generators": 3, "synthetic": 5}
    high = calibration.p_values(np.full((2, 3), 99, np.float32), np.arange(2))
    units = calibration.units()
    of_kind = [units["photographs"], units["generators"], units["synthetic"]]
    fewest = min(sum(of_kind[kind] for kind in kinds) for kinds in origins)
    times = [np.count_nonzero(chosen == gallery, axis=0) for gallery in range(2)]
    assert high == pytest.approx(calibration.floors)
    assert calibration.floors == pytest.approx([(t**2).sum() / t.sum() / (1 + fewest) for t in times])
    assert calibration.floor == min(calibration.floors)


@pytest.mark.parametrize("unit_of", ["image", "source"])
def test_photographs_never_stand_for_generated_images(unit_of):
    """Generated negatives stand higher than photographs, and are too few to show the rate by themselves."""
    generator = np.random.default_rng(1)
    kind = np.repeat([0, 1, 2], [50, 12, 8])
    source = np.concatenate([10 + np.arange(50), np.arange(12) // 3, 60 + np.arange(8) // 2])
    scores = np.where(kind[:, None] == 0, 0.0, 3.0) + generator.standard_normal((70, 2))
    calibration = calibration_of(scores, kind, source, unit=unit_of)
    assert calibration.floor == pytest.approx(1 / 9)  # 8 synthetic images, or 4 sources of either kind
    p_values = calibration.p_values(np.full((1, 2), 99, np.float32), np.zeros(1, int))
    assert p_values == pytest.approx([calibration.floor])
    alone = calibration_of(scores[:50], kind[:50], source[:50], unit=unit_of)
    assert alone.floor == 1 and alone.p_values(np.full((1, 2), 99, np.float32), np.zeros(1, int)).tolist() == [1.0]
    without_photographs = calibration_of(scores[50:], kind[50:], source[50:], unit=unit_of)
    assert without_photographs.floor == calibration.floor


def test_many_synthetic_images_do_not_drown_few_generated_ones():
    """Those of other generators stand higher than those of a pool, and are as many as the rate asks for."""
    generator = np.random.default_rng(16)
    kind = np.repeat([1, 2], [30, 600])
    scores = np.where(kind[:, None] == 1, 3.0, 0.0) + generator.standard_normal((630, 2))
    queries = np.float32(3) + generator.standard_normal((400, 2)).astype(np.float32)
    p_values = calibration_of(scores, kind).p_values(queries, np.zeros(400, int))
    assert np.mean(p_values <= 0.05) < 0.1


def test_references_as_negatives_count_for_the_generators_that_they_were_not_scored_by():
    """All images alike in everything, of two generators' 20 references each and of none: an image of none meets one generator more."""
    generator = np.random.default_rng(11)
    found, owner = [], np.repeat([0, 1], 20)
    for _ in range(400):
        scores = generator.standard_normal((60, 2))
        negatives = scores[:40].copy()
        negatives[np.arange(40), owner] = np.nan
        calibration = calibration_of(negatives, np.ones(40, int), owner)
        found.append(calibration.p_values(scores[40:].astype(np.float32), np.zeros(20, int)) <= 0.05 + 1e-12)
    assert 0.03 < np.mean(found) < 0.06


def test_the_rate_holds_for_few_negatives_that_come_to_one_gallery_many_times():
    """19 negatives under five degradations that change little: the image itself would come to its gallery as often as one of them."""
    generator = np.random.default_rng(12)
    rates, own = [], np.full((5, 1, 5, 1), 20.0)
    for _ in range(500):
        scores = generator.standard_normal((1, 20, 1, 1)) + generator.standard_normal((1, 20, 5, 1))
        scores = (scores + 0.01 * generator.standard_normal((5, 20, 5, 1))).astype(np.float32)
        calibration = calibration_of(scores[:, :19], own=own, false_attribution_rate=0.25)
        gallery = gallery_of(scores[:, 19])
        p_values = calibration.p_values(scores[np.arange(5), 19, gallery], gallery)
        rates.append(np.mean(p_values <= 0.25 + 1e-12))
    assert 0.05 < np.mean(rates) < 0.25 + 4 * math.sqrt(0.19 / 500)
    assert calibration.floors.max() >= 3 / 20


def test_ties_count_against_the_image_and_the_floor_is_attained():
    values, weights = np.array([1.0, 2, 2, 3]), np.ones(4)
    observed = np.array([0.5, 2.0, 2.5, 3.0, 4.0])
    assert conformal_p_values(values, weights, observed) == pytest.approx([1, 4 / 5, 2 / 5, 2 / 5, 1 / 5])


def test_an_image_of_no_registered_generator_is_attributed_at_exactly_the_stated_rate():
    """Exchangeable scores of any shape, here skewed and of other scales: with 19 negatives, p <= 0.05 in one of 20."""
    generator = np.random.default_rng(2)
    trials, found = 4000, []
    own = np.array([50.0, 500, 5])[None, :, None, None] * np.ones((1, 3, 1, 3))
    for _ in range(trials):
        level = generator.exponential(size=(20, 1))
        scores = level * generator.standard_normal((20, 3)) ** 3 * [1, 10, 0.1] + [0, 5, 0]
        calibration = calibration_of(scores[:19], own=own)
        found.append(calibration.p_values(scores[19:].astype(np.float32), np.zeros(1, int))[0])
    found = np.array(found)
    for level in (0.05, 0.2, 0.5):
        assert np.mean(found <= level + 1e-9) == pytest.approx(level, abs=4 * math.sqrt(level * (1 - level) / trials))


@pytest.mark.parametrize("shift", [0.0, 1.0, 6.0])
def test_the_rate_holds_whichever_kind_the_image_is_of_and_however_it_was_degraded(shift):
    """Two kinds, one scoring higher; galleries that say nothing of the degradation (shift 0), something, or everything."""
    generator = np.random.default_rng(3)
    kinds = np.repeat([0, 1], 24)
    level = np.array([0.0, 1.0])
    matched, own = shift * np.eye(2)[:, None, :, None], np.full((2, 2, 2, 2), 20.0)

    def drawn(of_kinds):
        noise = generator.standard_normal((1, len(of_kinds), 1, 2)) + 0.5 * generator.standard_normal(
            (2, len(of_kinds), 2, 2)
        )
        return noise + level[of_kinds][None, :, None, None] + matched

    found = {}
    for _ in range(700):
        calibration = calibration_of(drawn(kinds), kinds, own=own, false_attribution_rate=0.1)
        queries = drawn(np.array([0, 1])).astype(np.float32).reshape(4, 2, 2)
        gallery = gallery_of(queries)
        p_values = calibration.p_values(queries[np.arange(4), gallery], gallery)
        for case, p_value in enumerate(p_values):
            found.setdefault(case, []).append(p_value)
    rates = [np.mean(np.array(values) <= 0.1) for values in found.values()]
    assert max(rates) <= 0.1 + 4 * math.sqrt(0.09 / 700)
    assert max(rates) > 0.03  # of the kind that scores higher, not far from what is promised


def test_by_source_the_rate_holds_for_a_new_source_and_by_image_it_does_not():
    """19 sources of 8 images that share most of their score: the first image of a 20th."""
    generator = np.random.default_rng(4)
    found = {"image": [], "source": []}
    source = np.repeat(np.arange(19), 8)
    for _ in range(1500):
        centres = generator.standard_normal(20) ** 3
        scores = (np.append(centres[source], centres[19]) + 0.1 * generator.standard_normal(153))[:, None]
        for unit_of, values in found.items():
            calibration = calibration_of(scores[:152], np.ones(152, int), source, unit=unit_of)
            values.append(calibration.p_values(scores[152:].astype(np.float32), np.zeros(1, int))[0])
    assert np.mean(np.array(found["source"]) <= 0.1) <= 0.1 + 4 * math.sqrt(0.09 / 1500)
    assert np.mean(np.array(found["source"]) <= 0.1) > 0.05
    assert np.mean(np.array(found["image"]) <= 0.05) > 0.05  # more than promised


def test_a_generators_own_images_are_rejected_at_most_at_about_the_stated_rate():
    generator = np.random.default_rng(5)
    found, zero = [], np.zeros(1, int)
    for _ in range(1500):
        rows = around(np.ones(12), 20, 0.7, generator)
        galleries = Galleries(Vectors(), [rows[None, :19]])
        own, owner = galleries.leave_one_out()
        calibration = calibration_of(np.zeros((0, 1)), own=own, owner=owner)
        found.append(calibration.own_p_values(galleries.scores(rows[19:])[:, 0, 0], zero, zero)[0])
    rate = np.mean(np.array(found) <= 0.1 + 1e-9)
    assert 0.03 < rate < 0.1 + 4 * math.sqrt(0.09 / 1500)
    assert calibration.own_p_values(np.array([-99.0]), zero, zero) == pytest.approx([1 / 20])


def test_own_references_are_left_out_of_what_they_are_compared_with():
    own = np.array([0.1, 0.4, 0.4, 0.9])[None, :, None, None]
    calibration = calibration_of(np.zeros((0, 1)), own=own, owner=np.zeros(4, int))
    zeros = np.zeros(4, int)
    found = calibration.own_p_values(own[0, :, 0, 0], zeros, zeros, exclude=np.arange(4))
    assert found == pytest.approx([1 / 4, 3 / 4, 3 / 4, 4 / 4])


def test_an_image_goes_to_the_gallery_of_its_highest_score_and_prefers_its_own_degradation():
    scores = np.array([[[0.1, np.nan], [0.3, 0.2]], [[0.5, 0.5], [0.5, 0.4]], [[np.nan] * 2] * 2])
    assert gallery_of(scores).tolist() == [1, 0, -1]
    chosen = np.array([[1, 0, 1, 0, -1], [1, 1, 0, 0, 0]])
    assert first_in(chosen, 1).tolist() == [1, 1, 0, -1, -1] and first_in(chosen, 0).tolist() == [-1, 0, 1, 0, 1]


def test_binomial_tails_equal_sums():
    for trials, probability in ((1, 0.5), (20, 0.6), (13, 0.05)):
        for k in range(trials + 1):
            terms = (
                math.comb(trials, j) * probability**j * (1 - probability) ** (trials - j) for j in range(k, trials + 1)
            )
            assert binomial_tail(k, trials, probability) == pytest.approx(math.fsum(terms))
    assert binomial_tail(3, 2, 0.5) == 0.0 and 0 < binomial_tail(900, 10_000, 0.05) < 1e-50


def test_permutation_p_values_are_uniform_for_exchangeable_rows_and_small_for_higher_ones():
    generator = np.random.default_rng(6)
    rows = [generator.exponential(size=(25, 3)) for _ in range(600)]
    found = np.array([permutation_p_value([(r[:2], r[2:10]), (r[10:13], r[13:])], 99, generator) for r in rows])
    for level in (0.05, 0.25):
        assert np.mean(found <= level + 1e-9) == pytest.approx(level, abs=4 * math.sqrt(level / 600))
    assert permutation_p_value([(rows[0][:5] + [0, 9, 0], rows[0][5:])], 999, generator) < 0.005


def test_a_set_from_a_new_source_is_attributed_at_most_at_the_rate_only_by_source():
    """19 sources of 10 images; each source has a level of its own, which the mean of five images shows almost surely."""
    generator = np.random.default_rng(7)
    by_source, by_image = [], []
    for _ in range(300):
        levels = generator.standard_normal(20)
        sets = [level + 0.3 * generator.standard_normal((10, 1)) for level in levels]
        in_strata = [[one[:6], one[6:]] for one in sets]
        by_source.append(source_p_value([sets[19][:3], sets[19][6:8]], in_strata[:19], 50, generator))
        by_image.append(permutation_p_value([(sets[19][:5], np.concatenate(sets[:19]))], 99, generator))
    assert np.mean(np.array(by_source) <= 0.1) <= 0.1 + 4 * math.sqrt(0.09 / 300)
    assert np.mean(np.array(by_image) <= 0.1) > 0.2
    assert source_p_value([np.full((5, 1), 99.0)], [[one[:2]] for one in sets[:19]], 50, generator) == pytest.approx(
        1 / 20
    )


def judge_from(groups, strangers, family=None, with_references=False, **settings) -> Judge:
    """groups: float32 [D, r, d] of each generator; strangers: float32 [n, d] as synthetic images, not degraded by anything.

    with_references: the groups' are negatives, too.
    """
    galleries = Galleries(Vectors(), groups)
    own, owner = galleries.leave_one_out()
    scores = np.stack([galleries.scores(strangers)] * groups[0].shape[0])
    kind, source = np.full(len(strangers), SYNTHETIC), len(groups) + np.arange(len(strangers))
    if with_references:
        scores = np.concatenate([galleries.as_unregistered(np.arange(len(groups))), scores], axis=1)
        kind, source = np.append(np.ones(len(owner), int), kind), np.append(owner, source)
    return Judge(galleries, calibration_of(scores, kind, source, own=own, owner=owner, family=family, **settings))


@pytest.fixture(scope="module")
def vectors():
    """Three generators of which the last two are one, 20 references each; 60 strangers; a new generator."""
    generator = np.random.default_rng(8)
    centres = unit(generator.standard_normal((4, 24)))
    groups = [around(centres[c], 20, 0.12, generator)[None] for c in (0, 1, 1)]
    return generator, centres, groups, unit(generator.standard_normal((60, 24)))


def test_verdicts_of_known_generators_families_and_strangers(vectors):
    generator, centres, groups, strangers = vectors
    judge = judge_from(groups, strangers, family=np.array([0, 1, 1]))  # as the references say, see test_registry
    assert judge.families == ["g0", "g1|g2"] and judge.abstains is None and judge.floor == pytest.approx(1 / 61)
    known = judge.verdicts(around(centres[0], 40, 0.12, generator))
    assert sum(v.kind == "known" and v.generator == "g0" for v in known) >= 34
    in_family = judge.verdicts(around(centres[1], 40, 0.12, generator))
    assert sum(v.kind == "family" and v.generator == "g1|g2" for v in in_family) >= 34
    unknown = judge.verdicts(around(centres[3], 40, 0.12, generator))
    assert all(v.kind == "unknown" and v.generator is None and v.nearest and v.reason for v in unknown)
    first = next(v for v in known if v.kind == "known")
    assert first.p_value == pytest.approx(1 / 61) and first.margin > 0.2 and first.gallery == "none"
    assert all("made by" not in (v.reason or "") for v in known + in_family + unknown)
    # References, each left out, and strangers in the confusion, which add up.
    assert judge.confusion[0].sum(axis=1).tolist() == [20, 40, 60]
    assert judge.confusion[0][0, 0] >= 17 and judge.confusion[0][2, 2] >= 55


def test_what_is_high_but_unlike_the_references_is_unknown(vectors):
    """Half way between a generator and nowhere: no stranger scores as high, and no reference as low."""
    _, centres, groups, strangers = vectors
    judge = judge_from(groups[:1], strangers)
    across = unit(np.roll(centres[0], 1) - np.roll(centres[0], 1) @ centres[0] * centres[0])
    aside = unit(centres[0] + 1.1 * across)
    verdict = judge.verdicts(aside[None])[0]
    assert verdict.kind == "unknown" and "its own references are more like each other" in verdict.reason
    assert verdict.p_value <= 0.05 and verdict.own_p_value == pytest.approx(1 / 21)


def test_a_rate_below_the_floor_means_abstention(vectors):
    _, _, groups, strangers = vectors
    judge = judge_from(groups[:2], strangers, false_attribution_rate=0.01)
    assert judge.floor == pytest.approx(1 / 61)
    verdicts = judge.verdicts(groups[0][0])
    assert all(v.kind == "unassessable" and v.generator is None for v in verdicts)
    assert "0.01 is below 0.0164, the least that 60 synthetic images (by image) can show" in verdicts[0].reason
    assert "register 99 or more of synthetic models" in verdicts[0].reason and verdicts[0].p_value == pytest.approx(
        1 / 61
    )
    assert judge.confusion[0, :, -1].tolist() == [20, 20, 60]
    alone = judge_from(groups[:2], strangers[:0])
    assert alone.floor == 1 and "no negative was generated" in alone.verdicts(groups[0][0, :1])[0].reason


def test_where_references_are_not_recognised_nothing_is_said(vectors):
    """Under the second degradation all references look like strangers."""
    generator, _, groups, strangers = vectors
    lost = [np.concatenate([rows, unit(generator.standard_normal(rows.shape))]) for rows in groups[:2]]
    judge = judge_from(lost, strangers)
    assert judge.assessable.tolist() == [True, False]
    verdict = judge.verdicts(unit(lost[0][1].mean(axis=0, keepdims=True)))[0]
    assert (
        verdict.gallery == "jpeg-85" and verdict.kind == "unassessable" and "degraded: under jpeg-85" in verdict.reason
    )


def test_sets_are_told_apart_where_single_images_are_not(vectors):
    """Images so noisy that few of them are attributed alone."""
    generator, centres, _, _ = vectors
    noise = 0.4
    groups = [around(centres[c], 40, noise, generator)[None] for c in (0, 1)]
    strangers = around(centres[3], 120, 0.6, generator)
    judge = judge_from(groups, strangers)
    settings = DumpSettings(num_permutations=199)
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
    settings = DumpSettings(num_permutations=199)
    named = [judge_set("s", around(centres[i % 2], 30, 0.12, generator), judge, settings) for i in range(40)]
    right = sum(v.verdict == "known" and v.generator == f"g{i % 2}" for i, v in enumerate(named))
    lost = sum(v.generator is None or f"g{i % 2}" not in v.generator for i, v in enumerate(named))
    assert right >= 30 and lost <= 7  # the true one is given up in at most about one of twenty
    few = [judge_set("s", around(centres[0], 2, 0.12, generator), judge, settings) for _ in range(20)]
    assert sum(v.generator == "g0|g1" and v.verdict == "family" for v in few) >= 3


def test_how_far_an_image_stands_out_depends_on_it_alone():
    scores = np.random.default_rng(13).standard_normal((9, 4))
    scores[2, 1:3] = np.nan
    family = np.array([0, 1, 1, 3])
    found = standing_out(scores, family)
    for row, got in zip(scores, found):
        means = [row[0], np.nan if np.isnan(row[1]) else (row[1] + row[2]) / 2, row[3]]
        assert got == pytest.approx(row - np.nanmean(means), nan_ok=True)
    assert standing_out(scores[4:5], family) == pytest.approx(found[4:5])
    assert np.array_equal(standing_out(scores, np.zeros(4, int)), scores, equal_nan=True)


def test_what_has_no_score_is_left_out_of_a_mean():
    rows = np.array([[1.0, np.nan, np.nan], [3.0, 5.0, np.nan]])
    assert column_means(rows).tolist() == [2, 5, -np.inf]
    # Half of what is drawn has no first column: it must not pull the mean of the rest to zero.
    others = np.array([[2.0, -1.0], [np.nan, -1.0]] * 10)
    assert permutation_p_value([(np.full((2, 2), 1.5), others)], 199, np.random.default_rng(0)) > 0.7


def test_more_images_of_a_registered_generator_are_no_weaker_a_set(vectors):
    """More images in the set than there are negatives, and scores that hardly differ."""
    generator, centres, _, _ = vectors
    groups = [around(centres[c], 20, 0.4, generator)[None] for c in (0, 1)]
    judge = judge_from(groups, around(centres[3], 25, 0.6, generator))
    settings = DumpSettings(num_permutations=199)
    for size in (10, 30, 90):
        found = judge_set("s", around(centres[0], size, 0.4, generator), judge, settings)
        assert found.verdict == "known" and found.generator == "g0" and found.p_value <= 0.05


def test_copies_of_a_picture_count_once_in_a_set(vectors):
    generator, centres, groups, strangers = vectors
    judge = judge_from(groups[:2], strangers)
    settings = DumpSettings(num_permutations=199)
    pictures = around(centres[3], 3, 0.6, generator)
    once = judge_set("s", pictures, judge, settings)
    stored = unit(np.repeat(pictures, 20, axis=0).astype(np.float16).astype(np.float32))
    assert judge_set("s", np.repeat(pictures, 20, axis=0), judge, settings) == replace(once, num_images=60)
    copies = judge_set("s", stored, judge, settings)
    assert (copies.num_images, copies.num_distinct, once.num_distinct) == (60, 3, 3)
    assert copies.p_value == pytest.approx(once.p_value, abs=0.05)


def test_too_few_references_to_reject_an_image_are_named(vectors):
    _, _, groups, strangers = vectors
    judge = judge_from([groups[0], groups[1][:, :10]], strangers)
    assert judge.calibration.own_floors.tolist() == [[1 / 21, 1 / 11]]
    assert judge.warnings[:1] == [
        "g1 has 10 references, which reject no image at false_rejection_rate 0.05; register 19 or more"
    ]
    first, second = (judge_from(groups, strangers, with_references=given).warnings for given in (False, True))
    assert second == [] and len(first) == 1 and "holds for synthetic models alone" in first[0]


def test_a_gallery_that_needs_more_negatives_says_so_by_itself():
    """Each of 40 negatives comes to the second gallery under both degradations, and would need to be one of 59 or more."""
    generator = np.random.default_rng(14)
    scores = generator.standard_normal((1, 40, 1, 1)) + np.array([0.0, 1.0])[None, None, :, None] * np.ones(
        (2, 40, 2, 1)
    )
    calibration = calibration_of(scores, own=np.full((2, 1, 2, 1), 20.0), false_attribution_rate=0.04)
    assert calibration.floors == pytest.approx([1 / 41, 2 / 41])
    judge = Judge(Galleries(Vectors(), [np.ones((2, 1, 1), np.float32)]), calibration)
    assert judge.abstains is None
    judge.assessable[:] = True
    decisions = judge.decide(np.array([[[30.0], [0]], [[0], [30]]], np.float32))
    first, second = (judge._verdict(i, decisions, judge.label(decisions)[i]) for i in range(2))
    assert first.kind == "known" and second.kind == "unassessable"
    assert "under jpeg-85" in second.reason and "register 49 or more" in second.reason


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> Judge:
    method = spectrum_method()
    uri = str(tmp_path_factory.mktemp("judge") / "registry")
    settings = RegistryMethodSettings(name="log-spectrum", uri="method")
    registry = create_registry(uri, settings, method, ("none", "jpeg-85"), STORAGE)
    with pytest.raises(AttribError, match="has no generator"):
        judge_of(registry, method, VerdictSettings(), STORAGE)
    for trace in ("nearest", "stripes", "checker"):
        registry, _ = register(registry, trace, "generator", [drawn_samples(trace, range(15))], method, STORAGE)
    photographs = as_sources(drawn_samples(None, range(40)), "photographs")
    registry, _ = register(registry, "camera", "photographs", photographs, method, STORAGE)
    return judge_of(registry, method, VerdictSettings(), STORAGE)


def test_references_serve_as_negatives_without_their_own_family(judge):
    calibration = judge.calibration
    assert calibration.negatives.shape == (2, 85, 2, 3) and calibration.units() == {"generators": 45, "photographs": 40}
    is_nan = np.isnan(calibration.negatives[0, :45, 1])
    assert np.array_equal(is_nan, calibration.owner[:, None] == np.arange(3)[None])
    expected = judge.galleries.as_unregistered(calibration.family)[0, :, 1]
    assert np.array_equal(calibration.negatives[0, :45, 1][~is_nan], expected[~is_nan])


def test_images_too_degraded_for_the_default_grid_are_not_called_unknown(judge, tmp_path):
    method, grid = judge.galleries.method, RegistrySettings.model_fields["degradations"].default
    made_by = RegistryMethodSettings(name="log-spectrum", uri="m")
    held = create_registry(str(tmp_path / "r"), made_by, method, grid, STORAGE)
    for trace in ("nearest", "stripes", "checker"):
        held, _ = register(held, trace, "generator", [drawn_samples(trace, range(20))], method, STORAGE)
    photographs = as_sources(drawn_samples(None, range(60)), "photographs")
    held, _ = register(held, "camera", "photographs", photographs, method, STORAGE)
    fine = judge_of(held, method, VerdictSettings(), STORAGE)
    samples = drawn_samples("nearest", range(300, 320))
    for name in ("jpeg-10", "webp-40", "resize-0.5", "blur-1"):
        verdicts, _ = assess([recoded(sample, parse(name)) for sample in samples], fine)
        assert sum(v.kind == "unknown" for v in verdicts) <= 2, name
    assert sum(v.generator == "nearest" for v in assess(samples, fine)[0]) >= 18


def test_left_out_rates_are_those_of_registries_without_a_generator(judge, tmp_path):
    method, settings = judge.galleries.method, judge.settings
    assert set(judge.left_out_rates) == {"nearest", "stripes", "checker"}
    held = create_registry(
        str(tmp_path / "r"), RegistryMethodSettings(name="log-spectrum", uri="m"), method, ("none", "jpeg-85"), STORAGE
    )
    for trace in ("nearest", "checker"):
        held, _ = register(held, trace, "generator", [drawn_samples(trace, range(15))], method, STORAGE)
    photographs = as_sources(drawn_samples(None, range(40)), "photographs")
    held, _ = register(held, "camera", "photographs", photographs, method, STORAGE)
    without = judge_of(held, method, settings, STORAGE)
    vectors = method.embed(drawn_samples("stripes", range(15)))
    attributed = without.decide(without.galleries.scores(vectors)).attributed
    assert judge.left_out_rates["stripes"] == pytest.approx(attributed.mean())
    assert without.left_out_rates == {}  # of two, one is left and nothing generated among its negatives


def test_left_out_rates_show_what_the_rate_by_image_does_not_promise():
    """Images of an unseen generator go to the registered one that it resembles, all of them or none."""
    generator = np.random.default_rng(15)
    centre = unit(generator.standard_normal(40))
    centres = [
        *(unit(centre + 0.3 * unit(generator.standard_normal(40))) for _ in range(2)),
        unit(generator.standard_normal(40)),
    ]
    groups = [around(c, 20, 0.03, generator)[None] for c in centres]
    judge = judge_from(
        groups, unit(generator.standard_normal((60, 40))), with_references=True, false_rejection_rate=0.01
    )
    assert judge.left_out_rates["g0"] > 0.9 and judge.left_out_rates["g2"] == 0


def test_pictures_get_their_verdicts_and_bad_ones_a_reason(judge):
    samples = [
        *drawn_samples("nearest", range(200, 220)),
        *drawn_samples("diagonal", range(200, 220)),  # not registered
        *drawn_samples(None, range(200, 220)),
        *drawn_samples("nearest", [1], px=14),
        drawn_sample(torch.full((3, 48, 48), 77, dtype=torch.uint8)),
        drawn_sample(torch.zeros((3, 1, 500), dtype=torch.uint8)),
    ]
    verdicts, vectors = assess(samples, judge)
    assert sum(v.generator == "nearest" for v in verdicts[:20]) >= 17
    assert sum(v.kind == "unknown" for v in verdicts[20:40]) >= 17
    assert sum(v.kind == "unknown" for v in verdicts[40:60]) >= 17
    assert [v.kind for v in verdicts[60:]] == ["unassessable"] * 3
    assert "too small: 14x14 pixels, and 16 are needed" in verdicts[60].reason
    assert "blank" in verdicts[61].reason and "too small: 500x1" in verdicts[62].reason
    assert np.isnan(vectors[60:]).all() and np.isfinite(vectors[:60]).all()
    # One at a time, the same comes out.
    assert assess(samples[:1], judge)[0][0] == verdicts[0]


def test_an_image_of_one_pixel_has_no_detail(judge):
    one = drawn_sample(torch.zeros((3, 1, 1), dtype=torch.uint8))
    assert "too small" in refusal(one, judge.galleries.method, VerdictSettings())


def test_a_picture_without_colours_is_refused_where_the_method_needs_them(judge):
    method = Vectors()
    colours = drawn_samples("nearest", [1])[0]
    grey = drawn_sample(colours.image[:1].expand(3, -1, -1).contiguous())
    method.needs_colour = True
    assert refusal(grey, method, VerdictSettings()) == "greyscale: no colour trace"
    assert refusal(colours, method, VerdictSettings()) is None
    assert refusal(grey, judge.galleries.method, VerdictSettings()) is None
    assert "blank" in refusal(drawn_sample(torch.full((3, 48, 48), 77, dtype=torch.uint8)), method, VerdictSettings())


def test_calibrating_twice_gives_the_same(judge):
    again = Judge(judge.galleries, judge.calibration)
    assert np.array_equal(again.confusion, judge.confusion) and again.floor == judge.floor
