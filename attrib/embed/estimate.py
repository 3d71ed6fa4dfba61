"""Estimate of the embed job, from a probe of the encoder: memory, bytes and time."""

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import pyarrow as pa

from attrib.common.formats import gib
from attrib.common.storage import Storage
from attrib.data.fatal_images import without_fatal_rows
from attrib.data.manifest import Manifest
from attrib.embed.settings import EmbedSettings
from attrib.runtime.estimate import READER_BYTES, TABLE_COPIES, TOUCHED_BYTES, WRITER_BYTES, Estimate
from attrib.runtime.machine import baseline_bytes, measure_growth

PROBE_BATCHES = 3  # of images: one batch does not show what a further image adds
# Measured on 2026-11-21.
ID_BYTES_ON_DISK = 50  # id and content hash, which do not compress
FILE_BYTES_PER_PIXEL = 25  # upper limit of a decoder's buffers (WebP; a JPEG needs 3)


class EmbedTask(StrEnum):
    """Kinds of tasks of the embed job, as `num_tasks` of its record counts them."""

    CHUNK = "chunk"  # one chunk through Ray Data
    PARTITION = "partition"  # one partition, assembled from its chunks


@dataclass(frozen=True)
class EncoderProbe:
    """Memory and time that `num_images` images of a job needed in this process.

    baseline_bytes: imports; network_bytes: weights; growth_bytes: growth of the peak while the images are prepared and
    encoded; image_bytes: growth per further image of a chunk; seconds_per_image: of one worker with one thread.
    """

    num_images: int
    baseline_bytes: int
    network_bytes: int
    growth_bytes: int
    image_bytes: int
    seconds_per_image: float


def probe_encoder(encoder, manifest: Manifest, settings: EmbedSettings, storage: Storage) -> EncoderProbe:
    """Prepare and encode a few images of the manifest.

    encoder: attrib.models.encoder.ImageEncoder, on the device of the workers.
    """
    # Local imports: the formulas below are also used where torch must not be loaded.
    import torch

    from attrib.embed.encode import encode_chunk, prepare_images

    baseline = baseline_bytes()
    num_wanted = min(PROBE_BATCHES * encoder.batch_size, max(settings.chunk_rows, encoder.batch_size))
    images = spread(storage.read_table(manifest.checked_uri(0, storage)), num_wanted)
    images = without_fatal_rows(images, manifest, settings.max_megapixels, settings.io_threads, storage)
    first = images.slice(0, encoder.batch_size)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        growth, _, prepared = measure_growth(
            lambda: prepare_images(first, manifest, encoder.preprocessing, settings, storage)
        )
        encoding, _, _ = measure_growth(lambda: encode_chunk(prepared, encoder))
        # Timed at the second call, because the first one also compiles kernels.
        _, encode_seconds, _ = measure_growth(lambda: encode_chunk(prepared, encoder))
        held = prepared.pixels.nbytes
        del prepared
        most, prepare_seconds, prepared = measure_growth(
            lambda: prepare_images(images, manifest, encoder.preprocessing, settings, storage)
        )
    finally:
        torch.set_num_threads(threads)
    per_image = prepared.pixels.nbytes // max(1, len(prepared.pixels))
    further = (most - growth) // max(1, len(images) - len(first)) if len(images) > len(first) else 0
    return EncoderProbe(
        num_images=len(first),
        baseline_bytes=baseline,
        network_bytes=sum(p.numel() * p.element_size() for p in encoder.model.state_dict().values()),
        growth_bytes=max(growth, held + encoding),
        image_bytes=max(per_image, further),
        seconds_per_image=prepare_seconds / len(images) + encode_seconds / encoder.batch_size,
    )


def spread(rows: pa.Table, num_wanted: int) -> pa.Table:
    """Return evenly spaced rows, because the first images of a collection often come from one folder."""
    return rows.take(pa.array(np.linspace(0, len(rows) - 1, min(num_wanted, len(rows))).astype(np.int64)))


def estimate_embed(
    num_images: int,
    dimension: int,
    partition_rows: int,
    images_in_flight: int,
    max_megapixels: float,
    probe: EncoderProbe,
    num_workers: int,
    on_gpus: bool = False,
) -> Estimate:
    """Return the estimate. images_in_flight: prepared or waiting in one worker, of one chunk or of overlapping ones."""
    beyond_probe = max(0, images_in_flight - probe.num_images)
    working = probe.growth_bytes + beyond_probe * (probe.image_bytes + 4 * dimension)
    loading = 2 * probe.network_bytes  # the file, and the weights of the network
    tables = READER_BYTES + WRITER_BYTES + TOUCHED_BYTES
    # The same workers also assemble partitions: chunks are concatenated, sorted and written.
    assembling = tables + min(partition_rows, num_images) * (TABLE_COPIES + 1) * (2 * dimension + 64)
    written = round(num_images * embedding_row_bytes(dimension))
    return Estimate(
        num_workers=num_workers,
        worker_bytes=probe.baseline_bytes + max(loading, probe.network_bytes + working + tables, assembling),
        driver_bytes=probe.baseline_bytes + max(loading, probe.network_bytes + probe.growth_bytes),
        output_bytes=written,
        temporary_bytes=written,
        seconds=num_images * probe.seconds_per_image / num_workers,
        on_gpus=on_gpus,
        note=f"an image of {max_megapixels:g} megapixels adds up to {gib(FILE_BYTES_PER_PIXEL * max_megapixels * 1e6)}",
    )


def embedding_row_bytes(dimension: int) -> float:
    """Return the bytes on disk of an image with its vector, stored uncompressed (attrib/common/storage.py)."""
    return 2 * dimension + ID_BYTES_ON_DISK
