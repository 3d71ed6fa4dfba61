"""The attribute job: search every shard for every block of queries, then merge exactly per block.

1. Probe: find the inverted lists of each query once for all shards, and sample the queries that recall is measured on.
2. Search: a task opens one shard and searches as many blocks at once as memory holds. It writes one file per (block,
   shard), and searches the sampled queries exactly.
3. Merge the candidates per block, read the metadata of sources per shard, write the final rows per block.

Neither the index nor the batch nor the metadata has to fit one machine, and each is read a fixed number of times.
"""

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow.compute as pc

from attrib.attribute.blocks import block_name, block_rows, lists_uri, partial_table, partial_uri, read_partial
from attrib.attribute.estimate import AttributeTask, AttributionWork, estimate_attribute
from attrib.attribute.merge import describe_sources, merge_blocks, write_blocks
from attrib.attribute.rows import ATTRIBUTIONS_RECORD, RunStamp
from attrib.attribute.run import AttributionJob, exact_uri
from attrib.attribute.settings import AttributeSettings
from attrib.common.errors import MAX_EXAMPLES, FailedShareError
from attrib.common.run_record import run_identity, run_once
from attrib.common.scratch import scratch_folder
from attrib.common.storage import Storage, is_remote, join
from attrib.data.estimate import RowBytes, row_bytes
from attrib.data.ids import sampling_rank
from attrib.data.manifest import open_manifest
from attrib.embed.embeddings import FAILURES, open_embeddings
from attrib.generators.identify.files import check_same_images, open_identified
from attrib.index.cost_model import plan_search
from attrib.index.estimate import probe_groups, shard_parts, shard_sizes
from attrib.index.index import check_same_encoder, open_index
from attrib.index.recall import recall
from attrib.index.sampling import lowest_ranked, sampling_rank_limit
from attrib.index.search import merge, probed_lists, ranks, search_shard
from attrib.runtime.admission import admit
from attrib.runtime.estimate import Estimate
from attrib.runtime.machine import baseline_bytes, measure_answers
from attrib.runtime.session import connect, device_of, num_cluster_cpus
from attrib.runtime.tasks import run_all

logger = logging.getLogger(__name__)

SEARCH_ROWS = 131_072  # queries whose vectors a search task holds at a time
SAMPLED_SOURCES = 4_096  # rows whose mean size is measured


def run(settings: AttributeSettings) -> dict[str, Any]:
    """Attribute every query and return the record.

    Raises MismatchError unless queries and index come from the same encoder; FailedShareError if more queries than
    `max_failed_share` have no vector.
    """
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
        # The same shards may be measured again: nprobe and the engine can differ under one digest of the index.
        "engine": plan.engine,
        "nprobe": plan.nprobe,
        "num_candidates": job.num_candidates,
    }
    if settings.generators:
        job.identified = open_identified(settings.generators, storage)
        check_same_images(job.identified, manifest)
        inputs["generators"] = job.identified.digest
    run_id = settings.run_id or run_identity(settings, inputs)[:16]
    stamp = RunStamp(run_id, index.encoder["model_digest"], index.digest)
    return run_once(settings, ATTRIBUTIONS_RECORD, inputs, storage, lambda: _attribute(job, stamp, storage))


def _attribute(job: AttributionJob, stamp: RunStamp, storage: Storage) -> dict[str, Any]:
    """The results of the job, for its record."""
    settings, index, queries, plan = job.settings, job.index, job.queries, job.plan
    connect(settings.ray)
    job.device = device_of(settings.device, "attribute")
    job.num_workers = max(1, num_cluster_cpus() // settings.threads_per_task)
    logger.info(job.describe())
    admitted = admit(_estimate(job, storage), settings)
    checked_ids, checked_vectors = _probe(job, storage)
    _search(job, checked_ids, checked_vectors, storage)
    merge_blocks(job, storage)
    describe_sources(job, storage)
    counts = write_blocks(job, stamp, storage)
    num_queries, num_failed = counts["num_queries"], counts["num_failed"]
    if num_failed > settings.max_failed_share * num_queries:
        uris = [join(settings.output, "outcomes", block_name(block)) for block in range(len(job.blocks))]
        columns = {"key": pc.field("query_key"), "stage": pc.field("stage"), "reason": pc.field("reason")}
        failed = storage.dataset(uris, format="parquet").head(
            MAX_EXAMPLES, columns=columns, filter=pc.field("status") == "failed"
        )
        raise FailedShareError(
            f"{num_failed:,} of {num_queries:,} queries could not be embedded, more than max_failed_share = "
            f"{settings.max_failed_share:g}; e.g. {FailedShareError.examples(failed.to_pylist())}. "
            f"{join(queries.uri, FAILURES)} lists them all; run jobs.embed again with retry_failed=true, or raise "
            "max_failed_share"
        )
    results = {
        "run_id": stamp.run_id,
        "num_queries": num_queries,
        "num_attributed": num_queries - num_failed,
        "num_failed": num_failed,
        "num_rows": counts["num_rows"],
        "sha256": counts["sha256"],
        "num_blocks": len(job.blocks),
        "engine": plan.engine,
        "engine_reason": plan.reason,
        "nprobe": plan.nprobe,
        "num_candidates": job.num_candidates,
        "model": index.encoder,
        "index_digest": index.digest,
        "index_recall": index.recall,
        "batch_recall": _check_recall(job, checked_ids, storage),
        "estimate": admitted.to_dict(),
        "num_tasks": job.num_tasks,
        "num_files": 2 * len(job.blocks),
        "generators": job.identified.summary if job.identified else None,
    }
    storage.delete_folder(join(settings.output, "_partials"))
    return results


def _estimate(job: AttributionJob, storage: Storage) -> Estimate:
    settings, index = job.settings, job.index
    num_rows, dimension = max(block_rows(block) for block in job.blocks), job.queries.dimension
    sizes = [shard["num_vectors"] for shard in index.shards]
    sources = storage.read_rows(index.sources_uri(0, storage), 0, min(SAMPLED_SOURCES, sizes[0]))
    work = AttributionWork(
        num_queries=sum(job.queries.num_rows),
        queries_together=SEARCH_ROWS,
        block_rows=num_rows,
        top_k=settings.top_k,
        num_candidates=job.num_candidates if job.scans_codes else settings.top_k,
        nprobe=job.plan.nprobe,
        query=row_bytes(job.manifest, storage),
        search_seconds=job.plan.seconds,
        check_seconds=plan_search(index, job.num_checked, "exact").seconds if job.num_checked else 0.0,
    )
    return estimate_attribute(
        shard_sizes(dimension, index.plan, sizes, num_rows, RowBytes.of(sources)),
        work,
        baseline_bytes(),
        measure_answers(dimension),
        job.num_workers,
        copies_shards=is_remote(index.uri),
        on_gpus=job.device == "cuda",
    )


def _probe(job: AttributionJob, storage: Storage) -> tuple[np.ndarray, np.ndarray]:
    """Write the lists that each query probes, and sample the queries that recall is measured on.

    Returns ids int64 [n] ascending and unit vectors float32 [n, d] of the sample; n is 0 if recall is not measured.
    """
    wanted = job.num_checked
    # The sample covers finished blocks too, so that a restart draws the same one.
    blocks = range(len(job.blocks)) if wanted else job.pending_blocks(storage) if job.shares_lists else []
    num_groups = probe_groups(len(blocks), sum(block_rows(job.blocks[block]) for block in blocks), job.num_workers)
    groups = [group.tolist() for group in np.array_split(blocks, num_groups)] if num_groups else []
    job.num_tasks[AttributeTask.PROBE] = len(groups)
    if not groups:
        return np.empty(0, np.int64), np.empty((0, job.queries.dimension), np.float32)
    threshold = sampling_rank_limit(wanted, sum(job.queries.num_embedded)) if wanted else None
    units = [(job, group, threshold, storage) for group in groups]
    counts = [sum(block_rows(job.blocks[block]) for block in group) for group in groups]
    found = run_all(_probe_task, units, "probe", "queries", counts, num_cpus=job.settings.threads_per_task)
    ids, vectors = (np.concatenate(column) for column in zip(*found))
    ids, vectors = lowest_ranked(ids, vectors, wanted)
    order = np.argsort(ids)
    return ids[order], vectors[order]


def _probe_task(
    job: AttributionJob, blocks: list[int], threshold: np.uint64 | None, storage: Storage
) -> tuple[np.ndarray, np.ndarray]:
    """Write the lists of the blocks; return ids and unit vectors of queries with a sampling_rank up to `threshold`."""
    job.use_threads()
    read = job.read_blocks(blocks, storage)
    if job.shares_lists and (quantizer := job.index.read_quantizer(storage)) is not None:
        for block, (_, vectors) in zip(blocks, read):
            uri = lists_uri(job.settings.output, block)
            if not storage.exists(uri):
                storage.write_array(uri, probed_lists(quantizer, vectors, job.plan.nprobe))
    ids, vectors = (np.concatenate(column) for column in zip(*read))
    chosen = np.zeros(len(ids), bool) if threshold is None else sampling_rank(ids) <= threshold
    return ids[chosen], vectors[chosen]


def _search(job: AttributionJob, checked_ids: np.ndarray, checked_vectors: np.ndarray, storage: Storage) -> None:
    """Write the candidates of every pending block in every shard.

    The first task of each shard also searches the checked queries exactly.
    """
    pending, units, counts = job.pending_blocks(storage), [], []
    for shard, num_parts in enumerate(shard_parts(len(job.index.shards), job.num_workers)):
        checked = None
        if len(checked_ids) and not storage.exists(exact_uri(job.settings.output, shard)):
            checked = checked_ids, checked_vectors
        for part in np.array_split(pending, min(max(1, len(pending)), num_parts)):
            if len(part) or checked:
                units.append((job, shard, part.tolist(), checked, storage))
                counts.append(sum(block_rows(job.blocks[block]) for block in part))
            checked = None
    job.num_tasks[AttributeTask.SEARCH] = len(units)
    if units:
        resources = {"num_cpus": job.settings.threads_per_task, "num_gpus": int(job.device == "cuda")}
        run_all(_search_task, units, "search", "query-shard pairs", counts, **resources)


def _search_task(
    job: AttributionJob, shard: int, group: list[int], checked: tuple[np.ndarray, np.ndarray] | None, storage: Storage
) -> None:
    """Write the candidates that one shard holds for some blocks, and, unless None, those of the checked queries."""
    output = job.settings.output
    pending = [b for b in group if not storage.exists(partial_uri(output, b, shard))]
    if checked and storage.exists(exact_uri(output, shard)):
        checked = None
    if not pending and not checked:
        return
    widths = job.settings.top_k, job.num_candidates
    job.use_threads()
    with scratch_folder() as folder:
        opened = job.open_shard(shard, storage, folder)
        for together in job.together(pending, SEARCH_ROWS):
            ids_by_block, vectors = zip(*job.read_blocks(together, storage))
            queries, nprobe, lists = np.concatenate(vectors), job.plan.nprobe, None
            if job.shares_lists:
                lists = np.concatenate([storage.read_array(lists_uri(output, b), sealed=True) for b in together])
            found = search_shard(opened, queries, *widths, nprobe, job.scans_codes, job.kernel(), lists)
            starts = np.cumsum([0, *map(len, ids_by_block)])
            cuts = np.searchsorted(found.query, starts)
            for i, (block, ids) in enumerate(zip(together, ids_by_block)):
                part = found.at(slice(cuts[i], cuts[i + 1]))
                part = replace(part, query=part.query - starts[i])
                storage.write_table(partial_uri(output, block, shard), partial_table(part, ids))
        if checked:
            ids, queries = checked
            exact = search_shard(opened, queries, *widths, 0, False, job.kernel())
            storage.write_table(exact_uri(output, shard), partial_table(exact, ids))


def _check_recall(job: AttributionJob, ids: np.ndarray, storage: Storage) -> dict[str, Any] | None:
    """Measure recall on queries of this batch against exact search; None if no query was checked.

    The index was tuned on held-out sources, and generated images may be distributed differently.
    """
    if not len(ids):
        return None
    k, output = job.settings.top_k, job.settings.output
    exact_uris = [exact_uri(output, shard) for shard in range(len(job.index.shards))]
    truth = merge([read_partial(storage.read_sealed(uri), ids) for uri in exact_uris], k)
    uris = [join(output, "attributions", block_name(block)) for block in range(len(job.blocks))]
    rows = storage.dataset(uris, format="parquet").to_table(
        columns=["query_id", "rank", "source_id"], filter=pc.field("query_id").isin(ids)
    )
    found, exact = np.full((2, len(ids), k), -1, np.int64)
    found[np.searchsorted(ids, rows["query_id"].to_numpy()), rows["rank"].to_numpy() - 1] = rows["source_id"].to_numpy()
    exact[truth.query, ranks(truth.query)] = truth.id
    measured = recall(found, exact)
    logger.info(f"recall@{k} {measured:.4f} of exact search on {len(ids)} queries of this batch")
    return {"k": k, "recall": round(measured, 6), "num_queries": len(ids)}
