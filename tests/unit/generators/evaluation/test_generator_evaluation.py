"""The evaluation of fingerprint methods: measures against methods of which every answer is known and against loops over the definitions."""

import itertools
import pickle

import numpy as np
import pytest
from support.evaluation import NUM_IMAGES, Blind, MeanColour, Noise, coloured_tier, noisy_tier, settings

from attrib.common.errors import AttribError
from attrib.generators.evaluation import measures
from attrib.generators.evaluation.controls import CodecAndSize
from attrib.generators.evaluation.generator_sets import divisions, make_tier
from attrib.generators.evaluation.protocol import Embedded, cluster_cut, evaluate_tier
from attrib.generators.evaluation.settings import FolderTierSettings, TierSettings
from attrib.generators.signals.degradations import parse
from attrib.generators.signals.samples import Sample, recoded

pytestmark = pytest.mark.usefixtures("one_thread")


def measured(method, tier, cut=0.9, **changes) -> dict:
    return evaluate_tier(method, Embedded(method, tier), cut, settings(**changes))


def test_a_method_that_knows_has_everything_right():
    found = measured(MeanColour(), coloured_tier())
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


def test_a_blind_method_identifies_nothing_and_rejects_by_chance():
    found = measured(Blind(), coloured_tier())
    assert found["values"]["identification"] == [0.0] * 3
    assert found["values"]["verification_auc"] == found["values"]["rejection_auroc"] == [0.5] * 3
    assert found["values"]["oscr"] == found["values"]["true_positive_rate"] == [0.0] * 3
    assert np.shape(found["clusters"]) == (1, 3)


def loop_scores(gallery, vectors, question, known=(0, 1, 2)):
    means = [gallery[question.references[g]].mean(axis=0) for g in known]
    return vectors[question.queries] @ np.stack([mean / np.linalg.norm(mean) for mean in means]).T


def loop_identification(tier, gallery, vectors, num_references=6) -> list[float]:
    shares = []
    for question in divisions(tier, num_references, seed=0):
        right = loop_scores(gallery, vectors, question).argmax(axis=1) == question.truth
        shares.append([right[question.truth == g].mean() for g in range(3)])
    return np.mean(shares, axis=0).tolist()


def loop_rejection(tier, gallery, vectors) -> tuple[list[float], list[float]]:
    """AUROC and OSCR of each generator without its references."""
    found = []
    for question in divisions(tier, 6, seed=0):
        for unknown in range(3):
            known = np.array([g for g in range(3) if g != unknown])
            scores = loop_scores(gallery, vectors, question, known)
            is_known = question.truth != unknown
            correct = known[scores.argmax(axis=1)] == question.truth
            pairs = list(itertools.product(np.flatnonzero(is_known), np.flatnonzero(~is_known)))
            above = np.array([scores[k].max() > scores[u].max() for k, u in pairs])
            found.append([above.mean(), (above & correct[[k for k, _ in pairs]]).mean()])
    return tuple(np.array(found).reshape(3, 3, 2).mean(axis=0).T.tolist())


def loop_sets(tier, vectors, size) -> list[float]:
    shares = []
    for question in divisions(tier, 6, seed=0):
        scores = loop_scores(vectors, vectors, question)
        for g in range(3):
            own = scores[question.truth == g]
            sets = [own[start : start + size].mean(axis=0) for start in range(0, len(own) - size + 1, size)]
            shares.append(np.mean([mean.argmax() == g for mean in sets]))
    return np.array(shares).reshape(3, 3).mean(axis=0).tolist()


@pytest.fixture(scope="module")
def noise():
    """(tier, vectors by degradation, what evaluate_tier found)."""
    tier, method = noisy_tier(), Noise()
    vectors = {
        name: method.embed([recoded(sample, parse(name)) for sample in tier.samples]) for name in ("none", "jpeg-85")
    }
    assert not np.isclose(vectors["none"], vectors["jpeg-85"]).all(axis=1).any(), "every image is changed"
    return tier, vectors, measured(method, tier)


def near(values):
    return pytest.approx(values, abs=1e-6)


def test_measures_are_those_of_loops_over_the_divisions(noise):
    tier, vectors, found = noise
    plain = vectors["none"]
    assert found["values"]["identification"] == near(loop_identification(tier, plain, plain))
    assert 0 < np.mean(found["values"]["identification"]) < 1, "the test asks something"
    rejection, oscr = loop_rejection(tier, plain, plain)
    assert found["values"]["rejection_auroc"] == near(rejection) and found["values"]["oscr"] == near(oscr)
    counts, f1 = np.zeros((3, 3)), []
    for question in divisions(tier, 6, seed=0):
        predicted = loop_scores(plain, plain, question).argmax(axis=1)
        for truth, named in zip(question.truth, predicted):
            counts[truth, named] += 1
        for g in range(3):
            hits = sum((predicted == g) & (question.truth == g))
            f1.append(2 * hits / (sum(predicted == g) + sum(question.truth == g)))
    for row, expected in zip(found["confusion"], counts / 30):
        assert row == near(expected.tolist())
    assert not np.allclose(counts, counts.T), "the test would see rows taken for columns"
    assert found["values"]["f1"] == near(np.reshape(f1, (3, 3)).mean(axis=0).tolist())


def test_verification_is_that_of_a_loop_over_pairs(noise):
    tier, vectors, found = noise
    cosine = vectors["none"] @ vectors["none"].T
    pairs = list(itertools.combinations(range(3 * NUM_IMAGES), 2))
    for g in range(3):
        within = [cosine[i, j] for i, j in pairs if tier.generator[i] == tier.generator[j] == g]
        across = [cosine[i, j] for i, j in pairs if (tier.generator[i] == g) != (tier.generator[j] == g)]
        others = [
            cosine[i, j]
            for i, j in pairs
            if g not in (tier.generator[i], tier.generator[j]) and tier.generator[i] != tier.generator[j]
        ]
        threshold = sorted(others)[-1 - len(others) // 100]
        assert found["values"]["verification_auc"][g] == near(np.mean([w > a for w in within for a in across]))
        assert found["values"]["true_positive_rate"][g] == near(np.mean(within > threshold))
        assert found["values"]["false_positive_rate"][g] == near(np.mean(across > threshold))


def test_degraded_queries_are_asked_of_either_gallery(noise):
    tier, vectors, found = noise
    galleries = {"clean": vectors["none"], "matched": vectors["jpeg-85"]}
    expected = {kind: loop_identification(tier, rows, vectors["jpeg-85"]) for kind, rows in galleries.items()}
    held = found["degradations"]["jpeg-85"]
    for kind, rows in galleries.items():
        assert held[kind]["identification"] == near(expected[kind])
        assert held[kind]["rejection_auroc"] == near(loop_rejection(tier, rows, vectors["jpeg-85"])[0])
    untouched = found["values"]["identification"]
    assert len({tuple(values) for values in (*expected.values(), untouched)}) == 3, "the test can tell them apart"
    assert found["degradations"]["none"]["clean"] == found["degradations"]["none"]["matched"]


def test_curves_are_those_of_loops_untouched_and_degraded(noise):
    tier, vectors, found = noise
    for name, rows in vectors.items():
        for count in (1, 6):
            assert found["references"][name][str(count)] == near(loop_identification(tier, rows, rows, count))
        for size in (1, 3):
            assert found["sets"][name][str(size)] == near(loop_sets(tier, rows, size))
        assert found["references"][name]["6"] == found["sets"][name]["1"], "a set of one image is an image"
    assert found["references"]["none"]["6"] == found["values"]["identification"]
    assert found["references"]["jpeg-85"]["6"] == found["degradations"]["jpeg-85"]["matched"]["identification"]


@pytest.mark.parametrize("history", [None, "jpeg-50"])
def test_real_images_are_degraded_as_the_others(history):
    """And generated ones first go through what the real ones went through before they came."""
    plain = noisy_tier()
    given = FolderTierSettings(
        judged=True, num_splits=3, uri="/x", generators=plain.names, real="real", real_history=history
    )
    images = {name: [plain.samples[row] for row in plain.rows_of(g)] for g, name in enumerate(plain.names)}
    tier, method = make_tier("noise", given, images, plain.real), Noise()
    found = measured(method, tier, real_degradation="jpeg-70")["values"]["real_auroc"]
    samples = tier.samples if history is None else [recoded(sample, parse(history)) for sample in tier.samples]
    generated = method.embed([recoded(sample, parse("jpeg-70")) for sample in samples])
    real = method.embed([recoded(sample, parse("jpeg-70")) for sample in tier.real])
    expected = []
    for question in divisions(tier, 6, seed=0):
        known = loop_scores(generated, generated, question).max(axis=1)
        means = [generated[rows].mean(axis=0) for rows in question.references]
        unknown = (real @ np.stack([mean / np.linalg.norm(mean) for mean in means]).T).max(axis=1)
        expected.append([np.mean([k > u for k in known[question.truth == g] for u in unknown]) for g in range(3)])
    assert found == near(np.mean(expected, axis=0).tolist())


def test_the_format_of_the_files_tells_nothing():
    """The generators differ in nothing but what their files were: encoded alike, codec and size know none of them."""
    plain = noisy_tier()
    files = {"a": ("JPEG", 900), "b": ("PNG", 3_000), "c": ("WEBP", 500)}
    images = {
        name: [Sample(plain.samples[row].image, *files[name]) for row in plain.rows_of(g)]
        for g, name in enumerate(plain.names)
    }
    values = measured(CodecAndSize(), make_tier("files", TierSettings(num_splits=3), images))["values"]
    assert np.mean(values["identification"]) < 0.6 and np.mean(values["rejection_auroc"]) < 0.7
    given = CodecAndSize().embed([sample for samples in images.values() for sample in samples])
    assert measures.auc(*measures.pair_scores(given @ given.T, plain.generator, 0)) == 1.0, "as files they are known"


def test_a_tier_travels_as_its_pixels():
    tier = noisy_tier()
    num_bytes = sum(sample.image.numel() for sample in [*tier.samples, *tier.real])
    assert len(pickle.dumps(tier)) < 2 * num_bytes


def test_divisions_use_every_image_once_and_differ():
    tier = coloured_tier()
    seen = []
    for question in divisions(tier, 6, seed=0):
        assert [len(rows) for rows in question.references] == [6, 6, 6]
        for g, rows in enumerate(question.references):
            queries = question.queries[question.truth == g]
            assert sorted([*rows, *queries]) == tier.rows_of(g).tolist()
        seen.append(question.queries.tolist())
    assert len({tuple(queries) for queries in seen}) == 3
    assert [q.queries.tolist() for q in divisions(tier, 6, seed=0)] == seen
    assert [q.queries.tolist() for q in divisions(tier, 6, seed=1)] != seen


def test_the_same_pictures_are_never_on_both_sides():
    tier = coloured_tier(same_content=True)
    for question in divisions(tier, 6, seed=0):
        shown = {row % NUM_IMAGES for rows in question.references for row in rows}
        assert len(shown) == 6 and not shown & {row % NUM_IMAGES for row in question.queries}


def test_a_twin_counts_for_the_family_and_is_taken_away_with_it():
    """Red and green become one family whose members a method cannot tell apart."""
    tier = coloured_tier(families=("warm", "warm", "cold"))

    class Warm(MeanColour):
        def embed(self, samples):
            return super().embed(samples) @ np.array([[1, 0], [1, 0], [0, 1]], np.float32)

    found = measured(Warm(), tier)
    values = found["values"]
    assert np.mean(values["identification"][:2]) < 0.8
    assert values["family_identification"] == [1.0] * 3
    assert max(values["rejection_auroc"][:2]) < 0.9, "its twin is still registered"
    assert values["family_rejection_auroc"] == pytest.approx([1.0] * 3, abs=1e-6)
    assert values["family_rejection_auroc"][2] == values["rejection_auroc"][2]
    for gallery in ("clean", "matched"):
        held = found["degradations"]["jpeg-85"][gallery]
        assert held["family_identification"] == [1.0] * 3 and max(held["identification"][:2]) < 0.9


def test_judged_tiers_go_through_the_grid_and_others_through_what_the_loss_is_of():
    found = measured(MeanColour(), coloured_tier(judged=False, real=False))
    assert list(found["degradations"]) == ["jpeg-85"] and found["degradations"]["jpeg-85"]["matched"]
    grid = measured(MeanColour(), coloured_tier(real=False), degradations=["none", "blur-1"])["degradations"]
    assert list(grid) == ["none", "blur-1", "jpeg-85"]
    assert "real_auroc" not in measured(MeanColour(), coloured_tier(real=False))["values"]


def test_what_cannot_be_measured_is_an_error_with_a_remedy():
    with pytest.raises(AttribError, match=r"red of tier 'colours' has 10 images.*lower num_references"):
        measured(MeanColour(), coloured_tier(num_images=10))

    class Broken(MeanColour):
        def embed(self, samples):
            return np.full((len(samples), 2), np.nan, np.float32)

    with pytest.raises(AttribError, match="not finite on tier 'colours'"):
        measured(Broken(), coloured_tier())

    class Large(MeanColour):
        min_side_px = 64

    with pytest.raises(AttribError, match="below the 64 px that mean-colour needs"):
        measured(Large(), coloured_tier())


def test_vectors_are_made_once_for_methods_that_embed_alike():
    calls = []

    class Counted(MeanColour):
        def embed(self, samples):
            calls.append(len(samples))
            return super().embed(samples)

    embedded = Embedded(Counted(), coloured_tier())
    for _ in range(2):
        evaluate_tier(embedded.method, embedded, 0.9, settings())
    assert sum(calls) == 2 * 3 * NUM_IMAGES + 8, "untouched and JPEG once each, the real images once"


def test_the_cut_separates_generators_of_another_tier():
    assert 0.3 < cluster_cut(Embedded(MeanColour(), coloured_tier())) < 1.0
