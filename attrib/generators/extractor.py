"""The fingerprint extractor: patches of an image to one vector that is near for images of one generator, whatever they show.

The vector is the patch's colour spectrum, whitened by what varies within the pool's models, which is content, plus a learned correction that
starts at zero. The whitening is fitted and not trained: it keeps all directions, so it serves generators that differ in ways in which the pool's
models do not. The correction sees the same spectrum, and a few convolutions over the residual at full resolution.
"""

import copy
from collections.abc import Sequence

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
from attrib.generators.methods import Method, check_sides
from attrib.generators.samples import Sample
from attrib.generators.spectrum import colour_spectrum, patches, residual
from attrib.storage import Storage, join, scratch_folder

WEIGHTS = "extractor.safetensors"
RECORD = "extractor.json"
DESCRIPTION_KEY = "attrib.extractor"  # of the weights' metadata: the network's settings as JSON
COLOURS = 3  # of the residual as the convolutions see it: green, and red and blue less green
GAIN, COLOUR_GAIN = 20.0, 60.0  # residuals of photographs deviate by a few hundredths, and their colours by less
VARIANCE_FLOOR = 1e-5
PATCH_BATCH = 32  # every call of the network sees as many, so that a vector does not depend on its neighbours


class FingerprintNetwork(nn.Module):
    """uint8 [n, 3, s, s] -> float32 [n, dimension] of length one."""

    def __init__(self, settings: NetworkSettings):
        super().__init__()
        self.settings = settings
        width, size = settings.width, settings.dimension
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("directions", torch.eye(size))
        self.pixels = nn.Sequential(
            *_convolution(COLOURS, width, stride=1),
            *_convolution(width, width, stride=2),
            *_convolution(width, 2 * width, stride=1),
            *_convolution(2 * width, 2 * width, stride=2),
            *_convolution(2 * width, 4 * width, stride=1),
        )
        self.norm = nn.LayerNorm(8 * width)
        self.correction = nn.Sequential(
            nn.Linear(size + 8 * width, settings.hidden), nn.GELU(), nn.Linear(settings.hidden, size)
        )
        self.leave_out_correction()

    def forward(self, pixels: Tensor) -> Tensor:
        residuals = residual(pixels.float() / 255)
        spectrum = colour_spectrum(residuals, self.settings.window_px).flatten(1)
        whitened = (spectrum - self.mean) @ self.directions
        red, green, blue = residuals.unbind(dim=1)
        colours = torch.stack([GAIN * green, COLOUR_GAIN * (red - green), COLOUR_GAIN * (blue - green)], dim=1)
        maps = self.pixels(colours)
        # The root of a variance of zero, as a flat patch has it, has no gradient.
        pooled = torch.cat([maps.mean(dim=(2, 3)), (maps.var(dim=(2, 3)) + VARIANCE_FLOOR).sqrt()], dim=1)
        seen = torch.cat([F.layer_norm(whitened, whitened.shape[1:]), self.norm(pooled)], dim=1)
        return F.normalize(whitened + self.correction(seen), dim=1)

    def leave_out_correction(self) -> None:
        nn.init.zeros_(self.correction[-1].weight)
        nn.init.zeros_(self.correction[-1].bias)

    def start_from(self, mean: Tensor, directions: Tensor) -> None:
        """mean: float32 [dimension]; directions: float32 [dimension, dimension]. Training does not change them."""
        self.mean.copy_(mean)
        self.directions.copy_(directions)


def _convolution(num_in: int, num_out: int, stride: int) -> list[nn.Module]:
    # Group norm: batch statistics would tell a batch's degradation, and differ between workers.
    return [
        nn.Conv2d(num_in, num_out, 3, stride, padding=1, bias=False),
        nn.GroupNorm(8 if num_out % 8 == 0 else 1, num_out),
        nn.GELU(),
    ]


class Extractor(Method):
    """A frozen network on one device as a fingerprint method. patch_px: the smallest side that it can embed."""

    name = "extractor"

    def __init__(self, network: FingerprintNetwork, device: str = "cpu"):
        self.network, self.device = network.eval().to(device), torch.device(device)
        self.patch_px, self.min_side_px = network.settings.patch_px, network.settings.patch_px
        self.digest = extractor_digest(network)

    def embed(self, samples: Sequence[Sample]) -> np.ndarray:
        """float32 [n, dimension], rows of length one. Raises AttribError for an image below min_side_px."""
        check_sides(samples, self)
        return self.embed_images([sample.image for sample in samples])

    def embed_images(self, images: Sequence[Tensor]) -> np.ndarray:
        """uint8 [3, h, w] each -> float32 [n, dimension], rows of length one: the direction of the mean of the patches' unit vectors.

        Raises AttribError for an image with a side below patch_px.
        """
        embedded = np.zeros((len(images), self.network.settings.dimension), np.float32)
        for position, image in enumerate(images):
            cut = patches(image, self.patch_px, self.network.settings.max_patches)
            embedded[position] = F.normalize(self.embed_patches(cut).mean(dim=0), dim=0).numpy()
        return embedded

    @torch.inference_mode()
    def embed_patches(self, cut: Tensor) -> Tensor:
        """uint8 [p, 3, patch_px, patch_px] -> float32 [p, dimension] on the CPU, rows of length one."""
        vectors = []
        for batch in cut.split(PATCH_BATCH):
            missing = PATCH_BATCH - len(batch)
            padded = torch.cat([batch, batch[:1].expand(missing, -1, -1, -1)]) if missing else batch
            vectors.append(self.network(padded.to(self.device))[: len(batch)].float().cpu())
        return torch.cat(vectors)


def untrained(extractor: Extractor) -> Extractor:
    """What the extractor's training began with: the whitened colour spectrum, without the learned correction."""
    network = copy.deepcopy(extractor.network)
    network.leave_out_correction()
    found = Extractor(network, str(extractor.device))
    found.name = f"{extractor.name}-untrained"
    return found


def extractor_digest(network: FingerprintNetwork) -> str:
    """Of all that decides a vector."""
    return digest([network.settings.model_dump(mode="json"), model_digest("extractor", network)])


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
