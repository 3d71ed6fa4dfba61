"""The fingerprint job under Ray Train, on a pool of random filters."""

import json

import numpy as np
import pytest
from support.generators import STORAGE
from support.pool import smooth_images, traced, write_tiny_pool

from attrib.common.errors import AttribError
from attrib.generators.extractor import job as fingerprint_job
from attrib.generators.extractor.network import load_extractor
from attrib.generators.extractor.settings import FingerprintSettings
from attrib.generators.fingerprints.spectrum import load_spectrum_method


def values(folder, **changes) -> dict:
    return {
        "pool": f"{folder}/pool",
        "output": f"{folder}/extractor",
        "network": {"patch_px": 16, "window_px": 4, "num_learned": 24, "width": 8, "max_patches": 4},
        "contrast": {"models_per_batch": 4, "images_per_model": 3},
        "optimiser": {"num_steps": 6, "validation_steps": 3},
        "num_workers": 2,
    } | changes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fingerprint")
    write_tiny_pool(f"{folder}/pool", STORAGE, num_models=8, num_images=24, px=24, num_bicubic=2)
    return folder


@pytest.fixture(scope="module")
def record(folder, local_ray) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        # Ray Train checks every two seconds by default whether a worker has reported.
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.3")
        return fingerprint_job.run(FingerprintSettings(**values(folder)))


def test_the_job_writes_an_extractor(folder, record):
    assert record == json.loads((folder / "extractor" / "extractor.json").read_text())
    assert (record["num_training_models"], record["num_held_out_models"], record["num_images_per_model"]) == (6, 2, 12)
    assert [row["step"] for row in record["history"]] == [0, 3, 6]
    extractor = load_extractor(f"{folder}/extractor", STORAGE)
    assert extractor.digest == record["digest"]
    images = list(traced(smooth_images(3, 40, 5), 70))
    embedded = extractor.embed_images(images)
    assert embedded.shape == (3, 360)
    np.testing.assert_allclose(np.linalg.norm(embedded, axis=1), 1, atol=1e-5)
    assert load_spectrum_method("colour-spectrum-lda", f"{folder}/extractor", STORAGE).min_side_px == 16


def test_a_finished_run_is_found_and_another_is_refused(folder, record):
    assert fingerprint_job.run(FingerprintSettings(**values(folder, num_workers=1, num_loaders=2))) == record
    with pytest.raises(AttribError, match="seed"):
        fingerprint_job.run(FingerprintSettings(**values(folder, seed=1)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": {"patch_px": 32}}, "patch_px is 32 and the pool's images have 24 px"),
        (
            {"pool": "few"},
            "the pool has 20 images of each model, and validation can use half of them; it needs 10 references",
        ),
        (
            {"validation_upsampler": "transposed"},
            "the pool has 0 models with validation_upsampler 'transposed' for validation and 8 other models",
        ),
        (
            {"contrast": {"models_per_batch": 16}},
            "a batch takes 16 models and 4 images of each, but the pool has 7 models and 12 images of each",
        ),
        ({"pool": "/nowhere/pool"}, r"run jobs\.synthesize to its end first"),
    ],
)
def test_a_pool_that_does_not_fit_is_an_error_before_any_work(folder, changes, message):
    if changes.get("pool") == "few":
        changes = {"pool": f"{folder}/few"}
        write_tiny_pool(changes["pool"], STORAGE, num_models=8, num_images=20, px=24, num_bicubic=2)
    with pytest.raises(AttribError, match=message):
        fingerprint_job.run(FingerprintSettings(**values(folder, output=f"{folder}/other", **changes)))
    assert not (folder / "other").exists()


def test_workers_must_divide_the_batch():
    with pytest.raises(ValueError, match="models_per_batch 4 is not a multiple of num_workers 3"):
        FingerprintSettings(**values("/x", num_workers=3))
