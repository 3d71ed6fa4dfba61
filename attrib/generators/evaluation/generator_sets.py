"""Generator sets: groups of generators that a method must tell apart. Every method gets the same images."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from attrib.common.config import digest
from attrib.common.errors import AttribError, ImageError
from attrib.common.storage import Storage, join
from attrib.generators.evaluation.settings import FolderSetSettings, PoolSetSettings, SetSettings
from attrib.generators.signals.samples import Sample, drawn_sample, read_sample
from attrib.generators.synthesis.pool import Pool, PoolModel, open_pool

TUNING_MODELS, TUNING_IMAGES = 40, 10  # number of models, and of images per model
THUMBNAIL_PX = 8
SAME_LEVELS = 4.0  # mean difference of thumbnails (0..255): lower for one image at two sizes, higher for two images
MAX_SHARED = 0.1  # of the photographs of a set; a smaller share is assumed to be accidental copies, which are removed
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True, eq=False)
class GeneratorSet:
    """Images of generators that a method must tell apart.

    names, families: of each generator; generators of one family differ only in the seed of their training. samples,
    generator: n images and their generators, int64 [n]. real: photographs. same_content: whether image i of every
    generator shows the same scene; if so, all generators are divided alike, and no query shows the scene of a
    reference.
    """

    name: str
    settings: SetSettings
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
        """Family of each generator as a number, int64 [G]."""
        return np.unique(self.families, return_inverse=True)[1]

    @property
    def has_families(self) -> bool:
        return len(set(self.families)) < len(self.families)

    def digest(self) -> str:
        """Digest of names, families and images."""
        pixels = hashlib.sha256()
        for sample in [*self.samples, *self.real]:
            pixels.update(f"{sample.codec} {sample.num_bytes} {tuple(sample.image.shape)}".encode())
            pixels.update(np.ascontiguousarray(sample.image.numpy()))
        return digest([self.name, self.names, self.families, self.generator.tolist(), pixels.hexdigest()])

    def description(self) -> dict:
        """Plain values for the record. formats: of the original files; the format alone may reveal the generator."""
        sides = {"generated": self.samples, "real": self.real}
        return {
            "generators": list(self.names),
            "families": list(self.families),
            "judged": self.settings.judged,
            "note": self.settings.note,
            "same_content": self.same_content,
            "num_images": len(self.samples),
            "num_real": len(self.real),
            "formats": {
                side: ", ".join(sorted({sample.codec for sample in found})) for side, found in sides.items() if found
            },
            "real_history": getattr(self.settings, "real_history", None),
        }


class Division(NamedTuple):
    """Row numbers of a set: references of each generator, queries, and the true generators of the queries."""

    references: list[np.ndarray]
    queries: np.ndarray
    truth: np.ndarray


def divisions(generators: GeneratorSet, num_references: int, seed: int) -> Iterator[Division]:
    """Random divisions into references and queries, the same for every method."""
    rows = [generators.rows_of(g) for g in range(generators.num_generators)]
    for number in range(generators.settings.num_splits):
        rng = np.random.default_rng([seed, number])
        if generators.same_content:
            order = rng.permutation(min(map(len, rows)))
            shuffled = [own[order] for own in rows]
        else:
            shuffled = [rng.permutation(own) for own in rows]
        yield Division(
            [own[:num_references] for own in shuffled],
            np.concatenate([own[num_references:] for own in shuffled]),
            np.repeat(np.arange(len(shuffled)), [len(own) - num_references for own in shuffled]),
        )


def folder_set(name: str, settings: FolderSetSettings, max_megapixels: float, storage: Storage) -> GeneratorSet:
    """Generators in folders. Raises AttribError for a folder without images, or a file that cannot be decoded."""

    def read(folder: str) -> list[Sample]:
        return _read_folder(join(settings.uri, folder), settings.max_images, max_megapixels, storage)

    images = {generator: read(generator) for generator in settings.generators}
    return make_set(name, settings, images, real=read(settings.real) if settings.real else ())


def _read_folder(uri: str, max_images: int, max_megapixels: float, storage: Storage) -> list[Sample]:
    files = [name for name in storage.names(uri) if name.lower().endswith(EXTENSIONS) and not name.startswith(".")]
    if not files:
        raise AttribError(f"{uri} holds no image ({', '.join(EXTENSIONS)}); correct uri or generators of the set")
    samples = []
    for name in files[:max_images]:
        try:
            samples.append(read_sample(storage.read_bytes(join(uri, name)), max_megapixels))
        except ImageError as error:
            raise AttribError(f"{join(uri, name)} cannot be read as an image ({error}); remove the file") from error
    return samples


def pool_set(name: str, settings: PoolSetSettings, training: Pool, storage: Storage) -> GeneratorSet:
    """Models of another pool with architectures (or upsamplers) that the training pool does not have.

    If there are more than max_models, evenly spaced ones are taken. A family is an architecture. Raises AttribError if
    there are fewer than three models, or as `unseen`.
    """

    def trait(model: PoolModel) -> str:
        spec = model.spec  # another width alone does not make an architecture unseen
        return spec.upsampler if settings.unseen == "upsamplers" else spec.model_dump_json(exclude={"width"})

    pool = open_pool(settings.uri, storage)
    seen = {trait(model) for model in training.models}
    others = [model for model in pool.models if trait(model) not in seen]
    if len(others) < 3:
        raise AttribError(
            f"{settings.uri} holds {len(others)} models with {settings.unseen} that the training pool does not have, "
            f"and generator set {name!r} needs 3; synthesize more with another first_architecture, or with "
            "grid.upsamplers that the training pool does not use"
        )
    places = np.linspace(0, len(others) - 1, min(settings.max_models, len(others))).round().astype(int)
    kept = [others[i] for i in places]
    photographs = pool.photographs(storage)[: settings.max_images]
    remedy = f"synthesize {settings.uri} again with another first_photograph"
    is_new = unseen(photographs, training, name, remedy, storage)
    images = {
        model.model_id: as_samples(pool.samples(model.model_id, storage)[: settings.max_images][is_new])
        for model in kept
    }
    families = [model.spec.name for model in kept]
    return make_set(name, settings, images, as_samples(photographs[is_new]), families, same_content=True)


def unseen(photographs: torch.Tensor, training: Pool, name: str, remedy: str, storage: Storage) -> torch.Tensor:
    """Bool [n]: which photographs, uint8 [n, 3, h, w], are not in the training pool, whatever their size there.

    Raises AttribError if more than MAX_SHARED of them are, because methods were trained on those.
    """
    mine, shown = (
        F.adaptive_avg_pool2d(pixels.float(), THUMBNAIL_PX).flatten(1)
        for pixels in (photographs, training.photographs(storage))
    )
    is_new = torch.cdist(mine, shown, p=1).amin(dim=1) / mine.shape[1] > SAME_LEVELS
    num_shared = int((~is_new).sum())
    if num_shared > MAX_SHARED * len(mine):
        raise AttribError(
            f"generator set {name!r}: {num_shared} of its {len(mine)} photographs are also in the training pool "
            f"{training.uri}, so methods have seen them in training; {remedy}"
        )
    return is_new


def tuning_set(training: Pool, storage: Storage) -> GeneratorSet:
    """Models of the training pool, to choose thresholds. They show different photographs if there are enough."""
    models = training.models[:: -(-len(training.models) // TUNING_MODELS)]
    images = {}
    for number, model in enumerate(models):
        shown = (TUNING_IMAGES * number + np.arange(TUNING_IMAGES)) % training.num_photographs
        images[model.model_id] = as_samples(training.samples(model.model_id, storage)[np.unique(shown)])
    return make_set("synthetic models", SetSettings(), images)


def make_set(
    name: str,
    settings: SetSettings,
    images: dict[str, Sequence[Sample]],
    real: Sequence[Sample] = (),
    families: Sequence[str] | None = None,
    same_content: bool = False,
) -> GeneratorSet:
    """A set of {generator: its images}. families: of each generator; None: each generator is a family."""
    samples = [sample for own in images.values() for sample in own]
    generator = np.repeat(np.arange(len(images)), [len(own) for own in images.values()])
    return GeneratorSet(
        name, settings, tuple(images), tuple(families or images), samples, generator, list(real), same_content
    )


def as_samples(pixels: torch.Tensor) -> list[Sample]:
    """Images uint8 [n, 3, h, w] that were never files. Cloned, because pickle writes the whole tensor for each view."""
    return [drawn_sample(image.clone()) for image in pixels]
