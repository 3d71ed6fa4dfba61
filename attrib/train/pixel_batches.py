"""End-to-end training: pixels through the last blocks of the backbone and the head, on views rendered on demand.

Batch norm keeps the statistics of the pretrained network (the backbone stays in evaluation mode), so that workers agree
exactly and small batches do no harm.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

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
from attrib.train.view_features import NO_DONOR, DecodedImages, decode_images

VALIDATION_VIEWS_PER_IMAGE = 2
VALIDATION_ANCHORS = 2_000  # images among which held-out views must find their sources, the held-out ones included
CACHED_IMAGES = 4_000  # decoded images that a process keeps: 1.4 GB at 336 px
ENCODE_BATCH = 16


class PixelBatches:
    """Batches shuffled by seed and epoch, with new views in every epoch. Donor of a view: next content of the global
    batch."""

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
        """images: the manifest rows to train on. Raises AttribError if they are too few for one batch."""
        self.settings, self.rank, self.num_workers, self.device = settings, rank, num_workers, device
        self.reader = _Reader(images, manifest, preprocessing, storage)
        self.preprocessing = preprocessing
        self.ids = images["id"].to_numpy()
        held_out = is_validation(self.ids, settings.optimiser.validation_share)
        self.training, self.held_out = np.flatnonzero(~held_out), np.flatnonzero(held_out)
        size = settings.optimiser.batch_size
        if size % num_workers or len(self.training) < size or not len(self.held_out):
            raise AttribError(
                f"{len(self.training):,} images to train on and {len(self.held_out):,} to validate do not make "
                f"batches of {size} over "
                f"{num_workers} workers; choose a smaller optimiser.batch_size that divides"
            )
        self._judged: tuple | None = None

    @property
    def num_steps(self) -> int:
        return len(self.training) // self.settings.optimiser.batch_size

    def epoch(self, epoch: int) -> Iterator[TrainBatch]:
        generator = np.random.default_rng(view_seed(self.settings.seed, epoch, 0))
        shuffled = generator.permutation(self.training)
        size = self.settings.optimiser.batch_size
        mine = size // self.num_workers
        steps = []
        for step in range(self.num_steps):
            batch = shuffled[step * size : (step + 1) * size]
            places = np.arange(self.rank * mine, (self.rank + 1) * mine)
            steps.append((batch[places], batch[(places + 1) % size], epoch))
        num_loaders = self.settings.fine_tune.num_loaders
        yield from DataLoader(
            _Steps(self, steps), batch_size=None, num_workers=num_loaders, persistent_workers=False,
            multiprocessing_context="spawn" if num_loaders else None,  # forked Arrow clients hang
        )  # fmt: skip

    def make(self, contents: np.ndarray, donors: np.ndarray, view: int) -> TrainBatch:
        """Views of images, by position, in the style of others; the contents are the anchors."""
        anchors, ids, views, sources = [], [], [], []
        for content, donor in zip(contents, donors):
            original = self.reader(content)
            anchors.append(None if original is None else original[0])
            pixels, source = self._view(content, donor, view) if original is not None else (None, (NO_DONOR, NO_DONOR))
            ids.append(EMPTY_SLOT if original is None else int(self.ids[content]))
            views.append(pixels)
            sources.append(source)
        blank = torch.zeros(3, self.preprocessing.crop_px, self.preprocessing.crop_px, dtype=torch.uint8)
        anchors, views = (torch.stack([blank if p is None else p for p in some]) for some in (anchors, views))
        return TrainBatch(anchors, torch.tensor(ids), views, torch.tensor(sources))

    def _view(self, content: int, donor: int, view: int) -> tuple[Tensor, tuple[int, int]]:
        views, size_px = self.settings.views, self.preprocessing.crop_px
        generator = view_generator(self.settings.seed, int(self.ids[content]), view)
        kind = draw_kind(views, generator)
        style = self.reader(donor) if kind in DONOR_KINDS and donor != content else None
        kind = kind if style is not None else "solo"
        pixels = render_view(self.reader(content)[1], style and style[1], kind, views, size_px, generator)
        return pixels, (int(self.ids[content]), NO_DONOR if style is None else int(self.ids[donor]))

    @torch.no_grad()
    def criterion(self, student: Student) -> float:
        """Every worker embeds its share of the images; all of them are gathered."""
        if self._judged is None:
            self._judged = self._validation()
        anchors, anchor_ids, views, sources = self._judged
        found = [
            gather_fixed(torch.cat([student.encode(batch, domain) for batch in pixels.split(ENCODE_BATCH)]))
            for pixels, domain in ((anchors, "real"), (views, "synthetic"))
        ]
        anchors, views = (student.embedding(outputs) for outputs in found)
        return mean_reciprocal_rank(views, anchors, gather_fixed(sources), gather_fixed(anchor_ids))

    def _validation(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        held_out = self.held_out[: VALIDATION_ANCHORS // 4]
        pool = np.concatenate([held_out, self.training])[:VALIDATION_ANCHORS]
        contents = np.repeat(held_out, VALIDATION_VIEWS_PER_IMAGE)
        donors = np.roll(contents, VALIDATION_VIEWS_PER_IMAGE)
        # Padded by repetition to as many on every worker; a repeated anchor is left out, a repeated view counts twice.
        pool, repeated = _share(pool, self.rank, self.num_workers)
        mine, _ = _share(np.arange(len(contents)), self.rank, self.num_workers)
        anchors = self.make(pool, pool, 0)
        views = [self.make(contents[[i]], donors[[i]], -1 - int(i) % VALIDATION_VIEWS_PER_IMAGE) for i in mine]
        ids = torch.where(torch.from_numpy(repeated), EMPTY_SLOT, anchors.anchor_ids)
        tensors = (
            anchors.anchors,
            ids,
            torch.cat([b.views for b in views]),
            torch.cat([b.view_sources for b in views]),
        )
        return tuple(tensor.to(self.device) for tensor in tensors)


def _share(items: np.ndarray, rank: int, num_workers: int) -> tuple[np.ndarray, np.ndarray]:
    """This worker's part, and which of it only fills up."""
    each = -(-len(items) // num_workers)
    places = np.arange(rank * each, (rank + 1) * each)
    return items[places % len(items)], places >= len(items)


class _Steps(Dataset):
    def __init__(self, batches: PixelBatches, steps: list[tuple[np.ndarray, np.ndarray, int]]):
        self.batches, self.steps = batches, steps

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, step: int) -> TrainBatch:
        if torch.utils.data.get_worker_info():
            torch.set_num_threads(1)
        contents, donors, epoch = self.steps[step]
        return self.batches.make(contents, donors, epoch)


class _Reader:
    """DecodedImages by position, cached while there is room; None for an image that cannot be decoded."""

    def __init__(self, images: pa.Table, manifest: Manifest, preprocessing: Preprocessing, storage: Storage):
        self.images, self.manifest, self.preprocessing, self.storage = images, manifest, preprocessing, storage
        self.kept: dict[int, tuple[Tensor, Tensor] | None] = {}

    def __call__(self, position: int) -> tuple[Tensor, Tensor] | None:
        position = int(position)
        if position not in self.kept:
            decoded: DecodedImages = decode_images(
                self.images.slice(position, 1), self.manifest, self.preprocessing, self.storage
            )
            pixels = (decoded.prepared[0], decoded.pixels[0]) if decoded.ids else None
            if len(self.kept) >= CACHED_IMAGES:
                return pixels
            self.kept[position] = pixels
        return self.kept[position]
