"""Contenders that embed and train under a Ray of their own; apart from benchmark_jobs, whose processes need no torch."""

import os
import shutil
import statistics
import threading
import time
from contextlib import contextmanager, suppress

import numpy as np

from attrib.benchmark import ours, train_contenders
from attrib.benchmark.contender import Clock
from attrib.benchmark.harness import process_tree
from attrib.benchmark.job_contenders import start_ray
from attrib.data import job as manifest_job
from attrib.data.chunks import CHUNKS
from attrib.data.settings import CollectionSettings, ManifestSettings
from attrib.embed import job as embed
from attrib.embed.settings import EmbedSettings
from attrib.train import job as train
from attrib.train.settings import TrainSettings

# Rarely, so as not to take from what is measured: times of files are those that the file system noted.
POLL_SECONDS, CPU_POLL_SECONDS = 0.2, 2.0


def embed_job(job: dict, clock: Clock) -> dict:
    """Seconds per image from when every worker had finished a chunk until one ran out of them, by the times of the chunks' files."""
    listed = ManifestSettings(
        collection=CollectionSettings(name="jpegs", uri=job["folder"]), output=f"{job['output']}/manifest"
    )
    shutil.rmtree(job["output"], ignore_errors=True)
    start_ray(job, clock)
    manifest_job.run(listed)
    settings = EmbedSettings(
        manifest=listed.output,
        output=f"{job['output']}/embeddings",
        backbone=job["backbone"],
        num_workers=job["workers"],
        chunk_rows=job["chunk_rows"],
        device="cpu",
    )
    started = time.time()
    with _appearing(os.path.join(settings.output, CHUNKS), ".parquet") as seen, _cpu_noted() as noted:
        record = embed.run(settings)
    ended = time.time()
    times = sorted((at, _chunk_rows(name)) for name, at in seen.items())
    steady = times[job["workers"] - 1 : len(times) - job["workers"] + 1]
    seconds = steady[-1][0] - steady[0][0]
    num_images = sum(rows for _, rows in steady[1:])
    clock.note("image", seconds / num_images, 0.0)
    return {
        "images_per_second": num_images / seconds,
        "start_to_first_chunk_seconds": times[0][0] - started,
        "cpu_ms_per_image": {role: 1000 * spent / num_images for role, spent in _spent(noted, steady).items()},
        "num_failed": record["num_failed"],
        "estimated_over_measured": record["estimate"]["seconds"] / (ended - started),
    }


def _chunk_rows(name: str) -> int:
    start, stop = name.removesuffix(".parquet").split("-")[-2:]
    return int(stop) - int(start)


def _spent(noted: list[tuple[float, dict[str, float]]], steady: list[tuple[float, int]]) -> dict[str, float]:
    """CPU seconds by role between the first and the last time of `steady`, read between two samples by interpolation."""
    at = [when for when, _ in noted]
    roles = noted[-1][1]
    spent = {role: [found.get(role, 0.0) for _, found in noted] for role in roles}
    return {role: float(np.diff(np.interp([steady[0][0], steady[-1][0]], at, spent[role]))[0]) for role in roles}


@contextmanager
def _cpu_noted():
    """[(time, CPU seconds so far by role)] of this process and all below it, filled in by a thread while the context lasts."""
    noted: list[tuple[float, dict[str, float]]] = []
    done = threading.Event()

    def watch() -> None:
        while True:
            noted.append((time.time(), _cpu_seconds()))
            if done.wait(CPU_POLL_SECONDS):
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield noted
    finally:
        done.set()
        thread.join()


def _cpu_seconds() -> dict[str, float]:
    """Of the driver (this process), the encoders, and all else, which is Ray's own."""
    found = dict.fromkeys(("driver", "encoders", "Ray"), 0.0)
    for pid in process_tree(os.getpid()):
        with suppress(OSError):
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                title = file.read()
            with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
                ticks = file.read().rpartition(")")[2].split()[11:13]  # of user and system, behind the name in brackets
            role = "driver" if pid == os.getpid() else "encoders" if b"MapWorker" in title else "Ray"
            found[role] += sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
    return found


@contextmanager
def _appearing(folder: str, suffix: str):
    """{path: time} of the files or folders below `folder` whose names end so, filled in by a thread while the context lasts."""
    seen: dict[str, float] = {}
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            for root, folders, files in os.walk(folder):
                for name in (*folders, *files):
                    if name.endswith(suffix) and not name.startswith("."):
                        path = os.path.join(root, name)
                        with suppress(FileNotFoundError):  # deleted once its partition was put together
                            seen.setdefault(path, os.stat(path).st_mtime)
            time.sleep(POLL_SECONDS)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def train_job(job: dict, clock: Clock) -> dict:
    """Seconds per step of the median epoch under Ray Train, criterion and checkpoint included, by when checkpoints appear."""
    shutil.rmtree(os.path.join(job["folder"], "_ray_train"), ignore_errors=True)
    start_ray(job | {"dashboard": True}, clock)
    settings = TrainSettings.model_validate(job["settings"])
    with _appearing(os.path.join(job["folder"], "_ray_train"), "state.pt") as seen:
        _, history = train._fit(settings, None, ours.STORAGE)
    epochs = np.diff(sorted(seen.values()))[1:]  # the first epoch warms up
    num_steps = train_contenders.open_inputs(job["folder"], settings).num_steps
    clock.note("step", statistics.median(epochs) / num_steps, 0.0)
    return {"num_steps": num_steps, "loss": history[-1]["loss"]}
