"""Sets of generators that are told apart from each other: what every method of an evaluation is shown, the same for all."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from attrib.common.config import digest
from attrib.common.errors import AttribError, ImageError
from attrib.common.storage import Storage, join
from attrib.generators.evaluation.settings import FolderTierSettings, PoolTierSettings, TierSettings
from attrib.generators.signals.samples import Sample, drawn_sample, read_sample
from attrib.generators.synthesis.architectures import DecoderSpec
from attrib.generators.synthesis.pool import Pool, open_pool

TUNING_MODELS, TUNING_IMAGES = 40, 10  # images of each
THUMBNAIL_PX, SAME_LEVELS = (
    8,
    4.0,
)  # mean difference, of 255: most pictures in two sizes differ by less, other pictures by more
MAX_SHARED = 0.1  # of a tier's photographs; a few copies, which collections have, are left out of it
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True, eq=False)
class Tier:
    """names, families: of each generator; generators of one family differ in nothing but the seed of their training.

    samples, generator: n images and whose they are, int64 [n]. real: photographs, of no generator. same_content: the i-th image of every
    generator shows the same, so references and queries are divided alike for all, and no query shows what a reference shows.
    """

    name: str
    settings: TierSettings
    names: tuple[str, ...]
    families: tuple[str, ...]
    samples: list[Sample]
    generator: np.ndarray
    real: list[Sample]
    same_content: bool = False

    @property
    def num_generators(self) -> int:
        return len(self.names)

    def rows_of(self, generator: int) -> np.ndarray:
        return np.flatnonzero(self.generator == generator)

    @property
    def family_numbers(self) -> np.ndarray:
        """int64 [G]."""
        return np.unique(self.families, return_inverse=True)[1]

    @property
    def has_families(self) -> bool:
        return len(set(self.families)) < len(self.families)

    def digest(self) -> str:
        """Of all that the tier holds."""
        pixels = hashlib.sha256()
        for sample in [*self.samples, *self.real]:
            pixels.update(f"{sample.codec} {sample.num_bytes} {tuple(sample.image.shape)}".encode())
            pixels.update(np.ascontiguousarray(sample.image.numpy()))
        return digest([self.name, self.names, self.families, self.generator.tolist(), pixels.hexdigest()])


@dataclass(frozen=True, eq=False)
class Question:
    """Rows of the tier for one division of the images: references of each generator, then queries with their generator."""

    references: list[np.ndarray]
    queries: np.ndarray
    truth: np.ndarray


def divisions(tier: Tier, num_references: int, seed: int) -> Iterator[Question]:
    """The tier's random divisions, the same for every method. Where all generators show the same, all are divided at the same pictures."""
    for number in range(tier.settings.num_splits):
        rng = np.random.default_rng([seed, number])
        rows = [tier.rows_of(g) for g in range(tier.num_generators)]
        if tier.same_content:
            order = rng.permutation(min(map(len, rows)))
            shuffled = [own[order] for own in rows]
        else:
            shuffled = [rng.permutation(own) for own in rows]
        yield Question(
            [own[:num_references] for own in shuffled],
            np.concatenate([own[num_references:] for own in shuffled]),
            np.repeat(np.arange(len(shuffled)), [len(own) - num_references for own in shuffled]),
        )


def folder_tier(name: str, settings: FolderTierSettings, max_megapixels: float, storage: Storage) -> Tier:
    """Generators in folders. Raises AttribError for a folder without images, or a file that is no complete image."""
    folders = [*settings.generators, *([settings.real] if settings.real else [])]
    found = [
        _read_folder(join(settings.uri, folder), settings.max_images, max_megapixels, storage) for folder in folders
    ]
    return make_tier(
        name,
        settings,
        dict(zip(settings.generators, found)),
        real=found[-1] if settings.real else (),
    )


def pool_tier(name: str, settings: PoolTierSettings, training: Pool, storage: Storage) -> Tier:
    """Models of another pool that the training pool holds nothing like, evenly from the pool's order; a family is an architecture.

    Raises AttribError if they are fewer than three, or the training pool shows more than a few of the pictures; those few are
    left out.
    """
    pool = open_pool(settings.uri, storage)
    traits = _upsamplers if settings.unseen == "upsamplers" else _architecture
    seen = set().union(*(traits(model.spec) for model in training.models))
    others = [model for model in pool.models if not traits(model.spec) & seen]
    if len(others) < 3:
        raise AttribError(
            f"{settings.uri} holds {len(others)} models with {settings.unseen} that the training pool does not have, and tier {name!r} "
            "needs 3; synthesize some with another first_architecture, or with a grid.upsamplers that the training pool leaves out"
        )
    kept = [
        others[i] for i in np.linspace(0, len(others) - 1, min(settings.max_models, len(others))).round().astype(int)
    ]
    photographs = pool.photographs(storage)[: settings.max_images]
    is_new = unseen(
        photographs, training, name, f"synthesize {settings.uri} again with another first_photograph", storage
    )
    images = {
        model.model_id: as_samples(pool.samples(model.model_id, storage)[: settings.max_images][is_new])
        for model in kept
    }
    return make_tier(
        name,
        settings,
        images,
        real=as_samples(photographs[is_new]),
        families=[model.spec.name for model in kept],
        same_content=True,
    )


def unseen(photographs: torch.Tensor, training: Pool, name: str, remedy: str, storage: Storage) -> torch.Tensor:
    """Bool [n]: which of these pictures, uint8 [n, 3, h, w], the training pool does not show; methods know those, as real ones or as content.

    A picture is known in other sizes too, by averages over a grid of areas. Raises AttribError if more than MAX_SHARED are shown there:
    then they were taken from the same ranks of a collection, and are no chance copies.
    """
    mine, shown = (_thumbnails(pixels) for pixels in (photographs, training.photographs(storage)))
    is_new = torch.cdist(mine, shown, p=1).amin(dim=1) / mine.shape[1] > SAME_LEVELS
    num_shared = int((~is_new).sum())
    if num_shared > MAX_SHARED * len(mine):
        raise AttribError(
            f"tier {name!r}: {num_shared} of its {len(mine)} photographs are among those that the training pool {training.uri} shows, and "
            f"methods have learned those; {remedy}"
        )
    return is_new


def _thumbnails(pixels: torch.Tensor) -> torch.Tensor:
    """float32 [n, 3 * THUMBNAIL_PX**2], in levels of 255."""
    return F.adaptive_avg_pool2d(pixels.float(), THUMBNAIL_PX).flatten(1)


def tuning_tier(training: Pool, storage: Storage) -> Tier:
    """Models of the training pool, from which thresholds may be taken; no picture is shown by two models, as far as there are enough."""
    models = training.models[:: -(-len(training.models) // TUNING_MODELS)]
    images = {}
    for number, model in enumerate(models):
        shown = (TUNING_IMAGES * number + np.arange(TUNING_IMAGES)) % training.num_photographs
        images[model.model_id] = as_samples(training.samples(model.model_id, storage)[np.unique(shown)])
    return make_tier("synthetic models", TierSettings(), images)


def make_tier(
    name: str,
    settings: TierSettings,
    images: dict[str, Sequence[Sample]],
    real: Sequence[Sample] = (),
    families: Sequence[str] | None = None,
    same_content: bool = False,
) -> Tier:
    """A tier of {generator: its images}, and photographs. families: as `images`; None: every generator is its own."""
    return Tier(
        name,
        settings,
        tuple(images),
        tuple(families or images),
        [sample for samples in images.values() for sample in samples],
        np.repeat(np.arange(len(images)), [len(samples) for samples in images.values()]),
        list(real),
        same_content,
    )


def as_samples(pixels: torch.Tensor) -> list[Sample]:
    """uint8 [n, 3, h, w] that were never files. Each has memory of its own: pickle would write that of all for every view into it."""
    return [drawn_sample(image.clone()) for image in pixels]


def formats(tier: Tier) -> dict[str, str]:
    """{"generated", "real": formats of the files as they came}: a reader shall see what the files alone would tell."""
    sides = {"generated": tier.samples, "real": tier.real}
    return {side: ", ".join(sorted({sample.codec for sample in found})) for side, found in sides.items() if found}


def _architecture(spec: DecoderSpec) -> set[str]:
    """The width does not make an architecture an unseen one."""
    return {spec.model_dump_json(exclude={"width"})}


def _upsamplers(spec: DecoderSpec) -> set[str]:
    return {spec.upsampler}


def _read_folder(uri: str, max_images: int, max_megapixels: float, storage: Storage) -> list[Sample]:
    files = [name for name in storage.names(uri) if name.lower().endswith(EXTENSIONS) and not name.startswith(".")]
    if not files:
        raise AttribError(f"{uri} holds no image ({', '.join(EXTENSIONS)}); correct the tier's uri or its generators")
    samples = []
    for name in files[:max_images]:
        try:
            samples.append(read_sample(storage.read_bytes(join(uri, name)), max_megapixels))
        except ImageError as error:
            raise AttribError(f"{join(uri, name)} cannot be evaluated on ({error}); remove it") from error
    return samples
