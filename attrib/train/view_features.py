"""Features of source images and of their views, computed once, so that a head trains in minutes on a CPU.

<folder>/part-00000/rows-....safetensors   a chunk of images: features float16 [n, D], content int64 [n],
                                           donor int64 [n] (-1: none), view int64 [n] (-1: the image itself),
                                           kind int64 [n] (place in KINDS; -1: the image itself);
                                           metadata "failures": JSON of images without features
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from safetensors import safe_open
from safetensors.numpy import save
from torchvision.transforms.v2 import functional

from attrib.common.errors import AttribError, ImageError
from attrib.common.storage import Storage, scratch_folder
from attrib.data.decoding import decode_image
from attrib.data.manifest import Manifest
from attrib.data.reading import read_all
from attrib.models.preprocessing import Preprocessing
from attrib.train.augment.settings import DONOR_KINDS, KINDS, Kind, ViewSettings
from attrib.train.augment.views import draw_kind, render_view, view_generator, view_sheet
from attrib.train.settings import TrainSettings

COLUMNS = ("features", "content", "donor", "view", "kind")
ORIGINAL = -1  # in the place of a view's number and kind
NO_DONOR = -1
MARGIN = 1.5  # of a decoded image's shorter side over a view's: crops of less than half the area are enlarged a little
IO_THREADS = 8
MAX_MEGAPIXELS = 100.0
BATCH_SIZE = 16
SHEET_PX = 160


@dataclass(frozen=True)
class ViewFeatures:
    """features: float16 [n, D]; content, donor, view, kind: int64 [n], as in the files. failures: id, stage, reason of
    each lost image."""

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
        """Some rows, by position or mask."""
        return ViewFeatures(*(getattr(self, name)[rows] for name in COLUMNS), self.failures)

    def sources(self, rows: np.ndarray) -> np.ndarray:
        """int64 [m, 2]: content and donor of some rows."""
        return np.stack([self.content[rows], self.donor[rows]], axis=1)


@dataclass(frozen=True)
class DecodedImages:
    """ids of images that could be decoded; of each, prepared: uint8 [3, crop_px, crop_px], as the network wants it, and
    pixels: uint8 [3, h, w], shrunk to what views need; failures of the others."""

    ids: list[int]
    prepared: list[torch.Tensor]
    pixels: list[torch.Tensor]
    failures: list[dict]


def decode_images(
    images: pa.Table, manifest: Manifest, preprocessing: Preprocessing, storage: Storage
) -> DecodedImages:
    """The images of some manifest rows."""
    rows = images.select(["id", "uri", "offset", "num_bytes", "row_group", "row"]).to_pylist()
    decoded = DecodedImages([], [], [], [])
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
        decoded.pixels.append(_shrunk(pixels, preprocessing.crop_px))
    return decoded


def _shrunk(pixels: torch.Tensor, view_px: int) -> torch.Tensor:
    side_px = round(view_px * MARGIN)
    return functional.resize(pixels, [side_px], antialias=True) if min(pixels.shape[1:]) > side_px else pixels


def draw_view(
    decoded: DecodedImages, position: int, view: int, settings: ViewSettings, view_px: int, seed: int
) -> tuple[torch.Tensor, int, Kind]:
    """View number `view` of an image: uint8 [3, view_px, view_px], its kind, and the id of its donor, another image of
    the chunk or NO_DONOR."""
    generator = view_generator(seed, decoded.ids[position], view)
    kind = draw_kind(settings, generator)
    num_others = len(decoded.ids) - 1
    if kind in DONOR_KINDS and not num_others:
        kind = "solo"  # an image alone in its chunk
    if kind not in DONOR_KINDS:
        return render_view(decoded.pixels[position], None, kind, settings, view_px, generator), NO_DONOR, kind
    other = int(torch.randint(num_others, (), generator=generator))
    other += other >= position
    view_pixels = render_view(decoded.pixels[position], decoded.pixels[other], kind, settings, view_px, generator)
    return view_pixels, decoded.ids[other], kind


def extract_chunk(
    images: pa.Table,
    manifest: Manifest,
    extractor: torch.nn.Module,
    preprocessing: Preprocessing,
    settings: TrainSettings,
    num_views: int,
    device: str,
    storage: Storage,
) -> ViewFeatures:
    """Features of the images of some manifest rows and of `num_views` views of each."""
    decoded = decode_images(images, manifest, preprocessing, storage)
    content, donor, view, kind, batch, features = [], [], [], [], [], []
    for pixels, row in _prepared_views(decoded, preprocessing, settings, num_views):
        for column, value in zip((content, donor, view, kind), row):
            column.append(value)
        batch.append(pixels)
        if len(batch) == BATCH_SIZE:
            features.append(_features(batch, extractor, preprocessing, device))
            batch = []
    if batch:
        features.append(_features(batch, extractor, preprocessing, device))
    return ViewFeatures(
        np.concatenate(features) if features else np.empty((0, extractor.dimension), np.float16),
        *(np.array(column, np.int64) for column in (content, donor, view, kind)),
        decoded.failures,
    )


def _prepared_views(
    decoded: DecodedImages, preprocessing: Preprocessing, settings: TrainSettings, num_views: int
) -> Iterator[tuple[torch.Tensor, tuple[int, int, int, int]]]:
    """(uint8 [3, crop_px, crop_px], (content, donor, view, kind)) of every image and view."""
    for position, image_id in enumerate(decoded.ids):
        yield decoded.prepared[position], (image_id, NO_DONOR, ORIGINAL, ORIGINAL)
        for view in range(num_views):
            pixels, donor, kind = draw_view(
                decoded, position, view, settings.views, preprocessing.crop_px, settings.seed
            )
            yield pixels, (image_id, donor, view, KINDS.index(kind))


@torch.inference_mode()
def _features(batch: list[torch.Tensor], extractor, preprocessing: Preprocessing, device: str) -> np.ndarray:
    images = preprocessing.normalise(torch.stack(batch), device, torch.float32)
    features = extractor(images.contiguous(memory_format=torch.channels_last)).half().cpu().numpy()
    if not np.isfinite(features).all():
        raise AttribError("features are not finite in float16; use other feature levels")
    return features


def sheet_of_views(
    images: pa.Table, manifest: Manifest, preprocessing: Preprocessing, settings: TrainSettings, storage: Storage
) -> bytes:
    """A PNG with the views of the images of some manifest rows."""
    decoded = decode_images(images, manifest, preprocessing, storage)
    donors = decoded.pixels[1:] + decoded.pixels[:1]
    return view_sheet(decoded.pixels, donors, settings.views, SHEET_PX, seed=settings.seed)


def write_chunk(uri: str, chunk: ViewFeatures, storage: Storage) -> None:
    tensors = {name: getattr(chunk, name) for name in COLUMNS}
    storage.write_bytes(uri, save(tensors, metadata={"failures": json.dumps(chunk.failures)}))


def read_chunks(uris: list[str], storage: Storage) -> ViewFeatures:
    """Chunks in the given order, joined."""
    chunks = [_read_chunk(uri, storage) for uri in uris]
    joined = (np.concatenate([getattr(chunk, name) for chunk in chunks]) for name in COLUMNS)
    return ViewFeatures(*joined, [failure for chunk in chunks for failure in chunk.failures])


def _read_chunk(uri: str, storage: Storage) -> ViewFeatures:
    with scratch_folder() as folder, safe_open(storage.localise(uri, folder), framework="np") as file:
        tensors = (file.get_tensor(name) for name in COLUMNS)
        return ViewFeatures(*tensors, json.loads(file.metadata()["failures"]))
