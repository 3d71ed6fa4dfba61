"""Verdicts on vectors and on images, also on unusable ones; abstention, and the reported rates."""

import numpy as np
import pytest
import torch
from support.generators import STORAGE, Vectors, around, drawn_samples, spectrum_method, unit
from support.identify import drawn_registry
from support.verdicts import calibration_of, groups_and_negatives, judge_from

from attrib.common.errors import AttribError
from attrib.generators.identify.verdicts import Judge, assess, decide, judge_of
from attrib.generators.registry.galleries import Galleries
from attrib.generators.registry.quality import refusal
from attrib.generators.registry.settings import VerdictSettings
from attrib.generators.signals.samples import drawn_sample


@pytest.fixture(scope="module")
def vectors():
    return groups_and_negatives()


def test_verdicts_of_known_generators_families_and_unknown_generators(vectors):
    generator, centres, groups, negatives = vectors
    judge = judge_from(groups, negatives, family=np.array([0, 1, 1]))  # as the references say, see test_registry
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
    # The rows of the confusion matrix add up to the numbers of references and negatives.
    assert judge.confusion[0].sum(axis=1).tolist() == [20, 40, 60]
    assert judge.confusion[0][0, 0] >= 17 and judge.confusion[0][2, 2] >= 55


def test_a_generator_that_resembles_everything_does_not_affect_others(vectors):
    """Its references resemble each other no more than negatives resemble them. Nothing is attributed to it."""
    generator, centres, groups, _ = vectors
    shared = unit(np.ones(24))
    vague = around(shared, 20, 1.5, generator)[None]
    judge = judge_from([groups[0], groups[1], vague], around(shared, 60, 1.5, generator))
    for g in range(2):
        verdicts = judge.verdicts(around(centres[g], 40, 0.12, generator))
        assert sum(v.generator == f"g{g}" for v in verdicts) >= 34
    assert sum(v.kind == "known" for v in judge.verdicts(around(shared, 40, 1.5, generator))) <= 6


def test_high_scores_unlike_the_references_are_unknown(vectors):
    """No negative scores as high as the image, and no reference as low."""
    _, centres, groups, negatives = vectors
    judge = judge_from(groups[:1], negatives)
    across = unit(np.roll(centres[0], 1) - np.roll(centres[0], 1) @ centres[0] * centres[0])
    aside = unit(centres[0] + 1.1 * across)
    verdict = judge.verdicts(aside[None])[0]
    assert verdict.kind == "unknown" and "its own references score higher" in verdict.reason
    assert verdict.p_value <= 0.05 and verdict.own_p_value == pytest.approx(1 / 21)


def test_nothing_is_attributed_at_a_rate_below_the_smallest_p_value(vectors):
    _, _, groups, negatives = vectors
    judge = judge_from(groups[:2], negatives, false_attribution_rate=0.01)
    assert judge.floor == pytest.approx(1 / 61)
    verdicts = judge.verdicts(groups[0][0])
    assert all(v.kind == "unassessable" and v.generator is None for v in verdicts)
    assert "0.01 is below 0.0164, the smallest p-value that 60 synthetic images allow" in verdicts[0].reason
    assert "register 99 or more images of synthetic models" in verdicts[0].reason
    assert verdicts[0].p_value == pytest.approx(1 / 61)
    assert judge.confusion[0, :, -1].tolist() == [20, 20, 60]
    alone = judge_from(groups[:2], negatives[:0])
    assert alone.floor == 1 and "no generated negatives are registered:" in alone.verdicts(groups[0][0, :1])[0].reason


def test_images_are_unassessable_where_references_are_not_recognised(vectors):
    """Under the second degradation all references look like negatives."""
    generator, _, groups, negatives = vectors
    lost = [np.concatenate([rows, unit(generator.standard_normal(rows.shape))]) for rows in groups[:2]]
    judge = judge_from(lost, negatives)
    assert judge.assessable.tolist() == [True, False]
    verdict = judge.verdicts(unit(lost[0][1].mean(axis=0, keepdims=True)))[0]
    assert verdict.gallery == "jpeg-85" and verdict.kind == "unassessable"
    assert verdict.reason.startswith("degraded or from an unknown generator: under jpeg-85, the generators'")


def test_unattributed_images_are_unassessable_where_few_references_are_recognised(vectors):
    """Under the second degradation seven of ten references of every generator look like negatives."""
    generator, centres, groups, negatives = vectors
    kept = [unit(generator.standard_normal((20, 24))) for _ in range(2)]
    for rows, centre in zip(kept, (centres[2], centres[3])):
        rows[:6] = around(centre, 6, 0.05, generator)
    both = [np.stack([rows[0], half]) for rows, half in zip(groups, kept)]
    judge = judge_from(both, negatives)
    assert judge.assessable.tolist() == [True, True] and 0.1 < judge.recognised[1] < 0.5 < judge.recognised[0]
    like = judge.verdicts(around(centres[2], 20, 0.05, generator))
    assert sum(v.kind == "known" and v.gallery == "jpeg-85" for v in like) >= 15
    open_ones = [v for v in judge.verdicts(unit(kept[0][6:] + kept[1][6:])) if v.gallery == "jpeg-85"]
    assert open_ones and all(v.kind == "unassessable" for v in open_ones)
    assert "degraded or from an unknown generator: under jpeg-85, only" in open_ones[0].reason
    assert "are recognised" in open_ones[0].reason
    lenient = judge_from(both, negatives, least_recognised=0.1)
    assert {v.kind for v in lenient.verdicts(unit(kept[0][6:] + kept[1][6:])) if v.gallery == "jpeg-85"} == {"unknown"}


def test_too_few_references_to_reject_an_image_are_named(vectors):
    _, _, groups, negatives = vectors
    judge = judge_from([groups[0], groups[1][:, :10]], negatives)
    assert judge.calibration.own_floors.tolist() == [[1 / 21, 1 / 11]]
    assert judge.warnings[:1] == [
        "g1 has 10 references, too few to reject an image at false_rejection_rate 0.05; register 19 or more"
    ]
    first, second = (judge_from(groups, negatives, with_references=given).warnings for given in (False, True))
    assert [line.partition(":")[0] for line in second] == ["the negatives contain no photographs"]
    assert [line.partition(":")[0] for line in first[1:]] == ["the negatives contain no images of other generators"]
    assert "register some (role: other-generator)" in first[1] and first[:1] == second


def test_a_gallery_with_too_few_negatives_gives_its_reason():
    """Each of 40 negatives is assigned to the second gallery under both degradations."""
    generator = np.random.default_rng(14)
    scores = generator.standard_normal((1, 40, 1, 1)) + np.array([0.0, 1.0])[None, None, :, None] * np.ones(
        (2, 40, 2, 1)
    )
    calibration = calibration_of(scores, own=np.full((2, 1, 2, 1), 20.0), false_attribution_rate=0.04)
    assert calibration.floors == pytest.approx([1 / 41, 2 / 41])
    judge = Judge(Galleries(Vectors(), [np.ones((2, 1, 1), np.float32)]), calibration)
    assert judge.abstains is None
    judge.assessable[:] = True
    decisions = decide(calibration, np.array([[[30.0], [0]], [[0], [30]]], np.float32))
    first, second = (judge._verdict(i, decisions, judge.label(decisions)[i]) for i in range(2))
    assert first.kind == "known" and second.kind == "unassessable"
    assert second.reason.startswith("too few negatives under jpeg-85: ") and "register 49 or more" in second.reason


def test_a_score_without_references_to_compare_with_has_its_own_reason():
    scores = np.random.default_rng(15).standard_normal((1, 40, 1, 1))
    calibration = calibration_of(scores, own=np.full((1, 1, 1, 1), np.nan), false_attribution_rate=0.05)
    judge = Judge(Galleries(Vectors(), [np.ones((1, 1, 1), np.float32)]), calibration)
    judge.assessable[:], judge.recognised[:] = True, 1.0
    decisions = decide(calibration, np.array([[[30.0]]], np.float32))
    verdict = judge._verdict(0, decisions, judge.label(decisions)[0])
    assert verdict.kind == "unknown" and verdict.p_value == 1.0
    assert "has too few references under degradation none to test the score" in verdict.reason


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> Judge:
    registry = drawn_registry(str(tmp_path_factory.mktemp("judge")), ("nearest", "stripes", "checker"), 15, 40)
    return judge_of(registry, spectrum_method(), VerdictSettings(), STORAGE)


def test_a_registry_without_generators_is_refused(tmp_path):
    with pytest.raises(AttribError, match="has no generator"):
        judge_of(drawn_registry(str(tmp_path), (), 0, 10), spectrum_method(), VerdictSettings(), STORAGE)


def test_references_serve_as_negatives_without_their_own_family(judge):
    calibration = judge.calibration
    assert calibration.negatives.shape == (2, 85, 2, 3) and calibration.units() == {"generators": 45, "photographs": 40}
    is_nan = np.isnan(calibration.negatives[0, :45, 1])
    assert np.array_equal(is_nan, calibration.owner[:, None] == np.arange(3)[None])
    expected = judge.galleries.as_unregistered(calibration.family)[0, :, 1]
    assert np.array_equal(calibration.negatives[0, :45, 1][~is_nan], expected[~is_nan])


def test_left_out_rates_are_those_of_registries_without_a_generator(judge, tmp_path):
    method, settings = judge.galleries.method, judge.settings
    assert set(judge.left_out_rates) == {"nearest", "stripes", "checker"}
    without = judge_of(drawn_registry(str(tmp_path), ("nearest", "checker"), 15, 40), method, settings, STORAGE)
    vectors = method.embed(drawn_samples("stripes", range(15)))
    attributed = decide(without.calibration, without.galleries.scores(vectors)).attributed
    assert judge.left_out_rates["stripes"] == pytest.approx(attributed.mean())
    assert without.left_out_rates == {}  # without one of two generators, no negative is generated


def test_left_out_rates_exceed_the_rate_by_image_for_similar_generators():
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


def test_images_get_verdicts_and_unusable_ones_a_reason(judge):
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
    assert "too small: 14x14 pixels, and the shorter side needs 16" in verdicts[60].reason
    assert "blank" in verdicts[61].reason and "too small: 500x1" in verdicts[62].reason
    assert np.isnan(vectors[60:]).all() and np.isfinite(vectors[:60]).all()
    # The verdict on an image does not depend on the others.
    assert assess(samples[:1], judge)[0][0] == verdicts[0]


def test_an_image_of_one_pixel_has_no_detail(judge):
    one = drawn_sample(torch.zeros((3, 1, 1), dtype=torch.uint8))
    assert "too small" in refusal(one, judge.galleries.method, VerdictSettings())


def test_grey_images_are_refused_by_methods_that_need_colour(judge):
    method = Vectors()
    colours = drawn_samples("nearest", [1])[0]
    grey = drawn_sample(colours.image[:1].expand(3, -1, -1).contiguous())
    method.needs_colour = True
    assert refusal(grey, method, VerdictSettings()) == "greyscale: the fingerprint needs colours"
    assert refusal(colours, method, VerdictSettings()) is None
    assert refusal(grey, judge.galleries.method, VerdictSettings()) is None
    assert "blank" in refusal(drawn_sample(torch.full((3, 48, 48), 77, dtype=torch.uint8)), method, VerdictSettings())


def test_two_judges_of_one_calibration_are_equal(judge):
    again = Judge(judge.galleries, judge.calibration)
    assert np.array_equal(again.confusion, judge.confusion) and again.floor == judge.floor
