"""The embed job: embed pending chunks, assemble partitions, retry failed images if asked to, write the record."""

import hashlib
import logging
from functools import lru_cache

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
import torch

from attrib.common.config import digest
from attrib.common.errors import AttribError, FailedShareError, MismatchError
from attrib.common.progress import Progress
from attrib.common.run_record import begin, finish
from attrib.common.settings import StorageSettings
from attrib.common.storage import Storage, join
from attrib.data.chunks import CHUNKS, Chunk, assemble_partition, failures_of, pending_chunks, plan_chunks
from attrib.data.collections import LOCATION_FIELDS
from attrib.data.decoding import decoder_name
from attrib.data.manifest import Manifest, open_manifest, part_name
from attrib.embed.embeddings import EMBEDDINGS_RECORD, FAILURES
from attrib.embed.encode import PreparedChunk, encode_chunk, prepare_images
from attrib.embed.estimate import EmbedTask, EncoderProbe, estimate_embed, probe_encoder
from attrib.embed.settings import EmbedSettings
from attrib.models.encoder import KEEP_FREED_MEMORY, EncoderIdentity, ImageEncoder, load_encoder
from attrib.models.preprocessing import Preprocessing
from attrib.runtime.admission import admit
from attrib.runtime.chunk_stream import WorkerPool, map_chunks
from attrib.runtime.estimate import Estimate
from attrib.runtime.machine import baseline_bytes
from attrib.runtime.session import connect
from attrib.runtime.tasks import run_units

logger = logging.getLogger(__name__)


def run(settings: EmbedSettings) -> dict:
    """Embed every image of the manifest and return the record.

    Raises FailedShareError as soon as more images failed than `max_failed_share` allows. The chunks that are embedded
    by then are kept, and a restart continues.
    """
    baseline_bytes()
    storage = Storage(settings.storage)
    manifest = open_manifest(settings.manifest, storage)
    loaded = load_encoder(settings.backbone, storage, jpeg_margin=settings.jpeg_margin)
    encoder = loaded.identity
    # The name of a chunk is its position in the manifest, so another order of the same images is another input.
    inputs = {
        "manifest": manifest.digest,
        "order": manifest.order_digest,
        "model": encoder.model_digest,
        "preprocessing": encoder.preprocessing,
    }
    record = begin(settings, EMBEDDINGS_RECORD, inputs, storage)
    if record and not (settings.retry_failed and record["num_failed"]):
        return record
    connect(settings.ray)
    pool = WorkerPool.plan(settings.device, "embed", settings.num_workers)
    logger.info(
        f"embed: {encoder.name}, {encoder.dimension}-d, on {pool.describe()}; images decoded by {decoder_name()}"
    )
    admitted = admit(_estimate(settings, manifest, loaded, pool, storage), settings)
    results, num_chunks = record, 0
    if not record:
        num_chunks = _embed_pending(settings, manifest, encoder, pool, storage)
        results = _assemble(settings, manifest, storage)
    if settings.retry_failed and results["num_failed"]:
        if record:
            # Vectors change from here on. If the retry is killed, the record of the old vectors must be gone.
            storage.delete_file(join(settings.output, EMBEDDINGS_RECORD))
        _retry_failed(settings, manifest, encoder, pool, storage)
        results = _assemble(settings, manifest, storage)
    results |= {"encoder": encoder.to_dict(), "estimate": admitted.to_dict()}
    num_parts = len(results["num_rows"])
    results |= {"num_tasks": {EmbedTask.CHUNK: num_chunks, EmbedTask.PARTITION: num_parts}, "num_files": num_parts}
    if results["num_failed"] > settings.max_failed_share * manifest.num_images:
        raise _too_many_failed(settings, results["num_failed"], manifest.num_images, results["failure_reasons"])
    return finish(settings, EMBEDDINGS_RECORD, inputs, results, storage)


def _estimate(
    settings: EmbedSettings, manifest: Manifest, encoder: ImageEncoder, pool: WorkerPool, storage: Storage
) -> Estimate:
    """Estimate from a few images, encoded here or, for GPU workers, by a task on a GPU: the driver may have none."""
    if pool.device == "cuda":
        probe = next(iter(run_units(_probe_task, [(settings, manifest, storage)], num_gpus=1)))[1]
    else:
        probe = probe_encoder(encoder, manifest, settings, storage)
    return estimate_embed(
        manifest.num_images,
        encoder.identity.dimension,
        max(manifest.num_rows),
        settings.chunk_rows,
        settings.max_megapixels,
        probe,
        pool.num_workers,
        pool.device == "cuda",
    )


def _probe_task(settings: EmbedSettings, manifest: Manifest, storage: Storage) -> EncoderProbe:
    baseline_bytes()
    encoder = load_encoder(settings.backbone, storage, "cuda", settings.device_batch_size, settings.jpeg_margin)
    return probe_encoder(encoder, manifest, settings, storage)


def _embed_pending(
    settings: EmbedSettings, manifest: Manifest, encoder: EncoderIdentity, pool: WorkerPool, storage: Storage
) -> int:
    """Embed the chunks that are not committed yet; returns their number."""
    pending = pending_chunks(settings.output, settings.output, manifest.num_rows, settings.chunk_rows, storage)
    num_pending = sum(chunk.stop - chunk.start for chunk in pending)
    progress = Progress("embed", manifest.num_images, "images", already_done=manifest.num_images - num_pending)
    if not pending:
        return 0
    rows = map_chunks(
        ChunkEncoder,
        (settings, manifest, encoder, pool.device),
        pending,
        pool,
        # An encoder on a CPU decodes its own images: it gains nothing from another process on the same cores.
        prepare=ChunkDecoder(settings, manifest, encoder) if pool.device == "cuda" else None,
        environment=KEEP_FREED_MEMORY,  # Ray Data calls the encoder in a thread that is not the first of its process
    )
    for row in rows:
        progress.update(row["num_images"], row["num_failed"])
        if progress.failed > settings.max_failed_share * manifest.num_images:
            raise _too_many_failed(settings, progress.failed, manifest.num_images, [row["example"]])
    progress.close()
    return len(pending)


def _manifest_rows(manifest: Manifest, chunk: Chunk, storage: Storage) -> pa.Table:
    partition = _read_partition(storage.settings, manifest.partition_uri(chunk.partition))
    return partition.slice(chunk.start, chunk.stop - chunk.start)


@lru_cache(maxsize=1)  # a worker's next chunk is often of the same partition
def _read_partition(storage: StorageSettings, uri: str) -> pa.Table:
    return Storage(storage).read_table(uri, columns=[field.name for field in LOCATION_FIELDS])


class ChunkDecoder:
    """Row of a chunk -> the row with prepared pixels. For encoders on GPUs, which should not wait for decoding."""

    def __init__(self, settings: EmbedSettings, manifest: Manifest, encoder: EncoderIdentity):
        self.settings, self.manifest, self.storage = settings, manifest, Storage(settings.storage)
        self.preprocessing = Preprocessing.from_dict(encoder.preprocessing)

    def __call__(self, row: dict) -> dict:
        torch.set_num_threads(1)
        images = _manifest_rows(self.manifest, Chunk(**row), self.storage)
        return row | prepare_images(images, self.manifest, self.preprocessing, self.settings, self.storage).to_row()


class ChunkEncoder:
    """Row of a chunk -> committed vectors and their counts. Loads the network once per worker."""

    def __init__(self, settings: EmbedSettings, manifest: Manifest, encoder: EncoderIdentity, device: str):
        torch.set_num_threads(1)
        self.settings, self.manifest, self.storage = settings, manifest, Storage(settings.storage)
        self.encoder = _load_same(encoder, settings, self.storage, device)

    def __call__(self, row: dict) -> dict:
        chunk = Chunk(row["partition"], row["start"], row["stop"])
        if "pixels" in row:
            prepared = PreparedChunk.from_row(row)
        else:
            images = _manifest_rows(self.manifest, chunk, self.storage)
            prepared = prepare_images(images, self.manifest, self.encoder.preprocessing, self.settings, self.storage)
        table = encode_chunk(prepared, self.encoder)
        self.storage.write_table(chunk.uri(self.settings.output), table)
        reasons = table["reason"].drop_null()
        example = reasons[0].as_py() if len(reasons) else ""
        return {"num_images": len(table), "num_failed": len(reasons), "example": example}


def _load_same(expected: EncoderIdentity, settings: EmbedSettings, storage: Storage, device: str) -> ImageEncoder:
    """Load the encoder of a worker.

    Raises MismatchError if it differs from the driver's: a local path may hold other weights on another node.
    """
    encoder = load_encoder(settings.backbone, storage, device, settings.device_batch_size, settings.jpeg_margin)
    if encoder.identity != expected:
        raise MismatchError(
            f"{settings.backbone.weights} of {settings.backbone.name!r} is not the same on all nodes (or their "
            "versions of timm differ); put the weights on storage that all nodes share"
        )
    return encoder


def _assemble(settings: EmbedSettings, manifest: Manifest, storage: Storage) -> dict:
    """Publish the partitions and the table of failures, delete the chunks, and return the results for the record."""
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
                f"{missing[0]} is missing although a worker wrote it; put the output on storage that all nodes share"
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


def _retry_failed(
    settings: EmbedSettings, manifest: Manifest, encoder: EncoderIdentity, pool: WorkerPool, storage: Storage
) -> None:
    failed = storage.read_table(join(settings.output, FAILURES), columns=["id"])["id"]
    progress = Progress("retry", len(failed), "images")
    partitions = ((settings, manifest, encoder, i, failed, pool.device, storage) for i in range(len(manifest.num_rows)))
    for _, (num_retried, num_failed) in run_units(_retry_partition, partitions, num_gpus=pool.num_gpus):
        progress.update(num_retried, num_failed)
    progress.close()


def _retry_partition(
    settings: EmbedSettings,
    manifest: Manifest,
    expected: EncoderIdentity,
    partition: int,
    failed: pa.ChunkedArray,
    device: str,
    storage: Storage,
) -> tuple[int, int]:
    uri = join(settings.output, part_name(partition))
    images = storage.read_table(manifest.partition_uri(partition), filter=pc.field("id").isin(failed))
    if not len(images):
        return 0, 0
    torch.set_num_threads(1)
    encoder = _load_same(expected, settings, storage, device)
    chunks = [images.slice(start, settings.chunk_rows) for start in range(0, len(images), settings.chunk_rows)]
    retried = pa.concat_tables(
        encode_chunk(prepare_images(chunk, manifest, encoder.preprocessing, settings, storage), encoder)
        for chunk in chunks
    )
    kept = storage.read_table(uri, filter=~pc.field("id").isin(failed))
    storage.write_table(uri, pa.concat_tables([kept, retried]).sort_by("id").combine_chunks())
    return len(retried), retried["reason"].is_valid().to_numpy().sum()


def _too_many_failed(settings: EmbedSettings, num_failed: int, num_images: int, reasons: list[str]) -> FailedShareError:
    return FailedShareError(
        f"{num_failed:,} of {num_images:,} images failed, more than max_failed_share = {settings.max_failed_share:g} "
        f"allows; e.g. {'; '.join(reasons[:3])}. Fix or remove these images, then rerun with retry_failed, or raise "
        "max_failed_share; the vectors of the other images are kept"
    )
