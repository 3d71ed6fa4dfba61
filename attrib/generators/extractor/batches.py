"""What the extractor trains on and is judged by: patches of the pool's images, degraded on the fly, and held-out models with references.

Every draw depends on the seed and the step alone: not on how many workers share a batch, nor on where a restart begins.
"""

import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attrib.common.errors import AttribError
from attrib.common.storage import Storage
from attrib.generators.extractor.losses import check_batch, draw_batch
from attrib.generators.extractor.network import Extractor
from attrib.generators.extractor.settings import FingerprintSettings
from attrib.generators.fingerprints.scoring import identified
from attrib.generators.settings import PERIOD_PX
from attrib.generators.signals.degradations import NONE, Degradation, degrade, random_degradation
from attrib.generators.synthesis.pool import Pool

NUM_REFERENCES = 10
MAX_QUERIES = 20  # of each held-out model in a validation
VALIDATION = (NONE, Degradation("jpeg", 85))  # references and queries are degraded alike
NUM_AHEAD = 2  # batches that each loader may have ready


@dataclass(frozen=True, eq=False)
class PoolImages:
    """uint8 [n, 3, px, px] of each class: those that train, of the same photographs in the same order, and those that judge, of others.

    photographs: uint8 [n, 3, px, px], what the former show.
    """

    training: list[Tensor]
    held_out: list[Tensor]
    photographs: Tensor

    @property
    def num_images(self) -> int:
        return len(self.training[0])

    @property
    def px(self) -> int:
        return self.training[0].shape[-1]


def check_pool(pool: Pool, settings: FingerprintSettings) -> None:
    """Raises AttribError if the pool is too small, in any sense, for what the settings ask."""
    held_out = [model for model in pool.models if model.spec.upsampler == settings.validation_upsampler]
    num_training = len(pool.models) - len(held_out)
    if len(held_out) < 2 or num_training < 2:
        raise AttribError(
            f"of the pool's {len(pool.models)} models {len(held_out)} have validation_upsampler {settings.validation_upsampler!r} and judge, and "
            f"{num_training} others train; both must be 2 or more: choose another upsampler, or synthesize more"
        )
    contrast = settings.contrast
    num_judging = _num_judging(pool)
    num_classes, num_images = num_training + settings.photographs_as_class, pool.num_photographs - num_judging
    check_batch(num_classes, num_images, contrast.models_per_batch, contrast.images_per_model)
    if pool.px < settings.network.patch_px:
        raise AttribError(
            f"network.patch_px is {settings.network.patch_px} and the pool's images have {pool.px} px; lower it, or make a pool of larger images"
        )
    if num_judging <= NUM_REFERENCES:
        raise AttribError(
            f"the pool has {pool.num_photographs} images of each model, half of which may judge; validation takes {NUM_REFERENCES} references and at "
            "least one query"
        )


def read_pool(pool: Pool, settings: FingerprintSettings, storage: Storage) -> PoolImages:
    """All models of the pool: those that judge have an upsampler of which none that trains has any, and show other photographs."""
    num_judging = _num_judging(pool)
    training, held_out = [], []
    for model in pool.models:
        samples = pool.samples(model.model_id, storage)
        if model.spec.upsampler == settings.validation_upsampler:
            held_out.append(samples[-num_judging:].clone())  # a view would keep all
        else:
            training.append(samples[:-num_judging].clone())
    photographs = pool.photographs(storage)[:-num_judging].clone()
    return PoolImages(training + [photographs] * settings.photographs_as_class, held_out, photographs)


def _num_judging(pool: Pool) -> int:
    """The last photographs of the pool judge."""
    return min(NUM_REFERENCES + MAX_QUERIES, pool.num_photographs // 2)


@dataclass(frozen=True, eq=False)
class ExtractorBatch:
    """One worker's part of a step. patches: uint8 [p * k, 3, s, s]; labels: int64 [p * k], places of the models among the training classes."""

    patches: Tensor
    labels: Tensor


class ExtractorBatches:
    """The batches of one worker: its models of every global batch."""

    def __init__(self, images: PoolImages, settings: FingerprintSettings, rank: int, num_workers: int):
        self.images, self.settings, self.rank, self.num_workers = images, settings, rank, num_workers
        self.smallest_scale = settings.network.patch_px / images.px

    def steps(self, start: int, stop: int) -> Iterator[ExtractorBatch]:
        """Batches of the steps start to stop, in order, made ahead by num_loaders threads: codecs run without Python's lock."""
        waiting: deque = deque()
        with ThreadPoolExecutor(self.settings.num_loaders) as loaders:
            for step in range(start, stop):
                waiting.append(loaders.submit(self.make, step))
                if len(waiting) > NUM_AHEAD * self.settings.num_loaders:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def make(self, step: int) -> ExtractorBatch:
        """This worker's part of a step's batch. All images of a batch are degraded alike, and in a same-content batch cut alike too."""
        contrast, patch_px = self.settings.contrast, self.settings.network.patch_px
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + step)
        draw = draw_batch(
            len(self.images.training),
            self.images.num_images,
            contrast.models_per_batch,
            contrast.images_per_model,
            contrast.same_content_share,
            generator,
        )
        is_degraded = torch.rand((), generator=generator) < self.settings.degraded_share
        degradation = random_degradation(generator, self.smallest_scale) if is_degraded else NONE
        num_rows = 1 if draw.same_content else contrast.models_per_batch
        places = torch.rand(num_rows, contrast.images_per_model, 3, generator=generator)
        places = places.expand(contrast.models_per_batch, -1, -1)
        mine = range(self.rank, contrast.models_per_batch, self.num_workers)
        cut = [
            augmented(self.images.training[draw.models[p]][draw.images[p, k]], degradation, places[p, k], patch_px)
            for p in mine
            for k in range(contrast.images_per_model)
        ]
        labels = draw.models[list(mine)].repeat_interleave(contrast.images_per_model)
        return ExtractorBatch(torch.stack(cut), labels)


def augmented(image: Tensor, degradation: Degradation, place: Tensor, patch_px: int) -> Tensor:
    """uint8 [3, h, w] -> uint8 [3, patch_px, patch_px], degraded; place: float32 [3] in 0..1.

    place[:2] is where the patch lies on the lattice. place[2] below a half cuts before degrading, else after: the border of a small image is
    degraded as a border, that of a patch of a large one is not.
    """
    if place[2] < 0.5:
        scale = degradation.strength if degradation.kind in ("resize", "crop") else 1.0
        image = _window(image, min(image.shape[-1], math.ceil(patch_px / scale)), place)
    return _window(degrade(image, degradation), patch_px, place)


def _window(image: Tensor, size: int, place: Tensor) -> Tensor:
    """On the lattice, as `patches` cuts."""
    top, left = (int(place[axis] * ((image.shape[1 + axis] - size) // PERIOD_PX + 1)) * PERIOD_PX for axis in (0, 1))
    return image[:, top : top + size, left : left + size]


class Validation:
    """Identification of held-out models from references, scored as the extractor is, one patch of the middle of each image: as small as what
    may come."""

    def __init__(self, held_out: list[Tensor], patch_px: int):
        num_images = len(held_out[0])
        middle = torch.full((3,), 0.5)
        self.cut = {
            degradation.name: torch.stack(
                [augmented(image, degradation, middle, patch_px) for images in held_out for image in images]
            )
            for degradation in VALIDATION
        }
        self.num_models, self.num_images = len(held_out), num_images

    def __call__(self, extractor: Extractor) -> dict[str, float]:
        """Accuracy of identification under each degradation of VALIDATION, by its name, ties counted as wrong."""
        return {name: self._accuracy(extractor, cut) for name, cut in self.cut.items()}

    def _accuracy(self, extractor: Extractor, cut: Tensor) -> float:
        embedded = extractor.embed_patches(cut).numpy().reshape(self.num_models, self.num_images, -1)
        queries = np.concatenate(embedded[:, NUM_REFERENCES:])
        truth = np.repeat(np.arange(self.num_models), self.num_images - NUM_REFERENCES)
        scores = extractor.scores(list(embedded[:, :NUM_REFERENCES]), queries)
        return float((identified(scores, truth) == truth).mean())
