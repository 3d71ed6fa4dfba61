"""P-values of single images: against their definition, their smallest values, and error rates in simulations."""

import math

import numpy as np
import pytest
from support.generators import Vectors, around
from support.verdicts import calibration_of

from attrib.generators.identify.calibration import Calibration, first_in, gallery_of
from attrib.generators.registry.galleries import Galleries


def own_values(calibration: Calibration, gallery: int, g: int) -> np.ndarray:
    return calibration.own[gallery, calibration.owner == g, gallery, g].astype(float)


def p_value_by_definition(
    calibration: Calibration, origins: list[list[int]], scores: np.ndarray, gallery: int, exclude: int | None = None
) -> float:
    """P-value of one row [G] in a gallery: the largest over origins (lists of kinds), one negative at a time."""
    found, by_source = [], calibration.settings.unit == "source"
    same = calibration.source if by_source else np.arange(len(calibration.kind))
    left = [i for i in range(len(same)) if exclude is None or same[i] != same[exclude]]
    weight = {i: 1 / sum(same[j] == same[i] for j in left) if by_source else 1.0 for i in left}
    assigned = []  # every negative under every degradation that leads it to this gallery
    for i in range(len(same)):
        for every in calibration.negatives[:, i].astype(float):
            if not np.isnan(every).all() and np.nanargmax(every) // len(scores) == gallery:
                assigned.append((i, every[gallery]))
    itself = np.mean([sum(i == j for j, _ in assigned) for i, _ in assigned])
    rows = [(i, row) for i, row in assigned if i in weight]
    num_columns = sum(any(not np.isnan(row[g]) for _, row in assigned) for g in range(len(scores)))
    means, spreads, owns = [], [], []
    own_squares = [own_values(calibration, gallery, g) for g in range(len(scores))]
    of_all = sum(((v - v.mean()) ** 2).sum() for v in own_squares) / max(1, sum(len(v) - 1 for v in own_squares))
    for g, own in enumerate(scores):
        values = [(row[g], weight[i]) for i, row in rows if not np.isnan(row[g])]
        values += [] if np.isnan(own) else [(float(own), 1.0)]
        means.append(sum(v * w for v, w in values) / sum(w for _, w in values))
        spreads.append((sum(w * (v - means[-1]) ** 2 for v, w in values) / sum(w for _, w in values)) ** 0.5)
        v = own_squares[g]
        owns.append((v.mean(), ((((v - v.mean()) ** 2).sum() + 5 * of_all) / (len(v) - 1 + 5)) ** 0.5))

    def statistic(row):
        best = int(np.nanargmax(row))
        below = max(0.0, owns[best][0] - float(row[best])) / max(owns[best][1], 1e-6)
        return (float(row[best]) - means[best]) / spreads[best] - below

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
    own, owner = np.full((2, 12, 2, 3), np.nan), np.repeat(np.arange(3), 4)
    own[:, np.arange(12), :, owner] = 1 + generator.standard_normal((12, 2, 2))
    given = {"own": own, "owner": owner, "unit": unit_of, "false_attribution_rate": 0.4}
    calibration = calibration_of(negatives, kind, source, **given)
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
    high = calibration.p_values(np.full((2, 3), 99, np.float32), np.arange(2))
    units = calibration.units()
    of_kind = [units["photographs"], units["generators"], units["synthetic"]]
    fewest = min(sum(of_kind[kind] for kind in kinds) for kinds in origins)
    times = [np.count_nonzero(chosen == gallery, axis=0) for gallery in range(2)]
    assert high == pytest.approx(calibration.floors)
    assert calibration.floors == pytest.approx([(t**2).sum() / t.sum() / (1 + fewest) for t in times])
    assert calibration.floor == min(calibration.floors)


@pytest.mark.parametrize("unit_of", ["image", "source"])
def test_photographs_never_replace_generated_negatives(unit_of):
    """Generated negatives score higher than photographs and are too few for the rate by themselves."""
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


def test_many_synthetic_images_do_not_outweigh_few_generated_ones():
    """Images of other generators score higher than those of a pool, and there are as many as the rate needs."""
    generator = np.random.default_rng(16)
    kind = np.repeat([1, 2], [30, 600])
    scores = np.where(kind[:, None] == 1, 3.0, 0.0) + generator.standard_normal((630, 2))
    queries = np.float32(3) + generator.standard_normal((400, 2)).astype(np.float32)
    p_values = calibration_of(scores, kind).p_values(queries, np.zeros(400, int))
    assert np.mean(p_values <= 0.05) < 0.1


def test_references_as_negatives_are_weighted_for_missing_generators():
    """Images of two generators and of none are alike, but an image of none is scored by one generator more."""
    generator = np.random.default_rng(11)
    found, owner = [], np.repeat([0, 1], 20)
    for _ in range(400):
        scores = generator.standard_normal((60, 2))
        negatives = scores[:40].copy()
        negatives[np.arange(40), owner] = np.nan
        calibration = calibration_of(negatives, np.ones(40, int), owner)
        found.append(calibration.p_values(scores[40:].astype(np.float32), np.zeros(20, int)) <= 0.05 + 1e-12)
    assert 0.03 < np.mean(found) < 0.06


def test_the_rate_holds_for_negatives_assigned_to_one_gallery_repeatedly():
    """19 negatives under five degradations that change little: the image is assigned as often as one of them."""
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


def test_out_of_distribution_images_are_attributed_at_the_stated_rate():
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
def test_the_rate_holds_for_every_origin_and_degradation(shift):
    """Two kinds, one scoring higher; the gallery depends on the degradation not at all (shift 0), partly or fully."""
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
    assert max(rates) > 0.03  # the rate of the kind that scores higher is not far below the limit


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
    assert np.mean(np.array(found["image"]) <= 0.05) > 0.05  # above the rate


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


def test_no_image_is_attributed_to_a_generator_without_leave_one_out_scores():
    """For example a generator whose images are too small once degraded, except for a single large one."""
    scores = np.random.default_rng(17).standard_normal((40, 2))
    own = np.full((1, 2, 1, 2), 6.0)
    own[0, 0, 0, 0] = np.nan
    calibration = calibration_of(scores, own=own)
    queries = np.array([[99.0, 0.0], [0.0, 99.0], [np.nan, np.nan]], np.float32)
    assert calibration.p_values(queries, np.zeros(3, int)) == pytest.approx([1.0, 1 / 41, 1.0])
    # The same holds where almost no negative is assigned to the gallery.
    elsewhere = np.stack([scores + 5, scores], axis=1)[None].repeat(2, axis=0)
    elsewhere[:, 0, 1] += 20
    own = np.full((2, 2, 2, 2), 6.0)
    own[:, 0, :, 0] = np.nan
    calibration = calibration_of(elsewhere, own=own)
    assert calibration.p_values(queries[:1], np.ones(1, int)) == pytest.approx([1.0])


def test_references_are_compared_without_themselves():
    own = np.array([0.1, 0.4, 0.4, 0.9])[None, :, None, None]
    calibration = calibration_of(np.zeros((0, 1)), own=own, owner=np.zeros(4, int))
    zeros = np.zeros(4, int)
    found = calibration.own_p_values(own[0, :, 0, 0], zeros, zeros, exclude=np.arange(4))
    assert found == pytest.approx([1 / 4, 3 / 4, 3 / 4, 4 / 4])


def test_an_image_is_assigned_to_the_gallery_of_its_highest_score():
    scores = np.array([[[0.1, np.nan], [0.3, 0.2]], [[0.5, 0.5], [0.5, 0.4]], [[np.nan] * 2] * 2])
    assert gallery_of(scores).tolist() == [1, 0, -1]
    chosen = np.array([[1, 0, 1, 0, -1], [1, 1, 0, 0, 0]])
    assert first_in(chosen, 1).tolist() == [1, 1, 0, -1, -1] and first_in(chosen, 0).tolist() == [-1, 0, 1, 0, 1]
