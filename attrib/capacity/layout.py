"""How the jobs divide a number of images (partitions, chunks, shards, blocks), and the tasks and files that follow.

tests/integration/test_capacity_counts.py compares these counts with a real run.
"""

from dataclasses import dataclass
from enum import StrEnum
from math import lcm

import numpy as np

from attrib.attribute.blocks import MIN_BLOCK_ROWS, USUAL_BLOCKS
from attrib.attribute.estimate import AttributeTask
from attrib.capacity.settings import Constants, TargetSettings
from attrib.common.storage import PARQUET_ROW_GROUP_ROWS
from attrib.data.estimate import ManifestTask
from attrib.embed.estimate import EmbedTask
from attrib.index.estimate import IndexTask, describe_parts, probe_groups, shard_parts
from attrib.index.planning import plan_index, training_rows
from attrib.index.settings import IndexSettings

NUMPY_HEADER_BYTES = 128
PARTIALS = "attributions/_partials/block-#/shard-#.parquet"
EMBED_BLOCKS = 10_000  # largest number of blocks that the embed job gives to Ray Data


@dataclass(frozen=True)
class Cut:
    """One collection: listed units, partitions and chunks. num_slices: pieces of listings that form the partitions."""

    num_images: int
    num_units: int
    num_partitions: int
    num_chunks: int
    num_slices: int


@dataclass(frozen=True)
class Layout:
    """The division of sources, queries and index. num_candidates: rows per (query, shard) pair in a partial file."""

    sources: Cut
    queries: Cut
    num_shards: int
    shard_vectors: int  # vectors of the largest shard
    worker_memory_bytes: int  # held by a search task besides memory-mapped files: centroids and a block of queries
    num_blocks: int
    num_query_slices: int  # pieces of query partitions that form the blocks
    training_rows: int
    kind: str
    num_lists: int
    code_bytes: int
    num_candidates: int

    @property
    def shares_lists(self) -> bool:
        """Whether the probed lists of the queries are computed once, before all shards are searched."""
        return self.num_lists > 0 and self.num_shards > 1


def cut_collection(num_images: int, target: TargetSettings) -> Cut:
    partitions, rest = divmod(num_images, target.partition_rows)
    chunks = partitions * _ceil(target.partition_rows, target.chunk_rows) + _ceil(rest, target.chunk_rows)
    units, slices = _ceil(num_images, target.unit_rows), _slices(num_images, target.unit_rows, target.partition_rows)
    return Cut(num_images, units, partitions + bool(rest), chunks, slices)


def group_count(num_images: int, partition_rows: int, rows_per_group: int) -> tuple[int, int]:
    """Number of groups and images of the largest group, as `attrib.index.planning.group_partitions` forms them."""
    full, rest = divmod(num_images, partition_rows)
    per_group = max(1, rows_per_group // partition_rows)
    groups = _ceil(full, per_group)
    in_last = (full - (groups - 1) * per_group) * partition_rows if groups else 0
    largest = min(full, per_group) * partition_rows
    if rest and groups and in_last + rest <= rows_per_group:
        return groups, max(largest, in_last + rest)
    return groups + bool(rest), max(largest, rest)


def lay_out(target: TargetSettings) -> Layout:
    """The division of `target`. Raises AttribError if no kind of index fits the memory of a worker."""
    num_shards, largest = group_count(target.num_sources, target.partition_rows, target.shard_rows)
    shared = ("kind", "shard_rows", "worker_memory_gib", "num_lists", "pq_bytes", "training_rows")
    settings = IndexSettings(embeddings="/", output="/", **{name: getattr(target, name) for name in shared})
    # As attrib.attribute.blocks.plan_blocks divides the queries.
    wanted_rows = min(target.query_block_rows, max(MIN_BLOCK_ROWS, _ceil(target.num_queries, USUAL_BLOCKS)))
    block_rows = _ceil(target.num_queries, _ceil(target.num_queries, wanted_rows))
    block_bytes = 4 * target.dimension * min(target.query_block_rows, target.num_queries)
    plan = plan_index(settings, target.num_sources, [largest], target.dimension)
    return Layout(
        sources=cut_collection(target.num_sources, target),
        queries=cut_collection(target.num_queries, target),
        num_shards=num_shards,
        shard_vectors=largest,
        worker_memory_bytes=plan.template_bytes + block_bytes,
        num_blocks=_ceil(target.num_queries, block_rows),
        num_query_slices=_slices(target.num_queries, target.partition_rows, block_rows),
        training_rows=training_rows(settings, plan),
        kind=plan.kind,
        num_lists=plan.num_lists,
        code_bytes={"ivf_sq8": target.dimension, "ivf_pq": plan.pq_bytes}.get(plan.kind, 0),
        num_candidates=target.top_k * (target.rerank_factor if plan.is_compressed else 1),
    )


def task_counts(layout: Layout, target: TargetSettings, num_cpus: int) -> dict[str, dict[StrEnum, int]]:
    """Tasks of every job, by the folder of the job's output and by the kinds that `num_tasks` of its record counts."""
    shards, blocks = layout.num_shards, layout.num_blocks
    passes = target.num_recall_passes if layout.num_lists else 0
    probes = layout.shares_lists or num_checked(layout, target)
    # Shards of an unfilled last round are searched in parts (attrib.index.estimate.shard_parts).
    rest = shards % num_cpus
    counts: dict[str, dict[StrEnum, int]] = {
        "index": {
            IndexTask.SAMPLE: layout.sources.num_partitions,
            IndexTask.TRAIN: int(layout.num_lists > 0),
            IndexTask.BUILD: shards,
            IndexTask.RECALL: shards * (1 + passes),
            IndexTask.RATES: 1,
        },
        "attributions": {
            AttributeTask.PROBE: probe_groups(blocks, layout.queries.num_images, num_cpus) if probes else 0,
            AttributeTask.SEARCH: shards - rest + sum(min(parts, blocks) for parts in shard_parts(rest, num_cpus)),
            AttributeTask.MERGE: blocks,
            AttributeTask.DESCRIBE: shards * describe_parts(shards),
            AttributeTask.WRITE: blocks,
        },
    }
    for role, cut in (("sources", layout.sources), ("generated", layout.queries)):
        counts[f"{role}/manifest"] = {ManifestTask.LIST: cut.num_units, ManifestTask.PARTITION: cut.num_partitions}
        counts[f"{role}/embeddings"] = {EmbedTask.CHUNK: cut.num_chunks, EmbedTask.PARTITION: cut.num_partitions}
    return counts


def num_checked(layout: Layout, target: TargetSettings) -> int:
    """Queries that are also searched exactly, to measure recall."""
    return min(target.recall_check_queries, layout.queries.num_images) if layout.num_lists else 0


@dataclass(frozen=True)
class Files:
    """Files of one kind. kept: False for temporary files, which the job deletes at its end."""

    num_files: int
    num_bytes: float
    kept: bool = True


def file_counts(layout: Layout, target: TargetSettings, constants: Constants) -> dict[str, Files]:
    """Data files by path pattern, with # for every number. Without JSON records and failures.parquet (small)."""
    found: dict[str, Files] = {}

    def table(pattern: str, kind: str, num_files: int, num_rows: int, kept=True, num_ids=0.0, more=0.0) -> None:
        """num_ids: ids that the rows are drawn from, if the id column is not part of the constant."""
        row_bytes, file_bytes = (getattr(constants, f"{kind}_{of}_bytes").value for of in ("row", "file"))
        ids = num_files * id_bytes(num_rows / num_files, num_ids) if num_ids else 0.0
        found[pattern] = Files(num_files, num_rows * row_bytes + num_files * file_bytes + ids + more, kept)

    for role, cut in (("sources", layout.sources), ("generated", layout.queries)):
        images, embeddings = cut.num_images, f"{role}/embeddings"
        vectors = 2.0 * target.dimension * images  # not compressed (attrib.common.storage)
        table(f"{role}/manifest/_listings/unit-#.parquet", "manifest", cut.num_units, images, kept=False)
        table(f"{role}/manifest/part-#.parquet", "manifest", cut.num_partitions, images)
        chunks = f"{embeddings}/_chunks/part-#/rows-#-#.parquet"
        table(chunks, "embedding", cut.num_chunks, images, kept=False, more=vectors)
        table(f"{embeddings}/part-#.parquet", "embedding", cut.num_partitions, images, more=vectors)
    shards, images = layout.num_shards, layout.sources.num_images
    arrays = {"vectors": 2 * target.dimension * images, "ids": 8 * images, "inverse_norms": 4 * images}
    if layout.num_lists:
        found["index/template.faiss"] = Files(1, 4 * target.dimension * layout.num_lists)
        arrays["offsets"] = shards * 8 * (layout.num_lists + 1)
    if layout.code_bytes:
        arrays["codes"] = layout.code_bytes * images
    for name, num_bytes in arrays.items():
        found[f"index/shard-#/{name}.npy"] = Files(shards, num_bytes + shards * NUMPY_HEADER_BYTES)
    table("index/shard-#/sources.parquet", "source", shards, images)
    blocks, queries, temporary = layout.num_blocks, layout.queries.num_images, "attributions/_partials"
    found_rows = queries * shards * min(layout.num_candidates, layout.shard_vectors)
    table(PARTIALS, "partial", blocks * shards, found_rows, kept=False, num_ids=images / shards)
    if checked := num_checked(layout, target):
        num_rows = shards * checked * min(target.top_k, layout.shard_vectors)
        table(f"{temporary}/exact/shard-#.parquet", "partial", shards, num_rows, kept=False, num_ids=images / shards)
    if layout.shares_lists:
        lists = 4.0 * min(target.nprobe, layout.num_lists) * queries + blocks * NUMPY_HEADER_BYTES
        found[f"{temporary}/block-#/lists.npy"] = Files(blocks, lists, kept=False)
    rows, described = queries * min(target.top_k, images), described_sources(layout, target)
    table(f"{temporary}/block-#/merged.parquet", "partial", blocks, rows, kept=False, num_ids=images)
    table(f"{temporary}/block-#/wanted.parquet", "wanted", blocks, described, kept=False)
    pieces = min(blocks * shards * describe_parts(shards), described)
    table(f"{temporary}/block-#/sources-#-#.parquet", "source", pieces, described, kept=False)
    table("attributions/attributions/block-#.parquet", "attribution", blocks, rows)
    table("attributions/outcomes/block-#.parquet", "outcome", blocks, queries)
    return found


def described_sources(layout: Layout, target: TargetSettings) -> int:
    """Rows of source metadata that all blocks need, if every source is found equally often."""
    vectors = layout.sources.num_images
    drawn = layout.queries.num_images * min(target.top_k, vectors) / layout.num_blocks
    return round(layout.num_blocks * vectors * -np.expm1(-drawn / vectors))


def id_bytes(num_rows: float, num_ids: float) -> float:
    """Bytes of a dictionary-encoded Parquet column of ids drawn uniformly from `num_ids` ids."""
    group = min(num_rows, PARQUET_ROW_GROUP_ROWS)
    distinct = num_ids * -np.expm1(-group / num_ids)
    bits = max(1, (max(1, round(distinct)) - 1).bit_length())
    return float(num_rows / group * (8 * distinct + group * bits / 8))


def shard_files(layout: Layout) -> int:
    """Number of arrays of a shard that a search worker opens."""
    return 3 + bool(layout.num_lists) + bool(layout.code_bytes)


def _slices(num_rows: int, piece_rows: int, group_rows: int) -> int:
    """Number of slices: a slice starts where a piece or a group starts."""
    return _ceil(num_rows, piece_rows) + _ceil(num_rows, group_rows) - _ceil(num_rows, lcm(piece_rows, group_rows))


def _ceil(count: int, size: int) -> int:
    return -(-count // size)
