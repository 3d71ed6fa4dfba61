"""Training and scoring of variants: folds do not leak, each row has its fold's model, controls equal their formulas."""

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.files import LOCAL
from support.pairs import unit
from support.variants import (
    NUM_FOLDS,
    NUM_QUERIES,
    NUM_SOURCES,
    SHRINKAGE,
    VARIANTS,
    WIDTH,
    drawn_features,
    settings_of,
)

from attrib.evaluate.ablation import variants
from attrib.evaluate.ablation.variants import (
    AblationFeatures,
    VariantResult,
    chosen_by_folds,
    fold_of,
    score_variant,
)
from attrib.evaluate.scores import MACRO_MIN_ROWS, QueryScores
from attrib.train.augment.settings import KINDS
from attrib.train.view_features import ORIGINAL, ViewFeatures

HALF = 3e-3  # the most that float16 inputs of a head change a cosine

pytestmark = pytest.mark.usefixtures("one_thread")


IMAGES, TRUTH = drawn_features()
FOLDS = np.array([fold_of(row.group, NUM_FOLDS, 0) for row in TRUTH])


def score(name: str, images: AblationFeatures = IMAGES, **changes) -> VariantResult:
    settings = settings_of({"name": name} | VARIANTS[name] | changes)
    (variant,) = settings.variants
    return score_variant(settings, variant, settings.training(variant, "m", "o"), images, TRUTH, LOCAL)


def allowed_queries(fold: int) -> set[str]:
    """Queries without a true source in the fold."""
    return {row.query for row in TRUTH} - {row.query for row, its in zip(TRUTH, FOLDS) if its == fold}


def originals(found: ViewFeatures, ids: np.ndarray) -> np.ndarray:
    """Features float64 [n, d] of images without views, in the order of the ids."""
    place = {int(i): row for row, i in enumerate(found.content) if found.view[row] == ORIGINAL}
    return found.features[[place[int(i)] for i in ids]].astype(np.float64)


def source_rows() -> np.ndarray:
    return originals(IMAGES.sources, IMAGES.source_keys.vectors[:, 0])


def query_rows() -> np.ndarray:
    return originals(IMAGES.queries, IMAGES.query_keys.vectors[:, 0])


def zca(rows: np.ndarray, fitted_on: np.ndarray) -> np.ndarray:
    """Whitened by the whole covariance matrix, of unit length; the library uses PCA directions and a floor instead."""
    centred = fitted_on - fitted_on.mean(axis=0)
    variance, axes = np.linalg.eigh(centred.T @ centred / len(centred))
    transform = axes / np.sqrt(np.maximum(variance, 0) + SHRINKAGE * variance[-1]) @ axes.T
    return unit((rows - fitted_on.mean(axis=0)) @ transform)


def disturbed(found: ViewFeatures, ids: set[int]) -> ViewFeatures:
    """With random features, far from the others, for some images and their views."""
    features = found.features.copy()
    rows = np.isin(found.content, list(ids))
    features[rows] = 40 * np.random.default_rng(9).normal(size=(rows.sum(), WIDTH))
    return replace(found, features=features)


def row_of(result: VariantResult, row: int) -> tuple:
    """The ranking and the values of one truth row."""
    scores = result.scores
    return scores.top_keys[row], scores.top_similarity[row], {n: v[row] for n, v in scores.values.items()}


# Folds


def test_folds_are_random_and_depend_on_the_group_name_only():
    names = [f"group {i}" for i in range(2000)]
    folds = np.array([fold_of(name, 5, 0) for name in names])
    counts = np.bincount(folds)
    assert len(counts) == 5 and counts.min() > 320 and counts.max() < 480  # expected 400, standard deviation 18
    assert folds.tolist() == [fold_of(name, 5, 0) for name in names]
    again = np.array([fold_of(name, 5, 1) for name in names])
    assert 0.15 < (folds == again).mean() < 0.25  # another seed draws anew
    # Results on disk depend on these folds.
    assert [fold_of(f"g{i}", 5, 0) for i in range(10)] == [2, 1, 4, 0, 4, 4, 2, 1, 1, 1]


@pytest.mark.parametrize("name", ["by domain", "supervised"])
def test_a_model_is_fitted_on_exactly_the_queries_without_a_true_source_in_its_fold(name, monkeypatch):
    ids = dict(zip(IMAGES.query_keys.keys, IMAGES.query_keys.vectors[:, 0].tolist()))
    key_of = {image_id: key for key, image_id in ids.items()}
    seen, paired = [], []
    fitted_model, paired_inputs = variants.fitted_model, variants.paired_inputs

    def spy(training, network, real, synthetic):
        seen.append({key_of[i] for i in synthetic.content.tolist()})
        return fitted_model(training, network, real, synthetic)

    def spy_on_pairs(model, real, synthetic, pairs):
        paired.append(pairs)
        return paired_inputs(model, real, synthetic, pairs)

    monkeypatch.setattr(variants, "fitted_model", spy)
    monkeypatch.setattr(variants, "paired_inputs", spy_on_pairs)
    score(name)
    assert seen == [allowed_queries(fold) for fold in range(NUM_FOLDS)]
    assert all(3 < len(keys) < NUM_QUERIES - 3 for keys in seen)
    if name == "by domain":
        assert not paired
        return
    group_of = dict(zip(IMAGES.source_keys.vectors[:, 0].tolist(), IMAGES.source_keys.column("group")))
    for fold, pairs in enumerate(paired):
        # One image for each true group, and no group of the fold.
        found = {(key_of[q], group_of[s]) for q, sources in pairs.items() for s in sources}
        expected = [(row.query, row.group) for row in TRUTH if row.query in allowed_queries(fold)]
        assert found == set(expected) and sum(map(len, pairs.values())) == len(expected)
        assert fold not in {fold_of(group, NUM_FOLDS, 0) for _, group in found}
        assert len({s for sources in pairs.values() for s in sources}) == len({group for _, group in found})


@pytest.mark.parametrize("fold", range(NUM_FOLDS))
@pytest.mark.parametrize("name", ["by domain", "supervised"])
def test_queries_do_not_influence_the_model_of_a_fold_with_their_true_sources(name, fold):
    """Disturb half of these queries: the other rows of this fold keep all bits, and the rows of other folds change."""
    changed = {row.query for row, its in zip(TRUTH, FOLDS) if its == fold and int(row.query[1:-4]) % 2}
    ids = {int(i) for key, i in zip(IMAGES.query_keys.keys, IMAGES.query_keys.vectors[:, 0]) if key in changed}
    before, after = score(name), score(name, replace(IMAGES, queries=disturbed(IMAGES.queries, ids)))
    others = [i for i, row in enumerate(TRUTH) if row.query not in changed]
    kept = [i for i in others if FOLDS[i] == fold]
    told = [i for i in others if FOLDS[i] != fold]
    assert len(ids) > 8 and len(kept) > 8 and len(told) > 20
    assert all(row_of(before, i) == row_of(after, i) for i in kept)
    assert all(before.scores.top_similarity[i] != after.scores.top_similarity[i] for i in told)


def test_each_truth_row_is_scored_by_the_model_of_its_fold():
    result = score("by domain")
    sources, group_of = zca(source_rows(), source_rows()), np.array(IMAGES.source_keys.column("group"))
    keys, method_of = IMAGES.query_keys.keys, IMAGES.query_keys.column("method")
    embedded = []
    for fold in range(NUM_FOLDS):
        allowed = allowed_queries(fold)
        embedded.append(zca(query_rows(), query_rows()[[i for i, key in enumerate(keys) if key in allowed]]))
    truths = defaultdict(set)
    for row in TRUTH:
        truths[row.query].add(row.group)
    num_sure, other_model = 0, []
    for i, (row, fold) in enumerate(zip(TRUTH, FOLDS)):
        pool = [s for s in range(NUM_SOURCES) if group_of[s] not in truths[row.query] - {row.group}]
        at = keys.index(row.query)
        similarity = {IMAGES.source_keys.keys[s]: embedded[fold][at] @ sources[s] for s in pool}
        top = result.scores.top_keys[i]
        expected = [similarity[key] for key in top]
        np.testing.assert_allclose(result.scores.top_similarity[i], expected, atol=HALF)
        assert expected[0] > max(similarity.values()) - HALF
        other = embedded[(fold + 1) % NUM_FOLDS][at] @ sources[IMAGES.source_keys.keys.index(top[0])]
        other_model.append(abs(other - result.scores.top_similarity[i][0]))
        # Average precision by counting, with a margin in both directions for rounding.
        relevant = [IMAGES.source_keys.keys[s] for s in pool if group_of[s] == row.group]
        assert result.scores.true_keys[i] == relevant
        low, high = (precision(similarity, relevant, margin) for margin in (HALF, -HALF))
        assert low - 1e-9 <= result.scores.values["ap"][i] <= high + 1e-9
        num_sure += low == high
        assert result.scores.cells[i] == (row.role, method_of[at])
    assert num_sure > len(TRUTH) / 2 and np.median(other_model) > 5 * HALF
    assert result.scores.queries == [row.query for row in TRUTH] and result.history == []
    # The vectors are those of the first fold.
    np.testing.assert_allclose(result.sources @ result.queries.T, sources @ embedded[0].T, atol=HALF)


def precision(similarity: dict[str, float], relevant: list[str], margin: float) -> float:
    """Average precision if the similarity of every irrelevant source grows by a margin."""
    found = []
    for place, value in enumerate(sorted((similarity[key] for key in relevant), reverse=True), start=1):
        above = sum(s + margin >= value for key, s in similarity.items() if key not in relevant)
        found.append(place / (place + above))
    return float(np.mean(found))


# Controls


def test_raw_and_centred_controls_return_the_features():
    result = score("raw")
    np.testing.assert_allclose(result.sources, unit(source_rows()), atol=HALF)
    np.testing.assert_allclose(result.queries, unit(query_rows()), atol=HALF)
    assert result.sources.dtype == result.queries.dtype == np.float32 and result.history == []
    mean = source_rows().mean(axis=0)
    result = score("raw", head={"projection": "centre", "net": "none"})
    np.testing.assert_allclose(result.sources, unit(source_rows() - mean), atol=HALF)
    np.testing.assert_allclose(result.queries, unit(query_rows() - mean), atol=HALF)


@pytest.mark.parametrize(
    ("projection", "num_directions"), [("whiten", None), ("standardise_whiten", None), ("whiten", 7)]
)
def test_whitening_is_fitted_to_sources_and_applied_to_sources_and_queries(projection, num_directions):
    head = {"projection": projection, "shrinkage": SHRINKAGE, "num_directions": num_directions, "net": "none"}
    result = score("raw", head=head)
    sources, queries = source_rows(), query_rows()
    mean = sources.mean(axis=0)
    scale = sources.std(axis=0) if projection.startswith("standardise") else 1
    _, singular, axes = np.linalg.svd((sources - mean) / scale, full_matrices=False)
    kept = num_directions or NUM_SOURCES - 1  # centred rows have rank n - 1
    variance = singular[:kept] ** 2 / NUM_SOURCES
    weights = axes[:kept].T / np.sqrt(variance + SHRINKAGE * variance[0])
    sources, queries = (unit((rows - mean) / scale @ weights) for rows in (sources, queries))
    assert result.sources.shape == (NUM_SOURCES, kept) and result.queries.shape == (NUM_QUERIES, kept)
    np.testing.assert_allclose(result.sources @ result.queries.T, sources @ queries.T, atol=HALF)
    np.testing.assert_allclose(result.sources @ result.sources.T, sources @ sources.T, atol=HALF)


def test_the_macro_map_is_the_mean_of_large_cells():
    result = score("raw")
    cells = defaultdict(list)
    for cell, ap in zip(result.scores.cells, result.scores.values["ap"]):
        cells[cell].append(ap)
    large = [np.mean(aps) for aps in cells.values() if len(aps) >= MACRO_MIN_ROWS]
    assert 0 < len(large) < len(cells) == 4
    assert result.macro_map == pytest.approx(np.mean(large), abs=1e-12)


# What is trained


def test_a_variant_that_learns_from_views_never_sees_queries():
    before = score("views")
    ids = set(IMAGES.query_keys.vectors[:20, 0].tolist())
    after = score("views", replace(IMAGES, queries=disturbed(IMAGES.queries, ids)))
    assert np.array_equal(before.sources, after.sources) and before.history == after.history
    changed = (before.queries != after.queries).any(axis=1)
    assert changed[:20].all() and not changed[20:].any()
    assert [row["epoch"] for row in before.history] == [-1, 0, 1]


@pytest.mark.parametrize(
    ("name", "changes"),
    [("views", {"head": {"net": "mlp", "hidden": 8}}), ("supervised", {})],
)
def test_scores_do_not_depend_on_the_global_generator(name, changes):
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        results.append(score(name, **changes))
    assert np.array_equal(results[0].sources, results[1].sources)
    assert results[0].history == results[1].history
    assert results[0].scores.top_similarity == results[1].scores.top_similarity


def test_only_the_chosen_kinds_are_trained_on_and_no_image_is_dropped():
    kinds = ["colour", "solo"]
    kept = np.isin(IMAGES.sources.kind, [KINDS.index(kind) for kind in kinds])
    results = []
    for changed in (None, ~kept & ~IMAGES.sources.is_original, kept):
        features = IMAGES.sources.features.copy()
        if changed is not None:
            features[changed] = 40 * np.random.default_rng(9).normal(size=(changed.sum(), WIDTH))
        images = replace(IMAGES, sources=replace(IMAGES.sources, features=features))
        results.append(score("views", images, kinds=kinds))
    plain, others_changed, own_changed = results
    assert plain.history == others_changed.history and np.array_equal(plain.sources, others_changed.sources)
    assert plain.history != own_changed.history
    assert plain.sources.shape == (NUM_SOURCES, NUM_SOURCES - 1)
    # Equal to a run without the other kinds, and different from a run with all of them.
    images = replace(IMAGES, sources=IMAGES.sources.take(kept | IMAGES.sources.is_original))
    assert np.array_equal(score("views", images).sources, plain.sources)
    assert score("views").history != plain.history


def test_the_training_settings_of_a_variant_equal_those_of_the_train_job():
    features = {"moment_levels": [1], "layout_levels": [3]}
    variant = VARIANTS["views"] | {
        "name": "v",
        "features": "mine",
        "views": "odd",
        "alignment": {"kind": "moco", "temperature": 0.3},
        "disentanglement": {"kind": "cca_ssg", "weight": 0.5},
        "fine_tune": {"num_blocks": 3},
        "num_workers": 2,
    }
    views = {"mix": {"texture": 0, "solo": 3}}
    settings = settings_of(
        variant,
        feature_sets={"mine": features},
        view_sets={"odd": views},
        views_per_image=5,
        seed=4,
        storage={"client": "s3fs"},
    )
    found = settings.training(settings.variants[0], "/m", "/o")
    expected = {"manifest": "/m", "output": "/o", "views": views, "features": features, "head": variant["head"]}
    expected |= {name: variant[name] for name in ("alignment", "disentanglement", "fine_tune", "optimiser")}
    expected |= {"views_per_image": 5, "max_failed_share": 0.0, "seed": 4, "num_workers": 2}
    expected |= {"backbone": {"name": "test_resnet", "weights": "random"}, "storage": {"client": "s3fs"}}
    assert found == type(found).model_validate(expected)


# Choosing among variants


def made_scores(ap: np.ndarray, units: list[str], cells: list[tuple[str, str]], mark: str) -> QueryScores:
    rows = range(len(ap))
    values = {"ap": ap, "recall_at_1": (ap > 0.5).astype(float)}
    return QueryScores(
        [f"q{i}" for i in rows], cells, units, values, [[]] * len(ap), [[f"{mark}{i}"] for i in rows], [[v] for v in ap]
    )


@pytest.mark.parametrize("seed", range(5))
def test_choosing_by_folds_equals_a_loop(seed):
    rng = np.random.default_rng(seed)
    num_rows, num_folds = 150, 4
    units = [f"u{i}" for i in rng.integers(0, 40, num_rows)]
    cells = [("content", "a")] * 60 + [("style", "a")] * 45 + [("content", "b")] * 45
    cells[-20:] = [("style", "b")] * 20  # too few for the macro mean
    order = rng.permutation(num_rows)
    cells = [cells[i] for i in order]
    candidates = {name: made_scores(rng.random(num_rows), units, cells, name) for name in "xyz"}
    # One is best by far in the small cell, which must not matter.
    candidates["x"].values["ap"][[cell == ("style", "b") for cell in cells]] = 1
    found, chosen = chosen_by_folds(candidates, num_folds, seed)
    large = [("content", "a"), ("style", "a")]
    assert sorted(any_cell for any_cell in set(cells) if cells.count(any_cell) >= MACRO_MIN_ROWS) == large
    for fold in range(num_folds):
        means = {}
        for name, scores in candidates.items():
            of_cells = []
            for cell in large:
                aps = [
                    scores.values["ap"][i]
                    for i in range(num_rows)
                    if cells[i] == cell and fold_of(units[i], num_folds, seed) != fold
                ]
                of_cells.append(sum(aps) / len(aps))
            means[name] = sum(of_cells) / len(of_cells)
        assert chosen[fold] == max(means, key=means.get)
    for i in range(num_rows):
        expected = candidates[chosen[fold_of(units[i], num_folds, seed)]]
        assert all(found.values[name][i] == expected.values[name][i] for name in expected.values)
        assert found.top_keys[i] == expected.top_keys[i] and found.top_similarity[i] == expected.top_similarity[i]
    assert found.asked() == candidates["x"].asked()


def test_a_variant_that_is_good_on_one_fold_is_not_chosen_for_that_fold():
    units = [f"u{i}" for i in range(90)]
    folds = np.array([fold_of(unit, 3, 0) for unit in units])
    cells = [("content", "a")] * 90
    lucky = np.where(folds == 1, 1.0, 0.4)
    candidates = {"lucky": lucky, "steady": np.full(90, 0.5)}
    candidates = {name: made_scores(ap, units, cells, name) for name, ap in candidates.items()}
    before = {name: scores.values["ap"].copy() for name, scores in candidates.items()}
    found, chosen = chosen_by_folds(candidates, 3, 0)
    assert chosen[1] == "steady" and (found.values["ap"][folds == 1] == 0.5).all()
    # On all queries it would be chosen, and its score would be too high.
    assert lucky.mean() > 0.5 > found.values["ap"].mean()
    assert all(np.array_equal(before[name], scores.values["ap"]) for name, scores in candidates.items())
