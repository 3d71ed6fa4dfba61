"""Speed of every stage over its ceiling and its peers: each contender in a process of its own, in turn, told as ratios (attrib/benchmark/).

<output>/inputs/          images and vectors, kept from run to run
<output>/work/            indexes and rows of this run
<output>/benchmark.json   rows, facts, constants, settings, versions; written after every stage
"""

import logging
import os
import time

from attrib.benchmark import facts, stages, train_contenders
from attrib.benchmark import resume as resume_benchmark
from attrib.benchmark.bench import Bench, as_json
from attrib.benchmark.facts import Fact
from attrib.benchmark.harness import Contender, Row
from attrib.benchmark.settings import BenchmarkSettings
from attrib.benchmark.table import format_table
from attrib.common.config import versions
from attrib.common.storage import Storage, join

logger = logging.getLogger(__name__)

IMAGES, SEARCH = stages.IMAGES, stages.SEARCH
JOBS, IMAGE_JOBS = "attrib.benchmark.job_contenders", "attrib.benchmark.image_job_contenders"
COMMAND = "python -m jobs.benchmark --config configs/benchmark.yaml"
BARE_SECONDS = 8.0  # of the bare network and of bare decoding


def run(settings: BenchmarkSettings) -> dict:
    """Rows, facts and constants, also written to `benchmark.json`."""
    bench = Bench(settings)
    parts = {
        "decode": stages.decode,
        "embed": embed,
        "build": build,
        "search": stages.search,
        "attribute": attribute,
        "train": train,
        "ray": overhead,
        "resume": resume,
    }
    result: dict = {}
    minutes: dict[str, float] = {}
    for name, part in parts.items():
        if name in settings.only:
            started = time.monotonic()
            part(bench)
            minutes[name] = (time.monotonic() - started) / 60
            logger.info(f"benchmark: {name} took {minutes[name]:.1f} minutes")
            result = _result(bench, minutes)
            Storage(settings.storage).write_json(join(settings.output, "benchmark.json"), result)
    return result | {"table": f"{format_table(bench.rows)}\n\nfacts\n{facts.format_facts(_facts(bench))}"}


def _result(bench: Bench, minutes: dict[str, float]) -> dict:
    return {
        "rows": [row.to_dict() for row in bench.rows],
        "facts": [vars(fact) for fact in _facts(bench)],
        "constants": facts.constants(bench.rows, COMMAND),
        "minutes": minutes,
        "num_cpus": os.cpu_count(),
        "settings": as_json(bench.settings),
        "versions": versions(),
    }


def _facts(bench: Bench) -> list[Fact]:
    wanted, rows = bench.settings.vectors, bench.rows
    return [
        *facts.embed_shares(rows),
        *facts.embed_cpu(rows),
        *facts.estimates(rows),
        *facts.peak_shares(rows),
        *facts.build_slopes(rows, wanted.sizes),
        *facts.search_slopes(rows, wanted.sizes, wanted.batches),
        *facts.speed_up(rows, "build by workers", "index job's build"),
        *facts.speed_up(rows, "attribute job", "jobs.attribute"),
        *facts.identical(rows),
        *facts.ray_share(rows),
    ]


def embed(bench: Bench) -> list[Row]:
    settings, wanted = bench.settings, bench.settings.images
    workers = settings.num_workers
    job = {
        "folder": bench.jpegs,
        "num_images": wanted.num_images,
        "backbone": as_json(settings.backbone),
        "workers": workers,
        "chunk_rows": wanted.chunk_rows,
        "seconds": BARE_SECONDS,
        "output": os.path.join(bench.work, "embed"),
        "loader_batch_size": 16,
    }
    loaders = [
        Contender(
            f"DataLoader script, {count} loader(s)",
            f"{IMAGES}:data_loader",
            job | {"loaders": count, "num_images": min(wanted.loader_images, wanted.num_images)},
            threads=workers - count,
            note=f"{workers} threads in all; PIL, torchvision",
        )
        for count in range(workers)
    ]
    contenders = [
        Contender("jobs.embed", f"{IMAGE_JOBS}:embed_job", job, workers=workers, note="steady state"),
        Contender("bare network", f"{IMAGES}:bare_encoder", job, workers=workers, note="tensors ready: the ceiling"),
        Contender("decode + resize alone", f"{IMAGES}:decode_at_once", job, workers=workers),
        *loaders,
    ]
    return bench.compare(
        "embed job", {"image": f"an image of {wanted.num_images:,} JPEGs, {workers} threads"}, contenders
    )


def _by_workers(bench: Bench, name: str, run: str, job: dict, folder: str, note: str = "") -> list[Contender]:
    """The same job of benchmark_jobs by one worker and by all of them, each into a folder of its own."""
    return [
        Contender(
            name,
            f"{JOBS}:{run}",
            job | {"workers": workers, "output": os.path.join(bench.work, f"{folder}-by-{workers}")},
            workers=workers,
            note=note,
        )
        for workers in (1, bench.settings.num_workers)
    ]


def build(bench: Bench) -> list[Row]:
    rows = stages.build(bench) + stages.build_slope(bench)
    vectors = bench.largest
    job = vectors.job(bench.settings, num_shards=bench.settings.vectors.num_shards)
    contenders = _by_workers(bench, "index job's build", "build_shards", job, "shards")
    size = f"{vectors.size:,} x {bench.settings.vectors.dimension} in {bench.settings.vectors.num_shards} shards, under Ray"
    return rows + bench.compare("build by workers", {"build": size}, contenders)


def attribute(bench: Bench) -> list[Row]:
    """The whole job with one worker and with more, then what follows the search beside a plain write of the same rows."""
    vectors, wanted = bench.largest, bench.settings.vectors
    if not os.path.exists(vectors.job(bench.settings)["shard"]):
        stages.prepare_template(bench, vectors)
    prepared = vectors.job(bench.settings, timed_queries=wanted.argsort_queries)
    found = bench.prepare("exact neighbours", f"{SEARCH}:prepare", prepared)
    job = prepared | {
        "index": os.path.join(bench.work, "index"),
        "asked": os.path.join(prepared["queries_folder"], "embeddings"),
        "num_shards": wanted.num_shards,
        "num_lists": found["num_lists"],
        "memory_gib": 64.0,
    }
    indexing = Contender(
        "jobs.index",
        f"{JOBS}:index_job",
        job | {"workers": bench.settings.num_workers, "output": job["index"]},
        workers=bench.settings.num_workers,
        note="training apart; recall measured on 1,000 held-out vectors",
    )
    size = f"{vectors.size:,} x {wanted.dimension} in {wanted.num_shards} shards"
    rows = bench.compare("index job", {"job": size}, [indexing], num_rounds=1)
    note = "the whole job; Ray and its workers started before"
    contenders = _by_workers(bench, "jobs.attribute", "attribute_job", job, "attributions", note)
    asked = f"{wanted.batches[-1]:,} queries, {size}"
    rows += bench.compare("attribute job", {"job": asked}, contenders)
    output = os.path.join(bench.work, "written")
    writers = [
        Contender("attrib", f"{JOBS}:merge_score_write", job | {"workers": 1, "output": output}, note="as Ray tasks"),
        Contender(
            "pyarrow, write alone",
            "attrib.benchmark.write_contenders:plain_write",
            {"output": output, "folder": os.path.join(bench.work, "plainly")},
            note="rows in memory already",
        ),
    ]
    return rows + bench.compare("merge, score, write", {"rows": asked}, writers)


def train(bench: Bench) -> list[Row]:
    settings = bench.settings
    folder = os.path.join(bench.work, "train")
    job = {
        "settings": as_json(train_contenders.train_settings(settings, folder)),
        "sizes": as_json(settings.train),
        "folder": folder,
        "workers": 1,
        "criterion": False,
    }
    found = bench.prepare("training inputs", "attrib.benchmark.train_contenders:prepare", job)
    plain = "attrib.benchmark.train_contenders:plain_loop"
    threads = os.cpu_count() or 1  # which the job gives to its only worker
    contenders = [
        Contender(
            "jobs.train", f"{IMAGE_JOBS}:train_job", job, threads, note="Ray Train; criterion and checkpoint included"
        ),
        Contender("plain PyTorch loop", plain, job, threads, note="same batches"),
        Contender("plain PyTorch loop, criterion", plain, job | {"criterion": True}, threads, note="same batches"),
    ]
    size = f"a step of {settings.train.batch_size} views, {found['num_inputs']:,} inputs to {settings.train.dimension}"
    return bench.compare("train a head", {"step": size}, contenders)


def overhead(bench: Bench) -> list[Row]:
    """One process measures all three, so that they come in one comparison of its laps."""
    workers, num_tasks = bench.settings.num_workers, bench.settings.num_ray_tasks
    contender = Contender("Ray", f"{JOBS}:overhead", {"workers": workers, "num_tasks": num_tasks}, workers=workers)
    laps = {
        "first row": "start of the process to a first no-op result",
        "task": f"a no-op task of run_units, mean of {num_tasks}",
        "chunk": f"a no-op chunk through Ray Data, mean of {num_tasks}",
    }
    rows = bench.compare("ray", laps, [contender])
    multiply = "attrib.benchmark.gemm_contender:gemm"
    products = [Contender("NumPy float32", multiply, {}, threads) for threads in sorted({1, bench.num_cpus})]
    size = "a billion operations of a 2,048 x 256 by 256 x 4,096 product"
    return rows + bench.compare("gemm", {"gflop": size}, products)


def resume(bench: Bench) -> list[Row]:
    """Images embedded twice after a SIGKILL half-way: Ray Data's row-level checkpointing, and our committed chunks."""
    job = {"folder": os.path.join(bench.work, "resume")}
    contenders = [
        Contender(what, f"{resume_benchmark.__name__}:contender", job | {"name": name}, workers=1, max_rounds=1)
        for name, what in (("attrib", "embed job, committed chunks"), ("ray", "Ray Data row-level checkpointing"))
    ]
    size = f"{resume_benchmark.NUM_IMAGES:,} images, killed at half and started again"
    return bench.compare("resume", {"whole": size}, contenders)
