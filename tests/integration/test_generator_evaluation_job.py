"""The evaluation job: settings, generator sets from pools and folders, and whole runs on small ones."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from support.evaluation import PX, settings
from support.images import pictures, write_folder
from support.pool import SPEC, replace_photographs, smooth_images, traced, write_tiny_pool

from attrib.common.errors import AttribError
from attrib.common.json_records import with_checksum
from attrib.common.storage import Storage, join
from attrib.generators.evaluation import job as evaluate_job
from attrib.generators.evaluation.generator_sets import folder_set, pool_set, tuning_set
from attrib.generators.evaluation.settings import (
    TRAINED_SET,
    EvaluateGeneratorsSettings,
    FolderSetSettings,
    PoolSetSettings,
)
from attrib.generators.synthesis.pool import Pool, open_pool

pytestmark = pytest.mark.usefixtures("one_thread")


def test_contradictory_settings_are_refused():
    photographs = {"name": "p", "uri": "/p"}
    for changes, message in (
        ({"pools": {}}, "nothing to evaluate on"),
        ({"pools": {"a/b": {"uri": "/x"}}}, "is used in file names"),
        ({"folders": {"unseen": {"uri": "/x", "generators": ["a", "b", "c"]}}}, "share a name"),
        ({"pools": {TRAINED_SET: {"uri": "/x"}}}, "share a name"),
        ({"trained": {"photographs": photographs, "kinds": ["vae"], "seeds": [0, 1]}}, "fewer than three"),
        ({"trained": {"photographs": photographs, "seeds": [1, 1]}}, "contains a value twice"),
        ({"trained": {"photographs": photographs, "photograph_px": 16}}, "is below px 32"),
        ({"folders": {"f": {"uri": "/x", "generators": ["a", "b", "c"], "real_history": "jpeg-75"}}}, "set real to"),
        ({"budget": {"max_hours": 1}}, "makes no estimate"),
    ):
        with pytest.raises(ValueError, match=message):
            settings(**changes)


def rewrite_specs(uri: str, storage: Storage, changes: Sequence[dict]) -> None:
    record = storage.read_json(join(uri, "pool.json"))
    for model, change in zip(record["models"], changes):
        model["spec"] = SPEC.model_copy(update=change).model_dump(mode="json")
    storage.write_json(join(uri, "pool.json"), with_checksum(record))


def training_and_other_pool(
    folder: Path, storage: Storage, changes: Sequence[dict], num_images: int = 4, px: int = 16, training_px: int = 16
) -> tuple[Pool, str]:
    """A training pool of one architecture, and the URI of a pool whose models differ from it by these changes."""
    training, other = str(folder / "training"), str(folder / "other")
    write_tiny_pool(training, storage, num_models=2, num_images=4, px=training_px)
    write_tiny_pool(other, storage, num_models=len(changes), num_images=num_images, px=px, seed=1)
    rewrite_specs(other, storage, changes)
    return open_pool(training, storage), other


NORMS = ({}, *({"norm": norm} for norm in ("batch", "group", "instance")))


def test_a_pool_set_has_only_models_unlike_the_training_pool(tmp_path, local):
    tanh = {"activation": "tanh"}
    bilinear = [{"upsampler": "bilinear", "norm": norm} for norm in ("none", "batch", "group")]
    pool, other = training_and_other_pool(tmp_path, local, [{}, tanh, tanh, *bilinear])
    generators = pool_set("unseen", PoolSetSettings(uri=other, max_images=3), pool, local)
    assert generators.names == ("m001", "m002", "m003", "m004", "m005")
    assert generators.has_families and generators.family_numbers[0] == generators.family_numbers[1]
    assert generators.same_content and len(generators.samples) == 15 and len(generators.real) == 3
    expected = open_pool(other, local).samples("m003", local)[:3]
    assert torch.equal(torch.stack([generators.samples[row].image for row in generators.rows_of(2)]), expected)
    by_upsampler = PoolSetSettings(uri=other, unseen="upsamplers")
    assert pool_set("unseen", by_upsampler, pool, local).names == ("m003", "m004", "m005")
    few = PoolSetSettings(uri=other, max_models=3)
    assert pool_set("unseen", few, pool, local).names == ("m001", "m003", "m005")
    with pytest.raises(AttribError, match="holds 0 models with architectures"):
        pool_set("unseen", PoolSetSettings(uri=pool.uri), pool, local)


def test_an_architecture_of_another_width_is_not_unseen(tmp_path, local):
    pool, other = training_and_other_pool(tmp_path, local, [{"width": SPEC.width + 8}, *NORMS[1:], {}])
    assert pool_set("unseen", PoolSetSettings(uri=other), pool, local).names == ("m001", "m002", "m003")


@pytest.mark.parametrize("px", [16, 32])
def test_photographs_of_the_training_pool_are_refused_at_any_size(tmp_path, local, px):
    pool, other = training_and_other_pool(tmp_path, local, NORMS, num_images=6, px=px, training_px=32)
    wanted = PoolSetSettings(uri=other)
    assert len(pool_set("unseen", wanted, pool, local).names) == 3
    shown, own = pool.photographs(local), open_pool(other, local).photographs(local)
    smaller = F.interpolate(shown.float(), size=(px, px), mode="bilinear", antialias=True).round().to(torch.uint8)
    replace_photographs(other, torch.cat([own[:4], smaller[1:3]]), local)
    with pytest.raises(AttribError, match=r"2 of its 6 photographs.*another first_photograph"):
        pool_set("unseen", wanted, pool, local)
    few = wanted.model_copy(update={"max_images": 4})
    assert len(pool_set("unseen", few, pool, local).real) == 4, "only the images of the set count"


def test_a_few_photographs_of_the_training_pool_are_left_out(tmp_path, local):
    pool, other = training_and_other_pool(tmp_path, local, NORMS, num_images=12)
    own = open_pool(other, local).photographs(local)
    own[5] = pool.photographs(local)[2]
    replace_photographs(other, own, local)
    generators = pool_set("unseen", PoolSetSettings(uri=other), pool, local)
    assert len(generators.real) == 11 and [len(generators.rows_of(g)) for g in range(3)] == [11] * 3
    expected = open_pool(other, local).samples("m002", local)
    assert torch.equal(generators.samples[generators.rows_of(1)[5]].image, expected[6]), (
        "its reproductions are left out too"
    )


def test_models_of_the_tuning_set_show_different_photographs(tmp_path, local):
    write_tiny_pool(str(tmp_path), local, num_models=3, num_images=30, px=16)
    pool = open_pool(str(tmp_path), local)
    generators = tuning_set(pool, local)
    assert generators.names == ("m000", "m001", "m002") and len(generators.samples) == 30
    assert torch.equal(generators.samples[10].image, pool.samples("m001", local)[10])


def test_a_folder_set_reads_images_unchanged(tmp_path, local):
    for generator in ("a", "b", "c"):
        write_folder(pictures([f"{i}.png" for i in range(4)]), str(tmp_path / generator), local)
    write_folder(pictures(["0.jpg", "notes.jpg"]), str(tmp_path / "real"), local)
    given = FolderSetSettings(uri=str(tmp_path), generators=("a", "b", "c"), real="real", max_images=3)
    generators = folder_set("folders", given, 1.0, local)
    assert [len(generators.rows_of(g)) for g in range(3)] == [3, 3, 3] and len(generators.real) == 2
    assert (
        generators.samples[0].codec == "PNG"
        and generators.real[0].codec == "JPEG"
        and generators.families == ("a", "b", "c")
    )
    before = generators.digest()
    assert folder_set("folders", given, 1.0, local).digest() == before
    write_folder({"0.png": pictures(["x.png", "y.png"])["y.png"]}, str(tmp_path / "a"), local)
    assert folder_set("folders", given, 1.0, local).digest() != before
    (tmp_path / "b" / "1.png").write_bytes(b"no image")
    with pytest.raises(AttribError, match=r"b/1\.png cannot be read as an image .* remove the file"):
        folder_set("folders", given, 1.0, local)
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(AttribError, match="holds no image"):
        folder_set("folders", given, 1.0, local)


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
                "num_splits": 1,  # regressions on six poorly trained generators take most of the time
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
    return evaluate_job.run(job_settings)


def test_the_job_measures_every_method_on_every_set(evaluated, job_settings):
    assert list(evaluated["tiers"]) == [TRAINED_SET, "published", "unseen"]
    methods = list(evaluated["looks_at_trace"])
    assert {"content-only", "codec-and-size"} <= set(methods) and len(methods) >= 4
    for found in evaluated["tiers"].values():
        assert list(found["methods"]) == methods
    assert evaluated["shipped"]["method"] in [m for m in methods if evaluated["looks_at_trace"][m]]
    assert evaluated["tiers"][TRAINED_SET]["families"] == ["dcgan", "dcgan", "vae", "vae", "diffusion", "diffusion"]
    assert "Shipped: " in Path(job_settings.output, "evaluation.html").read_text(encoding="utf-8")
    assert Path(job_settings.output, "table.txt").read_text(encoding="utf-8").strip() == evaluated["table"]


def test_content_does_not_reveal_the_generator(evaluated):
    """All generators show the same photographs."""
    unseen = evaluated["tiers"]["unseen"]["methods"]
    assert unseen["content-only"]["values"]["identification"]["mean"] < 0.7


def test_a_finished_run_is_reused_and_an_unfinished_one_continues(evaluated, job_settings, local, caplog):
    caplog.set_level("INFO")
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


def test_a_missing_page_or_one_with_another_title_is_written_again(evaluated, job_settings):
    page = Path(job_settings.output, "evaluation.html")
    before = page.read_text(encoding="utf-8")
    page.unlink()
    evaluate_job.run(job_settings)
    assert page.read_text(encoding="utf-8") == before
    evaluate_job.run(job_settings.model_copy(update={"title": "Another title"}))
    assert "<h1>Another title</h1>" in page.read_text(encoding="utf-8")


def test_photographs_of_the_training_pool_are_not_used_as_real_images(evaluated, job_settings, local, tmp_path):
    pool, trained = tmp_path / "pool", job_settings.trained
    shutil.copytree(job_settings.pool, pool)
    photographs = evaluate_job._photographs(job_settings, local)
    replace_photographs(str(pool), photographs.shown, local)
    changed = {"pool": str(pool), "output": str(tmp_path / "out"), "folders": {}, "pools": {}}
    with pytest.raises(AttribError, match=r"12 of its 12 photographs .*another trained\.first_photograph"):
        evaluate_job.run(job_settings.model_copy(update=changed))
    later = trained.model_copy(update={"first_photograph": 4})
    moved = evaluate_job._photographs(job_settings.model_copy(update={"trained": later}), local)
    assert torch.equal(moved.shown[:8], photographs.shown[4:]) and torch.equal(moved.training, photographs.training)


def test_other_settings_need_another_output(evaluated, job_settings, local):
    with pytest.raises(AttribError, match="choose another output"):
        evaluate_job.run(job_settings.model_copy(update={"num_references": 4}))


def test_an_unknown_degradation_is_an_error_before_any_work(job_settings, tmp_path):
    with pytest.raises(AttribError, match="unknown degradation 'jpg'"):
        evaluate_job.run(job_settings.model_copy(update={"degradations": ("jpg-85",), "output": str(tmp_path / "new")}))
    assert not (tmp_path / "new").exists()
