"""The index job: sample vectors, train the quantizer, build shards in parallel, measure recall on held-out vectors."""

import logging
from typing import Any

import faiss
import numpy as np
import pyarrow as pa

from attrib.common.config import digest
from attrib.common.errors import AttribError
from attrib.common.progress import Progress
from attrib.common.run_record import begin, finish
from attrib.common.storage import Storage, bytes_sha256, join, scratch_folder
from attrib.data.estimate import row_bytes
from attrib.data.manifest import Manifest, open_manifest
from attrib.embed.embeddings import Embeddings, open_embeddings
from attrib.index.cost_model import measure_rates
from attrib.index.estimate import IndexTask, estimate_index, shard_sizes
from attrib.index.index import INDEX_RECORD, QUANTIZER_FILE
from attrib.index.normalize import unit_rows
from attrib.index.planning import IndexPlan, group_partitions, plan_index, training_rows
from attrib.index.quantizer import nearest_lists, read_quantizer, train_quantizer, write_quantizer
from attrib.index.recall import recall, recall_by_nprobe, smallest_nprobe, without_self
from attrib.index.sampling import sample_vectors
from attrib.index.search import Candidates, merge, search_shard
from attrib.index.settings import IndexSettings
from attrib.index.shard import SHARD_RECORD, build_shard, open_shard, shard_name
from attrib.runtime.admission import admit
from attrib.runtime.machine import baseline_bytes, measure_machine
from attrib.runtime.session import connect, device_of, num_cluster_cpus, num_node_cpus
from attrib.runtime.tasks import run_units

logger = logging.getLogger(__name__)

MAX_HELD_OUT_SHARE = 0.2


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
    num_vectors = sum(embeddings.num_embedded)
    sizes = [sum(embeddings.num_embedded[p] for p in group) for group in groups]
    plan = plan_index(settings, num_vectors, sizes, embeddings.dimension)
    record = begin(settings, INDEX_RECORD, inputs, storage)
    if record:
        return record
    logger.info(describe(plan, num_vectors, embeddings.dimension))
    connect(settings.ray)

    device = device_of(settings.device, "index")
    held_out_rows = min(settings.held_out_rows, max(1, int(MAX_HELD_OUT_SHARE * num_vectors)))
    sizes_of = shard_sizes(embeddings.dimension, plan, sizes, max(embeddings.num_rows), row_bytes(manifest, storage))
    rates = measure_machine(embeddings.dimension, settings.threads_per_task)
    num_workers = max(1, num_cluster_cpus() // settings.threads_per_task)
    has_quantizer = storage.exists(join(settings.output, QUANTIZER_FILE))
    num_training = 0 if has_quantizer else training_rows(settings, plan)
    admitted = admit(
        estimate_index(sizes_of, num_training, held_out_rows, baseline_bytes(), rates, num_workers, num_node_cpus()),
        settings,
    )
    sample_ids, sample = sample_vectors(embeddings, held_out_rows + num_training, storage)
    held_out_ids, held_out = sample_ids[:held_out_rows], unit_rows(sample[:held_out_rows])
    quantizer_uri = _train(settings, sample[held_out_rows:], plan, device, storage)
    shards = _build_shards(settings, plan, embeddings, manifest, groups, quantizer_uri, device, storage)
    measured = _measure(settings, plan, shards, quantizer_uri, held_out_ids, held_out, storage)
    search_rates = run_units(_rates_task, [(settings, embeddings.dimension)], num_cpus=settings.threads_per_task)
    quantizer_sha256 = bytes_sha256(storage.read_bytes(quantizer_uri)) if quantizer_uri else None
    results = {
        "encoder": embeddings.encoder,
        "metric": "cosine",
        "plan": plan.to_dict(),
        "is_compressed": plan.is_compressed,
        "num_vectors": num_vectors,
        "metadata_columns": manifest.metadata_columns,
        "nprobe": measured["nprobe"],
        "recall": measured,
        "template_sha256": quantizer_sha256,
        "shards": shards,
        "vectors_fit": plan.template_bytes + 2 * embeddings.dimension * max(sizes)
        <= settings.worker_memory_gib * 2**30,
        "rates": next(iter(search_rates))[1],
        "estimate": admitted.to_dict(),
        "num_tasks": {
            IndexTask.SAMPLE: sum(rows > 0 for rows in embeddings.num_embedded),
            IndexTask.TRAIN: int(bool(quantizer_uri) and not has_quantizer),
            IndexTask.BUILD: len(shards),
            IndexTask.RECALL: measured["num_searches"] * len(shards),
            IndexTask.RATES: 1,
        },
        # Shards record checksums of their arrays; sources.parquet is one more file of each.
        "num_files": sum(len(shard["files"]) + 1 for shard in shards) + bool(quantizer_uri),
        "digest": digest(
            [embeddings.encoder, plan.kind, inputs, quantizer_sha256, [shard["files"] for shard in shards]]
        ),
    }
    return finish(settings, INDEX_RECORD, inputs, results, storage)


def describe(plan: IndexPlan, num_vectors: int, dimension: int) -> str:
    lists = f", {plan.num_lists:,} lists" if plan.num_lists else ""
    return (
        f"index: {num_vectors:,} vectors of {dimension} dimensions as {plan.kind}{lists} in {plan.num_shards} shard(s) "
        f"({plan.reason}); at most {plan.shard_disk_bytes / 2**20:,.1f} MiB of disk per shard, "
        f"{plan.shard_scan_bytes / 2**20:,.1f} MiB of it scanned"
    )


def _rates_task(settings: IndexSettings, dimension: int) -> dict[str, Any]:
    faiss.omp_set_num_threads(settings.threads_per_task)
    return measure_rates(dimension).to_dict()


def _train(settings: IndexSettings, training: np.ndarray, plan: IndexPlan, device: str, storage: Storage) -> str | None:
    if plan.kind == "flat":
        return None
    uri = join(settings.output, QUANTIZER_FILE)
    if not storage.exists(uri):
        logger.info(f"train: {plan.num_lists:,} centroids on {len(training):,} vectors")
        # Nothing else runs at that time, so the task takes all CPUs of a node.
        threads = num_node_cpus()
        work = [(settings, training, plan, device, threads, uri, storage)]
        for _ in run_units(_train_task, work, num_cpus=threads, num_gpus=int(device == "cuda")):
            pass
    return uri


def _train_task(
    settings: IndexSettings,
    training: np.ndarray,
    plan: IndexPlan,
    device: str,
    threads: int,
    uri: str,
    storage: Storage,
) -> None:
    faiss.omp_set_num_threads(threads)
    write_quantizer(train_quantizer(unit_rows(training), plan, settings.seed, device), uri, storage)


def _build_shards(
    settings: IndexSettings,
    plan: IndexPlan,
    embeddings: Embeddings,
    manifest: Manifest,
    groups: list[list[int]],
    quantizer_uri: str | None,
    device: str,
    storage: Storage,
) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = [{}] * len(groups)
    sizes = [sum(embeddings.num_embedded[p] for p in group) for group in groups]
    progress = Progress("build", sum(sizes), "vectors")
    work = (
        (
            join(settings.output, shard_name(i)),
            embeddings,
            manifest,
            group,
            quantizer_uri,
            device,
            settings.threads_per_task,
            storage,
        )
        for i, group in enumerate(groups)
    )
    for i, record in run_units(_build_task, work, num_cpus=settings.threads_per_task, num_gpus=int(device == "cuda")):
        records[i] = record
        progress.update(sizes[i])
    progress.close()
    return records


def _build_task(
    uri: str,
    embeddings: Embeddings,
    manifest: Manifest,
    partitions: list[int],
    quantizer_uri: str | None,
    device: str,
    threads: int,
    storage: Storage,
) -> dict[str, Any]:
    if storage.exists(join(uri, SHARD_RECORD)):
        record: dict[str, Any] = storage.read_json(join(uri, SHARD_RECORD))
        return record
    faiss.omp_set_num_threads(threads)
    columns = ["id", "key", "uri", *manifest.metadata_columns]
    sources = pa.concat_tables([storage.read_table(manifest.partition_uri(p), columns=columns) for p in partitions])
    quantizer = read_quantizer(quantizer_uri, storage) if quantizer_uri else None
    return build_shard(uri, embeddings, partitions, quantizer, sources.sort_by("id").combine_chunks(), storage, device)


def _measure(
    settings: IndexSettings,
    plan: IndexPlan,
    shards: list[dict[str, Any]],
    quantizer_uri: str | None,
    held_out_ids: np.ndarray,
    held_out: np.ndarray,
    storage: Storage,
) -> dict[str, Any]:
    """Measure recall at `recall_k` of held-out images, without their own vector; find the nprobe that meets the target.

    The first nprobe is the one that probes the lists of the true neighbours, which needs no search. The whole search,
    with quantisation and re-ranking, is then measured at this nprobe, which is raised until it meets the target or
    recall stops rising.
    """
    k = settings.recall_k
    truth, lists, _ = _search_held_out(settings, plan, shards, held_out_ids, held_out, 0, quantizer_uri, storage)
    nprobe, curve = 0, {}
    if quantizer_uri:
        by_nprobe = recall_by_nprobe(read_quantizer(quantizer_uri, storage), held_out, lists)
        nprobe = min(int(np.searchsorted(by_nprobe, settings.recall_target)) + 1, plan.num_lists)
        curve = {
            str(n): round(float(by_nprobe[n - 1]), 6)
            for n in (1 << i for i in range(plan.num_lists.bit_length()))
            if n <= plan.num_lists
        }

    probed_share = {0: 1.0}

    def measure(nprobe: int) -> float:
        found, _, num_probed = _search_held_out(
            settings, plan, shards, held_out_ids, held_out, nprobe, quantizer_uri, storage
        )
        probed_share[nprobe] = num_probed / (len(held_out) * sum(record["num_vectors"] for record in shards))
        return recall(found, truth)

    measured = 1.0
    if quantizer_uri:
        nprobe, measured = smallest_nprobe(measure, nprobe, plan.num_lists, settings.recall_target)
    result = {
        "nprobe": nprobe,
        "k": k,
        "recall": round(measured, 6),
        "target": settings.recall_target,
        "met": measured >= settings.recall_target,
        "num_held_out": len(held_out),
        "num_searches": len(probed_share),  # of all shards, the exact one included
        "probed_share": round(probed_share[nprobe], 6),  # of all vectors
        "rerank_factor": settings.rerank_factor,
        "list_recall_by_nprobe": curve,
    }
    where = f"nprobe {nprobe} of {plan.num_lists:,}" if plan.num_lists else "exact search"
    logger.info(
        f"recall@{k} {measured:.4f} of exact search at {where}, {len(held_out):,} held-out images "
        f"(target {settings.recall_target:g})"
    )
    if not result["met"]:
        logger.warning(
            f"the recall target is out of reach with rerank_factor = {settings.rerank_factor}: raise it, or pq_bytes"
        )
    return result


def _search_held_out(
    settings: IndexSettings,
    plan: IndexPlan,
    shards: list[dict[str, Any]],
    ids: np.ndarray,
    vectors: np.ndarray,
    nprobe: int,
    quantizer_uri: str | None,
    storage: Storage,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Search all shards for the held-out images. nprobe: 0 for exact search.

    Returns their neighbours int64 [n, k], -1 where there are fewer, the lists of these, and the number of probed
    vectors.
    """
    work = ((settings, plan, i, record, vectors, nprobe, quantizer_uri, storage) for i, record in enumerate(shards))
    found = [result for _, result in run_units(_search_held_out_task, work, num_cpus=settings.threads_per_task)]
    compressed = bool(nprobe) and plan.is_compressed
    best = merge(
        [result[0] for result in found], settings.recall_k + 1, _num_candidates(settings) if compressed else None
    )
    neighbours = without_self(ids, best.query, best.id, settings.recall_k)
    pairs = np.concatenate([result[1] for result in found])
    pairs = pairs[np.argsort(pairs[:, 0])]
    at = np.minimum(np.searchsorted(pairs[:, 0], neighbours), len(pairs) - 1)
    return neighbours, np.where(neighbours >= 0, pairs[at, 1], -1), sum(result[2] for result in found)


def _search_held_out_task(
    settings: IndexSettings,
    plan: IndexPlan,
    shard: int,
    record: dict[str, Any],
    queries: np.ndarray,
    nprobe: int,
    quantizer_uri: str | None,
    storage: Storage,
) -> tuple[Candidates, np.ndarray, int]:
    """Return candidates, int64 [m, 2] (id, list) of each candidate, and how many vectors were probed."""
    faiss.omp_set_num_threads(settings.threads_per_task)
    quantizer = read_quantizer(quantizer_uri, storage) if quantizer_uri else None
    with scratch_folder() as folder:
        opened = open_shard(join(settings.output, shard_name(shard)), record, storage, folder, quantizer)
        compressed = bool(nprobe) and plan.is_compressed
        candidates = search_shard(opened, queries, settings.recall_k + 1, _num_candidates(settings), nprobe, compressed)
        ids = np.unique(candidates.id)
        if quantizer is None or opened.offsets is None:
            return candidates, np.stack([ids, np.zeros_like(ids)], axis=1), len(queries) * len(opened.ids)
        lists = np.searchsorted(opened.offsets, opened.positions_of(ids), side="right") - 1
        num_probed = np.diff(opened.offsets)[nearest_lists(quantizer, queries, max(nprobe, 1))].sum()
    return candidates, np.stack([ids, lists], axis=1), int(num_probed)


def _num_candidates(settings: IndexSettings) -> int:
    return (settings.recall_k + 1) * settings.rerank_factor
