"""How queries are cut into blocks, and the intermediate files of a block: their names and columns."""

import numpy as np
import pyarrow as pa

from attrib.common.storage import Storage, join
from attrib.data.manifest import Slice, plan_partitions
from attrib.embed.embeddings import Embeddings, read_vectors
from attrib.index.normalize import unit_rows
from attrib.index.search import Candidates

MIN_BLOCK_ROWS = 1_024  # minimum number of queries per block, if there are as many
USUAL_BLOCKS = 32
PARTIAL_SCHEMA = pa.schema(
    [("query_id", pa.int64()), ("source_id", pa.int64()), ("scan_score", pa.float32()), ("score", pa.float32())]
)


def block_name(block: int) -> str:
    return f"block-{block:05d}.parquet"


def plan_blocks(num_rows: list[int], query_block_rows: int) -> list[list[Slice]]:
    """Cut the queries into blocks of equal size, as slices of the partitions of `num_rows` images.

    The number of blocks depends on the batch only, so a restart on another cluster finds finished blocks.
    """
    total = max(1, sum(num_rows))
    num_blocks = -(-total // min(query_block_rows, max(MIN_BLOCK_ROWS, -(-total // USUAL_BLOCKS))))
    return plan_partitions(num_rows, -(-total // num_blocks))


def block_rows(block: list[Slice]) -> int:
    return sum(part.stop - part.start for part in block)


def partials(output: str, block: int) -> str:
    """Return the folder of the partial files of a block."""
    return join(output, "_partials", f"block-{block:05d}")


def lists_uri(output: str, block: int) -> str:
    """Return the URI of the lists that each query probes in every shard: int32 [n, nprobe]."""
    return join(partials(output, block), "lists.npy")


def partial_uri(output: str, block: int, shard: int) -> str:
    """Return the URI of the candidates of one shard."""
    return join(partials(output, block), f"shard-{shard:05d}.parquet")


def partial_table(candidates: Candidates, query_ids: np.ndarray) -> pa.Table:
    """Return candidates as a table (PARTIAL_SCHEMA). query_ids: int64 [n], all queries of the block."""
    columns = [query_ids[candidates.query], candidates.id, candidates.scan_score, candidates.score]
    return pa.table([pa.array(column) for column in columns], schema=PARTIAL_SCHEMA)


def read_partial(table: pa.Table, query_ids: np.ndarray) -> Candidates:
    """Invert `partial_table`. query_ids: int64 [n], ascending, all queries of the block."""
    query = np.searchsorted(query_ids, table["query_id"].to_numpy())
    return Candidates(query, table["source_id"].to_numpy(), table["scan_score"].to_numpy(), table["score"].to_numpy())


def read_block(queries: Embeddings, block: list[Slice], storage: Storage) -> tuple[np.ndarray, np.ndarray]:
    """Return ids int64 [n], ascending, and unit vectors float32 [n, d] of the embedded queries of a block."""
    parts = [read_vectors(queries, part.table, storage, part.start, part.stop) for part in block]
    ids = np.concatenate([ids for ids, _ in parts])
    order = np.argsort(ids)
    return ids[order], unit_rows(np.concatenate([vectors for _, vectors in parts])[order])
