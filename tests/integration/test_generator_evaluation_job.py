"""The job that evaluates fingerprint methods: its settings, the tiers that it reads from pools and folders, and whole runs on small ones."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from support.evaluation import PX, settings
from support.images import pictures, write_folder
from support.pool import SPEC, smooth_images, traced, write_tiny_pool

from attrib.common.errors import AttribError
from attrib.common.storage import Storage, join
from attrib.generators.evaluation.generator_sets import folder_tier, pool_tier, tuning_tier
from attrib.generators.evaluation.settings import (
    GRID_NAMES,
    TRAINED_TIER,
    EvaluateGeneratorsSettings,
    FolderTierSettings,
    PoolTierSettings,
)
from attrib.generators.signals import degradations
from attrib.generators.synthesis.pool import PHOTOGRAPHS, open_pool

pytestmark = pytest.mark.usefixtures("one_thread")


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
        ({"folders": {"f": {"uri": "/x", "generators": ["a", "b", "c"], "real_history": "jpeg-75"}}}, "under real"),
        ({"budget": {"max_hours": 1}}, "makes no estimate"),
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
    write_tiny_pool(other, local, num_models=6, num_images=4, px=16, seed=1)
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


def test_the_same_architecture_at_another_width_is_not_unseen(tmp_path, local):
    training, other = str(tmp_path / "training"), str(tmp_path / "other")
    write_tiny_pool(training, local, num_models=2, num_images=4, px=16)
    write_tiny_pool(other, local, num_models=5, num_images=4, px=16, seed=1)
    rewrite_specs(
        other, local, [{"width": SPEC.width + 8}, *({"norm": norm} for norm in ("batch", "group", "instance"))]
    )
    tier = pool_tier("unseen", PoolTierSettings(uri=other), open_pool(training, local), local)
    assert tier.names == ("m001", "m002", "m003")


@pytest.mark.parametrize("px", [16, 32])
def test_pictures_that_the_training_pool_shows_are_refused_in_any_size(tmp_path, local, px):
    training, other = str(tmp_path / "training"), str(tmp_path / "other")
    write_tiny_pool(training, local, num_models=2, num_images=4, px=32)
    write_tiny_pool(other, local, num_models=4, num_images=6, px=px, seed=1)
    rewrite_specs(other, local, [{}, *({"norm": norm} for norm in ("batch", "group", "instance"))])
    pool, asked = open_pool(training, local), PoolTierSettings(uri=other)
    assert len(pool_tier("unseen", asked, pool, local).names) == 3
    shown, own = pool.photographs(local), open_pool(other, local).photographs(local)
    smaller = F.interpolate(shown.float(), size=(px, px), mode="bilinear", antialias=True).round().to(torch.uint8)
    local.write_array(join(other, PHOTOGRAPHS), torch.cat([own[:4], smaller[1:3]]).numpy())
    with pytest.raises(AttribError, match=r"2 of its 6 photographs.*another first_photograph"):
        pool_tier("unseen", asked, pool, local)
    few = asked.model_copy(update={"max_images": 4})
    assert len(pool_tier("unseen", few, pool, local).real) == 4, "only what the tier uses counts"


def test_a_few_pictures_that_the_training_pool_shows_are_left_out(tmp_path, local):
    training, other = str(tmp_path / "training"), str(tmp_path / "other")
    write_tiny_pool(training, local, num_models=2, num_images=4, px=16)
    write_tiny_pool(other, local, num_models=4, num_images=12, px=16, seed=1)
    rewrite_specs(other, local, [{}, *({"norm": norm} for norm in ("batch", "group", "instance"))])
    own = open_pool(other, local).photographs(local)
    own[5] = open_pool(training, local).photographs(local)[2]
    local.write_array(join(other, PHOTOGRAPHS), own.numpy())
    tier = pool_tier("unseen", PoolTierSettings(uri=other), open_pool(training, local), local)
    assert len(tier.real) == 11 and [len(tier.rows_of(g)) for g in range(3)] == [11] * 3
    expected = open_pool(other, local).samples("m002", local)
    assert torch.equal(tier.samples[tier.rows_of(1)[5]].image, expected[6]), "the model's picture of it goes too"


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


@pytest.fixture(scope="module")
def job_settings(tmp_path_factory) -> EvaluateGeneratorsSettings:
    from attrib.common.settings import StorageSettings

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
                "num_splits": 1,  # regressions on six generators that are hardly trained are most of the work
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
    from attrib.generators.evaluation import job as evaluate_job

    return evaluate_job.run(job_settings)


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


def test_a_second_run_finds_the_first_and_a_broken_one_continues(evaluated, job_settings, local, caplog):
    caplog.set_level("INFO")
    from attrib.generators.evaluation import job as evaluate_job

    assert evaluate_job.run(job_settings) == json.loads(json.dumps(evaluated))
    record = join(job_settings.output, "evaluation.json")
    parts = join(job_settings.output, "_parts")
    kept, *gone = local.names(parts)
    samples = local.read_bytes(join(job_settings.output, "generators", "vae-0.npy"))
    for name in gone[:2]:
        local.delete_file(join(parts, name))
    local.delete_file(join(job_settings.output, "generators", "vae-0.npy"))
    local.delete_file(record)
    again = evaluate_job.run(job_settings)
    assert local.read_bytes(join(job_settings.output, "generators", "vae-0.npy")) == samples
    assert again["measured"] == evaluated["measured"] and "resuming" in caplog.text
    assert kept in local.names(parts)


def test_a_page_that_is_lost_or_has_another_title_is_written_again(evaluated, job_settings):
    from attrib.generators.evaluation import job as evaluate_job

    page = Path(job_settings.output, "evaluation.html")
    before = page.read_text(encoding="utf-8")
    page.unlink()
    evaluate_job.run(job_settings)
    assert page.read_text(encoding="utf-8") == before
    evaluate_job.run(job_settings.model_copy(update={"title": "Another title"}))
    assert "<h1>Another title</h1>" in page.read_text(encoding="utf-8")


def test_photographs_that_the_training_pool_shows_do_not_stand_for_real_ones(evaluated, job_settings, local, tmp_path):
    from attrib.generators.evaluation import job as evaluate_job

    pool, trained = tmp_path / "pool", job_settings.trained
    shutil.copytree(job_settings.pool, pool)
    photographs = evaluate_job._photographs(job_settings, local)
    local.write_array(str(pool / PHOTOGRAPHS), photographs.shown.numpy())
    changed = {"pool": str(pool), "output": str(tmp_path / "out"), "folders": {}, "pools": {}}
    with pytest.raises(AttribError, match=r"12 of its 12 photographs .*another trained\.first_photograph"):
        evaluate_job.run(job_settings.model_copy(update=changed))
    later = trained.model_copy(update={"first_photograph": 4})
    moved = evaluate_job._photographs(job_settings.model_copy(update={"trained": later}), local)
    assert torch.equal(moved.shown[:8], photographs.shown[4:]) and torch.equal(moved.training, photographs.training)


def test_other_generators_are_not_mixed_into_the_output(evaluated, job_settings, local):
    from attrib.generators.evaluation import job as evaluate_job

    with pytest.raises(AttribError, match="choose another output"):
        evaluate_job.run(job_settings.model_copy(update={"num_references": 4}))


def test_an_unknown_degradation_ends_before_any_work(job_settings, tmp_path):
    from attrib.generators.evaluation import job as evaluate_job

    with pytest.raises(AttribError, match="unknown degradation 'jpg'"):
        evaluate_job.run(job_settings.model_copy(update={"degradations": ("jpg-85",), "output": str(tmp_path / "new")}))
    assert not (tmp_path / "new").exists()
