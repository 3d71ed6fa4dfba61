"""The evaluation against methods of which every answer is known, loops over its definitions, and the job on a small pool."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from samples import pictures, write_folder
from tiny_pool import SPEC, smooth_images, traced, write_tiny_pool

from attrib.errors import AttribError
from attrib.generators import degradations, measures
from attrib.generators.evaluation import Embedded, cluster_cut, divisions, evaluate_tier
from attrib.generators.evaluation_charts import Steps, step_chart
from attrib.generators.evaluation_page import render_page
from attrib.generators.evaluation_settings import (
    GRID_NAMES,
    TRAINED_TIER,
    EvaluateGeneratorsSettings,
    FolderTierSettings,
    PoolTierSettings,
    TierSettings,
)
from attrib.generators.evaluation_summary import choose, format_table, summarise
from attrib.generators.methods import Method
from attrib.generators.pool import open_pool
from attrib.generators.tiers import as_samples, folder_tier, make_tier, pool_tier, tuning_tier
from attrib.storage import Storage, join

pytestmark = pytest.mark.usefixtures("one_thread")
PX, NUM_IMAGES = 32, 16


class MeanColour(Method):
    """The direction of an image's mean colour, which neither re-encoding nor cropping changes much."""

    name = digest = "mean-colour"
    min_side_px = 20

    def embed(self, samples):
        colours = np.stack([sample.image.float().mean(dim=(1, 2)).numpy() for sample in samples])
        return (colours / np.linalg.norm(colours, axis=1, keepdims=True)).astype(np.float32)


class Blind(Method):
    name = digest = "blind"

    def embed(self, samples):
        return np.ones((len(samples), 1), np.float32)


class Noise(Method):
    """A vector by the pixels' hash: neither perfect nor blind, so that every measure has something to count."""

    name = digest = "noise"

    def embed(self, samples):
        seeds = [int(sample.image.long().sum()) for sample in samples]
        rows = np.stack([np.random.default_rng(seed).standard_normal(4) for seed in seeds]) + [1, 0, 0, 0]
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def settings(**changes) -> EvaluateGeneratorsSettings:
    values = {
        "output": "/out",
        "pool": "/pool",
        "pools": {"unseen": {"uri": "/unseen"}},
        "num_references": 6,
        "reference_counts": [1, 6, 50],
        "set_sizes": [1, 3, 20],
        "degradations": ["none", "jpeg-85", "resize-0.5"],
    }
    return EvaluateGeneratorsSettings.model_validate(values | changes)


def coloured_tier(families=None, judged=True, num_images=NUM_IMAGES, real=True, **options):
    """Three generators, each of one colour in different brightness; real images are white."""
    rng = np.random.default_rng(0)
    images = {}
    for name, colour in (("red", (200, 30, 30)), ("green", (30, 200, 30)), ("blue", (30, 30, 200))):
        light = rng.uniform(0.7, 1.2, num_images)
        pixels = (np.array(colour)[None, :] * light[:, None]).astype(np.uint8)
        images[name] = as_samples(torch.from_numpy(pixels)[:, :, None, None].expand(-1, -1, PX, PX).contiguous())
    white = as_samples(torch.full((8, 3, PX, PX), 230, dtype=torch.uint8)) if real else ()
    tier = TierSettings(judged=judged, num_splits=3)
    return make_tier("colours", tier, images, white, families, **options)


def measured(method, tier, cut=0.9, **changes) -> dict:
    return evaluate_tier(method, Embedded(method, tier), cut, settings(**changes))


def test_a_method_that_knows_has_everything_right():
    found = measured(MeanColour(), coloured_tier())
    assert max(found["values"].pop("false_positive_rate")) < 0.05
    for name, values in found["values"].items():
        assert values == pytest.approx([1.0] * 3), name
    assert found["confusion"] == np.eye(3).tolist()
    assert sorted(found["clusters"]) == sorted((NUM_IMAGES * np.eye(3, dtype=int)).tolist())
    assert found["references"] == {"1": [1.0] * 3, "6": [1.0] * 3}, "50 references leave no queries"
    assert found["sets"] == {"1": [1.0] * 3, "3": [1.0] * 3}, "no generator has 20 queries"
    assert found["degradations"]["jpeg-85"]["clean"] == {"identification": [1.0] * 3, "rejection_auroc": [1.0] * 3}
    assert found["degradations"]["resize-0.5"] is None, "16 px are too small for the method"


def test_a_blind_method_identifies_nothing_and_rejects_by_chance():
    found = measured(Blind(), coloured_tier())
    assert found["values"]["identification"] == [0.0] * 3
    assert found["values"]["verification_auc"] == found["values"]["rejection_auroc"] == [0.5] * 3
    assert found["values"]["oscr"] == found["values"]["true_positive_rate"] == [0.0] * 3
    assert np.shape(found["clusters"]) == (1, 3)


def test_measures_are_those_of_loops_over_the_divisions():
    tier, method = coloured_tier(), Noise()
    vectors = method.embed(tier.samples)
    found = measured(method, tier)["values"]
    identified, rejection, oscr = np.zeros((3, 3)), np.zeros((3, 3)), np.zeros((3, 3))
    for number, question in enumerate(divisions(tier, 6, seed=0)):
        means = [vectors[rows].mean(axis=0) for rows in question.references]
        means = np.stack([mean / np.linalg.norm(mean) for mean in means])
        scores = vectors[question.queries] @ means.T
        right = scores.argmax(axis=1) == question.truth
        identified[number] = [right[question.truth == g].mean() for g in range(3)]
        for unknown in range(3):
            known = [g for g in range(3) if g != unknown]
            is_known = question.truth != unknown
            others = scores[:, known]
            correct = np.array(known)[others.argmax(axis=1)] == question.truth
            highest = others.max(axis=1)
            rejection[number, unknown] = measures.auc(highest[is_known], highest[~is_known])
            oscr[number, unknown] = measures.oscr(highest[is_known], correct[is_known], highest[~is_known])
    assert found["identification"] == pytest.approx(identified.mean(axis=0).tolist(), abs=1e-6)
    assert 0 < np.mean(found["identification"]) < 1, "the test asks something"
    assert found["rejection_auroc"] == pytest.approx(rejection.mean(axis=0).tolist(), abs=1e-6)
    assert found["oscr"] == pytest.approx(oscr.mean(axis=0).tolist(), abs=1e-6)


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

    values = measured(Warm(), tier)["values"]
    assert np.mean(values["identification"][:2]) < 0.8
    assert values["family_identification"] == [1.0] * 3
    assert max(values["rejection_auroc"][:2]) < 0.9, "its twin is still registered"
    assert values["family_rejection_auroc"] == pytest.approx([1.0] * 3, abs=1e-6)
    assert values["family_rejection_auroc"][2] == values["rejection_auroc"][2]


def test_only_judged_tiers_go_through_the_grid():
    assert measured(MeanColour(), coloured_tier(judged=False, real=False))["degradations"] == {}
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


# What is shipped, and the page.


def tiers_of(values: dict[str, dict[str, tuple[float, float]]], judged=("first", "second")) -> dict:
    """{tier: {method: (identification, rejection)}} as the job has it, each value the same for three generators."""
    return {
        tier: {
            "generators": ["a", "b", "c"],
            "families": ["a", "b", "c"],
            "judged": tier in judged,
            "note": "<i>what to know</i>",
            "same_content": False,
            "num_images": 48,
            "num_real": 8,
            "formats": {"generated": "PNG", "real": "JPEG"},
            "methods": {
                method: {
                    "values": {
                        "identification": [identification] * 3,
                        "rejection_auroc": [rejection] * 3,
                        "real_auroc": None,
                    },
                    "confusion": np.eye(3).tolist(),
                    "clusters": [[8, 0, 0], [0, 8, 8]],
                    "references": {"1": [identification / 2] * 3, "10": [identification] * 3},
                    "sets": {"1": [identification] * 3},
                    "degradations": {
                        "jpeg-85": {
                            kind: {"identification": [identification - 0.05] * 3, "rejection_auroc": [0.6] * 3}
                            for kind in ("clean", "matched")
                        },
                        "resize-0.5": None,
                    },
                }
                for method, (identification, rejection) in methods.items()
            },
        }
        for tier, methods in values.items()
    }


LOOKS = {"extractor": True, "lda": True, "spectrum": True, "content-only": False}


def chosen(values, looks=LOOKS, **options):
    return choose(tiers_of(values, **options), looks)


def test_the_extractor_is_shipped_if_it_beats_every_trace_based_control_everywhere():
    winning = {"extractor": (0.9, 0.8), "lda": (0.8, 0.7), "spectrum": (0.85, 0.75), "content-only": (1.0, 1.0)}
    found = chosen({"first": winning, "second": winning})
    assert found["method"] == "extractor" and "beats every control" in found["reason"]
    assert [row["loss"]["mean"] for row in found["losses"]] == pytest.approx([0.05, 0.05])
    versus = {(row["tier"], row["value"], row["versus"]): row["mean"] for row in found["comparisons"]}
    assert versus["first", "identification", "lda"] == pytest.approx(0.1)
    assert len(versus) == 2 * 2 * 2, "the leak control is no rival"


@pytest.mark.parametrize("place", ["first", "second"])
@pytest.mark.parametrize("value", [0, 1])
def test_a_tie_anywhere_ships_the_best_mean(place, value):
    winning = {"extractor": (0.9, 0.8), "lda": (0.6, 0.7), "spectrum": (0.5, 0.5), "content-only": (1.0, 1.0)}
    values = {"first": dict(winning), "second": dict(winning)}
    equal = list(winning["lda"])
    equal[value] = winning["extractor"][value]
    values[place]["lda"] = tuple(equal)
    found = chosen(values)
    assert found["method"] == "extractor", "it still has the highest mean"
    assert f"does not beat lda in {('identified', 'rejection AUROC')[value]} on {place}" in found["reason"]


def test_a_control_that_is_better_on_the_whole_is_shipped():
    values = {"extractor": (0.9, 0.8), "lda": (0.95, 0.9), "spectrum": (0.5, 0.5), "content-only": (1.0, 1.0)}
    assert chosen({"first": values, "second": values})["method"] == "lda"
    assert chosen({"first": values, "second": values}, {**LOOKS, "lda": False})["method"] == "extractor"


def test_tiers_that_are_not_judged_decide_nothing():
    good = {"extractor": (0.9, 0.9), "lda": (0.5, 0.5), "spectrum": (0.5, 0.5), "content-only": (0.5, 0.5)}
    bad = {"extractor": (0.1, 0.1), "lda": (0.9, 0.9), "spectrum": (0.5, 0.5), "content-only": (0.5, 0.5)}
    found = chosen({"first": good, "second": bad}, judged=("first",))
    assert found["method"] == "extractor" and {row["tier"] for row in found["comparisons"]} == {"first"}
    assert chosen({"first": good}, judged=()) is None


def test_without_an_extractor_the_best_control_is_shipped():
    found = chosen({"first": {"lda": (0.7, 0.7), "content-only": (1, 1)}}, {"lda": True, "content-only": False})
    assert found["method"] == "lda" and "extractor" not in found["reason"]


def test_table_and_page_hold_every_method_and_say_what_is_shipped():
    values = {"extractor": (0.9, 0.8), "lda": (0.8, 0.7), "spectrum": (0.85, 0.75), "<b>content</b>": (0.4, 0.5)}
    looks = {name: not name.startswith("<") for name in values}
    summary = summarise(tiers_of({"colours": values}, judged=("colours",)), looks)
    table = format_table(summary)
    assert "shipped: extractor: it beats every control" in table
    assert "0.900 (.90-.90)" in table and "leak control" in table and "less than 0.10" in table
    assert "real AUROC" not in table, "no method has it"
    record = {"settings": settings().model_dump(mode="json"), "versions": {"python": "3"}}
    page = render_page(summary, [coloured_tier()], "Which <one>", record)
    assert "Shipped: extractor" in page and "Which &lt;one&gt;" in page and "&lt;b&gt;content&lt;/b&gt;" in page
    assert "<b>content</b>" not in page and "<i>what to know" not in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page), "nothing is fetched"
    assert page.count("data:image/png;base64,") == 3, "a strip of each generator"
    assert json.loads(json.dumps(summary)) == summary


def test_a_line_is_cut_where_nothing_was_measured():
    chart = step_chart([Steps("steps", ["a", "b", "c", "d"], {"one": [0.1, None, 0.3, 0.4]}, chance=0.2)])
    assert chart.count("<polyline") == 2 and chart.count("<circle") == 3
    assert 'stroke-dasharray="4 4"' in chart


# Tiers and settings.


def test_settings_know_the_grid_and_refuse_what_cannot_be():
    assert GRID_NAMES == tuple(degradation.name for degradation in degradations.GRID)
    photographs = {"name": "p", "uri": "/p"}
    for changes, message in (
        ({"pools": {}}, "nothing to evaluate on"),
        ({"pools": {"a/b": {"uri": "/x"}}}, "names files"),
        ({"folders": {"unseen": {"uri": "/x", "generators": ["a", "b", "c"]}}}, "share a name"),
        ({"pools": {TRAINED_TIER: {"uri": "/x"}}}, "share a name"),
        ({"trained": {"photographs": photographs, "kinds": ["vae"], "seeds": [0, 1]}}, "fewer than three"),
        ({"trained": {"photographs": photographs, "seeds": [1, 1]}}, "names a value twice"),
        ({"trained": {"photographs": photographs, "photograph_px": 16}}, "is below px 32"),
    ):
        with pytest.raises(ValueError, match=message):
            settings(**changes)


def rewrite_specs(uri: str, storage: Storage, changes: list[dict]) -> None:
    record = storage.read_json(join(uri, "pool.json"))
    for model, change in zip(record["models"], changes):
        model["spec"] = SPEC.model_copy(update=change).model_dump(mode="json")
    storage.write_json(join(uri, "pool.json"), record)


def test_a_pool_tier_holds_only_what_the_training_pool_does_not(tmp_path, local):
    training, other = str(tmp_path / "training"), str(tmp_path / "other")
    write_tiny_pool(training, local, num_models=2, num_images=4, px=16)
    write_tiny_pool(other, local, num_models=6, num_images=4, px=16)
    tanh = {"activation": "tanh"}
    bilinear = [{"upsampler": "bilinear", "norm": norm} for norm in ("none", "batch", "group")]
    rewrite_specs(other, local, [{}, tanh, tanh, *bilinear])
    pool = open_pool(training, local)
    tier = pool_tier("unseen", PoolTierSettings(uri=other, max_images=3), pool, local)
    assert tier.names == ("m001", "m002", "m003", "m004", "m005")
    assert tier.has_families and tier.family_numbers[0] == tier.family_numbers[1]
    assert tier.same_content and len(tier.samples) == 15 and len(tier.real) == 3
    expected = open_pool(other, local).samples("m003", local)[:3]
    assert torch.equal(torch.stack([tier.samples[row].image for row in tier.rows_of(2)]), expected)
    by_upsampler = PoolTierSettings(uri=other, unseen="upsamplers")
    assert pool_tier("unseen", by_upsampler, pool, local).names == ("m003", "m004", "m005")
    few = PoolTierSettings(uri=other, max_models=3)
    assert pool_tier("unseen", few, pool, local).names == ("m001", "m003", "m005")
    with pytest.raises(AttribError, match="holds 0 models with architectures"):
        pool_tier("unseen", PoolTierSettings(uri=training), pool, local)


def test_thresholds_come_from_different_pictures_of_the_training_pool(tmp_path, local):
    write_tiny_pool(str(tmp_path), local, num_models=3, num_images=30, px=16)
    pool = open_pool(str(tmp_path), local)
    tier = tuning_tier(pool, local)
    assert tier.names == ("m000", "m001", "m002") and len(tier.samples) == 30
    assert torch.equal(tier.samples[10].image, pool.samples("m001", local)[10])


def test_a_folder_tier_reads_images_as_they_are(tmp_path, local):
    for generator in ("a", "b", "c"):
        write_folder(pictures([f"{i}.png" for i in range(4)]), str(tmp_path / generator), local)
    write_folder(pictures(["0.jpg", "notes.jpg"]), str(tmp_path / "real"), local)
    given = FolderTierSettings(uri=str(tmp_path), generators=("a", "b", "c"), real="real", max_images=3)
    tier = folder_tier("folders", given, 1.0, local)
    assert [len(tier.rows_of(g)) for g in range(3)] == [3, 3, 3] and len(tier.real) == 2
    assert tier.samples[0].codec == "PNG" and tier.real[0].codec == "JPEG" and tier.families == ("a", "b", "c")
    before = tier.digest()
    assert folder_tier("folders", given, 1.0, local).digest() == before
    write_folder({"0.png": pictures(["x.png", "y.png"])["y.png"]}, str(tmp_path / "a"), local)
    assert folder_tier("folders", given, 1.0, local).digest() != before
    (tmp_path / "b" / "1.png").write_bytes(b"no picture")
    with pytest.raises(AttribError, match=r"b/1\.png cannot be evaluated on .* remove it"):
        folder_tier("folders", given, 1.0, local)
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(AttribError, match="holds no image"):
        folder_tier("folders", given, 1.0, local)


# The job.


@pytest.fixture(scope="module")
def job_settings(tmp_path_factory) -> EvaluateGeneratorsSettings:
    from attrib.settings import StorageSettings

    folder, storage = tmp_path_factory.mktemp("evaluate"), Storage(StorageSettings())
    for name, seed in (("pool", 0), ("unseen", 1)):
        write_tiny_pool(str(folder / name), storage, num_models=4, num_images=12, px=PX, seed=seed)
    upsamplers = ("bilinear", "transposed", "bicubic", "pixel_shuffle")
    rewrite_specs(str(folder / "unseen"), storage, [{"upsampler": name} for name in upsamplers])
    for number, generator in enumerate(("a", "b", "c")):
        images = traced(smooth_images(12, PX, seed=number), seed=50 + number)
        (folder / "published" / generator).mkdir(parents=True)
        for i, image in enumerate(images):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / "published" / generator / f"{i:02}.png")
    write_folder(pictures([f"{i:02}.png" for i in range(30)]), str(folder / "photographs"), storage)
    return EvaluateGeneratorsSettings.model_validate(
        {
            "output": str(folder / "out"),
            "pool": str(folder / "pool"),
            "methods": {"spectrum": {"patch_px": 16}},
            "trained": {
                "photographs": {"name": "photographs", "uri": str(folder / "photographs")},
                "num_training_photographs": 12,
                "photograph_px": 40,
                "px": PX,
                "width": 8,
                "batch_size": 4,
                "num_steps": {"dcgan": 2, "vae": 2, "diffusion": 2},
                "max_images": 12,
                "num_splits": 2,
            },
            "folders": {
                "published": {"uri": str(folder / "published"), "generators": ["a", "b", "c"], "num_splits": 2}
            },
            "pools": {"unseen": {"uri": str(folder / "unseen"), "num_splits": 2}},
            "num_references": 5,
            "degradations": ["none", "jpeg-85"],
        }
    )


@pytest.fixture(scope="module")
def evaluated(local_ray, job_settings) -> dict:
    from attrib.distributed.generators import evaluate

    return evaluate.run(job_settings)


def test_the_job_measures_every_method_on_every_tier(evaluated, job_settings):
    assert list(evaluated["tiers"]) == [TRAINED_TIER, "published", "unseen"]
    methods = list(evaluated["looks_at_trace"])
    assert {"content-only", "codec-and-size"} <= set(methods) and len(methods) >= 4
    for tier in evaluated["tiers"].values():
        assert list(tier["methods"]) == methods
    assert evaluated["shipped"]["method"] in [m for m in methods if evaluated["looks_at_trace"][m]]
    assert evaluated["tiers"][TRAINED_TIER]["families"] == ["dcgan", "dcgan", "vae", "vae", "diffusion", "diffusion"]
    assert "Shipped: " in Path(job_settings.output, "evaluation.html").read_text(encoding="utf-8")
    assert Path(job_settings.output, "table.txt").read_text(encoding="utf-8").strip() == evaluated["table"]


def test_nothing_in_the_same_files_gives_the_generator_away(evaluated):
    """All are written as PNG of one size before they are compared; what is left are the bytes of the content."""
    unseen = evaluated["tiers"]["unseen"]["methods"]
    assert unseen["content-only"]["values"]["identification"]["mean"] < 0.7


def test_a_second_run_finds_the_first_and_a_broken_one_continues(evaluated, job_settings, local, capsys):
    from attrib.distributed.generators import evaluate

    assert evaluate.run(job_settings) == json.loads(json.dumps(evaluated))
    record = join(job_settings.output, "evaluation.json")
    parts = join(job_settings.output, "_parts")
    kept, *gone = local.names(parts)
    samples = local.read_bytes(join(job_settings.output, "generators", "vae-0.npy"))
    for name in gone[:2]:
        local.delete_file(join(parts, name))
    local.delete_file(join(job_settings.output, "generators", "vae-0.npy"))
    local.delete_file(record)
    again = evaluate.run(job_settings)
    assert local.read_bytes(join(job_settings.output, "generators", "vae-0.npy")) == samples
    assert again["measured"] == evaluated["measured"] and "resuming" in capsys.readouterr().err
    assert kept in local.names(parts)


def test_other_generators_are_not_mixed_into_the_output(evaluated, job_settings, local):
    from attrib.distributed.generators import evaluate

    with pytest.raises(AttribError, match="choose another output"):
        evaluate.run(job_settings.model_copy(update={"num_references": 4}))


def test_an_unknown_degradation_ends_before_any_work(job_settings, tmp_path):
    from attrib.distributed.generators import evaluate

    with pytest.raises(AttribError, match="unknown degradation 'jpg'"):
        evaluate.run(job_settings.model_copy(update={"degradations": ("jpg-85",), "output": str(tmp_path / "new")}))
    assert not (tmp_path / "new").exists()
