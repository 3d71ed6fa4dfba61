"""The synthesis job on a small folder of images: the pool, restarts, and errors."""

import json

import numpy as np
import pytest
import torch
from support.images import ODD_NAMES, pictures, write_folder

from attrib.common.errors import AttribError
from attrib.generators.synthesis import job as synthesize_job
from attrib.generators.synthesis.pool import open_pool
from attrib.generators.synthesis.settings import SynthesizeSettings

NUM_MODELS = 6


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    from attrib.common.settings import StorageSettings
    from attrib.common.storage import Storage

    folder = tmp_path_factory.mktemp("photographs")
    images = pictures([*(f"{i:02d}.png" for i in range(26)), *ODD_NAMES[:2]])
    images |= {"damaged.jpg": b"\xff\xd8\xff not a picture", "copy.png": images["03.png"]}
    write_folder(images, str(folder), Storage(StorageSettings()))
    real = {f"gan{name[:1]}/{name}": data for name, data in list(images.items())[:24]}
    write_folder(real, str(folder.parent / "real"), Storage(StorageSettings()))
    return folder


def settings(collection, output, **changes):
    values = {
        "photographs": {"name": "pictures", "uri": str(collection)},
        "output": str(output),
        "px": 32,
        "num_photographs": 6,
        "num_training_photographs": 12,
        "num_models": NUM_MODELS,
        "seeds_per_architecture": 2,
        "width": 4,
        "training": {"max_steps": 4, "check_steps": 2, "batch_size": 4, "crop_px": 16},
        "models_per_task": 2,
        "device": "cpu",
    }
    return SynthesizeSettings.model_validate(values | changes)


@pytest.fixture(scope="module")
def made(local_ray, collection, tmp_path_factory):
    output = tmp_path_factory.mktemp("pool") / "pool"
    real = {"collection": {"name": "real", "uri": str(collection.parent / "real")}, "left_out": ["gan1"]}
    return output, synthesize_job.run(settings(collection, output, real_generators=real))


def contents(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in folder.rglob("*")
        if p.suffix in (".npy", ".safetensors")
    }


def test_all_models_of_the_pool_reproduce_the_same_photographs(made, local):
    output, record = made
    pool = open_pool(str(output), local)
    assert len(pool.models) == len({m.model_id for m in pool.models}) == NUM_MODELS
    assert sorted(m.seed for m in pool.models) == [0, 0, 0, 1, 1, 1] and len({m.spec for m in pool.models}) == 3
    photographs = pool.photographs(local)
    assert photographs.shape == (6, 3, 32, 32) and photographs.dtype == torch.uint8
    samples = [pool.samples(m.model_id, local) for m in pool.models]
    assert all(s.shape == photographs.shape and s.dtype == torch.uint8 for s in samples)
    assert len({s.numpy().tobytes() for s in samples}) == NUM_MODELS
    assert len(np.unique(photographs.numpy().reshape(6, -1), axis=0)) == 6
    assert json.loads((output / "pool.json").read_text())["digest"] == pool.digest == record["digest"]
    measures = record["measures"]
    assert measures["diversity"]["num_models"] == NUM_MODELS and measures["diversity"]["separation"] > 0
    assert measures["frechet_frequency_distance"]["real_generators"] == ["gan0", "gan2"]
    assert measures["frechet_frequency_distance"]["pool"] > 0


def test_a_restart_makes_the_missing_models_with_equal_bits(made, collection, tmp_path, caplog):
    caplog.set_level("INFO")
    output, record = made
    before = contents(output)
    lost = [record["models"][i]["model_id"] for i in (1, 4)]
    (output / "pool.json").unlink()
    (output / "models" / f"{lost[0]}.safetensors").unlink()
    (output / "models" / f"{lost[1]}.safetensors").unlink()
    (output / "samples" / f"{lost[1]}.npy").unlink()
    kept = {p: p.stat().st_mtime_ns for p in (output / "models").iterdir()}
    again = synthesize_job.run(settings(collection, output))
    assert "resuming, 4 of 6 models" in caplog.text
    assert contents(output) == before and again["digest"] == record["digest"]
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    finished = synthesize_job.run(settings(collection, output))
    assert finished["written_at"] == again["written_at"]
    with pytest.raises(AttribError, match="seed: there 0, now 1"):
        synthesize_job.run(settings(collection, output, seed=1))


def test_too_few_photographs_are_an_error(local_ray, collection, tmp_path):
    # Of 30 files one is damaged and one a copy; none is counted twice.
    with pytest.raises(AttribError, match="has 28 that can be used"):
        synthesize_job.run(settings(collection, tmp_path / "pool", num_photographs=17, num_training_photographs=12))


def test_pools_of_one_seed_share_no_architecture(collection, tmp_path):
    first, second = (
        {model.spec for model in synthesize_job.plan(settings(collection, tmp_path, first_architecture=start))}
        for start in (0, 3)
    )
    assert len(first) == len(second) == 3 and not first & second


def test_settings_that_cannot_work_are_refused(collection, tmp_path):
    for changes, message in (
        ({"training": {"crop_px": 64}}, "exceeds px"),
        ({"training": {"crop_px": 18}}, "multiples of 4"),
        ({"num_models": 5}, "not a multiple of seeds_per_architecture"),
        ({"width": 6}, "multiple of 4"),
    ):
        with pytest.raises(ValueError, match=message):
            settings(collection, tmp_path, **changes)


def test_a_pool_beyond_the_budget_is_refused_before_any_model(local_ray, collection, tmp_path):
    asked = settings(collection, tmp_path / "pool", budget={"max_hours": 1e-9})
    with pytest.raises(AttribError, match=r"max_hours.*lower num_models, training\.max_steps or width"):
        synthesize_job.run(asked)
    assert not (tmp_path / "pool" / "models").exists()
