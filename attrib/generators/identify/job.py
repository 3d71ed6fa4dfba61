"""The identify job: verdicts of pending chunks, partitions assembled from chunks, then the summary of the image set.

A worker loads the fingerprint method and calibrates the registry once. A chunk is committed when its file is published,
so a restart computes only the missing chunks.
"""

import logging
import time

import pyarrow as pa
import torch

from attrib.common.config import digest
from attrib.common.errors import FailedShareError, MismatchError
from attrib.common.progress import Progress
from attrib.common.run_record import run_once
from attrib.common.storage import Storage, join
from attrib.data.chunks import CHUNKS, Chunk, pending_chunks
from attrib.data.collections import LOCATION_FIELDS
from attrib.data.fatal_images import without_fatal, without_fatal_rows
from attrib.data.manifest import Manifest, open_manifest
from attrib.data.reading import read_all
from attrib.generators.identify.files import RECORD, VERDICTS, Identified, failures, finish_part, open_identified
from attrib.generators.identify.rows import verdict_rows
from attrib.generators.identify.settings import IdentifySettings
from attrib.generators.identify.summary import BATCH_ROWS, check_set_column, summarise
from attrib.generators.identify.verdicts import Judge, judge_of
from attrib.generators.registry.method_loading import load_method
from attrib.generators.registry.registry import Registry, open_registry
from attrib.runtime.admission import admit
from attrib.runtime.chunk_stream import WorkerPool, map_chunks
from attrib.runtime.estimate import IMAGE_OVERHEAD_BYTES, READER_BYTES, WRITER_BYTES, Estimate
from attrib.runtime.machine import baseline_bytes, resident_bytes
from attrib.runtime.session import connect
from attrib.runtime.tasks import run_all

logger = logging.getLogger(__name__)

PROBE_IMAGES = 8
VERDICT_BYTES_ON_DISK = 120  # per image, without its fingerprint
COLUMNS_BYTES = 400  # memory of the verdict of one image, without its fingerprint
KEPT_BYTES = 32  # memory of side, id, cluster and hash of one image, which are kept for the summary


def run(settings: IdentifySettings) -> dict:
    """Give every image of the manifest a verdict and return the record.

    Raises AttribError without a registered generator; FailedShareError if more images than max_failed_share could not
    be read or decoded. The verdicts are kept: a restart with a higher max_failed_share reads no image again.
    """
    baseline_bytes()
    storage = Storage(settings.storage)
    manifest = open_manifest(settings.manifest, storage)
    check_set_column(settings, manifest)
    registry = open_registry(settings.registry, storage)
    previous = open_identified(settings.previous, storage) if settings.previous else None
    inputs = {"manifest": manifest.digest, "order": manifest.order_digest, "rows": manifest.rows_digest}
    inputs |= {"registry": registry.digest, "previous": previous.digest if previous else None}
    found = settings, manifest, registry, previous, storage
    return run_once(settings, RECORD, inputs, storage, lambda: _identify(*found))


def _identify(
    settings: IdentifySettings, manifest: Manifest, registry: Registry, previous: Identified | None, storage: Storage
) -> dict:
    """The results of the job, for its record."""
    started = time.monotonic()
    judge = judge_of(registry, load_method(registry.method, storage), settings.verdicts, storage)
    calibrated_seconds = time.monotonic() - started
    if abstains := judge.abstains:
        logger.warning(f"nothing will be attributed: {abstains}")
    connect(settings.ray)
    pool = WorkerPool.plan(settings.device, "identify")
    admitted = admit(_estimate(settings, manifest, judge, calibrated_seconds, pool, storage), settings)
    _identify_pending(settings, manifest, registry.digest, pool, storage)
    parts = [(settings.output, *part, settings.chunk_rows, storage) for part in enumerate(manifest.num_rows)]
    digests = run_all(finish_part, parts)
    storage.delete_folder(join(settings.output, CHUNKS))
    results = summarise(settings, manifest, registry, judge, previous, storage)
    results |= {"entries": [entry.name for entry in registry.generators], "digest": digest(digests), "sha256": digests}
    results |= {"manifest_digest": manifest.digest, "order_digest": manifest.order_digest}
    results["estimate"] = admitted.to_dict()
    for warning in results["warnings"]:
        logger.warning(warning)
    num_failed = results["num_failed"]
    if num_failed > settings.max_failed_share * manifest.num_images:
        raise FailedShareError(
            f"{num_failed:,} of {manifest.num_images:,} images could not be read or decoded, more than "
            f"max_failed_share = {settings.max_failed_share:g}; e.g. "
            f"{FailedShareError.examples(failures(settings.output, len(manifest.num_rows), storage))}. "
            f"The reasons of all are in {join(settings.output, VERDICTS)}. "
            "Raise max_failed_share to keep these verdicts, or delete that folder and run again to read all images"
        )
    return results


def _estimate(
    settings: IdentifySettings,
    manifest: Manifest,
    judge: Judge,
    calibrated_seconds: float,
    pool: WorkerPool,
    storage: Storage,
) -> Estimate:
    """Estimate measured on a few images, on a CPU."""
    partition = next(p for p, num_rows in enumerate(manifest.num_rows) if num_rows)
    count = min(PROBE_IMAGES, manifest.num_rows[partition])
    probed = _rows(Chunk(partition, 0, count), manifest, storage)
    probed = without_fatal_rows(probed, manifest, settings.max_megapixels, settings.io_threads, storage)
    before, started = resident_bytes(), time.monotonic()
    _verdicts(probed, settings, manifest, judge, storage)
    seconds = (time.monotonic() - started) / len(probed)
    dimension = judge.galleries.references[0].shape[2]
    row_bytes = 2 * dimension + VERDICT_BYTES_ON_DISK
    process_bytes = max(before, resident_bytes()) + READER_BYTES
    chunk_bytes = settings.chunk_rows * (IMAGE_OVERHEAD_BYTES + 4 * dimension)
    return Estimate(
        num_workers=pool.num_workers,
        worker_bytes=process_bytes + WRITER_BYTES + chunk_bytes + max(manifest.num_rows) * 4 * row_bytes,
        driver_bytes=process_bytes + _summary_bytes(settings, manifest, dimension),
        output_bytes=manifest.num_images * row_bytes,
        temporary_bytes=manifest.num_images * row_bytes,
        seconds=manifest.num_images * seconds / pool.num_workers + calibrated_seconds,
        on_gpus=pool.device == "cuda",
    )


def _summary_bytes(settings: IdentifySettings, manifest: Manifest, dimension: int) -> int:
    """Memory of the driver for the summary: one part, some bytes per image, clustering, and fingerprints of sets.

    Clustering needs the sample, two square matrices in float64, and one batch.
    """
    clustered = min(settings.prevalence.max_clustered, manifest.num_images)
    part = max(manifest.num_rows) * (2 * dimension + 4 * dimension + COLUMNS_BYTES)
    clusters = clustered * (2 * 4 * dimension + 8 * dimension + 2 * 8 * clustered)
    clusters += BATCH_ROWS * 4 * (dimension + 2 * clustered)
    sets = manifest.num_images * 4 * dimension if settings.prevalence.set_column else 0
    return part + KEPT_BYTES * manifest.num_images + clusters + sets


def _identify_pending(
    settings: IdentifySettings, manifest: Manifest, registry_digest: str, pool: WorkerPool, storage: Storage
) -> None:
    parts_folder = join(settings.output, VERDICTS)
    pending = pending_chunks(settings.output, parts_folder, manifest.num_rows, settings.chunk_rows, storage)
    num_pending = sum(chunk.stop - chunk.start for chunk in pending)
    progress = Progress("identify", manifest.num_images, "images", already_done=manifest.num_images - num_pending)
    for row in map_chunks(ChunkJudge, (settings, manifest, registry_digest, pool.device), pending, pool):
        progress.update(row["num_images"], row["num_failed"])
    if pending:
        progress.close()


class ChunkJudge:
    """Makes and commits the verdicts of a chunk. Method and calibrated registry are loaded once per worker."""

    def __init__(self, settings: IdentifySettings, manifest: Manifest, registry_digest: str, device: str):
        torch.set_num_threads(1)
        self.settings, self.manifest, self.storage = settings, manifest, Storage(settings.storage)
        registry: Registry = open_registry(settings.registry, self.storage)
        if registry.digest != registry_digest:
            raise MismatchError(
                f"{settings.registry} changed while the job ran, or a node sees another copy of it; run the job again "
                "with another output, and keep the registry on storage that all nodes share"
            )
        method = load_method(registry.method, self.storage, device)
        self.judge = judge_of(registry, method, settings.verdicts, self.storage)

    def __call__(self, row: dict) -> dict:
        chunk = Chunk(**row)
        rows = _rows(chunk, self.manifest, self.storage)
        table = _verdicts(rows, self.settings, self.manifest, self.judge, self.storage)
        self.storage.write_table(chunk.uri(self.settings.output), table)
        return {"num_images": len(table), "num_failed": len(table) - table["stage"].null_count}


def _rows(chunk: Chunk, manifest: Manifest, storage: Storage) -> pa.Table:
    columns = [field.name for field in LOCATION_FIELDS]
    return storage.read_rows(manifest.checked_uri(chunk.partition, storage), chunk.start, chunk.stop, columns)


def _verdicts(
    images: pa.Table, settings: IdentifySettings, manifest: Manifest, judge: Judge, storage: Storage
) -> pa.Table:
    rows = images.to_pylist()
    encoded = read_all(rows, manifest, settings.io_threads, storage)
    encoded = without_fatal(rows, encoded, settings.output, settings.max_megapixels)
    return verdict_rows(rows, encoded, judge, settings.max_megapixels)
