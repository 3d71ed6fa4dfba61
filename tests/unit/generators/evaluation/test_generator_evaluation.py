"""The evaluation of fingerprint methods, with methods whose results are known and against loops by definition."""

import itertools
import json
import pickle

import numpy as np
import pytest
from support.evaluation import NUM_IMAGES, Blind, MeanColour, Noise, coloured_set, noisy_set, settings

from attrib.common.errors import AttribError
from attrib.generators.evaluation import measures
from attrib.generators.evaluation.controls import CodecAndSize
from attrib.generators.evaluation.generator_sets import divisions, make_set
from attrib.generators.evaluation.protocol import Embedded, cluster_cut, evaluate_set
from attrib.generators.evaluation.settings import FolderSetSettings, SetSettings
from attrib.generators.fingerprints.base import with_scoring
from attrib.generators.signals.degradations import parse
from attrib.generators.signals.samples import Sample, recoded

pytestmark = pytest.mark.usefixtures("one_thread")


def measured(method, generators, cut=0.9, **changes) -> dict:
    return evaluate_set(method, Embedded(method, generators), cut, settings(**changes))


def test_a_perfect_method_has_perfect_values():
    found = measured(MeanColour(), coloured_set())
    assert max(found["values"].pop("false_positive_rate")) < 0.05
    for name, values in found["values"].items():
        assert values == pytest.approx([1.0] * 3), name
    assert found["confusion"] == np.eye(3).tolist()
    assert sorted(found["clusters"]) == sorted((NUM_IMAGES * np.eye(3, dtype=int)).tolist())
    for both_sides in ("none", "jpeg-85"):
        assert found["references"][both_sides] == {"1": [1.0] * 3, "6": [1.0] * 3}, "50 references leave no queries"
        assert found["sets"][both_sides] == {"1": [1.0] * 3, "3": [1.0] * 3}, "no generator has 20 queries"
    assert found["degradations"]["jpeg-85"]["clean"] == {"identification": [1.0] * 3, "rejection_auroc": [1.0] * 3}
    assert found["degradations"]["resize-0.5"] is None, "16 px are too small for the method"


def test_a_constant_method_identifies_nothing_and_rejects_by_chance():
    found = measured(Blind(), coloured_set())
    assert found["values"]["identification"] == [0.0] * 3
    assert found["values"]["verification_auc"] == found["values"]["rejection_auroc"] == [0.5] * 3
    assert found["values"]["oscr"] == found["values"]["true_positive_rate"] == [0.0] * 3
    assert np.shape(found["clusters"]) == (1, 3)


def loop_scores(gallery, vectors, split, known=(0, 1, 2)):
    means = [gallery[split.references[g]].mean(axis=0) for g in known]
    return vectors[split.queries] @ np.stack([mean / np.linalg.norm(mean) for mean in means]).T


def loop_identification(generators, gallery, vectors, num_references=6) -> list[float]:
    shares = []
    for split in divisions(generators, num_references, seed=0):
        right = loop_scores(gallery, vectors, split).argmax(axis=1) == split.truth
        shares.append([right[split.truth == g].mean() for g in range(3)])
    return np.mean(shares, axis=0).tolist()


def loop_rejection(generators, gallery, vectors) -> tuple[list[float], list[float]]:
    """AUROC and OSCR of each generator without its references."""
    found = []
    for split in divisions(generators, 6, seed=0):
        for unknown in range(3):
            known = np.array([g for g in range(3) if g != unknown])
            scores = loop_scores(gallery, vectors, split, known)
            is_known = split.truth != unknown
            correct = known[scores.argmax(axis=1)] == split.truth
            pairs = list(itertools.product(np.flatnonzero(is_known), np.flatnonzero(~is_known)))
            above = np.array([scores[k].max() > scores[u].max() for k, u in pairs])
            found.append([above.mean(), (above & correct[[k for k, _ in pairs]]).mean()])
    return tuple(np.array(found).reshape(3, 3, 2).mean(axis=0).T.tolist())


def loop_sets(generators, vectors, size) -> list[float]:
    shares = []
    for split in divisions(generators, 6, seed=0):
        scores = loop_scores(vectors, vectors, split)
        for g in range(3):
            own = scores[split.truth == g]
            sets = [own[start : start + size].mean(axis=0) for start in range(0, len(own) - size + 1, size)]
            shares.append(np.mean([mean.argmax() == g for mean in sets]))
    return np.array(shares).reshape(3, 3).mean(axis=0).tolist()


@pytest.fixture(scope="module")
def noise():
    """(generator set, vectors by degradation, result of evaluate_set)."""
    generators, method = noisy_set(), Noise()
    vectors = {
        name: method.embed([recoded(sample, parse(name)) for sample in generators.samples])
        for name in ("none", "jpeg-85")
    }
    assert not np.isclose(vectors["none"], vectors["jpeg-85"]).all(axis=1).any(), "every image is changed"
    return generators, vectors, measured(method, generators)


def near(values):
    return pytest.approx(values, abs=1e-6)


def test_identification_and_rejection_equal_loops_over_the_divisions(noise):
    generators, vectors, found = noise
    plain = vectors["none"]
    assert found["values"]["identification"] == near(loop_identification(generators, plain, plain))
    assert 0 < np.mean(found["values"]["identification"]) < 1, "neither perfect nor useless"
    rejection, oscr = loop_rejection(generators, plain, plain)
    assert found["values"]["rejection_auroc"] == near(rejection) and found["values"]["oscr"] == near(oscr)
    counts, f1 = np.zeros((3, 3)), []
    for split in divisions(generators, 6, seed=0):
        predicted = loop_scores(plain, plain, split).argmax(axis=1)
        for truth, named in zip(split.truth, predicted):
            counts[truth, named] += 1
        for g in range(3):
            hits = sum((predicted == g) & (split.truth == g))
            f1.append(2 * hits / (sum(predicted == g) + sum(split.truth == g)))
    for row, expected in zip(found["confusion"], counts / 30):
        assert row == near(expected.tolist())
    assert not np.allclose(counts, counts.T), "the test would see rows taken for columns"
    assert found["values"]["f1"] == near(np.reshape(f1, (3, 3)).mean(axis=0).tolist())


def test_verification_is_by_the_cosines_of_original_images(noise):
    """test_generator_measures compares measures.verification with a loop over pairs."""
    generators, vectors, found = noise
    expected = measures.verification(vectors["none"] @ vectors["none"].T, generators.generator, 0.01)
    for name, values in expected.items():
        assert found["values"][name] == near(values), name


def test_degraded_queries_against_clean_and_matched_galleries_equal_loops(noise):
    generators, vectors, found = noise
    galleries = {"clean": vectors["none"], "matched": vectors["jpeg-85"]}
    expected = {kind: loop_identification(generators, rows, vectors["jpeg-85"]) for kind, rows in galleries.items()}
    held = found["degradations"]["jpeg-85"]
    for kind, rows in galleries.items():
        assert held[kind]["identification"] == near(expected[kind])
        assert held[kind]["rejection_auroc"] == near(loop_rejection(generators, rows, vectors["jpeg-85"])[0])
    original = found["values"]["identification"]
    assert len({tuple(values) for values in (*expected.values(), original)}) == 3, "all three differ"
    assert found["degradations"]["none"]["clean"] == found["degradations"]["none"]["matched"]


def test_curves_equal_loops_for_original_and_degraded_images(noise):
    generators, vectors, found = noise
    for name, rows in vectors.items():
        for count in (1, 6):
            assert found["references"][name][str(count)] == near(loop_identification(generators, rows, rows, count))
        for size in (1, 3):
            assert found["sets"][name][str(size)] == near(loop_sets(generators, rows, size))
        assert found["references"][name]["6"] == found["sets"][name]["1"], "a set of one image is an image"
    assert found["references"]["none"]["6"] == found["values"]["identification"]
    assert found["references"]["jpeg-85"]["6"] == found["degradations"]["jpeg-85"]["matched"]["identification"]


@pytest.mark.parametrize("history", [None, "jpeg-50"])
def test_real_and_generated_images_are_degraded_alike(history):
    """Generated images first get the degradation that the real ones had before."""
    plain = noisy_set()
    given = FolderSetSettings(
        judged=True, num_splits=3, uri="/x", generators=plain.names, real="real", real_history=history
    )
    images = {name: [plain.samples[row] for row in plain.rows_of(g)] for g, name in enumerate(plain.names)}
    generators, method = make_set("noise", given, images, plain.real), Noise()
    found = measured(method, generators, real_degradation="jpeg-70")["values"]["real_auroc"]
    samples = (
        generators.samples if history is None else [recoded(sample, parse(history)) for sample in generators.samples]
    )
    generated = method.embed([recoded(sample, parse("jpeg-70")) for sample in samples])
    real = method.embed([recoded(sample, parse("jpeg-70")) for sample in generators.real])
    expected = []
    for split in divisions(generators, 6, seed=0):
        known = loop_scores(generated, generated, split).max(axis=1)
        means = [generated[rows].mean(axis=0) for rows in split.references]
        unknown = (real @ np.stack([mean / np.linalg.norm(mean) for mean in means]).T).max(axis=1)
        expected.append([np.mean([k > u for k in known[split.truth == g] for u in unknown]) for g in range(3)])
    assert found == near(np.mean(expected, axis=0).tolist())


def test_file_formats_reveal_nothing():
    """Generators that differ in their file formats alone cannot be identified, because all images are encoded alike."""
    plain = noisy_set()
    files = {"a": ("JPEG", 900), "b": ("PNG", 3_000), "c": ("WEBP", 500)}
    images = {
        name: [Sample(plain.samples[row].image, *files[name]) for row in plain.rows_of(g)]
        for g, name in enumerate(plain.names)
    }
    values = measured(CodecAndSize(), make_set("files", SetSettings(num_splits=3), images))["values"]
    assert np.mean(values["identification"]) < 0.6 and np.mean(values["rejection_auroc"]) < 0.7
    given = CodecAndSize().embed([sample for samples in images.values() for sample in samples])
    assert measures.verification(given @ given.T, plain.generator, 0.01)["verification_auc"][0] == 1.0, (
        "the original files reveal the generator"
    )


def test_a_pickled_set_is_not_larger_than_its_pixels():
    generators = noisy_set()
    num_bytes = sum(sample.image.numel() for sample in [*generators.samples, *generators.real])
    assert len(pickle.dumps(generators)) < 2 * num_bytes


def test_divisions_use_every_image_once_and_differ():
    generators = coloured_set()
    seen = []
    for split in divisions(generators, 6, seed=0):
        assert [len(rows) for rows in split.references] == [6, 6, 6]
        for g, rows in enumerate(split.references):
            queries = split.queries[split.truth == g]
            assert sorted([*rows, *queries]) == generators.rows_of(g).tolist()
        seen.append(split.queries.tolist())
    assert len({tuple(queries) for queries in seen}) == 3
    assert [q.queries.tolist() for q in divisions(generators, 6, seed=0)] == seen
    assert [q.queries.tolist() for q in divisions(generators, 6, seed=1)] != seen


def test_references_and_queries_never_show_the_same_scene():
    generators = coloured_set(same_content=True)
    for split in divisions(generators, 6, seed=0):
        shown = {row % NUM_IMAGES for rows in split.references for row in rows}
        assert len(shown) == 6 and not shown & {row % NUM_IMAGES for row in split.queries}


def test_families_count_as_one_generator():
    """Red and green are one family, and the method cannot tell them apart."""
    generators = coloured_set(families=("warm", "warm", "cold"))

    class Warm(MeanColour):
        def embed(self, samples):
            return super().embed(samples) @ np.array([[1, 0], [1, 0], [0, 1]], np.float32)

    found = measured(Warm(), generators)
    values = found["values"]
    assert np.mean(values["identification"][:2]) < 0.8
    assert values["family_identification"] == [1.0] * 3
    assert max(values["rejection_auroc"][:2]) < 0.9, "its twin is still registered"
    assert values["family_rejection_auroc"] == pytest.approx([1.0] * 3, abs=1e-6)
    assert values["family_rejection_auroc"][2] == values["rejection_auroc"][2]
    for gallery in ("clean", "matched"):
        held = found["degradations"]["jpeg-85"][gallery]
        assert held["family_identification"] == [1.0] * 3 and max(held["identification"][:2]) < 0.9


def test_judged_sets_have_the_whole_grid_and_others_the_loss_degradation():
    found = measured(MeanColour(), coloured_set(judged=False, real=False))
    assert list(found["degradations"]) == ["jpeg-85"] and found["degradations"]["jpeg-85"]["matched"]
    grid = measured(MeanColour(), coloured_set(real=False), degradations=["none", "blur-1"])["degradations"]
    assert list(grid) == ["none", "blur-1", "jpeg-85"]
    assert "real_auroc" not in measured(MeanColour(), coloured_set(real=False))["values"]


def test_images_that_cannot_be_measured_are_an_error():
    with pytest.raises(AttribError, match=r"red of generator set 'colours' has 10 images.*lower num_references"):
        measured(MeanColour(), coloured_set(num_images=10))

    class Broken(MeanColour):
        def embed(self, samples):
            return np.full((len(samples), 2), np.nan, np.float32)

    with pytest.raises(AttribError, match="not finite on generator set 'colours'"):
        measured(Broken(), coloured_set())

    class Large(MeanColour):
        min_side_px = 64

    with pytest.raises(AttribError, match="below the 64 px that mean-colour needs"):
        measured(Large(), coloured_set())


def test_vectors_are_computed_once_for_methods_that_embed_alike():
    calls = []

    class Counted(MeanColour):
        def embed(self, samples):
            calls.append(len(samples))
            return super().embed(samples)

    embedded = Embedded(Counted(), coloured_set())
    for _ in range(2):
        evaluate_set(embedded.method, embedded, 0.9, settings())
    assert sum(calls) == 2 * 3 * NUM_IMAGES + 8, "original and JPEG once each, the real images once"


@pytest.mark.parametrize("scoring", ["adapted", "logistic"])
def test_vectors_of_another_scoring_give_the_same_values_as_own_ones(scoring):
    generators, shared = noisy_set(), Embedded(Noise(), noisy_set())
    method = with_scoring(Noise(), scoring)
    found = evaluate_set(method, shared, 0.9, settings())
    assert json.dumps(found) == json.dumps(measured(method, generators))
    assert found["values"]["real_auroc"] != evaluate_set(Noise(), shared, 0.9, settings())["values"]["real_auroc"]


def test_the_cut_separates_generators():
    assert 0.3 < cluster_cut(Embedded(MeanColour(), coloured_set())) < 1.0
