"""P-values against their definitions and in simulations with a known truth; verdicts of images, bad ones included; sets."""

import math

import numpy as np
import pytest
import torch
from generator_samples import Vectors, around, drawn_samples, spectrum_method, unit

from attrib.errors import AttribError
from attrib.generators.calibration import Calibration, first_in, gallery_of
from attrib.generators.conformal import binomial_tail, conformal_p_values, permutation_p_value, source_p_value
from attrib.generators.galleries import Galleries
from attrib.generators.registration import as_sources
from attrib.generators.registry import create_registry, register
from attrib.generators.registry_settings import DumpSettings, RegistryMethodSettings, VerdictSettings
from attrib.generators.samples import drawn_sample
from attrib.generators.sets import judge_set
from attrib.generators.verdicts import Judge, assess, judge_of, refusal
from attrib.settings import StorageSettings
from attrib.storage import Storage

STORAGE = Storage(StorageSettings())


def calibration_of(negatives, kind=None, source=None, own=None, owner=None, family=None, **settings) -> Calibration:
    """negatives: [n, G], of one gallery, or [D, n, D, G]; own, by default: one reference of each generator, which scores 6 for its own."""
    negatives = np.asarray(negatives, np.float32)
    if negatives.ndim == 2:
        negatives = negatives[None, :, None]
    num_degradations, count, _, num_generators = negatives.shape
    if own is None:
        own = np.full((num_degradations, num_generators, num_degradations, num_generators), 6.0)
    return Calibration(
        names=[f"g{g}" for g in range(num_generators)],
        degradations=("none", "jpeg-85")[:num_degradations],
        family=np.arange(num_generators) if family is None else family,
        negatives=negatives,
        kind=np.zeros(count, int) if kind is None else kind,
        source=np.arange(count) if source is None else source,
        own=own,
        owner=np.arange(own.shape[1]) if owner is None else owner,
        settings=VerdictSettings(**settings),
    )


def p_value_by_definition(
    calibration: Calibration, scores: np.ndarray, gallery: int, exclude: int | None = None
) -> float:
    """Of one row [G] in a gallery: the largest over kinds, one negative at a time."""
    found, by_source = [], calibration.settings.unit == "source"
    same = calibration.source if by_source else np.arange(len(calibration.kind))
    left = [i for i in range(len(same)) if exclude is None or same[i] != same[exclude]]
    weight = {i: 1 / sum(same[j] == same[i] for j in left) if by_source else 1.0 for i in left}
    rows = []  # every negative under every degradation that leads it to this gallery
    for i in left:
        for every in calibration.negatives[:, i].astype(float):
            if not np.isnan(every).all() and np.nanargmax(every) // len(scores) == gallery:
                rows.append((i, every[gallery]))
    means, spans = [], []
    for g, own in enumerate(scores):
        values = [(row[g], weight[i]) for i, row in rows if not np.isnan(row[g])]
        values += [] if np.isnan(own) else [(float(own), 1.0)]
        means.append(sum(v * w for v, w in values) / sum(w for _, w in values))
        spans.append(np.mean(calibration.own[gallery, calibration.owner == g, gallery, g]) - means[-1])

    def statistic(row):
        best = int(np.nanargmax(row))
        return (float(row[best]) - means[best]) / spans[best] if spans[best] > 0 else 0.0

    for kind in set(calibration.kind.tolist()):
        reached = sum(
            weight[i] for i, row in rows if calibration.kind[i] == kind and statistic(row) >= statistic(scores) - 1e-12
        )
        found.append(min(1, (1 + reached) / (1 + sum(weight[i] for i in left if calibration.kind[i] == kind))))
    return max(found)


@pytest.mark.parametrize("unit_of", ["image", "source"])
def test_p_values_equal_their_definition(unit_of):
    generator = np.random.default_rng(0)
    negatives = generator.standard_normal((2, 60, 2, 3)) * [1, 2, 0.5]
    negatives[1, 7] = np.nan
    negatives[:, 45:, :, 1] = np.nan
    kind = np.repeat([0, 2, 1], [25, 20, 15])
    source = np.concatenate([np.arange(25), 25 + np.arange(20) // 4, 50 + np.arange(15) // 5])
    calibration = calibration_of(negatives, kind, source, unit=unit_of, false_attribution_rate=0.4)
    scores = (generator.standard_normal((30, 3)) * [1, 2, 0.5] + 1).astype(np.float32)
    gallery = np.arange(30) % 2
    expected = [p_value_by_definition(calibration, row, one) for row, one in zip(scores, gallery)]
    assert calibration.p_values(scores, gallery) == pytest.approx(expected)
    chosen = gallery_of(calibration.negatives)
    at = np.array([0, 12, 26, 40, 47])
    rows = calibration.negatives[0, at, chosen[0, at]]
    expected = [p_value_by_definition(calibration, row, one, i) for row, one, i in zip(rows, chosen[0, at], at)]
    assert calibration.p_values(rows, chosen[0, at], exclude=at) == pytest.approx(expected)
    assert calibration.units() == {"photographs": 25, "generators": 15 if unit_of == "image" else 3} | {
        "synthetic": 20 if unit_of == "image" else 5
    }
    high = calibration.p_values(np.full((2, 3), 99, np.float32), np.arange(2))
    assert high == pytest.approx([calibration.floor] * 2) and calibration.floor == pytest.approx(
        1 / (1 + min(calibration.units().values()))
    )


def test_kinds_too_few_to_show_the_rate_are_counted_with_the_largest():
    scores = np.random.default_rng(1).standard_normal((70, 2))
    kind = np.repeat([0, 1, 2], [50, 12, 8])
    for rate, groups, smallest in ((0.05, {0}, 70), (0.1, {0, 1}, 12), (0.12, {0, 1, 2}, 8)):
        calibration = calibration_of(scores, kind, false_attribution_rate=rate)
        assert set(calibration.groups.tolist()) == groups and calibration.floor == pytest.approx(1 / (smallest + 1))


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
    assert max(rates) > 0.04  # of the kind that scores higher, about what is promised


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


def judge_from(groups, strangers, family=None, **settings) -> Judge:
    """groups: float32 [D, r, d] of each generator; strangers: float32 [n, d] as photographs, not degraded by anything."""
    galleries = Galleries(Vectors(), groups)
    own, owner = galleries.leave_one_out()
    scores = np.stack([galleries.scores(strangers)] * groups[0].shape[0])
    return Judge(galleries, calibration_of(scores, own=own, owner=owner, family=family, **settings))


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
    assert "0.01 is below 0.0164, the least that 60 negatives (by image) can show" in verdicts[0].reason
    assert "register 99" in verdicts[0].reason and verdicts[0].p_value == pytest.approx(1 / 61)
    assert judge.confusion[0, :, -1].tolist() == [20, 20, 60]
    alone = judge_from(groups[:2], strangers[:0])
    assert alone.floor == 1 and "there are no negatives" in alone.verdicts(groups[0][0, :1])[0].reason


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


def test_calibrating_twice_gives_the_same(judge):
    again = Judge(judge.galleries, judge.calibration)
    assert np.array_equal(again.confusion, judge.confusion) and again.floor == judge.floor
