"""The train job under Ray Train: outputs, one and two workers, a killed worker or driver, and the controls."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from ray.train import Checkpoint
from support.cluster import drawn_image
from support.damage import damages
from support.files import LOCAL
from support.images import write_folder

from attrib.common.errors import AttribError, FailedShareError
from attrib.data import job as manifest_job
from attrib.data.settings import ManifestSettings
from attrib.models.encoder import load_encoder, load_network
from attrib.models.settings import BackboneSettings
from attrib.runtime.trainer import _load_state
from attrib.train import job as train_job
from attrib.train.settings import TrainSettings
from jobs.train import main

NUM_IMAGES, VIEWS_EACH, NUM_EPOCHS = 40, 6, 10
WORKER = "RayTrainWorker"
HEAD = {
    "num_directions": 16,
    "parts": {
        "content": {"blocks": ["pooled"], "role": "content"},
        "style": {"blocks": ["moments"], "role": "style"},
    },
}


class Site:
    """Images, one of them damaged, their manifest, and an undisturbed run of two workers."""

    def __init__(self, folder: Path, address: str):
        self.folder, self.address = folder, address
        images = {f"{i:02}.png": drawn_image(i) for i in range(NUM_IMAGES)}
        write_folder(images | {"broken.png": images["00.png"][:100]}, str(folder / "images"), LOCAL)
        manifest_job.run(ManifestSettings(**self.collection("images"), output=str(folder / "manifest")))
        self.undisturbed = train_job.run(self.settings("undisturbed"))

    def collection(self, name: str) -> dict:
        return {"collection": {"name": name, "uri": str(self.folder / name)}}

    def values(self, run: str, **changes) -> dict:
        return {
            "manifest": str(self.folder / "manifest"),
            "output": str(self.folder / run),
            "backbone": {"name": "test_resnet", "weights": "random"},
            "features": {"moment_levels": [1, 2], "whole_image": True},
            "head": HEAD,
            "views_per_image": VIEWS_EACH,
            "views": {"mix": {"texture": 0, "colour": 2, "bands": 0, "solo": 1}},
            "optimiser": {
                "num_epochs": NUM_EPOCHS,
                "batch_size": 32,
                "learning_rate": 1e-2,
                "validation_share": 0.3,
                "patience_epochs": NUM_EPOCHS,
            },
            "alignment": {"temperature": 0.1},
            "disentanglement": {"weight": 1.0},
            "num_workers": 2,
        } | changes

    def settings(self, run: str, **changes) -> TrainSettings:
        return TrainSettings(**self.values(run, **changes))

    def start(self, start_job, run: str, **changes) -> subprocess.Popen:
        """Start `python -m jobs.train` on the Ray of the tests."""
        (self.folder / f"{run}.config").mkdir(exist_ok=True)
        return start_job(
            "train", self.values(run, ray={"address": self.address}, **changes), self.folder / f"{run}.config"
        )

    def record(self, run: str) -> dict:
        return json.loads((self.folder / run / "train.json").read_text())

    def committed(self, run: str) -> int:
        """Return the number of reports up to the last checkpoint in Ray Train's list, from which a run continues."""
        try:
            found = json.loads(
                (self.folder / run / "_ray_train" / "run" / "checkpoint_manager_snapshot.json").read_text()
            )
        except (FileNotFoundError, json.JSONDecodeError):  # not written yet
            return 0
        latest = found["latest_checkpoint_result"]
        return 0 if latest is None else latest["metrics"]["epoch"] + 2  # the first report is of epoch -1

    def checkpoints(self, run: str) -> list[Path]:
        return sorted((self.folder / run / "_ray_train").glob("**/checkpoint_*/state.pt"))

    def weights(self, run: str, name: str = "model.safetensors") -> dict[str, torch.Tensor]:
        settings = BackboneSettings(name="test_resnet", weights=str(self.folder / run / name))
        return load_network(settings, LOCAL).model.state_dict()


@pytest.fixture(scope="module")
def site(tmp_path_factory, local_ray):
    # An epoch takes 0.1 s here, but Ray Train checks its workers every two seconds by default.
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.3"
    yield Site(tmp_path_factory.mktemp("train"), local_ray)
    del os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"]


def wait_until(condition, what: str, timeout_seconds: float = 120):
    deadline = time.monotonic() + timeout_seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_seconds:g} s for {what}")
        time.sleep(0.01)
    return found


def own_train_workers() -> list[int]:
    """Return the process ids of Ray Train's workers below this process, not those of another Ray on the machine."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it may have ended
            if WORKER in " ".join(process.cmdline()):
                found.append(process.pid)
    return found


def reported_epochs(stderr: str) -> Counter:
    """Return how often each epoch was reported."""
    lines = [line for line in stderr.splitlines() if "train: epoch " in line]
    return Counter(int(line.split("train: epoch ")[1].split()[0]) for line in lines)


def test_job_writes_model_record_failures_and_views(site):
    record, folder = site.undisturbed, site.folder / "undisturbed"
    assert site.record("undisturbed") == json.loads(json.dumps(record))
    assert (folder / "views.png").read_bytes()[:4] == b"\x89PNG"
    assert (record["num_images"], record["num_views"]) == (NUM_IMAGES, NUM_IMAGES * VIEWS_EACH)
    failures = LOCAL.read_table(str(folder / "failures.parquet")).to_pylist()
    assert record["num_failed"] == len(failures) == 1 and failures[0]["stage"] == "decode"
    assert [row["epoch"] for row in record["history"]] == list(range(-1, NUM_EPOCHS))
    criteria = [row["criterion"] for row in record["history"]]
    assert criteria[0] > 2 / NUM_IMAGES and max(criteria) > criteria[0] + 0.02  # it learns


def test_too_many_images_without_features_are_named_and_listed(site):
    with pytest.raises(
        FailedShareError, match=rf"1 of {NUM_IMAGES + 1} images .*; e\.g\. broken\.png: .*failures\.parquet"
    ):
        train_job.run(site.settings("few", control="raw", max_failed_share=0.0))
    failures = LOCAL.read_table(str(site.folder / "few" / "failures.parquet")).to_pylist()
    assert [(row["key"], row["stage"]) for row in failures] == [("broken.png", "decode")]
    assert train_job.run(site.settings("few", control="raw", max_failed_share=0.5))["num_failed"] == 1


def test_embed_job_loads_the_trained_model(site):
    settings = BackboneSettings(
        name="test_resnet", weights=str(site.folder / "undisturbed" / "model.safetensors"), domain="synthetic"
    )
    encoder = load_encoder(settings, LOCAL)
    assert encoder.identity.model_digest == site.undisturbed["model_digest"]
    assert encoder.identity.dimension == site.undisturbed["dimension"] == 32
    vectors = encoder.encode(np.random.default_rng(0).integers(0, 256, (3, 3, 160, 160), dtype=np.uint8))
    np.testing.assert_allclose(np.linalg.norm(vectors[:, :16], axis=1), 1, atol=1e-5)


def test_model_has_the_weights_of_the_best_epoch(site):
    """Only trained weights differ from the start."""
    states = [torch.load(path, weights_only=True) for path in site.checkpoints("undisturbed")]
    last = max(states, key=lambda state: len(state["history"]))
    weights, start = site.weights("undisturbed"), site.weights("undisturbed", "_start.safetensors")
    best = {name.removeprefix("trunk."): value for name, value in last["best"].items()}
    assert best.keys() == {name for name in weights if ".net." in name}
    for name, value in weights.items():
        assert torch.equal(value, best.get(name, start[name])), name
        assert torch.equal(value, start[name]) == (".net." not in name), name


def test_a_damaged_checkpoint_is_refused(site, tmp_path):
    path = site.checkpoints("undisturbed")[-1]
    assert _load_state(Checkpoint.from_directory(str(path.parent))).keys() >= {"best", "history"}
    for damage, content in damages(path.read_bytes()).items():
        (tmp_path / path.name).write_bytes(content)
        with pytest.raises(AttribError, match=r"state\.pt is damaged: .*; delete its folder _ray_train and run"):
            _load_state(Checkpoint.from_directory(str(tmp_path)))
            pytest.fail(damage)


def test_same_settings_return_the_record_without_work(site):
    folder = site.folder / "undisturbed"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert train_job.run(site.settings("undisturbed")) == site.undisturbed
    # The number of workers does not change the results.
    assert train_job.run(site.settings("undisturbed", num_workers=1)) == site.undisturbed
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    with pytest.raises(AttribError, match=r"belongs to a run with other settings or inputs \(seed: there 0, now 1\)"):
        train_job.run(site.settings("undisturbed", seed=1))


def test_one_worker_trains_the_same_model_and_keeps_it_if_no_shares_can_be_fitted(site, monkeypatch, caplog):
    def fail(*_):
        raise AttribError("every query has only one candidate")

    monkeypatch.setattr(train_job, "shares_of_views", fail)
    alone = train_job.run(site.settings("alone", num_workers=1))
    for row, expected in zip(alone["history"], site.undisturbed["history"], strict=True):
        assert row["criterion"] == pytest.approx(expected["criterion"], abs=0.02)
        assert row["loss"] is None or row["loss"] == pytest.approx(expected["loss"], rel=1e-3)
    together = site.weights("undisturbed")
    for name, value in site.weights("alone").items():
        torch.testing.assert_close(value, together[name], rtol=1e-2, atol=1e-3)
    assert site.undisturbed["shares"] and alone["shares"] is None
    assert site.record("alone") == json.loads(json.dumps(alone))
    assert "train.json has no calibrator of shares: every query has only one candidate" in caplog.text


def test_killed_worker_repeats_its_epoch_only(site, monkeypatch, capfd):
    def kill_a_worker() -> int:
        wait_until(lambda: site.committed("killed-worker"), "the first checkpoint")
        os.kill(wait_until(own_train_workers, "a worker of Ray Train")[0], signal.SIGKILL)
        return site.committed("killed-worker")

    config = site.folder / "killed-worker.yaml"
    config.write_text(yaml.safe_dump(site.values("killed-worker")), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["train", "--config", str(config)])
    with ThreadPoolExecutor(1) as pool:
        killing = pool.submit(kill_a_worker)
        main()
        committed = killing.result()
    printed, stderr = capfd.readouterr()
    record = site.record("killed-worker")
    assert record["history"] == site.undisturbed["history"]
    assert record["model_digest"] == site.undisturbed["model_digest"]
    assert f"32-d model from {NUM_IMAGES} images" in printed and "before training" in printed
    # Epochs with a checkpoint when the worker died were trained once.
    epochs = reported_epochs(stderr)
    assert set(epochs) == set(range(NUM_EPOCHS + 1)), stderr
    assert committed < NUM_EPOCHS and all(epochs[epoch] == 1 for epoch in range(committed)), stderr
    assert stderr.count("NO GPU") == 1


def test_restarted_driver_continues_from_its_last_epoch(site, start_job, request):
    if not request.config.getoption("--long"):
        pytest.skip("takes a minute; run with --long")
    first = site.start(start_job, "killed-driver")
    try:
        wait_until(lambda: site.committed("killed-driver") > 1, "the second checkpoint")
    finally:
        first.kill()
        first.communicate()
    wait_until(lambda: not own_train_workers(), "the end of the orphaned workers")
    folder, committed = site.folder / "killed-driver", site.committed("killed-driver")
    assert not (folder / "train.json").exists() and 1 < committed < NUM_EPOCHS
    features = {path: path.stat().st_mtime_ns for path in (folder / "_features").rglob("*.sealed")}
    again = site.start(start_job, "killed-driver")
    _, stderr = again.communicate(timeout=240)
    assert again.returncode == 0, stderr
    record = site.record("killed-driver")
    assert record["history"] == site.undisturbed["history"]
    assert record["model_digest"] == site.undisturbed["model_digest"]
    assert reported_epochs(stderr) == Counter(range(committed, NUM_EPOCHS + 1)), stderr
    assert features and features == {path: path.stat().st_mtime_ns for path in features}


def test_two_workers_train_end_to_end(site):
    """Only the weights of the head and of the backbone's last block change."""
    settings = site.settings(
        "end-to-end",
        fine_tune={"num_blocks": 1, "learning_rate": 1e-3},
        optimiser={"num_epochs": 1, "batch_size": 8, "learning_rate": 1e-2, "validation_share": 0.3},
    )
    record, folder = train_job.run(settings), site.folder / "end-to-end"
    assert record["num_views"] == 0 and len(record["history"]) == 2 and record["history"][1]["loss"] > 0
    assert (folder / "views.png").exists() and not (folder / "_inputs.safetensors").exists()
    state = torch.load(site.checkpoints("end-to-end")[-1], weights_only=True)["student"]
    start = site.weights("end-to-end", "_start.safetensors")
    changed = {name for name, value in state.items() if not torch.equal(value, start[name.split(".", 2)[2]])}
    assert any("backbone.layer4" in name for name in changed) and any(".net." in name for name in changed)
    assert all("backbone.layer4" in name or ".net." in name for name in state)


@pytest.mark.parametrize(("control", "dimension"), [("raw", 96), ("centred", 96), ("whitened", 32)])
def test_controls_need_no_views(control, dimension, site):
    record = train_job.run(site.settings(control, control=control))
    folder = site.folder / control
    assert (record["num_images"], record["num_views"], record["dimension"]) == (NUM_IMAGES, 0, dimension)
    assert record["num_failed"] == 1
    assert record["history"] == [] and not (folder / "_ray_train").exists() and not (folder / "views.png").exists()
    encoder = load_encoder(BackboneSettings(name="test_resnet", weights=str(folder / "model.safetensors")), LOCAL)
    assert encoder.identity.model_digest == record["model_digest"]
    if control == "raw":
        plain = load_encoder(BackboneSettings(name="test_resnet", weights="random"), LOCAL)
        pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 160, 160), dtype=np.uint8)
        vectors = plain.encode(pixels)
        expected = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        np.testing.assert_allclose(encoder.encode(pixels), expected, atol=1e-5)


def test_model_with_a_head_is_an_error(site):
    weights = str(site.folder / "undisturbed" / "model.safetensors")
    with pytest.raises(AttribError, match="has a head already; train from plain weights"):
        train_job.run(site.settings("again", backbone={"name": "test_resnet", "weights": weights}))
