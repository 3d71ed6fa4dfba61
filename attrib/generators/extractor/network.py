"""The fingerprint extractor: patches of an image to one vector that is near for images of one generator, whatever they show.

The vector has three parts, each whitened by what varies between pictures. Two are statistics, what a patch's power spectrum shows of its colours
and what lies at fixed places of the pixel grid (attrib/generators/signals/spectrum.py): a whitening keeps all directions, so they serve generators that
differ in ways in which the pool's models do not. The third is learned: a small CNN of the pixels and their residual that is taught to tell the
pool's models apart under every degradation of training. It finds under recompression what the statistics lose, in generators that are like the
pool's, and says little of others, so it has half their length; adapted scoring counts each part by how far the references at hand can rely on it.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from attrib.common.config import digest
from attrib.common.errors import AttribError
from attrib.common.storage import Storage, join, scratch_folder
from attrib.generators.extractor.settings import NetworkSettings
from attrib.generators.fingerprints.base import Method, check_sides
from attrib.generators.fingerprints.scoring import References, Scorer, adapted_by_part
from attrib.generators.settings import FINGERPRINT_VERSION, PERIOD_PX
from attrib.generators.signals.samples import Sample
from attrib.generators.signals.spectrum import colour_spectrum, lattice_blocks, patches, polyphase_means, residual
from attrib.models.encoder import model_digest

WEIGHTS = "extractor.safetensors"
RECORD = "extractor.json"
DESCRIPTION_KEY = "attrib.extractor"  # of the weights' metadata: the network's settings as JSON
PartName = Literal["colour-spectrum", "polyphase", "learned"]  # in the order of NetworkSettings.part_sizes
PARTS: tuple[PartName, ...] = get_args(PartName)
STATISTICS = PARTS[:2]  # what no training changes
PART_LENGTHS: dict[PartName, float] = {"colour-spectrum": 1.0, "polyphase": 1.0, "learned": 0.5}
# What the CNN sees is of order one: pixels of 0..1 deviate by about a quarter, residuals by a few hundredths.
CONTENT_GAIN, RESIDUAL_GAIN = 2.0, 10.0
VARIANCE_FLOOR = 1e-5  # the root of a variance of zero, as a flat patch has it, has no gradient
MAP_STRIDE_PX = 4  # of the CNN's last maps
PATCH_BATCH = 32  # every call of the network sees as many, so that a vector does not depend on its neighbours


class FingerprintNetwork(nn.Module):
    """uint8 [n, 3, s, s] -> float32 [n, d] of length one, min_side_px <= s <= patch_px; the parts' lengths are as PART_LENGTHS."""

    def __init__(self, settings: NetworkSettings):
        super().__init__()
        self.settings = settings
        width, size = settings.width, sum(settings.part_sizes)
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("directions", torch.eye(size))
        self.maps = nn.Sequential(
            *_convolution(6, width, stride=1),
            *_convolution(width, width, stride=1),
            *_convolution(width, 2 * width, stride=2),
            *_convolution(2 * width, 2 * width, stride=1),
            *_convolution(2 * width, 4 * width, stride=2),
            *_convolution(4 * width, 4 * width, stride=1),
        )
        num_places = (PERIOD_PX // MAP_STRIDE_PX) ** 2
        self.head = nn.Linear((2 + num_places) * 4 * width, settings.num_learned)

    def forward(self, pixels: Tensor, parts: Sequence[PartName] = PARTS) -> Tensor:
        """The parts that are asked for alone, in that order."""
        whitened = {}
        for name, rows in self.parts(pixels, parts).items():
            own = self.columns(name)
            whitened[name] = (rows - self.mean[own]) @ self.directions[own, own]
        return balanced(whitened)

    def parts(self, pixels: Tensor, names: Sequence[PartName]) -> dict[PartName, Tensor]:
        """The parts that are asked for before whitening, uint8 [n, 3, s, s] -> float32 [n, size] each; no other is computed."""
        shown = pixels.float() / 255
        residuals = residual(shown)
        made = {
            "colour-spectrum": lambda: colour_spectrum(residuals, self.settings.window_px).flatten(1),
            "polyphase": lambda: polyphase_means(residuals).flatten(1),
            "learned": lambda: self._learned(shown, residuals),
        }
        return {name: made[name]() for name in names}

    def columns(self, name: PartName) -> slice:
        """Of a part, in a vector of all."""
        place, sizes = PARTS.index(name), self.settings.part_sizes
        return slice(sum(sizes[:place]), sum(sizes[: place + 1]))

    def learned(self, pixels: Tensor) -> Tensor:
        """uint8 [n, 3, s, s] -> float32 [n, num_learned] of length one, before whitening: what training changes."""
        return self.parts(pixels, ["learned"])["learned"]

    def _learned(self, shown: Tensor, residuals: Tensor) -> Tensor:
        content = shown - shown.mean(dim=(1, 2, 3), keepdim=True)
        maps = self.maps(torch.cat([CONTENT_GAIN * content, RESIDUAL_GAIN * residuals], dim=1))
        spread = (maps.var(dim=(2, 3)) + VARIANCE_FLOOR).sqrt()
        by_place = lattice_blocks(maps, PERIOD_PX // MAP_STRIDE_PX).mean(dim=(2, 4)).flatten(1)
        return F.normalize(self.head(torch.cat([maps.mean(dim=(2, 3)), spread, by_place], dim=1)), dim=1)

    def whiten(self, name: PartName, mean: Tensor, projection: Tensor) -> None:
        """Of one part. mean: float32 [d]; projection: float32 [d, d]. No step of training changes them."""
        own = self.columns(name)
        self.mean[own] = mean
        self.directions[own, own] = projection


def balanced(parts: dict[PartName, Tensor]) -> Tensor:
    """float32 [n, size] each -> [n, d], rows of length one, of parts whose lengths are as PART_LENGTHS; a part of zeros stays zero."""
    scaled = [PART_LENGTHS[name] * F.normalize(rows, dim=1) for name, rows in parts.items()]
    return F.normalize(torch.cat(scaled, dim=1), dim=1)


def _convolution(num_in: int, num_out: int, stride: int) -> list[nn.Module]:
    # Group norm: batch statistics would tell a batch's degradation, and differ between workers.
    return [
        nn.Conv2d(num_in, num_out, 3, stride, padding=1, bias=False),
        nn.GroupNorm(8 if num_out % 8 == 0 else 1, num_out),
        nn.ReLU(),
    ]


class Extractor(Method):
    """A frozen network on one device as a fingerprint method. parts: what the vector consists of."""

    name = "extractor"
    scoring = "adapted"

    def __init__(self, network: FingerprintNetwork, device: str = "cpu", parts: tuple[PartName, ...] = PARTS):
        self.network, self.device, self.parts = network.eval().to(device), torch.device(device), parts
        self.min_side_px = network.settings.min_side_px
        self.needs_colour = "colour-spectrum" in parts
        whole = extractor_digest(network)
        self.digest = whole if parts == PARTS else digest([parts, whole])
        sizes = dict(zip(PARTS, network.settings.part_sizes))
        self.part_sizes = tuple(sizes[name] for name in parts)

    def fit(self, references: References) -> Scorer:
        """Adapted, each part by its reliability; polyphase means, which a crop moves, speak for a generator only."""
        one_sided = [name == "polyphase" and len(self.parts) > 1 for name in self.parts]
        return adapted_by_part(self.part_sizes, one_sided)(references)

    def embed(self, samples: Sequence[Sample]) -> np.ndarray:
        """float32 [n, d], rows of length one, d the sum of part_sizes. Raises AttribError for an image below min_side_px."""
        check_sides(samples, self)
        return self.embed_images([sample.image for sample in samples])

    def embed_images(self, images: Sequence[Tensor]) -> np.ndarray:
        """uint8 [3, h, w] each -> float32 [n, d], rows of length one: the mean of the patches' vectors, its parts of the same lengths as theirs.

        Patches have patch_px pixels on each side, or as many as the image's shorter side has.
        """
        settings = self.network.settings
        sides = [min(settings.patch_px, *image.shape[1:]) for image in images]
        cut = [patches(image, side, settings.max_patches) for image, side in zip(images, sides)]
        embedded = np.zeros((len(images), sum(self.part_sizes)), np.float32)
        for side in set(sides):
            places = [place for place, own in enumerate(sides) if own == side]
            vectors = self.embed_patches(torch.cat([cut[place] for place in places]))
            means = [own.mean(dim=0) for own in vectors.split([len(cut[place]) for place in places])]
            parts = torch.stack(means).split(self.part_sizes, dim=1)
            embedded[places] = balanced(dict(zip(self.parts, parts))).numpy()
        return embedded

    @torch.inference_mode()
    def embed_patches(self, cut: Tensor) -> Tensor:
        """uint8 [p, 3, s, s] -> float32 [p, d] on the CPU, rows of length one."""
        vectors = []
        for batch in cut.split(PATCH_BATCH):
            missing = PATCH_BATCH - len(batch)
            padded = torch.cat([batch, batch[:1].expand(missing, -1, -1, -1)]) if missing else batch
            vectors.append(self.network(padded.to(self.device), self.parts)[: len(batch)].float().cpu())
        return torch.cat(vectors)


def untrained(extractor: Extractor) -> Extractor:
    """The statistics alone, without what is learned."""
    found = Extractor(extractor.network, str(extractor.device), STATISTICS)
    found.name = f"{extractor.name}-untrained"
    return found


class ExtractorPart(Extractor):
    """One part of an extractor alone: what it can do without the others. A control that the extractor must beat; no registry holds it."""

    registered_as = None

    def __init__(self, extractor: Extractor, name: PartName):
        super().__init__(extractor.network, str(extractor.device), (name,))
        self.name = f"part-{name}"


def extractor_digest(network: FingerprintNetwork) -> str:
    """Of all that decides a vector and its scores."""
    settings = network.settings.model_dump(mode="json")
    return digest([FINGERPRINT_VERSION, settings, model_digest("extractor", network)])


def save_extractor(network: FingerprintNetwork, folder: str, storage: Storage) -> None:
    state = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    metadata = {DESCRIPTION_KEY: network.settings.model_dump_json()}
    storage.write_bytes(join(folder, WEIGHTS), save(state, metadata=metadata))


def load_extractor(uri: str, storage: Storage, device: str = "cpu") -> Extractor:
    """The extractor in `uri`, the output folder of jobs.fingerprint.

    Raises AttribError if the job has not run to its end, or the weights are not those that its record names.
    """
    record = storage.require(join(uri, RECORD), "jobs.fingerprint")
    weights = join(uri, WEIGHTS)
    if not storage.exists(weights):
        raise AttribError(f"{weights} is not there, though {RECORD} is; run jobs.fingerprint again with another output")
    with scratch_folder() as folder:
        try:
            with safe_open(storage.localise(weights, folder), framework="pt") as file:
                state = {key: file.get_tensor(key) for key in file.keys()}
                network = FingerprintNetwork(
                    NetworkSettings.model_validate_json(file.metadata()[DESCRIPTION_KEY], strict=True)
                )
                network.load_state_dict(state, strict=True)
        except (KeyError, RuntimeError, SafetensorError, TypeError, ValidationError) as error:
            raise AttribError(
                f"{weights} is no extractor that this version understands: {' '.join(str(error).split())[:300]}"
            ) from error
    extractor = Extractor(network, device)
    if extractor.digest != record["digest"]:
        raise AttribError(f"{weights} is not the file that {RECORD} beside it describes; restore one of the two")
    return extractor
