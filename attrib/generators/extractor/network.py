"""The fingerprint extractor: it maps an image to a vector that is similar for images of the same generator.

The vector has three parts, each whitened. Two are statistics: the colour spectrum and the polyphase means
(attrib/generators/signals/spectrum.py). Whitening keeps all their directions, so they can also tell generators apart
that differ in other ways than the models of the pool. The third part is the output of a small CNN on pixels and
residual, trained to tell the pool's models apart under degradations. It survives recompression better, but says less
about generators that are unlike the pool's models, so it has half the length. The scoring "adapted" weights the parts
by their reliability.
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
from attrib.common.scratch import scratch_folder
from attrib.common.storage import Storage, join
from attrib.generators.extractor.settings import NetworkSettings
from attrib.generators.fingerprints.base import Method, check_sides
from attrib.generators.fingerprints.scoring import References, Scorer, adapted_by_part
from attrib.generators.settings import FINGERPRINT_VERSION, PERIOD_PX
from attrib.generators.signals.samples import Sample
from attrib.generators.signals.spectrum import colour_spectrum, lattice_blocks, patches, polyphase_means, residual
from attrib.models.model import model_digest

WEIGHTS = "extractor.safetensors"
RECORD = "extractor.json"
DESCRIPTION_KEY = "attrib.extractor"  # metadata key of the weights file: the network's settings as JSON
PartName = Literal["colour-spectrum", "polyphase", "learned"]  # in the order of NetworkSettings.part_sizes
PARTS: tuple[PartName, ...] = get_args(PartName)
STATISTICS = PARTS[:2]  # not trained
PART_LENGTHS: dict[PartName, float] = {"colour-spectrum": 1.0, "polyphase": 1.0, "learned": 0.5}
# Scale the inputs of the CNN to a deviation of order one: pixels in 0..1 have about 0.25, residuals a few hundredths.
CONTENT_GAIN, RESIDUAL_GAIN = 2.0, 10.0
VARIANCE_FLOOR = 1e-5  # added for flat patches, because the square root has no finite gradient at zero
MAP_STRIDE_PX = 4  # of the CNN's last maps
PATCH_BATCH = 32  # the batch size of every call, so that a vector does not depend on the number of patches


class FingerprintNetwork(nn.Module):
    """uint8 [n, 3, s, s] -> float32 [n, d], L2-normalised; min_side_px <= s <= patch_px. Parts as in `balanced`."""

    def __init__(self, settings: NetworkSettings):
        super().__init__()
        self.settings = settings
        width, size = settings.width, sum(settings.part_sizes)
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("directions", torch.eye(size))
        widths = [6, width, width, 2 * width, 2 * width, 4 * width, 4 * width]
        layers: list[nn.Module] = []
        for num_in, num_out, stride in zip(widths, widths[1:], (1, 1, 2, 1, 2, 1)):
            # Not batch norm: batch statistics would reveal the degradation of a batch, and differ between workers.
            norm = nn.GroupNorm(8 if num_out % 8 == 0 else 1, num_out)
            layers += [nn.Conv2d(num_in, num_out, 3, stride, padding=1, bias=False), norm, nn.ReLU()]
        self.maps = nn.Sequential(*layers)
        num_places = (PERIOD_PX // MAP_STRIDE_PX) ** 2
        self.head = nn.Linear((2 + num_places) * 4 * width, settings.num_learned)

    def forward(self, pixels: Tensor, parts: Sequence[PartName] = PARTS) -> Tensor:
        """The whitened vector of the given parts, in that order."""
        whitened = {}
        for name, rows in self.parts(pixels, parts).items():
            own = self.columns(name)
            whitened[name] = (rows - self.mean[own]) @ self.directions[own, own]
        return balanced(whitened)

    def parts(self, pixels: Tensor, names: Sequence[PartName]) -> dict[PartName, Tensor]:
        """The given parts before whitening: uint8 [n, 3, s, s] -> float32 [n, size] each."""
        shown = pixels.float() / 255
        residuals = residual(shown)
        made = {
            "colour-spectrum": lambda: colour_spectrum(residuals, self.settings.window_px).flatten(1),
            "polyphase": lambda: polyphase_means(residuals).flatten(1),
            "learned": lambda: self._learned(shown, residuals),
        }
        return {name: made[name]() for name in names}

    def columns(self, name: PartName) -> slice:
        """The columns of a part in the vector of all parts."""
        place, sizes = PARTS.index(name), self.settings.part_sizes
        return slice(sum(sizes[:place]), sum(sizes[: place + 1]))

    def learned(self, pixels: Tensor) -> Tensor:
        """The trained part before whitening: uint8 [n, 3, s, s] -> float32 [n, num_learned], L2-normalised."""
        return self.parts(pixels, ["learned"])["learned"]

    def _learned(self, shown: Tensor, residuals: Tensor) -> Tensor:
        content = shown - shown.mean(dim=(1, 2, 3), keepdim=True)
        maps = self.maps(torch.cat([CONTENT_GAIN * content, RESIDUAL_GAIN * residuals], dim=1))
        spread = (maps.var(dim=(2, 3)) + VARIANCE_FLOOR).sqrt()
        by_place = lattice_blocks(maps, PERIOD_PX // MAP_STRIDE_PX).mean(dim=(2, 4)).flatten(1)
        return F.normalize(self.head(torch.cat([maps.mean(dim=(2, 3)), spread, by_place], dim=1)), dim=1)

    def whiten(self, name: PartName, mean: Tensor, projection: Tensor) -> None:
        """Set the whitening of one part, which is not trained. mean: float32 [d]; projection: float32 [d, d]."""
        own = self.columns(name)
        self.mean[own] = mean
        self.directions[own, own] = projection


def balanced(parts: dict[PartName, Tensor]) -> Tensor:
    """Join parts, float32 [n, size] each, scaled to PART_LENGTHS, to L2-normalised rows [n, d]. Zeros stay zeros."""
    scaled = [PART_LENGTHS[name] * F.normalize(rows, dim=1) for name, rows in parts.items()]
    return F.normalize(torch.cat(scaled, dim=1), dim=1)


class Extractor(Method):
    """A frozen network on one device as a fingerprint method. parts: which parts the vector has."""

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
        """The scoring "adapted", by part. A negative cosine of polyphase means counts as zero: a crop can cause it."""
        one_sided = [name == "polyphase" and len(self.parts) > 1 for name in self.parts]
        return adapted_by_part(self.part_sizes, one_sided)(references)

    def embed(self, samples: Sequence[Sample]) -> np.ndarray:
        """float32 [n, sum(part_sizes)], L2-normalised. Raises AttribError for an image below min_side_px."""
        check_sides(samples, self)
        return self.embed_images([sample.image for sample in samples])

    def embed_images(self, images: Sequence[Tensor]) -> np.ndarray:
        """uint8 [3, h, w] each -> float32 [n, d], L2-normalised: the mean over patches, its parts as in `balanced`.

        A patch has patch_px pixels on each side, or as many as the shorter side of the image.
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
        """uint8 [p, 3, s, s] -> float32 [p, d] on the CPU, L2-normalised."""
        vectors = []
        for batch in cut.split(PATCH_BATCH):
            missing = PATCH_BATCH - len(batch)
            padded = torch.cat([batch, batch[:1].expand(missing, -1, -1, -1)]) if missing else batch
            vectors.append(self.network(padded.to(self.device), self.parts)[: len(batch)].float().cpu())
        return torch.cat(vectors)


def untrained(extractor: Extractor) -> Extractor:
    """The extractor without its learned part: the two whitened statistics alone."""
    found = Extractor(extractor.network, str(extractor.device), STATISTICS)
    found.name = f"{extractor.name}-untrained"
    return found


class ExtractorPart(Extractor):
    """One part of an extractor alone: a baseline that the extractor must beat. No registry can hold it."""

    registered_as = None

    def __init__(self, extractor: Extractor, name: PartName):
        super().__init__(extractor.network, str(extractor.device), (name,))
        self.name = f"part-{name}"


def extractor_digest(network: FingerprintNetwork) -> str:
    """Digest of everything that determines vectors and scores."""
    settings = network.settings.model_dump(mode="json")
    return digest([FINGERPRINT_VERSION, settings, model_digest("extractor", network)])


def save_extractor(network: FingerprintNetwork, folder: str, storage: Storage) -> None:
    state = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    metadata = {DESCRIPTION_KEY: network.settings.model_dump_json()}
    storage.write_bytes(join(folder, WEIGHTS), save(state, metadata=metadata))


def load_extractor(uri: str, storage: Storage, device: str = "cpu") -> Extractor:
    """The extractor in an output folder of jobs.fingerprint.

    Raises AttribError if the job is not finished or the weights are not those of its record.
    """
    record = storage.require(join(uri, RECORD), "jobs.fingerprint")
    weights = join(uri, WEIGHTS)
    if not storage.exists(weights):
        raise AttribError(f"{weights} is missing beside {RECORD}; run jobs.fingerprint again with another output")
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
                f"this version cannot read the extractor {weights} ({' '.join(str(error).split())[:300]}); train "
                "it again with jobs.fingerprint"
            ) from error
    extractor = Extractor(network, device)
    if extractor.digest != record["digest"]:
        raise AttribError(f"{weights} differs from the file described in {RECORD} beside it; restore one of the two")
    return extractor
