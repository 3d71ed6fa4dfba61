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
from attrib.chunks import CHUNKS
from attrib.distributed import embed, manifest, train
from attrib.distributed.benchmark_jobs import start_ray
from attrib.settings import CollectionSettings, EmbedSettings, ManifestSettings
from attrib.train_settings import TrainSettings

POLL_SECONDS = 0.2  # rarely, so as not to take from what is measured: times are those that the file system noted


def embed_job(job: dict, clock: Clock) -> dict:
    """Seconds per image from when every worker had finished a chunk until one ran out of them, by the times of the chunks' files."""
    listed = ManifestSettings(
        collection=CollectionSettings(name="jpegs", uri=job["folder"]), output=f"{job['output']}/manifest"
    )
    shutil.rmtree(job["output"], ignore_errors=True)
    start_ray(job, clock)
    manifest.run(listed)
    settings = EmbedSettings(
        manifest=listed.output,
        output=f"{job['output']}/embeddings",
        backbone=job["backbone"],
        num_workers=job["workers"],
        chunk_rows=job["chunk_rows"],
        device="cpu",
    )
    started = time.time()
    with _appearing(os.path.join(settings.output, CHUNKS), ".parquet") as seen:
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
        "num_failed": record["num_failed"],
        "estimated_over_measured": record["estimate"]["seconds"] / (ended - started),
    }


def _chunk_rows(name: str) -> int:
    start, stop = name.removesuffix(".parquet").split("-")[-2:]
    return int(stop) - int(start)


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
