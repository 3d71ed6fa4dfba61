"""The jobs on several raylets of one machine, with images and a network that cost next to nothing, and what each node did.

Every cluster has a driver process of its own (`python -m attrib.capacity.simulate`): a process can join one Ray only, and what the driver
counts is patched into its `Storage`. Workers count likewise, by Ray's set-up hook, so that the jobs run as they are.
"""

import dataclasses
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import ray
from PIL import Image
from ray.cluster_utils import Cluster
from ray.util.state import list_tasks

from attrib.attribute import job as attribute_job
from attrib.capacity.check import Simulated
from attrib.capacity.settings import SimulationSettings
from attrib.capacity.storage_log import HOOK, LOG_FOLDER, count_storage
from attrib.common.errors import AttribError
from attrib.common.storage import join
from attrib.data import job as manifest_job
from attrib.embed import job as embed_job
from attrib.embed.embeddings import EMBEDDINGS_RECORD
from attrib.index import job as index_job
from attrib.pipeline.settings import PipelineSettings
from attrib.runtime.tasks import run_units

MAX_TASKS = 10_000  # that Ray's API lists at most
NUM_IDLE_TASKS = 300
TEMPORARY = "temporary-folder"  # says where Ray's files are, for whoever outlives the driver
JOBS = {
    "sources/manifest": manifest_job.run,
    "sources/embeddings": embed_job.run,
    "generated/manifest": manifest_job.run,
    "generated/embeddings": embed_job.run,
    "index": index_job.run,
    "attributions": attribute_job.run,
}


def simulate(settings: SimulationSettings, num_raylets: int, folder: str) -> Simulated:
    """Run all jobs on a cluster of `num_raylets`, below the empty or absent `folder`. Raises AttribError with the end of the log if a job fails."""
    images = Path(folder) / "images"
    draw_tars(images / "sources", settings.num_sources, settings.unit_rows, settings.image_px, seed=0)
    draw_tars(images / "generated", settings.num_queries, settings.unit_rows, settings.image_px, seed=1)
    (Path(folder) / "settings.json").write_text(settings.model_dump_json(), encoding="utf-8")
    log = Path(folder) / "driver.log"
    command = [sys.executable, "-m", "attrib.capacity.simulate", folder, str(num_raylets)]
    with open(log, "wb") as said:
        driver = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        try:
            code = driver.wait(settings.timeout_seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            # The raylets watch this process and end with it.
            driver.kill()
            driver.wait()
            if (Path(folder) / TEMPORARY).exists():
                _remove((Path(folder) / TEMPORARY).read_text(encoding="utf-8"))
    if code != 0:
        ended = f"ended with code {code}" if code is not None else f"took more than {settings.timeout_seconds} s"
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise AttribError(f"the simulation on {num_raylets} raylets {ended}; the end of {log}:\n{tail}")
    return Simulated(**json.loads((Path(folder) / "simulated.json").read_text(encoding="utf-8")))


def _remove(temporary: str) -> None:
    """Delete Ray's files; its last processes may still write for some seconds."""
    deadline = time.monotonic() + 20
    while os.path.exists(temporary) and time.monotonic() < deadline:
        shutil.rmtree(temporary, ignore_errors=True)
        time.sleep(0.2)


def draw_tars(folder: Path, num_images: int, unit_rows: int, image_px: int, seed: int) -> None:
    """Tar shards of `unit_rows` JPEGs, each of one colour with noise."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    for unit, start in enumerate(range(0, num_images, unit_rows)):
        with tarfile.open(folder / f"{unit:06d}.tar", "w") as tar:
            for number in range(start, min(num_images, start + unit_rows)):
                colour = generator.integers(0, 256, 3) + generator.normal(0, 20, (image_px, image_px, 3))
                encoded = io.BytesIO()
                Image.fromarray(colour.clip(0, 255).astype(np.uint8)).save(encoded, "JPEG")
                member = tarfile.TarInfo(f"{unit:06d}/{number:09d}.jpg")
                member.size = len(encoded.getvalue())
                encoded.seek(0)
                tar.addfile(member, encoded)


def stages(settings: SimulationSettings, folder: str) -> dict:
    """The settings of every job, as the pipeline makes them."""
    collections = {
        role: {"name": role, "uri": join(folder, "images", role), "format": "webdataset"}
        for role in ("sources", "generated")
    }
    return PipelineSettings(
        **collections,
        output=join(folder, "run"),
        backbone={"name": settings.backbone, "weights": "random"},
        manifest={"partition_rows": settings.partition_rows},
        embed={"chunk_rows": settings.chunk_rows, "device": "cpu"},
        # Any recall will do: the number of searches of the held-out images, and with it of tasks, is then known.
        index={
            "shard_rows": settings.shard_rows,
            "kind": settings.kind,
            "num_lists": settings.num_lists,
            "held_out_rows": settings.held_out_rows,
            "recall_target": 0.001,
        },
        attribute={
            "query_block_rows": settings.query_block_rows,
            "nprobe": settings.num_lists,
            "engine": "lists" if settings.kind == "ivf_flat" else "auto",
            "recall_check_queries": settings.recall_check_queries,
            "device": "cpu",
        },
    ).stages()


def pattern_of(uri: str, root: str) -> str:
    """The path of `uri` below `root`, every number in it a #."""
    return re.sub(r"\d+", "#", uri.removeprefix(root).lstrip("/"))


def main(folder: str, num_raylets: int) -> None:
    """The driver of one cluster; leaves <folder>/simulated.json."""
    settings = SimulationSettings.model_validate_json((Path(folder) / "settings.json").read_text(encoding="utf-8"))
    made = stages(settings, folder)
    logs = Path(folder) / "operations"
    logs.mkdir()
    os.environ[LOG_FOLDER] = str(logs)
    # Not below the user's own TMPDIR: a socket's path may have 107 bytes, and Ray adds about 70 to the folder.
    temporary = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    (Path(folder) / TEMPORARY).write_text(temporary, encoding="utf-8")
    each = {"num_cpus": 1, "object_store_memory": settings.object_store_mib * 2**20}
    # The dashboard's process answers list_tasks.
    dashboard_port = _free_port()
    head = {"include_dashboard": True, "dashboard_port": dashboard_port, "temp_dir": temporary}
    cluster = Cluster(initialize_head=True, head_node_args=each | head)
    try:
        for _ in range(num_raylets - 1):
            cluster.add_node(**each)
        count_storage()
        hook = {"worker_process_setup_hook": HOOK}
        environment = {LOG_FOLDER: str(logs), "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        ray.init(address=cluster.address, runtime_env=hook | {"env_vars": environment})
        mine = ray.get_runtime_context().get_node_id()
        nodes = [mine, *(node["NodeID"] for node in ray.nodes() if node["NodeID"] != mine)]
        task_seconds = _seconds_per_task()
        started: list[tuple[str, float]] = []
        for job, run in JOBS.items():
            started.append((job, time.time()))
            run(made[job])
        ended = time.time()
        found = _finished_tasks(f"http://127.0.0.1:{dashboard_port}")
    finally:
        ray.shutdown()
        cluster.shutdown()
    found = [task for task in found if task.creation_time_ms >= started[0][1] * 1000]
    simulated = _summary(nodes, found, started, ended, logs, join(folder, "run"), task_seconds)
    (Path(folder) / "simulated.json").write_text(json.dumps(dataclasses.asdict(simulated)), encoding="utf-8")


def _seconds_per_task() -> float:
    """Of the driver and its cluster for a task that does nothing, once workers are up."""
    for count in (2 * NUM_IDLE_TASKS // 10, NUM_IDLE_TASKS):
        begun = time.perf_counter()
        for _ in run_units(_nothing, (() for _ in range(count))):
            pass
    return (time.perf_counter() - begun) / NUM_IDLE_TASKS


def _nothing() -> None:
    pass


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _finished_tasks(address: str) -> list:
    """Ray's record of all tasks. Processes report to it about once a second, so it is asked until two answers agree and no task is on its way."""
    previous = -1
    while True:
        found = list_tasks(address=address, limit=MAX_TASKS, detail=True)
        if len(found) >= MAX_TASKS:
            raise AttribError(f"more than {MAX_TASKS:,} tasks, which Ray does not list; simulate fewer images")
        finished = [task for task in found if task.state == "FINISHED" and task.node_id]
        ended = all(task.state in ("FINISHED", "FAILED") for task in found if task.type == "NORMAL_TASK")
        if ended and len(finished) == previous:
            return finished
        previous = len(finished)
        time.sleep(3)


def _summary(
    nodes: list[str], found: list, started: list, ended: float, logs: Path, root: str, task_seconds: float
) -> Simulated:
    number = {node: i for i, node in enumerate(nodes)}
    num_raylets = len(nodes)
    tasks: dict[str, list[int]] = defaultdict(lambda: [0] * num_raylets)
    num_other = 0
    for task in found:
        job = max((begun, name) for name, begun in started if begun * 1000 <= task.creation_time_ms + 1)[1]
        if task.type != "NORMAL_TASK":
            num_other += 1
        else:
            tasks[f"{job}: {task.name}"][number[task.node_id]] += 1
    writes: dict[str, list[int]] = defaultdict(lambda: [0] * num_raylets)
    written_bytes: Counter = Counter()
    requests: dict[str, Counter] = defaultdict(Counter)
    for log in logs.iterdir():
        node = number.get(log.name.split("-")[0], 0)  # the driver is on the first
        for line in log.read_text(encoding="utf-8").splitlines():
            kind, num_bytes, uri = line.split("\t")
            job = next((job for job in JOBS if uri.startswith(join(root, job))), "images")
            requests[job][kind] += 1
            if kind == "write":
                pattern = pattern_of(uri, root)
                writes[pattern][node] += 1
                written_bytes[pattern] += int(num_bytes)
    ends = [*(begun for _, begun in started[1:]), ended]
    seconds = {job: round(end - begun, 2) for (job, begun), end in zip(started, ends)}
    plain = {job: dict(counts) for job, counts in requests.items()}
    encoder = json.loads(Path(root, "sources", "embeddings", EMBEDDINGS_RECORD).read_text(encoding="utf-8"))["encoder"]
    return Simulated(
        num_raylets,
        encoder["dimension"],
        dict(tasks),
        dict(writes),
        dict(written_bytes),
        plain,
        seconds,
        num_other,
        task_seconds,
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
