"""Speed of the jobs over that of their parts. Every pair is measured in turn in one run and told as a ratio, since machines are shared."""

import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import ray
import torch

from attrib.backbone import load_encoder
from attrib.chunks import chunk_folder
from attrib.demo.corpus import draw_corpus
from attrib.distributed import embed, manifest, resume_benchmark
from attrib.distributed.session import connect
from attrib.embedding import prepare_images
from attrib.index import Shard, train_template, unit_rows
from attrib.manifest import open_manifest
from attrib.planning import IndexPlan
from attrib.search import search_shard
from attrib.settings import BenchmarkSettings, CollectionSettings, EmbedSettings, ManifestSettings
from attrib.storage import Storage, fresh_folder, join

CHUNK_ROWS = 32
READY_IMAGES = 64  # images that the bare encoders see over and over


def run(settings: BenchmarkSettings) -> list[dict]:
    """Rows of what, ratio (median over rounds), lowest, highest, and the figures behind them."""
    parts = {"embed": _embed_rows, "search": _search_rows, "resume": _resume_rows}
    fresh_folder(settings.output, "jobs.benchmark")
    rows = []
    for name in settings.only:
        print(f"benchmark: {name}", file=sys.stderr)
        rows += parts[name](settings)
    return rows


def format_table(rows: list[dict]) -> str:
    lines = [f"{'what':66} {'median':>8} {'lowest':>8} {'highest':>8}  figures"]
    for row in rows:
        numbers = " ".join(f"{row[name]:8.3f}" for name in ("median", "lowest", "highest"))
        lines.append(f"{row['what']:66} {numbers}  {row['figures']}")
    return "\n".join(lines)


def _row(what: str, ratios: list[float], figures: str) -> dict:
    return {
        "what": what,
        "median": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "figures": figures,
    }


def _embed_rows(settings: BenchmarkSettings) -> list[dict]:
    storage = Storage(settings.storage)
    connect(settings.ray)
    collection = settings.collection
    if collection is None:
        folder = Path(settings.output) / "images"
        draw_corpus(folder, settings.num_images, seed=0, image_px=settings.image_px)
        collection = CollectionSettings(name="drawn", uri=str(folder))
    listed = ManifestSettings(collection=collection, output=join(settings.output, "manifest"))
    manifest.run(listed)
    job_rates, bare_rates, prepare_rates = [], [], []
    for turn in range(settings.num_rounds):
        job_rates.append(_job_rate(settings, listed.output, turn, storage))
        bare_rates.append(_in_workers(settings, listed.output, _encode_ready))
        prepare_rates.append(_in_workers(settings, listed.output, _prepare_only))
    ceilings = [1 / (1 / bare + 1 / prepare) for bare, prepare in zip(bare_rates, prepare_rates)]
    job, bare, prepare = (statistics.median(rates) for rates in (job_rates, bare_rates, prepare_rates))
    figures = f"{job:.1f} job, {bare:.1f} bare encoder, {prepare:.0f} read + decode + resize, images/s in {settings.num_workers} processes"
    return [
        _row(
            "embed job, steady, over the bare backbone on ready tensors",
            [j / b for j, b in zip(job_rates, bare_rates)],
            figures,
        ),
        _row("embed job, steady, over 1 / (decode + forward)", [j / c for j, c in zip(job_rates, ceilings)], ""),
    ]


def _job_rate(settings: BenchmarkSettings, manifest_uri: str, turn: int, storage: Storage) -> float:
    """Images/s of the embed job between the first chunk of every worker and the last chunk of all, by the times of the chunk files."""
    job = EmbedSettings(
        manifest=manifest_uri,
        output=join(settings.output, f"embeddings-{turn}"),
        backbone=settings.backbone,
        num_workers=settings.num_workers,
        chunk_rows=CHUNK_ROWS,
    )
    opened = open_manifest(manifest_uri, storage)
    identity = load_encoder(settings.backbone, storage).identity
    embed.embed_pending(job, opened, identity, embed.EncoderPool.plan(job), storage)
    committed = []
    for partition in range(len(opened.num_rows)):
        with os.scandir(chunk_folder(job.output, partition)) as files:
            for file in files:
                start, stop = file.name.removesuffix(".parquet").split("-")[1:]
                committed.append((file.stat().st_mtime, int(stop) - int(start)))
    committed.sort()
    started = committed[settings.num_workers - 1][0]
    return sum(count for _, count in committed[settings.num_workers :]) / (committed[-1][0] - started)


def _in_workers(settings: BenchmarkSettings, manifest_uri: str, work: Callable) -> float:
    """Images/s of `work` in as many one-thread processes as the job has, running at the same time."""
    remote = ray.remote(num_cpus=1)(work)
    return sum(ray.get([remote.remote(settings, manifest_uri) for _ in range(settings.num_workers)]))


def _ready(settings: BenchmarkSettings, manifest_uri: str):
    torch.set_num_threads(1)
    storage = Storage(settings.storage)
    opened = open_manifest(manifest_uri, storage)
    job = EmbedSettings(manifest=manifest_uri, output=settings.output, backbone=settings.backbone)
    encoder = load_encoder(settings.backbone, storage)
    images = storage.read_table(opened.partition_uri(0)).slice(0, READY_IMAGES)
    return encoder, lambda: prepare_images(images, opened, encoder.preprocessing, job, storage)


def _encode_ready(settings: BenchmarkSettings, manifest_uri: str) -> float:
    encoder, prepare = _ready(settings, manifest_uri)
    pixels = prepare().pixels
    encoder.encode(pixels[: encoder.batch_size])
    return _rate(lambda: encoder.encode(pixels), len(pixels), seconds=6.0)


def _prepare_only(settings: BenchmarkSettings, manifest_uri: str) -> float:
    _, prepare = _ready(settings, manifest_uri)
    return _rate(prepare, len(prepare().pixels), seconds=2.0)


def _rate(work: Callable, count: int, seconds: float) -> float:
    turns, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        work()
        turns += 1
    return turns * count / (time.perf_counter() - started)


def _search_rows(settings: BenchmarkSettings) -> list[dict]:
    """List-major batch search with exact re-scoring against FAISS's own query by query search of the same lists, on one thread each."""
    faiss.omp_set_num_threads(1)
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((settings.num_vectors // 100, settings.dimension))
    vectors = centres[generator.integers(0, len(centres), settings.num_vectors)]
    vectors = (vectors + 0.7 * generator.standard_normal(vectors.shape)).astype(np.float16)
    chosen = generator.integers(0, settings.num_vectors, settings.num_queries)
    queries = unit_rows(vectors[chosen] + 0.3 * generator.standard_normal((settings.num_queries, settings.dimension)))
    plan = IndexPlan("ivf_flat", int(4 * settings.num_vectors**0.5), 0, 1, 0, 0, "benchmark")
    units = unit_rows(vectors)
    lists = train_template(units[:: max(1, settings.num_vectors // 100_000)], plan, seed=0)
    ids = np.arange(settings.num_vectors)
    lists.add_with_ids(units, ids)
    lists.nprobe = settings.nprobe
    shard = Shard(ids, vectors, lists)
    k = settings.top_k

    ours, theirs, brute = [], [], []
    for _ in range(settings.num_rounds):
        started = time.perf_counter()
        found = search_shard(shard, queries, k, 2 * k, settings.nprobe, compressed=False)
        ours.append(time.perf_counter() - started)
        started = time.perf_counter()
        lists.search(queries, k)
        theirs.append(time.perf_counter() - started)
        started = time.perf_counter()
        _, exact = faiss.knn(queries, units, k, metric=faiss.METRIC_INNER_PRODUCT)
        brute.append(time.perf_counter() - started)
    hits = sum(len(np.intersect1d(a, b)) for a, b in zip(found.id.reshape(-1, k), exact))
    size = f"{settings.num_queries:,} queries, {settings.num_vectors:,} x {settings.dimension}, nprobe {settings.nprobe}, one thread"
    figures = f"recall@{k} {hits / exact.size:.4f}; {size}"
    return [
        _row("index.search time over batch search time, same lists", [t / o for t, o in zip(theirs, ours)], figures),
        _row(
            "exact search time over batch search time",
            [b / o for b, o in zip(brute, ours)],
            "faiss.knn over all vectors",
        ),
    ]


def _resume_rows(settings: BenchmarkSettings) -> list[dict]:
    """Images embedded twice after a SIGKILL half-way: Ray Data's row-level checkpointing, and our committed chunks."""
    rows = []
    for name, what in (("ray", "Ray Data row-level checkpointing"), ("attrib", "embed job, committed chunks")):
        shares = [
            resume_benchmark.measure(name, join(settings.output, f"resume-{name}-{turn}"))
            for turn in range(settings.num_rounds)
        ]
        rows.append(
            _row(
                f"share of images embedded twice after a kill at half: {what}",
                shares,
                f"{resume_benchmark.NUM_IMAGES} images",
            )
        )
    return rows
