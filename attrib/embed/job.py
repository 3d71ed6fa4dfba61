"""The embed job: embed pending chunks, assemble partitions, retry failed images if asked to, write the record."""

import logging
from dataclasses import dataclass
from functools import lru_cache

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
import torch

from attrib.common.config import digest
from attrib.common.errors import MAX_EXAMPLES, FailedShareError, MismatchError
from attrib.common.progress import Progress
from attrib.common.run_record import finish, finished, writing
from attrib.common.settings import StorageSettings
from attrib.common.storage import Storage, join
from attrib.data.chunks import CHUNKS, Chunk, failures_of, pending_chunks
from attrib.data.manifest import Manifest, open_manifest, open_places, part_name
from attrib.data.reading import accept_repaired
from attrib.embed.embeddings import EMBEDDINGS_RECORD, FAILURES, finish_partition
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
from attrib.runtime.tasks import run_all, run_units

logger = logging.getLogger(__name__)

MAX_LISTED_CHUNKS = 100  # whose failed images are listed when a run is stopped early; reading all would take hours


@dataclass(frozen=True)
class EmbedRun:
    """What all tasks of a run share. device: "cpu" or "cuda"."""

    settings: EmbedSettings
    manifest: Manifest
    encoder: EncoderIdentity
    device: str
    storage: Storage

    def load_encoder(self) -> ImageEncoder:
        """Load the encoder of a worker.

        Raises MismatchError if it differs from the driver's: a local path may hold other weights on another node.
        """
        settings = self.settings
        loaded = load_encoder(
            settings.backbone, self.storage, self.device, settings.device_batch_size, settings.jpeg_margin
        )
        if loaded.identity != self.encoder:
            raise MismatchError(
                f"{settings.backbone.weights} of {settings.backbone.name!r} is not the same on all nodes (or their "
                "versions of timm differ); put the weights on storage that all nodes share"
            )
        return loaded

    def prepare(self, images: pa.Table, preprocessing: Preprocessing) -> PreparedChunk:
        torch.set_num_threads(1)
        return prepare_images(images, self.manifest, preprocessing, self.settings, self.storage)

    def rows(self, chunk: Chunk) -> pa.Table:
        partition = _read_partition(self.storage.settings, self.manifest.checked_uri(chunk.partition, self.storage))
        return partition.slice(chunk.start, chunk.stop - chunk.start)

    def check_failed(self, num_failed: int, chunks: list[Chunk] | None = None) -> None:
        """Raise FailedShareError if more images failed than allowed; before, list those of `chunks` in FAILURES."""
        num_images, share, output = self.manifest.num_images, self.settings.max_failed_share, self.settings.output
        uri = join(output, FAILURES)
        if num_failed <= share * num_images:
            return
        if chunks:
            failures = [failures_of(self.storage.read_sealed(c.uri(output)), self.rows(c)) for c in chunks]
            self.storage.write_table(uri, pa.concat_tables(failures))
        examples = FailedShareError.examples(self.storage.read_sealed(uri).slice(0, MAX_EXAMPLES).to_pylist())
        raise FailedShareError(
            f"{num_failed:,} of {num_images:,} images failed, more than max_failed_share = {share:g} allows; e.g. "
            f"{examples}. {uri} lists failed images. Fix them and run again with retry_failed=true, or raise "
            "max_failed_share; the vectors of the other images are kept"
        )


@lru_cache(maxsize=1)  # a worker's next chunk is often of the same partition
def _read_partition(storage: StorageSettings, uri: str) -> pa.Table:
    return open_places([uri], Storage(storage)).to_table()


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
    record = finished(settings, EMBEDDINGS_RECORD, inputs, storage)
    if record and not (settings.retry_failed and record["num_failed"]):
        return record
    with writing(settings, EMBEDDINGS_RECORD, inputs, storage) as lease:
        results = _embed(settings, manifest, loaded, record, storage)
        return finish(settings, EMBEDDINGS_RECORD, inputs, results, storage, lease)


def _embed(
    settings: EmbedSettings, manifest: Manifest, loaded: ImageEncoder, record: dict | None, storage: Storage
) -> dict:
    """The results of the job, for its record. record: that of a finished run, whose failed images are tried again."""
    encoder = loaded.identity
    connect(settings.ray)
    pool = WorkerPool.plan(settings.device, "embed", settings.num_workers)
    logger.info(f"embed: {encoder.name}, {encoder.dimension}-d, on {pool.describe()}")
    work = EmbedRun(settings, manifest, encoder, pool.device, storage)
    admitted = admit(_estimate(work, loaded, pool), settings)
    results, num_chunks = record, 0
    if not record:
        num_chunks = _embed_pending(work, pool)
        results = _assemble(work)
    if settings.retry_failed and results["num_failed"]:
        if record:
            # Vectors change from here on. If the retry is killed, the record of the old vectors must be gone.
            storage.delete_file(join(settings.output, EMBEDDINGS_RECORD))
        _retry_failed(work, pool)
        results = _assemble(work)
    num_parts = len(results["num_rows"])
    results |= {
        "encoder": encoder.to_dict(),
        "estimate": admitted.to_dict(),
        "num_tasks": {EmbedTask.CHUNK: num_chunks, EmbedTask.PARTITION: num_parts},
        "num_files": num_parts,
    }
    work.check_failed(results["num_failed"])
    return results


def _estimate(run: EmbedRun, loaded: ImageEncoder, pool: WorkerPool) -> Estimate:
    """Estimate from a few images, encoded here or, for GPU workers, by a task on a GPU: the driver may have none."""
    settings, manifest = run.settings, run.manifest
    on_gpus = run.device == "cuda"
    if on_gpus:
        probe = run_all(_probe_task, [(run,)], num_gpus=1)[0]
    else:
        probe = probe_encoder(loaded, manifest, settings, run.storage)
    rows, pixels = (max(manifest.num_rows), settings.chunk_rows), settings.max_megapixels
    return estimate_embed(manifest.num_images, run.encoder.dimension, *rows, pixels, probe, pool.num_workers, on_gpus)


def _probe_task(run: EmbedRun) -> EncoderProbe:
    baseline_bytes()
    return probe_encoder(run.load_encoder(), run.manifest, run.settings, run.storage)


def _embed_pending(run: EmbedRun, pool: WorkerPool) -> int:
    """Embed the chunks that are not committed yet; returns their number."""
    output, manifest = run.settings.output, run.manifest
    pending = pending_chunks(output, output, manifest.num_rows, run.settings.chunk_rows, run.storage)
    num_pending = sum(chunk.stop - chunk.start for chunk in pending)
    progress = Progress("embed", manifest.num_images, "images", already_done=manifest.num_images - num_pending)
    if not pending:
        return 0
    # An encoder on a CPU decodes its own images: it gains nothing from another process on the same cores.
    decoder = ChunkDecoder(run) if run.device == "cuda" else None
    failed_chunks: list[Chunk] = []
    # Ray Data calls the encoder in a thread that is not the first of its process.
    for row in map_chunks(ChunkEncoder, (run,), pending, pool, prepare=decoder, environment=KEEP_FREED_MEMORY):
        progress.update(row["num_images"], row["num_failed"])
        if row["num_failed"] and len(failed_chunks) < MAX_LISTED_CHUNKS:
            failed_chunks.append(Chunk(row["partition"], row["start"], row["stop"]))
        run.check_failed(progress.failed, failed_chunks)
    progress.close()
    return len(pending)


class ChunkDecoder:
    """Row of a chunk -> the row with prepared pixels. For encoders on GPUs, which should not wait for decoding."""

    def __init__(self, run: EmbedRun):
        self.run, self.preprocessing = run, Preprocessing.from_dict(run.encoder.preprocessing)

    def __call__(self, row: dict) -> dict:
        return row | self.run.prepare(self.run.rows(Chunk(**row)), self.preprocessing).to_row()


class ChunkEncoder:
    """Row of a chunk -> committed vectors and their counts. Loads the network once per worker."""

    def __init__(self, run: EmbedRun):
        torch.set_num_threads(1)
        self.run, self.encoder = run, run.load_encoder()

    def __call__(self, row: dict) -> dict:
        chunk = Chunk(row["partition"], row["start"], row["stop"])
        if "pixels" in row:
            prepared = PreparedChunk.from_row(row)
        else:
            prepared = self.run.prepare(self.run.rows(chunk), self.encoder.preprocessing)
        table = encode_chunk(prepared, self.encoder)
        self.run.storage.write_table(chunk.uri(self.run.settings.output), table)
        return vars(chunk) | {"num_images": len(table), "num_failed": len(table) - table["reason"].null_count}


def _assemble(run: EmbedRun) -> dict:
    """Publish the partitions and the table of failures, delete the chunks, and return the results for the record."""
    output, num_parts = run.settings.output, len(run.manifest.num_rows)
    units = [(output, run.manifest, partition, run.settings.chunk_rows, run.storage) for partition in range(num_parts)]
    found = run_all(finish_partition, units, "assemble", "partitions", [1] * num_parts)
    num_rows, failures_by_part, sha256 = (list(column) for column in zip(*found))
    failures = pa.concat_tables(failures_by_part)
    failures_sha256 = run.storage.write_table(join(output, FAILURES), failures)
    run.storage.delete_folder(join(output, CHUNKS))
    counts = failures.group_by(["stage", "reason"]).aggregate([("id", "count")]).sort_by([("id_count", "descending")])
    return {
        "digest": digest(sha256),
        "num_images": run.manifest.num_images,
        "num_failed": len(failures),
        "failure_reasons": [f"{r['stage']}: {r['reason']} ({r['id_count']})" for r in counts.slice(0, 20).to_pylist()],
        "num_rows": num_rows,
        "num_embedded": [rows - len(failed) for rows, failed in zip(num_rows, failures_by_part)],
        "sha256": sha256,
        "failures_sha256": failures_sha256,
    }


def _retry_failed(run: EmbedRun, pool: WorkerPool) -> None:
    failed = run.storage.read_sealed(join(run.settings.output, FAILURES), ["id"])["id"]
    progress = Progress("retry", len(failed), "images")
    units = ((run, partition, failed) for partition in range(len(run.manifest.num_rows)))
    for _, (num_retried, num_failed) in run_units(_retry_partition, units, num_gpus=pool.num_gpus):
        progress.update(num_retried, num_failed)
    progress.close()


def _retry_partition(run: EmbedRun, partition: int, failed: pa.ChunkedArray) -> tuple[int, int]:
    storage, rows = run.storage, run.settings.chunk_rows
    is_failed = pc.field("id").isin(failed)
    images = open_places([run.manifest.checked_uri(partition, storage)], storage).to_table(filter=is_failed)
    if not len(images):
        return 0, 0
    images = accept_repaired(images)
    torch.set_num_threads(1)
    encoder = run.load_encoder()
    chunks = (images.slice(start, rows) for start in range(0, len(images), rows))
    retried = pa.concat_tables(encode_chunk(run.prepare(chunk, encoder.preprocessing), encoder) for chunk in chunks)
    uri = join(run.settings.output, part_name(partition))
    kept = storage.read_sealed(uri, filter=~is_failed)
    storage.write_table(uri, pa.concat_tables([kept, retried]).sort_by("id").combine_chunks())
    return len(retried), retried["reason"].is_valid().to_numpy().sum()
