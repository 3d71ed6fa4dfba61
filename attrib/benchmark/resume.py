"""What a kill costs: one flow of images under Ray Data's own row-level checkpointing, and under our commit per chunk.

The same work (a wait of fixed length per image in place of a network) runs in a process of its own, which is killed with SIGKILL when half of
the images were embedded, and started again. Every embedded image appends its id to a log, so that the log tells what was done twice.
"""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from attrib.benchmark.contender import Clock

NUM_IMAGES = 2048
CHUNK_ROWS = 64
SECONDS_PER_IMAGE = 0.004
TIMEOUT_SECONDS = 180


def contender(job: dict, clock: Clock) -> dict:
    """A contender of the benchmark: the whole of it, kill and restart included."""
    clock.works_elsewhere = True
    with clock.lap("whole"):
        share = measure(job["name"], os.path.join(job["folder"], job["name"]))
    return {"share_embedded_twice": share}


def measure(name: str, folder: str) -> float:
    """Share of the images that were embedded twice. Raises RuntimeError if a row is lost or doubled in the result."""
    os.makedirs(folder, exist_ok=True)
    ids = np.random.default_rng(0).permutation(NUM_IMAGES).astype(np.int64)
    pq.write_table(pa.table({"id": ids}), os.path.join(folder, "images.parquet"), row_group_size=CHUNK_ROWS)
    command = [sys.executable, "-m", "attrib.benchmark.resume", name, folder]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while len(_logged(folder)) < NUM_IMAGES // 2:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the {name} flow ended or stalled before it was half done")
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)  # the driver and, on its own local Ray, every worker
    process.wait()
    subprocess.run(command, stderr=subprocess.DEVNULL, check=True, timeout=TIMEOUT_SECONDS)
    found = [
        pq.read_table(os.path.join(root, file), columns=["id"])
        for root, _, files in os.walk(os.path.join(folder, "output"))
        for file in files
    ]
    written = np.sort(np.concatenate([table["id"].to_numpy() for table in found]))
    if not np.array_equal(written, np.arange(NUM_IMAGES)):
        raise RuntimeError(
            f"the {name} flow wrote {len(written)} rows with {len(np.unique(written))} ids for {NUM_IMAGES} images"
        )
    return len(_logged(folder)) / NUM_IMAGES - 1


def _logged(folder: str) -> list[str]:
    path = os.path.join(folder, "log")
    if not os.path.exists(path):
        return []
    with open(path, encoding="ascii") as file:
        return file.read().split()


class Work:
    """Stands for an encoder: takes its time, and notes whom it saw."""

    def __init__(self, folder: str):
        self.folder = folder

    def __call__(self, batch: dict) -> dict:
        with open(os.path.join(self.folder, "log"), "a", encoding="ascii") as file:
            file.write("".join(f"{i}\n" for i in batch["id"]))
        time.sleep(SECONDS_PER_IMAGE * len(batch["id"]))
        return {"id": batch["id"], "embedding": np.zeros((len(batch["id"]), 256), np.float16)}


class CommittedWork(Work):
    """The same, publishing each chunk under a name that depends on its place alone, as the embed job does."""

    def __call__(self, row: dict) -> dict:
        from attrib.common.settings import StorageSettings
        from attrib.common.storage import Storage

        start = row["start"]
        ids = pq.read_table(os.path.join(self.folder, "images.parquet"))["id"].to_numpy()[start : start + CHUNK_ROWS]
        done = super().__call__({"id": ids})
        table = pa.table(
            {"id": done["id"], "embedding": pa.FixedSizeListArray.from_arrays(done["embedding"].ravel(), 256)}
        )
        Storage(StorageSettings()).write_table(_chunk_path(self.folder, start), table)
        return {"num_images": len(ids)}


def _chunk_path(folder: str, start: int) -> str:
    return os.path.join(folder, "output", f"rows-{start:06d}.parquet")


def main(name: str, folder: str) -> None:
    import ray.data
    from ray.data import ActorPoolStrategy
    from ray.data.checkpoint import CheckpointConfig

    ray.init(address="local", num_cpus=2, include_dashboard=False)
    pool = ActorPoolStrategy(size=1)
    if name == "ray":
        context = ray.data.DataContext.get_current()
        context.checkpoint_config = CheckpointConfig(id_column="id", checkpoint_path=os.path.join(folder, "checkpoint"))
        images = ray.data.read_parquet(
            os.path.join(folder, "images.parquet"), override_num_blocks=NUM_IMAGES // CHUNK_ROWS
        )
        done = images.map_batches(Work, fn_constructor_args=(folder,), batch_size=CHUNK_ROWS, compute=pool)
        done.write_parquet(os.path.join(folder, "output"))
        return
    pending = [start for start in range(0, NUM_IMAGES, CHUNK_ROWS) if not os.path.exists(_chunk_path(folder, start))]
    chunks = ray.data.from_items([{"start": start} for start in pending], override_num_blocks=max(1, len(pending)))
    for _ in chunks.map(CommittedWork, fn_constructor_args=(folder,), compute=pool).iter_rows():
        pass


if __name__ == "__main__":
    main(*sys.argv[1:])
