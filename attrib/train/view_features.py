"""Features of source images and of their views, computed once, so that a head trains in minutes on a CPU.

<folder>/_chunks/part-00000/rows-....sealed   a chunk of images and their views: safetensors with the columns of
                                              ViewFeatures and "failures", JSON of images without features; then SHA-256
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pyarrow as pa
import torch
from safetensors.numpy import load, save
from torch import nn
from torchvision.transforms.v2 import functional

from attrib.common.errors import AttribError, ImageError
from attrib.common.storage import Storage
from attrib.data.decoding import decode_image
from attrib.data.manifest import Manifest
from attrib.data.reading import read_all
from attrib.models.preprocessing import Preprocessing
from attrib.train.augment.settings import DONOR_KINDS, KINDS, Kind, ViewSettings
from attrib.train.augment.views import draw_kind, render_view, view_generator, view_sheet
from attrib.train.settings import TrainSettings

COLUMNS = ("features", "content", "donor", "view", "kind")
FAILURES = "failures"
ORIGINAL = -1  # view and kind of an image itself
NO_DONOR = -1
MARGIN = 1.5  # shorter side of a decoded image / side of a view; only crops of less than half the area are enlarged
IO_THREADS = 8
MAX_MEGAPIXELS = 100.0
BATCH_SIZE = 16
SHEET_PX = 160


@dataclass(frozen=True)
class ViewFeatures:
    """Features of n images and views, in memory and in the files.

    features: float16 [n, D]. int64 [n]: content; donor (-1: none); view (-1: the image itself); kind, the index in
    KINDS (-1: the image itself). failures: id, stage and reason of each image without features.
    """

    features: np.ndarray
    content: np.ndarray
    donor: np.ndarray
    view: np.ndarray
    kind: np.ndarray
    failures: list[dict]

    @property
    def is_original(self) -> np.ndarray:
        return self.view == ORIGINAL

    def take(self, rows: np.ndarray) -> "ViewFeatures":
        """Return some rows, by position or mask."""
        return ViewFeatures(*(getattr(self, name)[rows] for name in COLUMNS), self.failures)


@dataclass(frozen=True)
class DecodedImages:
    """Images that could be decoded, and the failures of the others.

    prepared: uint8 [3, crop_px, crop_px], the network's input; pixels: uint8 [3, h, w], shrunk to the size views need.
    """

    ids: list[int]
    prepared: list[torch.Tensor]
    pixels: list[torch.Tensor]
    failures: list[dict]


def decode_images(
    images: pa.Table, manifest: Manifest, preprocessing: Preprocessing, storage: Storage
) -> DecodedImages:
    """Read and decode the images of some manifest rows."""
    rows = images.select(["id", "uri", "offset", "num_bytes", "row_group", "row"]).to_pylist()
    decoded = DecodedImages([], [], [], [])
    side_px = round(preprocessing.crop_px * MARGIN)
    for row, data in zip(rows, read_all(rows, manifest, IO_THREADS, storage)):
        try:
            if isinstance(data, ImageError):
                raise data
            pixels = decode_image(data, max_megapixels=MAX_MEGAPIXELS).pixels
        except ImageError as error:
            decoded.failures.append({"id": row["id"], "stage": error.stage, "reason": error.reason})
            continue
        decoded.ids.append(row["id"])
        decoded.prepared.append(preprocessing.resize_and_crop(pixels))
        if min(pixels.shape[1:]) > side_px:
            pixels = functional.resize(pixels, [side_px], antialias=True)
        decoded.pixels.append(pixels)
    return decoded


def draw_view(
    decoded: DecodedImages, position: int, view: int, settings: ViewSettings, view_px: int, seed: int
) -> tuple[torch.Tensor, int, Kind]:
    """Return view number `view` of an image: uint8 [3, view_px, view_px], the id of its donor, and its kind.

    The donor is another image of the chunk. Without a donor (NO_DONOR) the kind is solo.
    """
    generator = view_generator(seed, decoded.ids[position], view)
    kind = draw_kind(settings, generator)
    num_others = len(decoded.ids) - 1
    style, donor = None, NO_DONOR
    if kind in DONOR_KINDS and num_others:
        other = int(torch.randint(num_others, (), generator=generator))
        other += other >= position
        style, donor = decoded.pixels[other], decoded.ids[other]
    elif kind in DONOR_KINDS:
        kind = "solo"
    return render_view(decoded.pixels[position], style, kind, settings, view_px, generator), donor, kind


def extract_chunk(
    decoded: DecodedImages, extractor: nn.Module, preprocessing: Preprocessing, settings: TrainSettings, num_views: int
) -> ViewFeatures:
    """Compute the features of images and of `num_views` views of each.

    Raises AttribError if a feature is not finite in float16.
    """
    device = next(extractor.parameters()).device
    views = _prepared_views(decoded, preprocessing, settings, num_views)
    rows, features = [], [np.empty((0, extractor.dimension), np.float16)]
    while batch := list(islice(views, BATCH_SIZE)):
        rows += [row for _, row in batch]
        with torch.inference_mode():
            normalised = preprocessing.normalise(torch.stack([pixels for pixels, _ in batch]), device, torch.float32)
            found = extractor(normalised.contiguous(memory_format=torch.channels_last)).half().cpu().numpy()
        if not np.isfinite(found).all():
            row, column = np.argwhere(~np.isfinite(found))[0]
            block = np.repeat(list(extractor.sizes), list(extractor.sizes.values()))[column]
            raise AttribError(
                f"feature block {block} of image {batch[row][1][0]} holds NaN or values above 65,504, the limit of "
                "float16; remove the block from features"
            )
        features.append(found)
    columns = np.ascontiguousarray(np.array(rows, np.int64).reshape(-1, 4).T)
    return ViewFeatures(np.concatenate(features), *columns, decoded.failures)


def _prepared_views(
    decoded: DecodedImages, preprocessing: Preprocessing, settings: TrainSettings, num_views: int
) -> Iterator[tuple[torch.Tensor, tuple[int, int, int, int]]]:
    """Yield (uint8 [3, crop_px, crop_px], (content, donor, view, kind)) of every image and view."""
    for position, image_id in enumerate(decoded.ids):
        yield decoded.prepared[position], (image_id, NO_DONOR, ORIGINAL, ORIGINAL)
        for view in range(num_views):
            pixels, donor, kind = draw_view(
                decoded, position, view, settings.views, preprocessing.crop_px, settings.seed
            )
            yield pixels, (image_id, donor, view, KINDS.index(kind))


def sheet_of_views(
    images: pa.Table, manifest: Manifest, preprocessing: Preprocessing, settings: TrainSettings, storage: Storage
) -> bytes | None:
    """Return a PNG with views of the images of some manifest rows, None if no image can be decoded."""
    decoded = decode_images(images, manifest, preprocessing, storage)
    if not decoded.ids:
        return None
    return view_sheet(decoded.pixels, settings.views, SHEET_PX, settings.seed)


def write_chunk(uri: str, chunk: ViewFeatures, storage: Storage) -> None:
    """Write a chunk with its checksum; the failures as bytes of JSON."""
    failures = np.frombuffer(json.dumps(chunk.failures).encode(), np.uint8)
    storage.write_sealed_bytes(uri, save({name: getattr(chunk, name) for name in COLUMNS} | {FAILURES: failures}))


def read_chunks(uris: list[str], storage: Storage) -> ViewFeatures:
    """Return the chunks joined in the given order. Raises AttribError for a damaged one."""
    columns, failures = {name: [] for name in COLUMNS}, []
    for uri in uris:
        chunk = load(bytes(storage.read_sealed_bytes(uri)))
        for name, column in columns.items():
            column.append(chunk[name])
        failures += json.loads(chunk[FAILURES].tobytes())
    return ViewFeatures(*map(np.concatenate, columns.values()), failures)
