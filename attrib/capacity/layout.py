"""How the jobs divide a number of images (partitions, chunks, shards, blocks), and the tasks and files that follow.

tests/integration/test_capacity_counts.py compares these counts with a real run.
"""

from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from math import lcm

from attrib.attribute.blocks import plan_blocks
from attrib.attribute.estimate import AttributeTask
from attrib.capacity.settings import Constants, TargetSettings
from attrib.data.estimate import ManifestTask
from attrib.embed.estimate import EmbedTask
from attrib.index.estimate import IndexTask, describe_parts, probe_groups, shard_parts
from attrib.index.planning import group_partitions, plan_index, training_rows
from attrib.index.settings import IndexSettings

ID_BYTES = 9.75  # of a source id: 8, and 14 bits of its position in the dictionary of a row group, if all ids differ
TEMPORARY = "attributions/_partials"
PARTIALS = f"{TEMPORARY}/block-#/shard-#.parquet"
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
    def num_found(self) -> int:
        """Number of candidates in all partial files."""
        return self.queries.num_images * self.num_shards * min(self.num_candidates, self.shard_vectors)


def cut_collection(num_images: int, target: TargetSettings) -> Cut:
    """Units, partitions and chunks as `plan_partitions` and `plan_chunks` of attrib.data form them."""
    unit_rows, partition_rows, chunk_rows = target.unit_rows, target.partition_rows, target.chunk_rows
    units, partitions = -(-num_images // unit_rows), -(-num_images // partition_rows)
    full, rest = divmod(num_images, partition_rows)
    chunks = full * -(-partition_rows // chunk_rows) + -(-rest // chunk_rows)
    # A slice starts where a unit or a partition starts.
    slices = units + partitions - -(-num_images // lcm(unit_rows, partition_rows))
    return Cut(num_images, units, partitions, chunks, slices)


def group_count(num_images: int, partition_rows: int, rows_per_group: int) -> tuple[int, int]:
    """Number of groups and images of the largest group, as `group_partitions` forms them."""
    full, rest = divmod(num_images, partition_rows)
    per_group = max(1, rows_per_group // partition_rows)
    alike = max(0, full // per_group - 1)  # full groups before the last partitions
    rows = [partition_rows] * (full - alike * per_group) + [rest]
    last = [sum(rows[p] for p in group) for group in group_partitions(rows, rows_per_group)]
    return alike + len(last), max(last)


@cache
def _block_count(num_queries: int, partition_rows: int, query_block_rows: int) -> tuple[int, int]:
    """Number of query blocks, and of the slices of partitions that form them."""
    rows = [min(partition_rows, num_queries - start) for start in range(0, num_queries, partition_rows)]
    blocks = plan_blocks(rows, query_block_rows)
    return len(blocks), sum(map(len, blocks))


def lay_out(target: TargetSettings) -> Layout:
    """The division of `target`. Raises AttribError if no kind of index fits the memory of a worker."""
    num_shards, largest = group_count(target.num_sources, target.partition_rows, target.shard_rows)
    num_blocks, num_query_slices = _block_count(target.num_queries, target.partition_rows, target.query_block_rows)
    shared = ("kind", "shard_rows", "worker_memory_gib", "num_lists", "pq_bytes", "training_rows")
    settings = IndexSettings(embeddings="/", output="/", **{name: getattr(target, name) for name in shared})
    block_bytes = 4 * target.dimension * min(target.query_block_rows, target.num_queries)
    plan = plan_index(settings, target.num_sources, [largest], target.dimension)
    return Layout(
        sources=cut_collection(target.num_sources, target),
        queries=cut_collection(target.num_queries, target),
        num_shards=num_shards,
        shard_vectors=largest,
        worker_memory_bytes=plan.template_bytes + block_bytes,
        num_blocks=num_blocks,
        num_query_slices=num_query_slices,
        training_rows=training_rows(settings, plan),
        kind=plan.kind,
        num_lists=plan.num_lists,
        code_bytes={"ivf_sq8": target.dimension, "ivf_pq": plan.pq_bytes}.get(plan.kind, 0),
        num_candidates=target.top_k * (target.rerank_factor if plan.is_compressed else 1),
    )


def task_counts(layout: Layout, target: TargetSettings, num_cpus: int) -> dict[str, dict[StrEnum, int]]:
    """Tasks of every job, by the folder of the job's output and by the kinds that `num_tasks` of its record counts."""
    shards, blocks = layout.num_shards, layout.num_blocks
    probes = layout.num_lists > 0 and (shards > 1 or target.recall_check_queries > 0)
    counts: dict[str, dict[StrEnum, int]] = {
        "index": {
            IndexTask.SAMPLE: layout.sources.num_partitions,
            IndexTask.TRAIN: int(layout.num_lists > 0),
            IndexTask.BUILD: shards,
            IndexTask.RECALL: shards * (1 + (target.num_recall_passes if layout.num_lists else 0)),
            IndexTask.RATES: 1,
        },
        "attributions": {
            AttributeTask.PROBE: probe_groups(blocks, layout.queries.num_images, num_cpus) if probes else 0,
            AttributeTask.SEARCH: sum(min(parts, blocks) for parts in shard_parts(shards, num_cpus)),
            AttributeTask.MERGE: blocks,
            AttributeTask.DESCRIBE: shards * describe_parts(shards),
            AttributeTask.WRITE: blocks,
        },
    }
    for role, cut in (("sources", layout.sources), ("generated", layout.queries)):
        counts[f"{role}/manifest"] = {ManifestTask.LIST: cut.num_units, ManifestTask.PARTITION: cut.num_partitions}
        counts[f"{role}/embeddings"] = {EmbedTask.CHUNK: cut.num_chunks, EmbedTask.PARTITION: cut.num_partitions}
    return counts


@dataclass(frozen=True)
class Files:
    """Files of one kind. kept: False for temporary files, which the job deletes at its end."""

    num_files: int
    num_bytes: float
    kept: bool = True


def file_counts(layout: Layout, target: TargetSettings, constants: Constants) -> dict[str, Files]:
    """Data files by path pattern, with # for every number. Without JSON records and failures.parquet (small)."""
    found: dict[str, Files] = {}

    def table(pattern: str, kind: str, num_files: int, num_rows: int, more: float = 0.0) -> None:
        """more: bytes of a row that the constant leaves out."""
        row_bytes, file_bytes = (getattr(constants, f"{kind}_{of}_bytes").value for of in ("row", "file"))
        kept = "/_" not in pattern  # _listings, _chunks and _partials are deleted
        found[pattern] = Files(num_files, num_rows * (row_bytes + more) + num_files * file_bytes, kept)

    vector = 2.0 * target.dimension  # float16, not compressed (attrib.common.storage)
    for role, cut in (("sources", layout.sources), ("generated", layout.queries)):
        table(f"{role}/manifest/_listings/unit-#.parquet", "manifest", cut.num_units, cut.num_images)
        table(f"{role}/manifest/part-#.parquet", "manifest", cut.num_partitions, cut.num_images)
        table(f"{role}/embeddings/_chunks/part-#/rows-#-#.parquet", "embedding", cut.num_chunks, cut.num_images, vector)
        table(f"{role}/embeddings/part-#.parquet", "embedding", cut.num_partitions, cut.num_images, vector)

    shards, images, lists = layout.num_shards, layout.sources.num_images, layout.num_lists
    arrays = {"vectors": vector * images, "ids": 8 * images, "inverse_norms": 4 * images}
    if lists:
        found["index/template.faiss"] = Files(1, 4 * target.dimension * lists)
        arrays["offsets"] = shards * 8 * (lists + 1)
    if layout.code_bytes:
        arrays["codes"] = layout.code_bytes * images
    found |= {f"index/shard-#/{name}.npy": Files(shards, num_bytes) for name, num_bytes in arrays.items()}
    table("index/shard-#/sources.parquet", "source", shards, images)

    blocks, queries, top_k = layout.num_blocks, layout.queries.num_images, target.top_k
    table(PARTIALS, "partial", blocks * shards, layout.num_found, ID_BYTES)
    if lists and target.recall_check_queries:
        rows = shards * min(target.recall_check_queries, queries) * min(top_k, layout.shard_vectors)
        table(f"{TEMPORARY}/exact/shard-#.parquet", "partial", shards, rows, ID_BYTES)
    if lists and shards > 1:  # the probed lists of the queries are computed once, before all shards are searched
        found[f"{TEMPORARY}/block-#/lists.npy"] = Files(blocks, 4.0 * min(target.nprobe, lists) * queries, kept=False)
    rows = queries * min(top_k, images)
    table(f"{TEMPORARY}/block-#/merged.parquet", "partial", blocks, rows, ID_BYTES)
    # Metadata rows of the sources that a block finds, all different unless there are too few.
    described = min(rows, blocks * images)
    table(f"{TEMPORARY}/block-#/wanted.parquet", "wanted", blocks, described)
    pieces = min(blocks * shards * describe_parts(shards), described)
    table(f"{TEMPORARY}/block-#/sources-#-#.parquet", "source", pieces, described)
    table("attributions/attributions/block-#.parquet", "attribution", blocks, rows)
    table("attributions/outcomes/block-#.parquet", "outcome", blocks, queries)
    return found
