"""The index job: sample vectors, train the quantizer, build shards in parallel, measure recall on held-out vectors."""

import logging
from dataclasses import dataclass, replace
from typing import Any

import faiss
import numpy as np
import pyarrow as pa

from attrib.common.config import digest
from attrib.common.errors import AttribError
from attrib.common.run_record import run_once
from attrib.common.scratch import scratch_folder
from attrib.common.storage import Storage, join
from attrib.data.estimate import row_bytes
from attrib.data.manifest import Manifest, open_manifest
from attrib.embed.embeddings import Embeddings, open_embeddings
from attrib.index.cost_model import measure_rates
from attrib.index.estimate import IndexTask, estimate_index, shard_sizes
from attrib.index.index import INDEX_RECORD, QUANTIZER_FILE
from attrib.index.normalize import unit_rows
from attrib.index.planning import IndexPlan, group_partitions, num_held_out, plan_index, training_rows
from attrib.index.quantizer import nearest_lists, read_quantizer, train_quantizer, trained_sha256, write_quantizer
from attrib.index.recall import recall, recall_by_nprobe, smallest_nprobe, without_self
from attrib.index.sampling import sample_vectors
from attrib.index.search import Candidates, merge, search_shard
from attrib.index.settings import IndexSettings
from attrib.index.shard import build_shard, finished_shard, open_shard, shard_name
from attrib.runtime.admission import admit
from attrib.runtime.machine import baseline_bytes, measure_machine
from attrib.runtime.session import connect, device_of, num_cluster_cpus, num_node_cpus
from attrib.runtime.tasks import run_all

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class IndexBuild:
    """What all tasks of one build share. device: "cpu" or "cuda"."""

    settings: IndexSettings
    plan: IndexPlan
    embeddings: Embeddings
    manifest: Manifest
    device: str
    storage: Storage
    quantizer_sha256: str | None = None  # None: not trained yet, or kind flat

    @property
    def quantizer_uri(self) -> str:
        return join(self.settings.output, QUANTIZER_FILE)

    @property
    def num_candidates(self) -> int:
        return (self.settings.recall_k + 1) * self.settings.rerank_factor

    def read_quantizer(self) -> faiss.IndexIVF | None:
        """None for kind flat."""
        if not self.plan.num_lists:
            return None
        return read_quantizer(self.quantizer_uri, self.storage, self.quantizer_sha256)


def run(settings: IndexSettings) -> dict[str, Any]:
    """Build the index and return its record.

    Raises AttribError if there is no vector, or if no kind of index fits the memory of a worker.
    """
    baseline_bytes()
    storage = Storage(settings.storage)
    embeddings = open_embeddings(settings.embeddings, storage)
    manifest = open_manifest(embeddings.manifest_uri, storage)
    inputs = {"embeddings": embeddings.digest, "sources": manifest.rows_digest}
    groups = group_partitions(embeddings.num_embedded, settings.shard_rows)
    if not groups:
        raise AttribError(f"{embeddings.uri} holds no vector; every image failed (see its failures.parquet)")
    num_vectors, dimension = sum(embeddings.num_embedded), embeddings.dimension
    sizes = [sum(embeddings.num_embedded[p] for p in group) for group in groups]
    plan = plan_index(settings, num_vectors, sizes, dimension)
    build = IndexBuild(settings, plan, embeddings, manifest, "cpu", storage)
    return run_once(settings, INDEX_RECORD, inputs, storage, lambda: _build(build, groups, sizes, inputs))


def _build(build: IndexBuild, groups: list[list[int]], sizes: list[int], inputs: dict[str, str]) -> dict[str, Any]:
    """The results of the job, for its record. groups: partitions of each shard; sizes: vectors of each shard."""
    settings, plan, embeddings, manifest, storage = (
        build.settings, build.plan, build.embeddings, build.manifest, build.storage,
    )  # fmt: skip
    num_vectors, dimension = sum(sizes), embeddings.dimension
    lists = f", {plan.num_lists:,} lists" if plan.num_lists else ""
    logger.info(
        f"index: {num_vectors:,} vectors of {dimension} dimensions as {plan.kind}{lists} in {plan.num_shards} shard(s) "
        f"({plan.reason}); at most {plan.shard_disk_bytes / 2**20:,.1f} MiB of disk per shard, "
        f"{plan.shard_scan_bytes / 2**20:,.1f} MiB of it scanned"
    )
    connect(settings.ray)

    build = replace(build, device=device_of(settings.device, "index"))
    held_out = num_held_out(settings, num_vectors)
    sizes_of = shard_sizes(dimension, plan, sizes, max(embeddings.num_rows), row_bytes(manifest, storage))
    rates = measure_machine(dimension, settings.threads_per_task)
    num_workers = max(1, num_cluster_cpus() // settings.threads_per_task)
    if plan.num_lists:
        build = replace(build, quantizer_sha256=trained_sha256(build.quantizer_uri, storage))
    is_trained = not plan.num_lists or build.quantizer_sha256 is not None
    num_training = 0 if is_trained else training_rows(settings, plan)
    admitted = admit(
        estimate_index(sizes_of, num_training, held_out, baseline_bytes(), rates, num_workers, num_node_cpus()),
        settings,
    )
    sample_ids, sample = sample_vectors(embeddings, held_out + num_training, storage)
    if not is_trained:
        # One or two vectors have to train it, too: a code needs two.
        _train(build, sample[held_out:] if num_vectors - held_out > 1 else sample)
        build = replace(build, quantizer_sha256=trained_sha256(build.quantizer_uri, storage))
    names = [join(settings.output, shard_name(shard)) for shard in range(len(groups))]
    resources: dict[str, Any] = {"num_cpus": settings.threads_per_task, "num_gpus": int(build.device == "cuda")}
    shards = run_all(
        _build_task, ((build, *work) for work in zip(names, groups)), "build", "vectors", sizes, **resources
    )
    measured = _measure(build, shards, sample_ids[:held_out], unit_rows(sample[:held_out]))
    results = {
        "encoder": embeddings.encoder,
        "metric": "cosine",
        "plan": plan.to_dict(),
        "is_compressed": plan.is_compressed,
        "num_vectors": num_vectors,
        "metadata_columns": manifest.metadata_columns,
        "nprobe": measured["nprobe"],
        "recall": measured,
        "template_sha256": build.quantizer_sha256,
        "shards": shards,
        "vectors_fit": plan.template_bytes + 2 * dimension * max(sizes) <= settings.worker_memory_gib * 2**30,
        "rates": run_all(_rates_task, [(settings, dimension)], num_cpus=settings.threads_per_task)[0],
        "estimate": admitted.to_dict(),
        "num_tasks": {
            IndexTask.SAMPLE: sum(rows > 0 for rows in embeddings.num_embedded),
            IndexTask.TRAIN: int(not is_trained),
            IndexTask.BUILD: len(shards),
            IndexTask.RECALL: measured["num_searches"] * len(shards),
            IndexTask.RATES: 1,
        },
        # Shards record checksums of their arrays; sources.parquet is one more file of each.
        "num_files": sum(len(shard["files"]) + 1 for shard in shards) + bool(plan.num_lists),
        "digest": digest(
            [embeddings.encoder, plan.kind, inputs, build.quantizer_sha256, [shard["files"] for shard in shards]]
        ),
    }
    return results


def _rates_task(settings: IndexSettings, dimension: int) -> dict[str, Any]:
    faiss.omp_set_num_threads(settings.threads_per_task)
    return measure_rates(dimension).to_dict()


def _train(build: IndexBuild, training: np.ndarray) -> None:
    logger.info(f"train: {build.plan.num_lists:,} centroids on {len(training):,} vectors")
    # Nothing else runs at that time, so the task takes all CPUs of a node.
    threads = num_node_cpus()
    run_all(_train_task, [(build, training, threads)], num_cpus=threads, num_gpus=int(build.device == "cuda"))


def _train_task(build: IndexBuild, training: np.ndarray, threads: int) -> None:
    faiss.omp_set_num_threads(threads)
    quantizer = train_quantizer(unit_rows(training), build.plan, build.settings.seed, build.device)
    write_quantizer(quantizer, build.quantizer_uri, build.storage)


def _build_task(build: IndexBuild, uri: str, partitions: list[int]) -> dict[str, Any]:
    manifest, storage = build.manifest, build.storage
    if record := finished_shard(uri, storage):
        return record
    faiss.omp_set_num_threads(build.settings.threads_per_task)
    columns = ["id", "key", "uri", *manifest.metadata_columns]
    rows = pa.concat_tables([storage.read_table(manifest.checked_uri(p, storage), columns=columns) for p in partitions])
    sources = rows.sort_by("id").combine_chunks()
    return build_shard(uri, build.embeddings, partitions, build.read_quantizer(), sources, storage, build.device)


def _measure(build: IndexBuild, shards: list[dict[str, Any]], ids: np.ndarray, held_out: np.ndarray) -> dict[str, Any]:
    """Measure recall at `recall_k` of held-out images, without their own vector; find the nprobe that meets the target.

    The first nprobe is the one that probes the lists of the true neighbours, which needs no search. The whole search,
    with quantisation and re-ranking, is then measured at this nprobe, which is raised until it meets the target or
    recall stops rising.
    """
    settings, num_lists = build.settings, build.plan.num_lists
    truth, lists, _ = _search_held_out(build, shards, ids, held_out, 0)
    nprobe, measured, probed_share, curve = 0, 1.0, {0: 1.0}, {}

    def measure(nprobe: int) -> float:
        found, _, num_probed = _search_held_out(build, shards, ids, held_out, nprobe)
        probed_share[nprobe] = num_probed / (len(held_out) * sum(record["num_vectors"] for record in shards))
        return recall(found, truth)

    quantizer = build.read_quantizer()
    if quantizer is not None:
        by_nprobe = recall_by_nprobe(quantizer, held_out, lists)
        curve = {str(1 << i): round(float(by_nprobe[(1 << i) - 1]), 6) for i in range(num_lists.bit_length())}
        first = min(int(np.searchsorted(by_nprobe, settings.recall_target)) + 1, num_lists)
        nprobe, measured = smallest_nprobe(measure, first, num_lists, settings.recall_target)
    where = f"nprobe {nprobe} of {num_lists:,}" if num_lists else "exact search"
    logger.info(
        f"recall@{settings.recall_k} {measured:.4f} of exact search at {where}, {len(held_out):,} held-out images "
        f"(target {settings.recall_target:g})"
    )
    if measured < settings.recall_target:
        logger.warning(
            f"the recall target is out of reach with rerank_factor = {settings.rerank_factor}: raise it, or pq_bytes"
        )
    return {
        "nprobe": nprobe,
        "k": settings.recall_k,
        "recall": round(measured, 6),
        "target": settings.recall_target,
        "met": measured >= settings.recall_target,
        "num_held_out": len(held_out),
        "num_searches": len(probed_share),  # of all shards, the exact one included
        "probed_share": round(probed_share[nprobe], 6),  # of all vectors
        "rerank_factor": settings.rerank_factor,
        "list_recall_by_nprobe": curve,
    }


def _search_held_out(
    build: IndexBuild, shards: list[dict[str, Any]], ids: np.ndarray, vectors: np.ndarray, nprobe: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Search all shards for the held-out images. nprobe: 0 for exact search.

    Returns their neighbours int64 [n, k], -1 where there are fewer, the lists of these, and the number of probed
    vectors.
    """
    k, scans_codes = build.settings.recall_k, bool(nprobe) and build.plan.is_compressed
    work = ((build, shard, record, vectors, nprobe) for shard, record in enumerate(shards))
    found = run_all(_search_held_out_task, work, num_cpus=build.settings.threads_per_task)
    candidates, pairs_by_shard, num_probed = zip(*found)
    best = merge(list(candidates), k + 1, build.num_candidates if scans_codes else None)
    neighbours = without_self(ids, best.query, best.id, k)
    pairs = np.concatenate(pairs_by_shard)
    pairs = pairs[np.argsort(pairs[:, 0])]
    at = np.minimum(np.searchsorted(pairs[:, 0], neighbours), len(pairs) - 1)
    return neighbours, np.where(neighbours >= 0, pairs[at, 1], -1), sum(num_probed)


def _search_held_out_task(
    build: IndexBuild, shard: int, record: dict[str, Any], queries: np.ndarray, nprobe: int
) -> tuple[Candidates, np.ndarray, int]:
    """Return candidates, int64 [m, 2] (id, list) of each candidate, and how many vectors were probed."""
    faiss.omp_set_num_threads(build.settings.threads_per_task)
    quantizer, scans_codes = build.read_quantizer(), bool(nprobe) and build.plan.is_compressed
    uri = join(build.settings.output, shard_name(shard))
    with scratch_folder() as folder:
        opened = open_shard(uri, record, build.storage, folder, quantizer)
        candidates = search_shard(
            opened, queries, build.settings.recall_k + 1, build.num_candidates, nprobe, scans_codes
        )
        ids = np.unique(candidates.id)
        if quantizer is None or opened.offsets is None:
            return candidates, np.stack([ids, np.zeros_like(ids)], axis=1), len(queries) * len(opened.ids)
        lists = np.searchsorted(opened.offsets, opened.positions_of(ids), side="right") - 1
        num_probed = np.diff(opened.offsets)[nearest_lists(quantizer, queries, max(nprobe, 1))].sum()
    return candidates, np.stack([ids, lists], axis=1), int(num_probed)
