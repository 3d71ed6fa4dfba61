"""The attribute job: every shard against every block of queries, then an exact merge per block.

A search task opens one shard and takes all blocks of its group through it at once, so that each list is read once for as many queries as memory
holds. What it finds is published per (block, shard); then, each in tasks of its own: the best of all shards per block, the metadata of their
sources per shard, and the final rows per block. Neither the index nor the batch nor the sources' metadata has to fit a machine, and each is read
a fixed number of times.
"""

import sys

import numpy as np
import pyarrow.compute as pc

from attrib.attribution import (
    RECORD,
    RunStamp,
    block_name,
    block_rows,
    lists_uri,
    partial_table,
    partial_uri,
    read_block,
)
from attrib.distributed.admission import admit
from attrib.distributed.attribution_job import AttributionJob, parts_per_shard, pending_blocks, use_threads
from attrib.distributed.attribution_results import describe_sources, merge_blocks, write_blocks
from attrib.distributed.sampling import sample_vectors
from attrib.distributed.session import connect, device_of, num_cluster_cpus
from attrib.distributed.tasks import run_units
from attrib.errors import FailedShareError
from attrib.estimates import Estimate
from attrib.index import check_same_encoder, open_index, open_shard
from attrib.manifest import open_manifest
from attrib.probing import RowBytes, baseline_bytes, measure_machine, row_bytes
from attrib.progress import Progress
from attrib.recall import recall
from attrib.records import begin, finish, run_identity
from attrib.search import Candidates, merge, probed_lists, ranks, search_shard
from attrib.search_estimates import estimate_attribute, shard_sizes
from attrib.search_plan import plan_search
from attrib.settings import AttributeSettings
from attrib.storage import Storage, is_remote, join, scratch_folder
from attrib.units import unit_rows
from attrib.vectors import open_embeddings

SEARCH_ROWS = 131_072  # queries whose vectors a search task holds at a time
SAMPLED_SOURCES = 4_096  # rows, to see how large they are


def run(settings: AttributeSettings) -> dict:
    """Attribute every query and return the record. Raises MismatchError unless queries and index come from the same encoder."""
    baseline_bytes()
    storage = Storage(settings.storage)
    index = open_index(settings.index, storage)
    queries = open_embeddings(settings.queries, storage)
    check_same_encoder(index, queries)
    manifest = open_manifest(queries.manifest_uri, storage)
    plan = plan_search(index, sum(queries.num_embedded), settings.engine, settings.nprobe)
    job = AttributionJob(settings, index, queries, manifest, plan)
    inputs = {
        "index": index.digest,
        "queries": queries.digest,
        "query_rows": manifest.rows_digest,
        # An index may be measured again and store another nprobe, or other rates, with the same shards.
        "engine": plan.engine,
        "nprobe": plan.nprobe,
        "num_candidates": job.num_candidates,
    }
    record = begin(settings, RECORD, inputs, storage)
    if record:
        return record
    connect(settings.ray)
    job.device = device_of(settings.device, "attribute")
    stamp = RunStamp(
        settings.run_id or run_identity(settings, inputs)[:16], index.encoder["model_digest"], index.digest
    )
    print(job.describe(), file=sys.stderr)
    admitted = admit(_estimate(job, storage), settings)
    _search(job, storage)
    merge_blocks(job, storage)
    describe_sources(job, storage)
    counts = write_blocks(job, stamp, storage)
    num_queries, num_failed = sum(c["num_queries"] for c in counts), sum(c["num_failed"] for c in counts)
    if num_failed > settings.max_failed_share * num_queries:
        raise FailedShareError(
            f"{num_failed:,} of {num_queries:,} queries could not be embedded, more than max_failed_share = {settings.max_failed_share:g}; "
            f"see {join(queries.uri, 'failures.parquet')}"
        )
    results = {
        "run_id": stamp.run_id,
        "num_queries": num_queries,
        "num_attributed": num_queries - num_failed,
        "num_failed": num_failed,
        "num_rows": sum(c["num_rows"] for c in counts),
        "num_blocks": len(job.blocks),
        "engine": plan.engine,
        "engine_reason": plan.reason,
        "nprobe": plan.nprobe,
        "num_candidates": job.num_candidates,
        "model": index.encoder,
        "index_digest": index.digest,
        "index_recall": index.recall,
        "batch_recall": _check_recall(job, storage),
        "estimate": admitted.to_dict(),
    }
    storage.delete_folder(join(settings.output, "_partials"))
    return finish(settings, RECORD, inputs, results, storage)


def _estimate(job: AttributionJob, storage: Storage) -> Estimate:
    settings, index = job.settings, job.index
    num_rows, dimension = max(block_rows(block) for block in job.blocks), job.queries.dimension
    sizes = [shard["num_vectors"] for shard in index.shards]
    sources = storage.read_rows(join(index.shard_uri(0), "sources.parquet"), 0, min(SAMPLED_SOURCES, sizes[0]))
    return estimate_attribute(
        shard_sizes(dimension, index.plan, sizes, num_rows, RowBytes.of(sources)),
        num_queries=sum(job.queries.num_rows),
        queries_together=SEARCH_ROWS,
        block_rows=num_rows,
        top_k=settings.top_k,
        num_candidates=job.num_candidates if job.scans_codes else settings.top_k,
        nprobe=job.plan.nprobe,
        query=row_bytes(job.manifest, storage),
        search_seconds=job.plan.seconds,
        baseline_bytes=baseline_bytes(),
        rates=measure_machine(dimension, settings.threads_per_task),
        num_workers=max(1, num_cluster_cpus() // settings.threads_per_task),
        copies_shards=is_remote(index.uri),
        on_gpus=job.device == "cuda",
    )


def _search(job: AttributionJob, storage: Storage) -> None:
    pending = pending_blocks(job, storage)
    if not pending:
        return
    if job.shares_lists:
        progress = Progress("probe", sum(block_rows(job.blocks[b]) for b in pending), "queries")
        for i, _ in run_units(
            _probe_task, [(job, block, storage) for block in pending], num_cpus=job.settings.threads_per_task
        ):
            progress.update(block_rows(job.blocks[pending[i]]))
        progress.close()
    num_groups = min(len(pending), parts_per_shard(job))
    units = [
        (job, shard, group.tolist(), storage)
        for shard in range(len(job.index.shards))
        for group in np.array_split(pending, num_groups)
    ]
    counts = [sum(block_rows(job.blocks[b]) for b in group) for _, _, group, _ in units]
    progress = Progress("search", sum(counts), "query-shard pairs")
    for i, _ in run_units(
        _search_task, units, num_cpus=job.settings.threads_per_task, num_gpus=int(job.device == "cuda")
    ):
        progress.update(counts[i])
    progress.close()


def _probe_task(job: AttributionJob, block: int, storage: Storage) -> None:
    """Which lists a block's queries probe: found once, and not in every shard again."""
    uri = lists_uri(job.settings.output, block)
    if not storage.exists(uri):
        use_threads(job)
        _, vectors = read_block(job.queries, job.blocks[block], storage)
        storage.write_array(uri, probed_lists(job.index.read_template(storage), vectors, job.plan.nprobe))


def _search_task(job: AttributionJob, shard: int, group: list[int], storage: Storage) -> None:
    pending = [b for b in group if not storage.exists(partial_uri(job.settings.output, b, shard))]
    if not pending:
        return
    use_threads(job)
    with scratch_folder() as folder:
        opened = job.open_shard(shard, storage, folder)
        for together in _batches(job, pending):
            read = [read_block(job.queries, job.blocks[block], storage) for block in together]
            lists = None
            if job.shares_lists:
                lists = np.concatenate([storage.read_array(lists_uri(job.settings.output, b)) for b in together])
            found = search_shard(
                opened,
                np.concatenate([vectors for _, vectors in read]),
                job.settings.top_k,
                job.num_candidates,
                job.plan.nprobe,
                job.scans_codes,
                job.kernel(),
                lists,
            )
            starts = np.cumsum([0, *(len(ids) for ids, _ in read)])
            cuts = np.searchsorted(found.query, starts)
            for i, block in enumerate(together):
                part = found.at(np.arange(cuts[i], cuts[i + 1]))
                part = Candidates(part.query - starts[i], part.id, part.scan_score, part.score)
                storage.write_table(partial_uri(job.settings.output, block, shard), partial_table(part, read[i][0]))


def _batches(job: AttributionJob, blocks: list[int]) -> list[list[int]]:
    """Consecutive blocks of at most SEARCH_ROWS queries together (a larger one stands alone)."""
    batches: list[list[int]] = []
    filled = 0
    for block in blocks:
        rows = block_rows(job.blocks[block])
        if not batches or filled + rows > SEARCH_ROWS:
            batches.append([])
            filled = 0
        batches[-1].append(block)
        filled += rows
    return batches


def _check_recall(job: AttributionJob, storage: Storage) -> dict | None:
    """Recall of this batch's own queries against exact search: generated images may lie where held-out sources do not."""
    wanted, k = job.settings.recall_check_queries, job.settings.top_k
    if not wanted or job.plan.engine == "exact" or not sum(job.queries.num_embedded):
        return None
    ids, vectors = sample_vectors(job.queries, wanted, storage)
    order = np.argsort(ids)
    ids, queries = ids[order], unit_rows(vectors[order])
    work = ((job, shard, queries, storage) for shard in range(len(job.index.shards)))
    exact_finds = run_units(_exact_task, work, num_cpus=job.settings.threads_per_task)
    truth = merge([found for _, found in exact_finds], k)
    uris = [join(job.settings.output, "attributions", block_name(block)) for block in range(len(job.blocks))]
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


def _exact_task(job: AttributionJob, shard: int, queries: np.ndarray, storage: Storage) -> Candidates:
    use_threads(job)
    with scratch_folder() as folder:
        opened = open_shard(job.index.shard_uri(shard), job.index.shards[shard], storage, folder)
        return search_shard(opened, queries, job.settings.top_k, job.num_candidates, 0, False)
