"""The attribute job: every shard against every block of queries, then an exact merge per block.

A search task opens one shard and works through blocks of queries one at a time, so that neither the index nor the batch has to fit a machine.
Its finds are published per (block, shard); a merge task per block reads them and writes the final rows.
"""

import sys

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from attrib.attribution import (
    RECORD,
    RunStamp,
    attribution_rows,
    block_name,
    block_queries,
    partial_table,
    partial_uri,
    read_partial,
    read_sources,
)
from attrib.distributed.sampling import sample_vectors
from attrib.distributed.session import connect, num_cluster_cpus, num_cluster_gpus
from attrib.distributed.tasks import run_units
from attrib.errors import AttribError, FailedShareError
from attrib.index import Index, check_same_encoder, open_index, open_shard, unit_rows
from attrib.manifest import Manifest, open_manifest
from attrib.planning import group_partitions
from attrib.progress import Progress
from attrib.recall import recall
from attrib.records import begin, finish, run_identity
from attrib.search import Candidates, keep_candidates, merge, ranks, search_shard
from attrib.settings import AttributeSettings
from attrib.storage import Storage, join, scratch_folder
from attrib.vectors import Embeddings, open_embeddings, read_vectors


def run(settings: AttributeSettings) -> dict:
    """Attribute every query and return the record. Raises MismatchError unless queries and index come from the same encoder."""
    storage = Storage(settings.storage)
    index = open_index(settings.index, storage)
    queries = open_embeddings(settings.queries, storage)
    check_same_encoder(index, queries)
    manifest = open_manifest(queries.manifest_uri, storage)
    job = AttributionJob(settings, index, queries, manifest)
    inputs = {
        "index": index.digest,
        "queries": queries.digest,
        "query_rows": manifest.rows_digest,
        # An index may be measured again and store another nprobe with the same shards.
        "nprobe": job.nprobe,
        "num_candidates": job.num_candidates,
    }
    record = begin(settings, RECORD, inputs, storage)
    if record:
        return record
    connect(settings.ray)
    job.use_gpu = _use_gpu(settings)
    job_stamp = RunStamp(
        settings.run_id or run_identity(settings, inputs)[:16], index.encoder["model_digest"], index.digest
    )
    blocks = group_partitions(queries.num_rows, settings.query_block_rows)
    print(
        f"attribute: {sum(queries.num_rows):,} queries in {len(blocks)} block(s) against {index.num_vectors:,} vectors in {len(index.shards)} "
        f"shard(s), {index.kind}"
        + (f", nprobe {job.nprobe}" if job.nprobe else "")
        + (", on GPUs" if job.use_gpu else ", on CPUs"),
        file=sys.stderr,
    )
    _search(job, blocks, storage)
    counts = _merge(job, blocks, job_stamp, storage)
    num_queries, num_failed = sum(c["num_queries"] for c in counts), sum(c["num_failed"] for c in counts)
    if num_failed > settings.max_failed_share * num_queries:
        raise FailedShareError(
            f"{num_failed:,} of {num_queries:,} queries could not be embedded, more than max_failed_share = {settings.max_failed_share:g}; "
            f"see {join(queries.uri, 'failures.parquet')}"
        )
    results = {
        "run_id": job_stamp.run_id,
        "num_queries": num_queries,
        "num_attributed": num_queries - num_failed,
        "num_failed": num_failed,
        "num_rows": sum(c["num_rows"] for c in counts),
        "num_blocks": len(blocks),
        "nprobe": job.nprobe,
        "num_candidates": job.num_candidates,
        "model": index.encoder,
        "index_digest": index.digest,
        "index_recall": index.recall,
        "batch_recall": _check_recall(job, blocks, storage),
    }
    storage.delete_folder(join(settings.output, "_partials"))
    return finish(settings, RECORD, inputs, results, storage)


def _use_gpu(settings: AttributeSettings) -> bool:
    if settings.device == "cuda" and not num_cluster_gpus():
        raise AttribError(
            "attribute.device is 'cuda' but the cluster has no GPU; use 'auto' or 'cpu', or start GPU workers"
        )
    return settings.device != "cpu" and num_cluster_gpus() > 0


class AttributionJob:
    """What every task of a run needs to know."""

    def __init__(self, settings: AttributeSettings, index: Index, queries: Embeddings, manifest: Manifest):
        self.settings, self.index, self.queries, self.manifest = settings, index, queries, manifest
        self.nprobe = settings.nprobe or index.nprobe
        self.num_candidates = settings.top_k * (settings.rerank_factor or index.rerank_factor)
        self.use_gpu = False  # known once the cluster is joined

    def read_block(self, partitions: list[int], storage: Storage) -> tuple[np.ndarray, np.ndarray]:
        """ids int64 [n] ascending and unit vectors float32 [n, d] of the block's queries that have one."""
        parts = [read_vectors(self.queries, p, storage) for p in partitions]
        ids = np.concatenate([ids for ids, _ in parts])
        order = np.argsort(ids)
        return ids[order], unit_rows(np.concatenate([vectors for _, vectors in parts])[order])


def _search(job: AttributionJob, blocks: list[list[int]], storage: Storage) -> None:
    finished = set(storage.names(join(job.settings.output, "outcomes"), suffix=".parquet"))
    pending = [b for b in range(len(blocks)) if block_name(b) not in finished]
    if not pending:
        return
    # Few shards: share out the blocks as well, or workers would idle; many shards: open each only once.
    num_groups = min(len(pending), max(1, -(-2 * num_cluster_cpus() // len(job.index.shards))))
    units = [
        (job, shard, group.tolist(), blocks, storage)
        for shard in range(len(job.index.shards))
        for group in np.array_split(pending, num_groups)
    ]
    progress = Progress(
        "search",
        sum(sum(job.queries.num_rows[p] for p in blocks[b]) for _, _, group, _, _ in units for b in group),
        "query-shard pairs",
    )
    for i, _ in run_units(
        _search_task,
        units,
        num_cpus=job.settings.threads_per_task,
        num_gpus=int(job.use_gpu),
        memory_bytes=job.index.shard_memory_bytes,
    ):
        progress.update(sum(sum(job.queries.num_rows[p] for p in blocks[b]) for b in units[i][2]))
    progress.close()


def _search_task(job: AttributionJob, shard: int, group: list[int], blocks: list[list[int]], storage: Storage) -> None:
    pending = [b for b in group if not storage.exists(partial_uri(job.settings.output, b, shard))]
    if not pending:
        return
    faiss.omp_set_num_threads(job.settings.threads_per_task)
    with scratch_folder() as folder:
        opened = open_shard(job.index.shard_uri(shard), job.index.shards[shard], storage, folder)
        for block in pending:
            ids, vectors = job.read_block(blocks[block], storage)
            candidates = search_shard(
                opened,
                vectors,
                job.settings.top_k,
                job.num_candidates,
                job.nprobe,
                job.index.is_compressed,
                job.use_gpu,
            )
            storage.write_table(partial_uri(job.settings.output, block, shard), partial_table(candidates, ids))


def _merge(job: AttributionJob, blocks: list[list[int]], stamp: RunStamp, storage: Storage) -> list[dict]:
    counts: list[dict] = [{}] * len(blocks)
    progress = Progress("merge", sum(job.queries.num_rows), "queries")
    for i, count in run_units(
        _merge_task, ((job, b, partitions, stamp, storage) for b, partitions in enumerate(blocks))
    ):
        counts[i] = count
        progress.update(count["num_queries"], count["num_failed"])
    progress.close()
    return counts


def _merge_task(job: AttributionJob, block: int, partitions: list[int], stamp: RunStamp, storage: Storage) -> dict:
    rows_uri = join(job.settings.output, "attributions", block_name(block))
    outcomes_uri = join(job.settings.output, "outcomes", block_name(block))
    if not storage.exists(outcomes_uri):
        queries = block_queries(job.queries, job.manifest, partitions, storage)
        query_ids = queries["id"].to_numpy()
        best = _merge_shards(job, block, query_ids, storage)
        sources = read_sources(job.index, best.id, storage)
        attributions, outcomes = attribution_rows(
            best, queries, sources, job.settings.top_k, job.settings.shares, stamp
        )
        storage.write_table(rows_uri, attributions)
        # The outcomes come last: they say that the block is done.
        storage.write_table(outcomes_uri, outcomes)
    status = storage.read_table(outcomes_uri, columns=["status"])["status"]
    num_failed = int(np.sum(status.to_numpy(zero_copy_only=False) == "failed"))
    filesystem, path = storage.resolve(rows_uri)
    num_rows = pa.parquet.read_metadata(path, filesystem=filesystem).num_rows
    return {"num_queries": len(status), "num_failed": num_failed, "num_rows": num_rows}


def _merge_shards(job: AttributionJob, block: int, query_ids: np.ndarray, storage: Storage) -> Candidates:
    """One shard at a time, so that memory does not grow with their number."""
    num_candidates = job.num_candidates if job.index.is_compressed else None
    kept: list[Candidates] = []
    for shard in range(len(job.index.shards)):
        found = read_partial(storage.read_table(partial_uri(job.settings.output, block, shard)), query_ids)
        if num_candidates is None:
            kept = [merge([*kept, found], job.settings.top_k)]
        else:
            kept = [keep_candidates([*kept, found], num_candidates)]
    return merge(kept, job.settings.top_k, num_candidates)


def _check_recall(job: AttributionJob, blocks: list[list[int]], storage: Storage) -> dict | None:
    """Recall of this batch's own queries against exact search: generated images may lie where held-out sources do not."""
    wanted, k = job.settings.recall_check_queries, job.settings.top_k
    if not wanted or job.index.kind == "flat" or not sum(job.queries.num_embedded):
        return None
    ids, vectors = sample_vectors(job.queries, wanted, storage)
    order = np.argsort(ids)
    ids, queries = ids[order], unit_rows(vectors[order])
    work = ((job, shard, queries, storage) for shard in range(len(job.index.shards)))
    exact_finds = run_units(_exact_task, work, num_cpus=job.settings.threads_per_task)
    truth = merge([found for _, found in exact_finds], k)
    uris = [join(job.settings.output, "attributions", block_name(block)) for block in range(len(blocks))]
    rows = storage.dataset(uris, format="parquet").to_table(
        columns=["query_id", "rank", "source_id"], filter=pc.field("query_id").isin(ids)
    )
    found = np.full((len(ids), k), -1, np.int64)
    found[np.searchsorted(ids, rows["query_id"].to_numpy()), rows["rank"].to_numpy() - 1] = rows["source_id"].to_numpy()
    exact = np.full((len(ids), k), -1, np.int64)
    exact[truth.query, ranks(truth.query)] = truth.id
    measured = recall(found, exact)
    print(f"recall@{k} {measured:.4f} of exact search on {len(ids)} queries of this batch", file=sys.stderr)
    return {"k": k, "recall": round(measured, 6), "num_queries": len(ids)}


def _exact_task(job: AttributionJob, shard: int, queries: np.ndarray, storage: Storage):
    faiss.omp_set_num_threads(job.settings.threads_per_task)
    with scratch_folder() as folder:
        opened = open_shard(job.index.shard_uri(shard), job.index.shards[shard], storage, folder)
        opened.lists = None
        return search_shard(opened, queries, job.settings.top_k, job.num_candidates, 0, False)
