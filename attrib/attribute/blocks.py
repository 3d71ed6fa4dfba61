"""Blocks of queries, and the partial files of a block: their names and their tables."""

import numpy as np
import pyarrow as pa

from attrib.common.storage import Storage, join
from attrib.data.manifest import Slice, plan_partitions
from attrib.embed.embeddings import Embeddings, read_vectors
from attrib.index.normalize import unit_rows
from attrib.index.search import Candidates

MIN_BLOCK_ROWS = 1_024  # queries that are merged and written together, at least if there are so many


USUAL_BLOCKS = 32


PARTIAL_SCHEMA = pa.schema(
    [("query_id", pa.int64()), ("source_id", pa.int64()), ("scan_score", pa.float32()), ("score", pa.float32())]
)


def block_name(block: int) -> str:
    return f"block-{block:05d}.parquet"


def plan_blocks(num_rows: list[int], query_block_rows: int) -> list[list[Slice]]:
    """Queries in blocks of equal size, as slices of the partitions of `num_rows` images: enough of them to share out, none of too few rows.

    They depend on the batch alone, so that a restart on another cluster finds what was done.
    """
    total = sum(num_rows)
    rows = min(query_block_rows, max(MIN_BLOCK_ROWS, -(-total // USUAL_BLOCKS)))
    num_blocks = max(1, -(-total // rows))
    return plan_partitions(num_rows, max(1, -(-total // num_blocks)))


def block_rows(block: list[Slice]) -> int:
    return sum(part.stop - part.start for part in block)


def lists_uri(output: str, block: int) -> str:
    """The lists that each query probes, the same in every shard: int32 [n, nprobe]."""
    return join(_partials(output, block), "lists.npy")


def partial_uri(output: str, block: int, shard: int) -> str:
    """Candidates of one shard."""
    return join(_partials(output, block), f"shard-{shard:05d}.parquet")


def merged_uri(output: str, block: int) -> str:
    """The best candidates of all shards."""
    return join(_partials(output, block), "merged.parquet")


def wanted_uri(output: str, block: int) -> str:
    """The sources among them, by shard and id."""
    return join(_partials(output, block), "wanted.parquet")


def described_uri(output: str, block: int, shard: int, part: int) -> str:
    """Metadata of (a part of) the sources that lie in one shard."""
    return join(_partials(output, block), f"sources-{shard:05d}-{part:03d}.parquet")


def _partials(output: str, block: int) -> str:
    return join(output, "_partials", f"block-{block:05d}")


def partial_table(candidates: Candidates, query_ids: np.ndarray) -> pa.Table:
    columns = [query_ids[candidates.query], candidates.id, candidates.scan_score, candidates.score]
    return pa.table([pa.array(column) for column in columns], schema=PARTIAL_SCHEMA)


def read_partial(table: pa.Table, query_ids: np.ndarray) -> Candidates:
    """query_ids: int64 [n] ascending, all queries of the block."""
    query = np.searchsorted(query_ids, table["query_id"].to_numpy())
    return Candidates(query, table["source_id"].to_numpy(), table["scan_score"].to_numpy(), table["score"].to_numpy())


def wanted_table(source_ids: np.ndarray, shards: np.ndarray) -> pa.Table:
    """shard and source_id, without doubles, in that order. source_ids: int64 [m]; shards: int [m], where each lies."""
    ids, first = np.unique(source_ids, return_index=True)
    order = np.argsort(shards[first], kind="stable")
    return pa.table({"shard": shards[first][order].astype(np.int32), "source_id": ids[order]})


def read_block(queries: Embeddings, block: list[Slice], storage: Storage) -> tuple[np.ndarray, np.ndarray]:
    """ids int64 [n] ascending and unit vectors float32 [n, d] of the block's queries that have one."""
    parts = [read_vectors(queries, part.table, storage, part.start, part.stop) for part in block]
    ids = np.concatenate([ids for ids, _ in parts])
    order = np.argsort(ids)
    return ids[order], unit_rows(np.concatenate([vectors for _, vectors in parts])[order])
