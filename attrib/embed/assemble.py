"""The end of the embed job: partitions from their chunks, counts, checksums and the failures table."""

import hashlib

import pyarrow as pa
import pyarrow.parquet

from attrib.common.config import digest
from attrib.common.errors import AttribError
from attrib.common.progress import Progress
from attrib.common.storage import Storage, join
from attrib.data.chunks import CHUNKS, assemble_partition, failures_of, plan_chunks
from attrib.data.manifest import Manifest, part_name
from attrib.embed.embeddings import FAILURES
from attrib.embed.settings import EmbedSettings
from attrib.runtime.tasks import run_units


def assemble(settings: EmbedSettings, manifest: Manifest, storage: Storage) -> dict:
    """Publish partitions whose chunks are complete, and gather what the record says of all of them."""
    parts: list[dict] = [{}] * len(manifest.num_rows)
    progress = Progress("assemble", len(parts), "partitions")
    for i, part in run_units(_finish_partition, ((settings, manifest, i, storage) for i in range(len(parts)))):
        parts[i] = part
        progress.update(1)
    progress.close()
    failures = pa.concat_tables([part.pop("failures") for part in parts])
    storage.write_table(join(settings.output, FAILURES), failures)
    storage.delete_folder(join(settings.output, CHUNKS))
    counts = failures.group_by(["stage", "reason"]).aggregate([("id", "count")]).sort_by([("id_count", "descending")])
    return {
        "digest": digest([part["sha256"] for part in parts]),
        "num_images": manifest.num_images,
        "num_failed": len(failures),
        "failure_reasons": [f"{r['stage']}: {r['reason']} ({r['id_count']})" for r in counts.slice(0, 20).to_pylist()],
        "num_rows": [part["num_rows"] for part in parts],
        "num_embedded": [part["num_embedded"] for part in parts],
        "sha256": [part["sha256"] for part in parts],
    }


def _finish_partition(settings: EmbedSettings, manifest: Manifest, partition: int, storage: Storage) -> dict:
    uri = join(settings.output, part_name(partition))
    if not storage.exists(uri):
        chunks = plan_chunks(manifest.num_rows[partition], partition, settings.chunk_rows)
        missing = [chunk.uri(settings.output) for chunk in chunks if not storage.exists(chunk.uri(settings.output))]
        if missing:
            raise AttribError(
                f"{missing[0]} is not there although its worker wrote it; the output must be on storage that all nodes share"
            )
        storage.write_table(uri, assemble_partition(settings.output, partition, chunks, storage))
    data = storage.read_bytes(uri)
    part = pa.parquet.read_table(pa.BufferReader(data), columns=["id", "stage", "reason"])
    places = storage.read_table(manifest.partition_uri(partition), columns=["id", "key", "uri"])
    failures = failures_of(part, places)
    return {
        "failures": failures,
        "num_rows": len(part),
        "num_embedded": len(part) - len(failures),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
