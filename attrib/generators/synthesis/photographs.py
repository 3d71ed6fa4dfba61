"""Choose the photographs that synthetic generators are trained on, and others that all of them reproduce."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

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
SPARE = 4  # images listed per photograph that is needed, because copies, small and damaged images are skipped
READ_ROWS = 64  # images read at a time


@dataclass(frozen=True)
class Photographs:
    """shown: uint8 [n, 3, px, px], reproduced by every model; training: uint8 [m, 3, px, px], other photographs."""

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
    """Photographs of a manifest in the random order of sampling_rank: num_training for training, then num_shown others.

    first_shown: how many photographs to skip between them. Copies count once, so runs with disjoint ranges of shown
    photographs share no image. Images that cannot be decoded or have a side below px are skipped, because enlarging
    would add an upsampler's trace. Raises AttribError if too few remain.
    """
    found: dict[bytes, Tensor] = {}
    wanted = num_training + first_shown + num_shown
    images = sampled_images(manifest, SPARE * wanted, storage)
    rows = images.take(sampling_rank(images["id"].to_numpy()).argsort())
    rows = rows.select(["id", "uri", "offset", "num_bytes", "row_group", "row"]).to_pylist()
    for image in decoded(rows, manifest, px, max_megapixels, storage):
        pixels = shrink_and_crop(image, px)
        found.setdefault(pixels.numpy().tobytes(), pixels)
        if len(found) == wanted:
            stacked = torch.stack(list(found.values()))
            # Clones, because pickle would write the whole tensor for each view.
            return Photographs(stacked[-num_shown:].clone(), stacked[:num_training].clone())
    raise AttribError(
        f"{wanted:,} photographs of {px} px or more are needed (num_training_photographs {num_training:,}, "
        f"first_photograph {first_shown:,} and num_photographs {num_shown:,}) and collection "
        f"{manifest.collection.name!r} has {len(found):,} that can be used; lower the numbers or px, or take a larger "
        "collection"
    )


def decoded(
    rows: list[dict], manifest: Manifest, min_side_px: int, max_megapixels: float, storage: Storage
) -> Iterator[Tensor]:
    """uint8 [3, h, w] of each manifest row; images that are damaged or have a side below min_side_px are skipped."""
    for start in range(0, len(rows), READ_ROWS):
        for data in read_all(rows[start : start + READ_ROWS], manifest, IO_THREADS, storage):
            try:
                if not isinstance(data, ImageError):
                    pixels = decode_image(data, max_megapixels=max_megapixels).pixels
                    if min(pixels.shape[1:]) >= min_side_px:
                        yield pixels
            except ImageError:
                continue


def shrink_and_crop(pixels: Tensor, px: int) -> Tensor:
    """Centre crop uint8 [3, px, px] after shrinking the shorter side to px, which also removes JPEG traces."""
    return functional.center_crop(functional.resize(pixels, [px], antialias=True), [px, px]).contiguous()
