"""The index job: sample, train one template, fill shards in parallel, measure recall on held-out vectors, publish."""

import sys

import faiss
import numpy as np
import pyarrow as pa

from attrib.config import digest
from attrib.distributed.sampling import sample_vectors
from attrib.distributed.session import connect
from attrib.distributed.tasks import run_units
from attrib.errors import AttribError
from attrib.index import (
    RECORD,
    SHARD_RECORD,
    TEMPLATE,
    build_shard,
    open_shard,
    read_index,
    shard_name,
    train_template,
    unit_rows,
    write_index,
)
from attrib.manifest import Manifest, open_manifest
from attrib.planning import IndexPlan, group_partitions, plan_index
from attrib.progress import Progress
from attrib.recall import recall, recall_by_nprobe, smallest_nprobe, without_self
from attrib.records import begin, finish
from attrib.search import Candidates, merge, search_shard
from attrib.settings import IndexSettings
from attrib.storage import Storage, join, scratch_folder
from attrib.vectors import Embeddings, open_embeddings

MAX_HELD_OUT_SHARE = 0.2


def run(settings: IndexSettings) -> dict:
    """Build the index and return its record. Raises AttribError if there is nothing to index or no kind fits the memory of a worker."""
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
    record = begin(settings, RECORD, inputs, storage)
    if record:
        return record
    print(describe(plan, num_vectors, embeddings.dimension), file=sys.stderr)
    connect(settings.ray)

    held_out_rows = min(settings.held_out_rows, max(1, int(MAX_HELD_OUT_SHARE * num_vectors)))
    training_rows = settings.training_rows if plan.kind != "flat" else 0
    sample_ids, sample = sample_vectors(embeddings, held_out_rows + training_rows, storage)
    held_out_ids, held_out = sample_ids[:held_out_rows], unit_rows(sample[:held_out_rows])
    template_uri = _train(settings, sample[held_out_rows:], plan, storage)
    shards = _build_shards(settings, plan, embeddings, manifest, groups, template_uri, storage)
    measured = _measure(settings, plan, shards, template_uri, held_out_ids, held_out, storage)
    results = {
        "encoder": embeddings.encoder,
        "metric": "cosine",
        "plan": plan.to_dict(),
        "is_compressed": plan.is_compressed,
        "num_vectors": num_vectors,
        "metadata_columns": manifest.metadata_columns,
        "nprobe": measured["nprobe"],
        "recall": measured,
        "shards": shards,
        "digest": digest([embeddings.encoder, plan.kind, inputs, [shard["files"] for shard in shards]]),
    }
    return finish(settings, RECORD, inputs, results, storage)


def describe(plan: IndexPlan, num_vectors: int, dimension: int) -> str:
    lists = f", {plan.num_lists:,} lists" if plan.num_lists else ""
    return (
        f"index: {num_vectors:,} vectors of {dimension} dimensions as {plan.kind}{lists} in {plan.num_shards} shard(s) ({plan.reason}); "
        f"at most {plan.shard_memory_bytes / 2**20:,.1f} MiB of memory and {plan.shard_disk_bytes / 2**20:,.1f} MiB of disk a shard"
    )


def _train(settings: IndexSettings, training: np.ndarray, plan: IndexPlan, storage: Storage) -> str | None:
    if plan.kind == "flat":
        return None
    uri = join(settings.output, TEMPLATE)
    if not storage.exists(uri):
        print(f"train: {plan.num_lists:,} centroids on {len(training):,} vectors", file=sys.stderr)
        for _ in run_units(_train_task, [(settings, training, plan, uri, storage)], num_cpus=settings.threads_per_task):
            pass
    return uri


def _train_task(settings: IndexSettings, training: np.ndarray, plan: IndexPlan, uri: str, storage: Storage) -> None:
    faiss.omp_set_num_threads(settings.threads_per_task)
    write_index(train_template(unit_rows(training), plan, settings.seed), uri, storage)


def _build_shards(
    settings: IndexSettings,
    plan: IndexPlan,
    embeddings: Embeddings,
    manifest: Manifest,
    groups: list[list[int]],
    template_uri: str | None,
    storage: Storage,
) -> list[dict]:
    records: list[dict] = [{}] * len(groups)
    sizes = [sum(embeddings.num_embedded[p] for p in group) for group in groups]
    progress = Progress("build", sum(sizes), "vectors")
    work = (
        (
            join(settings.output, shard_name(i)),
            embeddings,
            manifest,
            group,
            template_uri,
            settings.threads_per_task,
            storage,
        )
        for i, group in enumerate(groups)
    )
    for i, record in run_units(
        _build_task, work, num_cpus=settings.threads_per_task, memory_bytes=plan.shard_memory_bytes
    ):
        records[i] = record
        progress.update(sizes[i])
    progress.close()
    return records


def _build_task(
    uri: str,
    embeddings: Embeddings,
    manifest: Manifest,
    partitions: list[int],
    template_uri: str | None,
    threads: int,
    storage: Storage,
) -> dict:
    if storage.exists(join(uri, SHARD_RECORD)):
        return storage.read_json(join(uri, SHARD_RECORD))
    faiss.omp_set_num_threads(threads)
    columns = ["id", "key", "uri", *manifest.metadata_columns]
    sources = pa.concat_tables([storage.read_table(manifest.partition_uri(p), columns=columns) for p in partitions])
    return build_shard(uri, embeddings, partitions, template_uri, sources.sort_by("id").combine_chunks(), storage)


def _measure(
    settings: IndexSettings,
    plan: IndexPlan,
    shards: list[dict],
    template_uri: str | None,
    held_out_ids: np.ndarray,
    held_out: np.ndarray,
    storage: Storage,
) -> dict:
    """Recall at `recall_k` of held-out images (their own vector left out), and the smallest nprobe that reaches the target.

    The nprobe at which the true neighbours' lists are probed is found first, without searching; then the whole search, quantisation and re-ranking
    included, is measured there, and nprobe is raised until it meets the target or gains nothing more.
    """
    k = settings.recall_k
    truth, lists = _search_held_out(settings, shards, held_out_ids, held_out, None, template_uri, storage)
    nprobe, curve = 0, {}
    if template_uri:
        by_nprobe = recall_by_nprobe(read_index(template_uri, storage), held_out, lists)
        nprobe = min(int(np.searchsorted(by_nprobe, settings.recall_target)) + 1, plan.num_lists)
        curve = {
            str(n): round(float(by_nprobe[n - 1]), 6)
            for n in (1 << i for i in range(plan.num_lists.bit_length()))
            if n <= plan.num_lists
        }

    def measure(nprobe: int) -> float:
        found, _ = _search_held_out(settings, shards, held_out_ids, held_out, nprobe, None, storage)
        return recall(found, truth)

    nprobe, measured = smallest_nprobe(measure, nprobe, plan.num_lists, settings.recall_target)
    result = {
        "nprobe": nprobe,
        "k": k,
        "recall": round(measured, 6),
        "target": settings.recall_target,
        "met": measured >= settings.recall_target,
        "num_held_out": len(held_out),
        "rerank_factor": settings.rerank_factor,
        "list_recall_by_nprobe": curve,
    }
    where = f"nprobe {nprobe} of {plan.num_lists:,}" if plan.num_lists else "exact search"
    print(
        f"recall@{k} {measured:.4f} of exact search at {where}, {len(held_out):,} held-out images (target {settings.recall_target:g})",
        file=sys.stderr,
    )
    if not result["met"]:
        print(
            f"WARNING: the recall target is out of reach with rerank_factor = {settings.rerank_factor}: raise it, or pq_bytes",
            file=sys.stderr,
        )
    return result


def _search_held_out(
    settings: IndexSettings,
    shards: list[dict],
    ids: np.ndarray,
    vectors: np.ndarray,
    nprobe: int | None,
    template_uri: str | None,
    storage: Storage,
) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours int64 [n, k] of the held-out images, and their lists if template_uri is given. nprobe None: exact search."""
    work = ((settings, i, record, vectors, nprobe, template_uri, storage) for i, record in enumerate(shards))
    found = [result for _, result in run_units(_search_held_out_task, work, num_cpus=settings.threads_per_task)]
    compressed = nprobe is not None and any(result[2] for result in found)
    best = merge(
        [result[0] for result in found], settings.recall_k + 1, _num_candidates(settings) if compressed else None
    )
    neighbours = without_self(ids, best.query, best.id, settings.recall_k)
    if not template_uri:
        return neighbours, np.empty(0)
    pairs = np.concatenate([result[1] for result in found])
    pairs = pairs[np.argsort(pairs[:, 0])]
    at = np.minimum(np.searchsorted(pairs[:, 0], neighbours), len(pairs) - 1)
    return neighbours, np.where(neighbours >= 0, pairs[at, 1], -1)


def _search_held_out_task(
    settings: IndexSettings,
    shard: int,
    record: dict,
    queries: np.ndarray,
    nprobe: int | None,
    template_uri: str | None,
    storage: Storage,
) -> tuple[Candidates, np.ndarray, bool]:
    """Candidates, int64 [m, 2] (id, list) of each candidate if template_uri is given, and whether scan scores are of codes."""
    faiss.omp_set_num_threads(settings.threads_per_task)
    with scratch_folder() as folder:
        opened = open_shard(join(settings.output, shard_name(shard)), record, storage, folder)
        if nprobe is None:
            opened.lists = None
        compressed = opened.lists is not None and not isinstance(opened.lists, faiss.IndexIVFFlat)
        candidates = search_shard(
            opened, queries, settings.recall_k + 1, _num_candidates(settings), nprobe or 0, compressed
        )
        lists = np.empty((0, 2), np.int64)
        if template_uri:
            found = np.unique(candidates.id)
            vectors = unit_rows(opened.vectors[np.searchsorted(opened.ids, found)])
            # The template must outlive its quantizer: the latter is a borrowed pointer, and Python would free the index before the call.
            template = read_index(template_uri, storage)
            lists = np.stack([found, template.quantizer.assign(vectors, 1)[:, 0]], axis=1)
    return candidates, lists, compressed


def _num_candidates(settings: IndexSettings) -> int:
    return (settings.recall_k + 1) * settings.rerank_factor
