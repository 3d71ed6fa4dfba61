"""Batches for end-to-end training: views are rendered from pixels in every epoch.

The last blocks of the backbone are trained with the head. The backbone stays in evaluation mode: its batch norm keeps
the statistics of the pretrained network, so workers agree exactly, and small batches do no harm.
"""

from collections.abc import Iterator
from functools import cached_property

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from attrib.common.errors import AttribError
from attrib.common.storage import Storage
from attrib.data.manifest import Manifest
from attrib.models.preprocessing import Preprocessing
from attrib.train.all_gather import gather_fixed
from attrib.train.augment.settings import DONOR_KINDS
from attrib.train.augment.views import draw_kind, render_view, view_generator, view_seed
from attrib.train.batches import is_validation
from attrib.train.loop import mean_reciprocal_rank
from attrib.train.objective import EMPTY_SLOT, Student, TrainBatch
from attrib.train.settings import TrainSettings
from attrib.train.view_features import NO_DONOR, decode_images

VALIDATION_VIEWS_PER_IMAGE = 2
VALIDATION_ANCHORS = 2_000  # images that validation views are compared with, the held-out ones included
CACHED_IMAGES = 4_000  # decoded images that a process keeps: 1.4 GB at 336 px
ENCODE_BATCH = 16


class PixelBatches:
    """Batches shuffled by seed and epoch, with new views in every epoch. A view's donor is the next image of the batch.

    images: the manifest rows to train on. Raises AttribError if they are too few for a batch and for validation.
    """

    def __init__(
        self,
        images: pa.Table,
        manifest: Manifest,
        preprocessing: Preprocessing,
        settings: TrainSettings,
        rank: int,
        num_workers: int,
        device: torch.device,
        storage: Storage,
    ):
        self.images, self.manifest, self.preprocessing, self.storage = images, manifest, preprocessing, storage
        self.settings, self.rank, self.num_workers, self.device = settings, rank, num_workers, device
        self.cache: dict[int, tuple[Tensor, Tensor] | None] = {}
        self.ids = images["id"].to_numpy()
        held_out = is_validation(self.ids, settings.optimiser.validation_share)
        self.training, self.held_out = np.flatnonzero(~held_out), np.flatnonzero(held_out)
        size = settings.optimiser.batch_size
        if len(self.training) < size or not len(self.held_out):
            raise AttribError(
                f"too few images: {len(self.training):,} to train on (optimiser.batch_size needs {size}) and "
                f"{len(self.held_out):,} held out for validation (1 is needed); give more images, lower "
                "optimiser.batch_size or change optimiser.validation_share"
            )

    @property
    def num_steps(self) -> int:
        return len(self.training) // self.settings.optimiser.batch_size

    def epoch(self, epoch: int) -> Iterator[TrainBatch]:
        generator = np.random.default_rng(view_seed(self.settings.seed, epoch, 0))
        shuffled = generator.permutation(self.training)
        size, num_loaders = self.settings.optimiser.batch_size, self.settings.fine_tune.num_loaders
        mine = size // self.num_workers
        places = np.arange(self.rank * mine, (self.rank + 1) * mine)
        batches = [shuffled[step * size : (step + 1) * size] for step in range(self.num_steps)]
        yield from DataLoader(
            [(batch[places], batch[(places + 1) % size], epoch) for batch in batches],
            batch_size=None,
            collate_fn=self._make_step,
            num_workers=num_loaders,
            multiprocessing_context="spawn" if num_loaders else None,  # Arrow clients hang in forked processes
        )

    def _make_step(self, step: tuple[np.ndarray, np.ndarray, int]) -> TrainBatch:
        return self.make(*step)

    def make(self, contents: np.ndarray, donors: np.ndarray, view: int) -> TrainBatch:
        """Return views of images, by position, in the style of others; the contents are the anchors."""
        blank = torch.zeros(3, self.preprocessing.crop_px, self.preprocessing.crop_px, dtype=torch.uint8)
        anchors, ids, views, sources = [], [], [], []
        for content, donor in zip(contents.tolist(), donors.tolist()):
            original = self._decoded(content)
            content_id, donor_id, pixels = EMPTY_SLOT, NO_DONOR, blank
            if original is not None:
                content_id = int(self.ids[content])
                pixels, donor_id = self._view(original[1], content, donor, view)
            anchors.append(blank if original is None else original[0])
            ids.append(content_id)
            views.append(pixels)
            sources.append((content_id, donor_id))
        return TrainBatch(torch.stack(anchors), torch.tensor(ids), torch.stack(views), torch.tensor(sources))

    def _view(self, original: Tensor, content: int, donor: int, view: int) -> tuple[Tensor, int]:
        settings, view_px = self.settings.views, self.preprocessing.crop_px
        generator = view_generator(self.settings.seed, int(self.ids[content]), view)
        kind = draw_kind(settings, generator)
        style = self._decoded(donor) if kind in DONOR_KINDS and donor != content else None
        if style is None:
            return render_view(original, None, "solo", settings, view_px, generator), NO_DONOR
        return render_view(original, style[1], kind, settings, view_px, generator), int(self.ids[donor])

    def _decoded(self, position: int) -> tuple[Tensor, Tensor] | None:
        """Return the network's input and the pixels for views of an image; None if it cannot be decoded."""
        if position in self.cache:
            return self.cache[position]
        decoded = decode_images(self.images.slice(position, 1), self.manifest, self.preprocessing, self.storage)
        found = (decoded.prepared[0], decoded.pixels[0]) if decoded.ids else None
        if len(self.cache) < CACHED_IMAGES:
            self.cache[position] = found
        return found

    @torch.no_grad()
    def criterion(self, student: Student) -> float:
        """Return the mean reciprocal rank of the validation views. Every worker embeds its share of the images."""
        batch = self._validation
        anchors, views = (
            student.embedding(
                gather_fixed(torch.cat([student.encode(part, domain) for part in pixels.split(ENCODE_BATCH)]))
            )
            for pixels, domain in ((batch.anchors, "real"), (batch.views, "synthetic"))
        )
        return mean_reciprocal_rank(views, anchors, gather_fixed(batch.view_sources), gather_fixed(batch.anchor_ids))

    @cached_property
    def _validation(self) -> TrainBatch:
        held_out = self.held_out[: VALIDATION_ANCHORS // 4]
        pool = np.concatenate([held_out, self.training])[:VALIDATION_ANCHORS]
        contents = np.repeat(held_out, VALIDATION_VIEWS_PER_IMAGE)
        donors = np.roll(contents, VALIDATION_VIEWS_PER_IMAGE)
        # All workers need parts of one size, so items are repeated: a repeated anchor is ignored, a view counts twice.
        pool, is_repeated = self._share(pool)
        mine, _ = self._share(np.arange(len(contents)))
        anchors = self.make(pool, pool, 0)
        views = [self.make(contents[[i]], donors[[i]], -1 - int(i) % VALIDATION_VIEWS_PER_IMAGE) for i in mine]
        return TrainBatch(
            anchors.anchors,
            torch.where(torch.from_numpy(is_repeated), EMPTY_SLOT, anchors.anchor_ids),
            torch.cat([batch.views for batch in views]),
            torch.cat([batch.view_sources for batch in views]),
        ).to(self.device)

    def _share(self, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return this worker's part, and which of it are repetitions."""
        each = -(-len(items) // self.num_workers)
        places = np.arange(self.rank * each, (self.rank + 1) * each)
        return items[places % len(items)], places >= len(items)
