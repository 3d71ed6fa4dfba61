"""Contenders that build, search and wait under a Ray of their own with `workers` CPUs (attrib/benchmark/contender.py).

Ray and its workers are started and warm before a lap begins, but for the laps that measure just that.
"""

import hashlib
import os
import shutil
import time

import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
from ray.data import ActorPoolStrategy

from attrib.attribute import job as attribute
from attrib.attribute.merge import describe_sources, merge_blocks, write_blocks
from attrib.attribute.rows import RunStamp
from attrib.attribute.run import AttributionJob
from attrib.attribute.settings import AttributeSettings
from attrib.benchmark import ours
from attrib.benchmark.contender import Clock, set_threads
from attrib.common.settings import RaySettings
from attrib.data.manifest import open_manifest
from attrib.embed.embeddings import open_embeddings
from attrib.index import job as index
from attrib.index.cost_model import plan_search
from attrib.index.index import open_index
from attrib.index.planning import group_partitions
from attrib.index.settings import IndexSettings
from attrib.runtime.session import connect
from attrib.runtime.tasks import run_units

WARM_SECONDS = 0.5  # long enough for every CPU to get a worker of its own
CHUNK_ITEMS = 64  # no-op chunks through Ray Data before its pace is taken


def start_ray(job: dict, clock: Clock) -> None:
    clock.works_elsewhere = True
    # Ray Train asks the dashboard whether its controller lives.
    connect(RaySettings(num_cpus=job["workers"], object_store_gib=0.5), dashboard=job.get("dashboard", False))


def _warm(job: dict) -> None:
    for _ in run_units(_load, ((),) * job["workers"]):
        pass


def _load() -> None:
    from attrib.index import search  # noqa: F401

    time.sleep(WARM_SECONDS)


def build_shards(job: dict, clock: Clock) -> dict:
    """`num_shards` shards from one template, by the scheduler and the build of the index job."""
    embeddings = open_embeddings(job["embeddings"], ours.STORAGE)
    groups = group_partitions(embeddings.num_embedded, -(-job["num_vectors"] // job["num_shards"]))
    shutil.rmtree(job["output"], ignore_errors=True)
    start_ray(job, clock)
    _warm(job)
    units = [(job, group, i) for i, group in enumerate(groups)]
    with clock.lap("build"):
        for _ in run_units(_build, units):
            pass
    return {"num_shards": len(groups)}


def _build(job: dict, partitions: list[int], shard: int) -> None:
    set_threads(1)
    ours.build(job["embeddings"], job["template"], os.path.join(job["output"], f"shard-{shard}"), partitions)


def index_job(job: dict, clock: Clock) -> dict:
    """The whole job from a template that is there already, as after a restart: fill, measure recall, publish."""
    os.makedirs(job["output"], exist_ok=True)
    shutil.copy(job["template"], os.path.join(job["output"], "template.faiss"))
    start_ray(job, clock)
    _warm(job)
    settings = IndexSettings(
        embeddings=job["embeddings"],
        output=job["output"],
        kind="ivf_flat",
        num_lists=job["num_lists"],
        shard_rows=-(-job["num_vectors"] // job["num_shards"]),
        worker_memory_gib=job["memory_gib"],
    )
    started = time.perf_counter()
    with clock.lap("job"):
        record = index.run(settings)
    estimated = record["estimate"]["seconds"] / (time.perf_counter() - started)
    return {"nprobe": record["nprobe"], "recall": record["recall"]["recall"], "estimated_over_measured": estimated}


def attribute_job(job: dict, clock: Clock) -> dict:
    """The whole job on workers that are warm."""
    shutil.rmtree(job["output"], ignore_errors=True)
    start_ray(job, clock)
    _warm(job)
    started = time.perf_counter()
    with clock.lap("job"):
        record = attribute.run(_attribute_settings(job))
    estimated = record["estimate"]["seconds"] / (time.perf_counter() - started)
    rows = _rows(job["output"])
    columns = [rows[name].to_numpy().tobytes() for name in ("query_id", "rank", "source_id", "similarity", "share")]
    answers = hashlib.sha256(b"".join(columns)).hexdigest()
    return {
        "answers": answers,
        "num_rows": len(rows),
        "engine": record["engine"],
        "nprobe": record["nprobe"],
        "estimated_over_measured": estimated,
    }


def _attribute_settings(job: dict) -> AttributeSettings:
    return AttributeSettings(
        queries=job["asked"], index=job["index"], output=job["output"], top_k=job["top_k"], run_id="benchmark"
    )


def _rows(output: str) -> pa.Table:
    folder = os.path.join(output, "attributions")
    parts = [pq.read_table(os.path.join(folder, name)) for name in sorted(os.listdir(folder))]
    return pa.concat_tables(parts).sort_by([("query_id", "ascending"), ("rank", "ascending")])


def merge_score_write(job: dict, clock: Clock) -> dict:
    """What the attribute job does once its shards are searched."""
    shutil.rmtree(job["output"], ignore_errors=True)
    settings, storage = _attribute_settings(job), ours.STORAGE
    opened, queries = open_index(settings.index, storage), open_embeddings(settings.queries, storage)
    plan = plan_search(opened, sum(queries.num_embedded), settings.engine, settings.nprobe)
    run = AttributionJob(settings, opened, queries, open_manifest(queries.manifest_uri, storage), plan)
    start_ray(job, clock)
    attribute._search(run, attribute._probe(run, storage), storage)  # which the attribute stage measures
    with clock.lap("rows"):
        merge_blocks(run, storage)
        describe_sources(run, storage)
        counts = write_blocks(run, RunStamp("benchmark", "benchmark", opened.digest), storage)
    return {"num_rows": sum(count["num_rows"] for count in counts)}


def overhead(job: dict, clock: Clock) -> dict:
    """Ray's own time: from the start of this process to the first result, per task, and per chunk through Ray Data."""
    start_ray(job, clock)
    for _ in run_units(_nothing, [()]):
        clock.note("first row", _process_seconds(), 0.0)
    for _ in run_units(_nothing, ((),) * (4 * job["workers"])):
        pass
    with clock.lap("task", scale=1 / job["num_tasks"]):
        for _ in run_units(_nothing, ((),) * job["num_tasks"]):
            pass
    items = [{"item": i} for i in range(CHUNK_ITEMS + job["num_tasks"])]
    done = ray.data.from_items(items, override_num_blocks=len(items)).map(
        Nothing, compute=ActorPoolStrategy(size=job["workers"])
    )
    for i, _ in enumerate(done.iter_rows()):
        if i == CHUNK_ITEMS:
            started = time.perf_counter()
    num_timed = len(items) - CHUNK_ITEMS - 1
    clock.note("chunk", (time.perf_counter() - started) / num_timed, 0.0)
    return {}


def _nothing() -> int:
    return 0


class Nothing:
    def __call__(self, row: dict) -> dict:
        return row


def _process_seconds() -> float:
    """Since this process was started, imports included."""
    with open("/proc/self/stat", encoding="ascii") as file:
        ticks = int(file.read().rsplit(")", 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
