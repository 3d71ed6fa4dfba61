"""The photographs that synthetic generators are trained on and that all of them reproduce."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from attrib.common.errors import AttribError, ImageError
from attrib.common.storage import Storage
from attrib.data.decoding import decode_image
from attrib.data.ids import sampling_rank
from attrib.data.manifest import Manifest, sampled_images
from attrib.data.reading import read_all

IO_THREADS = 8
SPARE = 4  # images listed per photograph: copies, small and damaged images are skipped
READ_ROWS = 64  # images read before the next look at whether there are enough


@dataclass(frozen=True)
class Photographs:
    """shown: uint8 [n, 3, px, px], which every model reproduces and none is trained on; training: uint8 [m, 3, px, px]."""

    shown: Tensor
    training: Tensor

    def digest(self) -> str:
        return hashlib.sha256(self.shown.numpy().tobytes() + self.training.numpy().tobytes()).hexdigest()


def read_photographs(
    manifest: Manifest,
    *,
    px: int,
    num_shown: int,
    num_training: int,
    max_megapixels: float,
    storage: Storage,
    first_shown: int = 0,
) -> Photographs:
    """The first usable images of a manifest in the order of sampling_rank: `num_training` to train on, then `num_shown` from `first_shown` on.

    Copies of one image count once. So two ranges of shown photographs that do not overlap share no image, however many are trained on. Images that
    cannot be decoded or have a side below `px` are skipped: enlarging one would add an upsampler's trace to an image that must have none. Raises
    AttribError if too few remain.
    """
    found: dict[bytes, Tensor] = {}  # copies of one picture would be trained on and shown
    wanted = num_training + first_shown + num_shown
    images = sampled_images(manifest, SPARE * wanted, storage)
    images = images.take(sampling_rank(images["id"].to_numpy()).argsort())
    for pixels in _usable(images, manifest, px, max_megapixels, storage):
        found.setdefault(pixels.numpy().tobytes(), pixels)
        if len(found) == wanted:
            stacked = torch.stack(list(found.values()))
            return Photographs(
                stacked[-num_shown:].clone(), stacked[:num_training].clone()
            )  # a view would travel whole
    raise AttribError(
        f"{wanted:,} photographs of {px} px or more are needed (num_training_photographs {num_training:,}, first_photograph {first_shown:,} and "
        f"num_photographs {num_shown:,}) and collection {manifest.collection.name!r} has {len(found):,} that can be used; lower the numbers or "
        "px, or take a larger collection"
    )


def _usable(images: pa.Table, manifest: Manifest, px: int, max_megapixels: float, storage: Storage) -> Iterator[Tensor]:
    rows = images.select(["id", "uri", "offset", "num_bytes", "row_group", "row"]).to_pylist()
    for start in range(0, len(rows), READ_ROWS):
        for data in read_all(rows[start : start + READ_ROWS], manifest, IO_THREADS, storage):
            if isinstance(data, ImageError):
                continue
            try:
                pixels = decode_image(data, max_megapixels=max_megapixels).pixels
            except ImageError:
                continue
            if min(pixels.shape[1:]) >= px:
                yield shrink_and_crop(pixels, px)


def shrink_and_crop(pixels: Tensor, px: int) -> Tensor:
    """uint8 [3, h, w] -> uint8 [3, px, px]: the middle of the picture, its shorter side shrunk to px; what JPEG left goes with it."""
    return functional.center_crop(functional.resize(pixels, [px], antialias=True), [px, px]).contiguous()
