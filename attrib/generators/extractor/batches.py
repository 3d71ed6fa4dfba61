"""Batches and validation for training the extractor: patches of pool images, with random degradations.

A batch has P models and K images of each, because a random batch would hold few images of one model. In a share of the
batches all models show the same K photographs, so that only their traces differ. Every random draw depends only on the
seed and the step, so it is the same for any number of workers and after a restart.
"""

import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from attrib.common.errors import AttribError
from attrib.common.storage import Storage
from attrib.generators.extractor.network import Extractor
from attrib.generators.extractor.settings import ContrastSettings, FingerprintSettings
from attrib.generators.fingerprints.scoring import identified
from attrib.generators.settings import PERIOD_PX
from attrib.generators.signals.degradations import NONE, Degradation, degrade, random_degradation
from attrib.generators.synthesis.pool import Pool

NUM_REFERENCES = 10
MAX_QUERIES = 20  # of each held-out model in a validation
VALIDATION = (NONE, Degradation("jpeg", 85))  # references and queries are degraded alike
NUM_AHEAD = 2  # batches that each loader may prepare in advance


@dataclass(frozen=True, eq=False)
class PoolImages:
    """Images of the pool, uint8 [n, 3, px, px] per class.

    training: for every class the same photographs in the same order. held_out: of models and photographs that are not
    used in training. photographs: the originals of the training images.
    """

    training: list[Tensor]
    held_out: list[Tensor]
    photographs: Tensor

    @property
    def num_images(self) -> int:
        return len(self.training[0])


def check_pool(pool: Pool, settings: FingerprintSettings) -> None:
    """Raises AttribError if the pool has too few models, images or pixels for the settings."""
    num_held_out = sum(model.spec.upsampler == settings.validation_upsampler for model in pool.models)
    num_training = len(pool.models) - num_held_out
    if min(num_held_out, num_training) < 2:
        raise AttribError(
            f"the pool has {num_held_out} models with validation_upsampler {settings.validation_upsampler!r} for "
            f"validation and {num_training} other models for training, and needs 2 or more of each; choose another "
            "validation_upsampler, or synthesize more models"
        )
    contrast, num_validation = settings.contrast, _num_validation(pool)
    num_classes, num_images = num_training + settings.photographs_as_class, pool.num_photographs - num_validation
    if num_classes < contrast.models_per_batch or num_images < contrast.images_per_model:
        raise AttribError(
            f"a batch takes {contrast.models_per_batch} models and {contrast.images_per_model} images of each, but the "
            f"pool has {num_classes} models and {num_images} images of each; lower "
            "contrast.models_per_batch or contrast.images_per_model, or make a larger pool"
        )
    if pool.px < settings.network.patch_px:
        raise AttribError(
            f"network.patch_px is {settings.network.patch_px} and the pool's images have {pool.px} px; lower patch_px "
            "or make a pool of larger images"
        )
    if num_validation <= NUM_REFERENCES:
        raise AttribError(
            f"the pool has {pool.num_photographs} images of each model, and validation can use half of them; it needs "
            f"{NUM_REFERENCES} references and at least one query, so make a pool with more photographs"
        )


def read_pool(pool: Pool, settings: FingerprintSettings, storage: Storage) -> PoolImages:
    """The images of all models. Models with the validation_upsampler are held out and show other photographs."""
    num_validation = _num_validation(pool)
    training, held_out = [], []
    for model in pool.models:
        samples = pool.samples(model.model_id, storage)
        if model.spec.upsampler == settings.validation_upsampler:
            held_out.append(samples[-num_validation:].clone())  # a view would keep all of them in memory
        else:
            training.append(samples[:-num_validation].clone())
    photographs = pool.photographs(storage)[:-num_validation].clone()
    return PoolImages(training + [photographs] * settings.photographs_as_class, held_out, photographs)


def _num_validation(pool: Pool) -> int:
    """Number of photographs that are kept for validation, the last ones of the pool."""
    return min(NUM_REFERENCES + MAX_QUERIES, pool.num_photographs // 2)


class Draw(NamedTuple):
    """models: int64 [P], distinct; images: int64 [P, K], positions among a model's images, distinct within each row."""

    models: Tensor
    images: Tensor
    same_content: bool  # whether all rows of `images` are equal


def draw_batch(num_models: int, num_images: int, contrast: ContrastSettings, generator: torch.Generator) -> Draw:
    """Draw the models and images of one batch, from num_models models with num_images images each."""
    models = torch.randperm(num_models, generator=generator)[: contrast.models_per_batch]
    same_content = bool(torch.rand((), generator=generator) < contrast.same_content_share)
    num_rows = 1 if same_content else contrast.models_per_batch
    order = torch.rand(num_rows, num_images, generator=generator).argsort(dim=1, stable=True)
    return Draw(models, order[:, : contrast.images_per_model].expand(contrast.models_per_batch, -1), same_content)


class ExtractorBatch(NamedTuple):
    """One worker's part of a batch. patches: uint8 [p * k, 3, s, s]; labels: int64 [p * k], the training class."""

    patches: Tensor
    labels: Tensor


class ExtractorBatches:
    """The batches of one worker, which gets an equal part of the models of every global batch."""

    def __init__(self, images: PoolImages, settings: FingerprintSettings, rank: int, num_workers: int):
        self.images, self.settings, self.rank, self.num_workers = images, settings, rank, num_workers

    def steps(self, start: int, stop: int) -> Iterator[ExtractorBatch]:
        """Batches of the steps start to stop, in order, made in advance by num_loaders threads."""
        waiting: deque = deque()
        with ThreadPoolExecutor(self.settings.num_loaders) as loaders:  # codecs release the GIL
            for step in range(start, stop):
                waiting.append(loaders.submit(self.make, step))
                if len(waiting) > NUM_AHEAD * self.settings.num_loaders:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def make(self, step: int) -> ExtractorBatch:
        """This worker's part of a batch, with one degradation for all images.

        If all models show the same photographs, they are also cut at the same positions.
        """
        contrast, patch_px = self.settings.contrast, self.settings.network.patch_px
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + step)
        draw = draw_batch(len(self.images.training), self.images.num_images, contrast, generator)
        is_degraded = torch.rand((), generator=generator) < self.settings.degraded_share
        smallest_scale = patch_px / self.images.photographs.shape[-1]
        degradation = random_degradation(generator, smallest_scale) if is_degraded else NONE
        num_rows = 1 if draw.same_content else contrast.models_per_batch
        places = torch.rand(num_rows, contrast.images_per_model, 3, generator=generator)
        places = places.expand(contrast.models_per_batch, -1, -1)
        mine = range(self.rank, contrast.models_per_batch, self.num_workers)
        cut = [
            augmented(self.images.training[draw.models[p]][draw.images[p, k]], degradation, places[p, k], patch_px)
            for p in mine
            for k in range(contrast.images_per_model)
        ]
        return ExtractorBatch(torch.stack(cut), draw.models[list(mine)].repeat_interleave(contrast.images_per_model))


def augmented(image: Tensor, degradation: Degradation, place: Tensor, patch_px: int) -> Tensor:
    """A degraded patch of an image: uint8 [3, h, w] -> uint8 [3, patch_px, patch_px].

    place: float32 [3] in 0..1. place[:2] is the position of the patch. If place[2] < 0.5, the patch is cut before the
    degradation, else after it. So training has patches with a degraded border, as small images have, and without one,
    as patches of large images.
    """
    if place[2] < 0.5:
        scale = degradation.strength if degradation.kind in ("resize", "crop") else 1.0
        image = _window(image, min(image.shape[-1], math.ceil(patch_px / scale)), place)
    return _window(degrade(image, degradation), patch_px, place)


def _window(image: Tensor, size: int, place: Tensor) -> Tensor:
    """A square that starts at a multiple of PERIOD_PX, like the patches of `patches`."""
    top, left = (int(place[axis] * ((image.shape[1 + axis] - size) // PERIOD_PX + 1)) * PERIOD_PX for axis in (0, 1))
    return image[:, top : top + size, left : left + size]


class Validation:
    """Identification of held-out models from references, with one patch from the middle of each image."""

    def __init__(self, held_out: list[Tensor], patch_px: int):
        middle = torch.full((3,), 0.5)
        self.shape = len(held_out), len(held_out[0]), -1
        self.cut = {
            degradation.name: torch.stack(
                [augmented(image, degradation, middle, patch_px) for images in held_out for image in images]
            )
            for degradation in VALIDATION
        }

    def __call__(self, extractor: Extractor) -> dict[str, float]:
        """{name of a degradation of VALIDATION: accuracy}; ties count as wrong."""
        found = {}
        for name, cut in self.cut.items():
            references, queries = np.split(
                extractor.embed_patches(cut).numpy().reshape(self.shape), [NUM_REFERENCES], 1
            )
            truth = np.repeat(np.arange(len(queries)), queries.shape[1])
            scores = extractor.scores(list(references), np.concatenate(queries))
            found[name] = float((identified(scores, truth) == truth).mean())
        return found
