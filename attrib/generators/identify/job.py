"""The identify job: verdicts of pending chunks, partitions from chunks, then the summary of the image set.

A worker loads the fingerprint method and calibrates the registry once, for all its chunks. A chunk commits by publishing
its file, so a restart computes only the missing ones.
"""

import logging
import time

import torch

from attrib.common.config import digest
from attrib.common.errors import FailedShareError, MismatchError
from attrib.common.progress import Progress
from attrib.common.run_record import begin, finish
from attrib.common.storage import Storage, bytes_sha256, join
from attrib.data.chunks import CHUNKS, Chunk, assemble_partition, pending_chunks, plan_chunks
from attrib.data.collections import LOCATION_FIELDS
from attrib.data.manifest import Manifest, open_manifest, part_name
from attrib.data.reading import read_all
from attrib.generators.identify.files import RECORD, VERDICTS, Identified, open_identified
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
from attrib.runtime.tasks import run_units

logger = logging.getLogger(__name__)

PROBE_IMAGES = 8
VERDICT_BYTES_ON_DISK = 120  # of an image beside its fingerprint
COLUMNS_BYTES = 400  # of an image's verdict in memory, beside its fingerprint
KEPT_BYTES = 32  # of an image's side, id, cluster and hash, until all are summed up


def run(settings: IdentifySettings) -> dict:
    """Give every image of the manifest a verdict and return the record.

    Raises AttribError without a registered generator; FailedShareError if more images than max_failed_share could not be read or decoded. The
    verdicts stay then: a restart with a higher max_failed_share only sums them up, and reads no image again.
    """
    baseline_bytes()
    storage = Storage(settings.storage)
    manifest = open_manifest(settings.manifest, storage)
    check_set_column(settings, manifest)
    registry = open_registry(settings.registry, storage)
    previous = open_identified(settings.previous, storage) if settings.previous else None
    inputs = {
        "manifest": manifest.digest,
        "order": manifest.order_digest,
        "rows": manifest.rows_digest,
        "registry": registry.digest,
        "previous": previous.digest if previous else None,
    }
    record = begin(settings, RECORD, inputs, storage)
    if record:
        return record
    started = time.monotonic()
    judge = judge_of(registry, load_method(registry.method, storage), settings.verdicts, storage)
    calibrated_seconds = time.monotonic() - started
    if abstains := judge.abstains:
        logger.warning(f"nothing will be attributed: {abstains}")
    connect(settings.ray)
    pool = WorkerPool.plan(settings.device, "identify")
    admitted = admit(_estimate(settings, manifest, judge, calibrated_seconds, pool, storage), settings)
    _identify_pending(settings, manifest, registry.digest, pool, storage)
    digests = _assemble(settings, manifest, storage)
    storage.delete_folder(join(settings.output, CHUNKS))
    results = summarise(settings, manifest, registry, judge, previous, storage)
    results["entries"] = [entry.name for entry in registry.generators]
    results["digest"] = digest(digests)
    results |= {"manifest_digest": manifest.digest, "order_digest": manifest.order_digest}
    results["estimate"] = admitted.to_dict()
    for warning in results["warnings"]:
        logger.warning(warning)
    num_failed = results["num_failed"]
    if num_failed > settings.max_failed_share * manifest.num_images:
        raise FailedShareError(
            f"{num_failed:,} of {manifest.num_images:,} images could not be read or decoded, more than max_failed_share = "
            f"{settings.max_failed_share:g}; their reasons are in {join(settings.output, VERDICTS)}. Raise max_failed_share to keep these verdicts, or "
            "delete that folder and run again to read the images again"
        )
    return finish(settings, RECORD, inputs, results, storage)


def _estimate(
    settings: IdentifySettings,
    manifest: Manifest,
    judge: Judge,
    calibrated_seconds: float,
    pool: WorkerPool,
    storage: Storage,
) -> Estimate:
    """From the first few images, on a CPU."""
    partition = next(p for p, num_rows in enumerate(manifest.num_rows) if num_rows)
    count = min(PROBE_IMAGES, manifest.num_rows[partition])
    rows = _rows(manifest, Chunk(partition, 0, count), storage)
    before, started = resident_bytes(), time.monotonic()
    verdict_rows(rows, read_all(rows, manifest, settings.io_threads, storage), judge, settings.max_megapixels)
    seconds = (time.monotonic() - started) / count
    dimension = judge.galleries.references[0].shape[2]
    row_bytes = 2 * dimension + VERDICT_BYTES_ON_DISK
    growth = max(0, resident_bytes() - before)
    rows_together = (
        settings.chunk_rows * (IMAGE_OVERHEAD_BYTES + 4 * dimension) + max(manifest.num_rows) * 4 * row_bytes
    )
    return Estimate(
        num_workers=pool.num_workers,
        worker_bytes=before + growth + READER_BYTES + WRITER_BYTES + rows_together,
        driver_bytes=before + growth + READER_BYTES + _summary_bytes(settings, manifest, dimension),
        output_bytes=manifest.num_images * row_bytes,
        temporary_bytes=manifest.num_images * row_bytes,
        seconds=manifest.num_images * seconds / pool.num_workers + calibrated_seconds,
        on_gpus=pool.device == "cuda",
    )


def _summary_bytes(settings: IdentifySettings, manifest: Manifest, dimension: int) -> int:
    """Of what the driver holds while it sums up: a part, what it keeps of every image, the sample that is clustered with its square matrices
    (twice in float64), and a batch beside it. Sets are judged from the fingerprints of all their images, at most those of the dump."""
    clustered = min(settings.prevalence.max_clustered, manifest.num_images)
    part = max(manifest.num_rows) * (2 * dimension + 4 * dimension + COLUMNS_BYTES)
    clusters = clustered * (2 * 4 * dimension + 8 * dimension + 2 * 8 * clustered) + BATCH_ROWS * 4 * (
        dimension + 2 * clustered
    )
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
    """Chunk -> committed verdicts. The method is loaded and the registry calibrated once per worker."""

    def __init__(self, settings: IdentifySettings, manifest: Manifest, registry_digest: str, device: str):
        torch.set_num_threads(1)
        self.settings, self.manifest, self.storage = settings, manifest, Storage(settings.storage)
        registry: Registry = open_registry(settings.registry, self.storage)
        if registry.digest != registry_digest:
            raise MismatchError(
                f"{settings.registry} changed while the job ran; start it again, with another output, or put the registry on storage "
                "that all nodes share"
            )
        method = load_method(registry.method, self.storage, device)
        self.judge = judge_of(registry, method, settings.verdicts, self.storage)

    def __call__(self, row: dict) -> dict:
        chunk = Chunk(**row)
        rows = _rows(self.manifest, chunk, self.storage)
        encoded = read_all(rows, self.manifest, self.settings.io_threads, self.storage)
        table = verdict_rows(rows, encoded, self.judge, self.settings.max_megapixels)
        self.storage.write_table(chunk.uri(self.settings.output), table)
        return {"num_images": len(table), "num_failed": len(table) - table["stage"].null_count}


def _rows(manifest: Manifest, chunk: Chunk, storage: Storage) -> list[dict]:
    columns = [field.name for field in LOCATION_FIELDS]
    return storage.read_rows(manifest.partition_uri(chunk.partition), chunk.start, chunk.stop, columns).to_pylist()


def _assemble(settings: IdentifySettings, manifest: Manifest, storage: Storage) -> list[str]:
    """SHA-256 of each part of verdicts, after all are there."""
    assembled = set(storage.names(join(settings.output, VERDICTS), suffix=".parquet"))
    digests = [""] * len(manifest.num_rows)
    units = (
        (settings, p, num_rows, part_name(p) in assembled, storage) for p, num_rows in enumerate(manifest.num_rows)
    )
    for partition, sha256 in run_units(_assemble_partition, units):
        digests[partition] = sha256
    return digests


def _assemble_partition(
    settings: IdentifySettings, partition: int, num_rows: int, assembled: bool, storage: Storage
) -> str:
    uri = Identified(settings.output, {}).part_uri(partition)
    if not assembled:
        chunks = plan_chunks(num_rows, partition, settings.chunk_rows)
        storage.write_table(uri, assemble_partition(settings.output, partition, chunks, storage))
    return bytes_sha256(storage.read_bytes(uri))
