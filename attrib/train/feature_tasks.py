"""Compute the features of sampled images and of their views, in Ray tasks. Each task commits one chunk."""

from dataclasses import replace
from functools import lru_cache

import pyarrow as pa
import pyarrow.compute as pc
import torch

from attrib.common.errors import FailedShareError
from attrib.common.progress import Progress
from attrib.common.storage import Storage, join
from attrib.data.chunks import Chunk, plan_chunks
from attrib.data.manifest import Manifest, sample_threshold, sampled_rows
from attrib.models.encoder import keep_freed_memory, load_network, preprocessing_of
from attrib.models.features import FeatureExtractor
from attrib.models.model import features_data_config
from attrib.models.preprocessing import Preprocessing
from attrib.models.settings import BackboneSettings, FeatureSettings
from attrib.runtime.session import device_of
from attrib.runtime.tasks import run_units
from attrib.train.settings import TrainSettings
from attrib.train.view_features import ViewFeatures, decode_images, extract_chunk, read_chunks, write_chunk


def view_features(
    settings: TrainSettings, manifest: Manifest, folder: str, num_views: int, max_images: int, storage: Storage
) -> ViewFeatures:
    """Compute the chunks missing below `folder` and return the features of all chunks.

    Raises FailedShareError if more images than `max_failed_share` have no features.
    """
    device = device_of(settings.device, "train")
    threshold = sample_threshold(manifest, max_images, storage)
    chunks = []
    for partition in range(len(manifest.num_rows)):
        num_rows = len(sampled_rows(manifest, partition, threshold, storage))
        chunks += plan_chunks(num_rows, partition, settings.chunk_rows)
    pending = [chunk for chunk in chunks if not storage.exists(_chunk_uri(folder, chunk))]
    num_images, num_pending = (sum(c.stop - c.start for c in some) for some in (chunks, pending))
    progress = Progress("features", num_images, "images", already_done=num_images - num_pending)
    tasks = ((settings, manifest, folder, chunk, threshold, num_views, device, storage) for chunk in pending)
    for _, (num_done, num_failed) in run_units(_extract, tasks, num_gpus=1 if device == "cuda" else 0):
        progress.update(num_done, num_failed)
    progress.close()
    found = read_chunks([_chunk_uri(folder, chunk) for chunk in chunks], storage)
    _name(found.failures, manifest, storage)
    if len(found.failures) > settings.max_failed_share * num_images:
        table = write_failures(settings.output, found.failures, storage)
        raise FailedShareError(
            f"{len(found.failures):,} of {num_images:,} images have no features, more than max_failed_share = "
            f"{settings.max_failed_share:g} allows; e.g. {FailedShareError.examples(found.failures)}. {table} lists "
            f"them; fix these images, delete {folder} and run again, or raise max_failed_share"
        )
    return found


def write_failures(output: str, failures: list[dict], storage: Storage) -> str:
    """Write the images without features to the output of the job; return the URI of the table."""
    uri = join(output, "failures.parquet")
    schema = pa.schema([("id", pa.int64()), *((name, pa.string()) for name in ("key", "stage", "reason"))])
    storage.write_table(uri, pa.Table.from_pylist(failures, schema))
    return uri


def _name(failures: list[dict], manifest: Manifest, storage: Storage) -> None:
    """Add the key of the image to each failure."""
    wanted, keys = pc.field("id").isin([failure["id"] for failure in failures]), {}
    for partition in range(len(manifest.num_rows)) if failures else ():
        rows = storage.read_table(manifest.checked_uri(partition, storage), ["id", "key"], wanted)
        keys |= dict(zip(rows["id"].to_pylist(), rows["key"].to_pylist()))
    for failure in failures:
        failure["key"] = keys[failure["id"]]


def _chunk_uri(folder: str, chunk: Chunk) -> str:
    return chunk.uri(folder).removesuffix(".parquet") + ".sealed"


@lru_cache(maxsize=2)  # loaded once per worker
def _extractor(
    backbone: BackboneSettings, features: FeatureSettings, device: str, storage_settings
) -> tuple[FeatureExtractor, Preprocessing]:
    torch.set_num_threads(1)
    network = load_network(backbone, Storage(storage_settings))
    data_config = features_data_config(network.data_config, features)
    preprocessing = preprocessing_of(replace(network, data_config=data_config), backbone.name)
    keep_freed_memory()
    model = network.model.eval().to(device, memory_format=torch.channels_last)
    return FeatureExtractor(model, features, preprocessing.crop_px), preprocessing


def _extract(
    settings: TrainSettings,
    manifest: Manifest,
    folder: str,
    chunk: Chunk,
    threshold,
    num_views: int,
    device: str,
    storage: Storage,
) -> tuple[int, int]:
    extractor, preprocessing = _extractor(settings.backbone, settings.features, device, storage.settings)
    images = sampled_rows(manifest, chunk.partition, threshold, storage).slice(chunk.start, chunk.stop - chunk.start)
    decoded = decode_images(images, manifest, preprocessing, storage)
    found = extract_chunk(decoded, extractor, preprocessing, settings, num_views)
    write_chunk(_chunk_uri(folder, chunk), found, storage)
    return len(images), len(found.failures)
