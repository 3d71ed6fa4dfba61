"""Chunks: consecutive rows of a manifest partition that are computed and committed together.

A chunk is committed by publishing one small file, whose name depends on the rows alone. Finished partitions are
assembled from the chunk files in `<output>/_chunks/`, which is deleted at the end.
"""

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from attrib.common.errors import AttribError
from attrib.common.storage import Storage, join
from attrib.data.manifest import part_name

CHUNKS = "_chunks"


@dataclass(frozen=True)
class Chunk:
    """Rows [start, stop) of a manifest partition."""

    partition: int
    start: int
    stop: int

    def uri(self, output: str) -> str:
        return join(chunk_folder(output, self.partition), f"rows-{self.start:08d}-{self.stop:08d}.parquet")


def chunk_folder(output: str, partition: int) -> str:
    return join(output, CHUNKS, part_name(partition).removesuffix(".parquet"))


def plan_chunks(num_rows: int, partition: int, chunk_rows: int) -> list[Chunk]:
    """Cut a partition into chunks of `chunk_rows` rows; the last one may be shorter."""
    return [Chunk(partition, start, min(start + chunk_rows, num_rows)) for start in range(0, num_rows, chunk_rows)]


def pending_chunks(
    output: str, parts_folder: str, num_rows: list[int], chunk_rows: int, storage: Storage
) -> list[Chunk]:
    """Return the chunks without a file below `output` whose partition has no file in `parts_folder`."""
    assembled = set(storage.names(parts_folder, suffix=".parquet"))
    pending = []
    for partition, rows in enumerate(num_rows):
        if part_name(partition) in assembled:
            continue
        committed = set(storage.names(chunk_folder(output, partition), suffix=".parquet"))
        chunks = plan_chunks(rows, partition, chunk_rows)
        pending += [chunk for chunk in chunks if chunk.uri(output).rsplit("/", 1)[1] not in committed]
    return pending


def publish_partition(uri: str, output: str, partition: int, num_rows: int, chunk_rows: int, storage: Storage) -> None:
    """Write one partition to `uri`, sorted by id, from its chunk files; nothing if it is there.

    Jobs run this as a task, which must not import torch. Raises AttribError if a chunk file is missing.
    """
    if storage.exists(uri):
        return
    chunks = [chunk.uri(output) for chunk in plan_chunks(num_rows, partition, chunk_rows)]
    if missing := next((chunk for chunk in chunks if not storage.exists(chunk)), None):
        raise AttribError(
            f"{missing} is missing although a worker wrote it; put the output on storage that all nodes share"
        )
    table = pa.concat_tables([storage.read_sealed(chunk) for chunk in chunks])
    storage.write_table(uri, table.sort_by("id").combine_chunks())


def failures_of(part: pa.Table, manifest_rows: pa.Table) -> pa.Table:
    """Return id, key, uri, stage and reason of the images of a partition that have no result."""
    failed = part.filter(pc.is_valid(part["stage"]))
    at = pc.index_in(failed["id"].combine_chunks(), value_set=manifest_rows["id"].combine_chunks())
    places = manifest_rows.select(["key", "uri"]).combine_chunks().take(at)
    columns = [failed["id"], places["key"], places["uri"], failed["stage"], failed["reason"]]
    return pa.table(columns, names=["id", "key", "uri", "stage", "reason"])
