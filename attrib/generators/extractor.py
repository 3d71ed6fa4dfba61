"""The fingerprint extractor: patches of an image to one vector that is near for images of one generator, whatever they show.

The vector has two parts of equal length, what a patch's power spectrum shows of its colours and what lies at fixed places of the pixel grid
(attrib/generators/polyphase.py), each whitened by what varies between pictures, and a learned correction that starts at zero. The whitenings are
fitted and not trained: they keep all directions, so they serve generators that differ in ways in which the pool's models do not. The correction is
a small CNN of the patch at half its resolution: it sees what is shown, and hardly a trace, which is a pattern of single pixels. So it can learn
what content does to a trace, and cannot learn the synthetic models' traces by heart, which a network that saw the spectrum did: it told them
apart better than the whitening, and generators of other kinds worse.
"""

import copy
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from attrib.backbone import model_digest
from attrib.config import digest
from attrib.errors import AttribError
from attrib.generators.extractor_settings import NetworkSettings
from attrib.generators.fingerprint_settings import FINGERPRINT_VERSION
from attrib.generators.methods import Method, check_sides
from attrib.generators.polyphase import polyphase_means
from attrib.generators.samples import Sample
from attrib.generators.scoring import References, Scorer, adapted_by_part, unit_or_zero
from attrib.generators.spectrum import colour_spectrum, patches, residual
from attrib.storage import Storage, join, scratch_folder

WEIGHTS = "extractor.safetensors"
RECORD = "extractor.json"
DESCRIPTION_KEY = "attrib.extractor"  # of the weights' metadata: the network's settings as JSON
CONTENT_GAIN = 4.0  # pixels deviate by about a quarter
VARIANCE_FLOOR = 1e-5
PartName = Literal["colour-spectrum", "polyphase"]  # in the order of NetworkSettings.part_sizes
PATCH_BATCH = 32  # every call of the network sees as many, so that a vector does not depend on its neighbours


class FingerprintNetwork(nn.Module):
    """uint8 [n, 3, s, s] -> float32 [n, dimension] of length one, in parts of equal length, min_side_px <= s <= patch_px."""

    def __init__(self, settings: NetworkSettings):
        super().__init__()
        self.settings = settings
        width, size = settings.width, settings.dimension
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("directions", torch.eye(size))
        self.pixels = nn.Sequential(
            *_convolution(3, width, stride=1),
            *_convolution(width, width, stride=2),
            *_convolution(width, 2 * width, stride=1),
            *_convolution(2 * width, 2 * width, stride=2),
            *_convolution(2 * width, 4 * width, stride=1),
        )
        self.norm = nn.LayerNorm(8 * width)
        self.correction = nn.Sequential(
            nn.Linear(8 * width, settings.hidden), nn.GELU(), nn.Linear(settings.hidden, size)
        )
        self.leave_out_correction()

    def forward(self, pixels: Tensor) -> Tensor:
        whitened = (trace(pixels, self.settings.window_px) - self.mean) @ self.directions
        shown = F.avg_pool2d(pixels.float() / 255, 2)
        maps = self.pixels(CONTENT_GAIN * (shown - shown.mean(dim=(2, 3), keepdim=True)))
        # The root of a variance of zero, as a flat patch has it, has no gradient.
        pooled = torch.cat([maps.mean(dim=(2, 3)), (maps.var(dim=(2, 3)) + VARIANCE_FLOOR).sqrt()], dim=1)
        return balanced(whitened + self.correction(self.norm(pooled)), self.settings.part_sizes)

    def leave_out_correction(self) -> None:
        nn.init.zeros_(self.correction[-1].weight)
        nn.init.zeros_(self.correction[-1].bias)

    def start_from(self, mean: Tensor, directions: Tensor) -> None:
        """mean: float32 [dimension]; directions: float32 [dimension, dimension]. Training does not change them."""
        self.mean.copy_(mean)
        self.directions.copy_(directions)


def trace(cut: Tensor, window_px: int) -> Tensor:
    """uint8 [n, 3, s, s] -> float32 [n, dimension]: the colour spectrum, then the polyphase means, flat."""
    residuals = residual(cut.float() / 255)
    return torch.cat([colour_spectrum(residuals, window_px).flatten(1), polyphase_means(residuals).flatten(1)], dim=1)


def balanced(rows: Tensor, part_sizes: tuple[int, ...]) -> Tensor:
    """Rows of length one, of parts that all have the same length; a part of zeros stays zero."""
    return F.normalize(torch.cat([F.normalize(part, dim=1) for part in rows.split(part_sizes, dim=1)], dim=1), dim=1)


def _convolution(num_in: int, num_out: int, stride: int) -> list[nn.Module]:
    # Group norm: batch statistics would tell a batch's degradation, and differ between workers.
    return [
        nn.Conv2d(num_in, num_out, 3, stride, padding=1, bias=False),
        nn.GroupNorm(8 if num_out % 8 == 0 else 1, num_out),
        nn.GELU(),
    ]


class Extractor(Method):
    """A frozen network on one device as a fingerprint method."""

    name = "extractor"
    scoring = "adapted"
    needs_colour = True

    def __init__(self, network: FingerprintNetwork, device: str = "cpu"):
        self.network, self.device = network.eval().to(device), torch.device(device)
        self.min_side_px = network.settings.min_side_px
        self.digest = extractor_digest(network)
        self.part_sizes: tuple[int, ...] = network.settings.part_sizes

    def fit(self, references: References) -> Scorer:
        """Adapted, each part by its reliability; polyphase means, which a crop moves, speak for a generator only."""
        one_sided = [name == "polyphase" for name in get_args(PartName)] if len(self.part_sizes) > 1 else [False]
        return adapted_by_part(self.part_sizes, one_sided)(references)

    def embed(self, samples: Sequence[Sample]) -> np.ndarray:
        """float32 [n, dimension], rows of length one. Raises AttribError for an image below min_side_px."""
        check_sides(samples, self)
        return self.embed_images([sample.image for sample in samples])

    def embed_images(self, images: Sequence[Tensor]) -> np.ndarray:
        """uint8 [3, h, w] each -> float32 [n, dimension], rows of length one: the mean of the patches' vectors, its parts of equal length.

        Patches have patch_px pixels on each side, or as many as the image's shorter side has.
        """
        settings = self.network.settings
        sides = [min(settings.patch_px, *image.shape[1:]) for image in images]
        cut = [patches(image, side, settings.max_patches) for image, side in zip(images, sides)]
        embedded = np.zeros((len(images), settings.dimension), np.float32)
        for side in set(sides):
            places = [place for place, own in enumerate(sides) if own == side]
            vectors = self.embed_patches(torch.cat([cut[place] for place in places]))
            means = [own.mean(dim=0) for own in vectors.split([len(cut[place]) for place in places])]
            embedded[places] = balanced(torch.stack(means), settings.part_sizes).numpy()
        return embedded

    @torch.inference_mode()
    def embed_patches(self, cut: Tensor) -> Tensor:
        """uint8 [p, 3, s, s] -> float32 [p, dimension] on the CPU, rows of length one."""
        vectors = []
        for batch in cut.split(PATCH_BATCH):
            missing = PATCH_BATCH - len(batch)
            padded = torch.cat([batch, batch[:1].expand(missing, -1, -1, -1)]) if missing else batch
            vectors.append(self.network(padded.to(self.device))[: len(batch)].float().cpu())
        return torch.cat(vectors)


def untrained(extractor: Extractor) -> Extractor:
    """What the extractor's training began with: the whitened trace, without the learned correction."""
    network = copy.deepcopy(extractor.network)
    network.leave_out_correction()
    found = Extractor(network, str(extractor.device))
    found.name = f"{extractor.name}-untrained"
    return found


class Part(Extractor):
    """One part of an extractor's start alone: what it can do without the other. A control that the extractor must beat; no registry holds it."""

    registered_as = None

    def __init__(self, extractor: Extractor, name: PartName):
        super().__init__(untrained(extractor).network, str(extractor.device))
        self.name = f"part-{name}"
        self.digest = digest([self.name, self.digest])
        self.needs_colour = name == "colour-spectrum"
        place = get_args(PartName).index(name)
        self._columns = slice(sum(self.part_sizes[:place]), sum(self.part_sizes[: place + 1]))
        self.part_sizes = self.part_sizes[place : place + 1]

    def embed(self, samples: Sequence[Sample]) -> np.ndarray:
        """float32 [n, the part's size], rows of length one."""
        return unit_or_zero(super().embed(samples)[:, self._columns])


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
