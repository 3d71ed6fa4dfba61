"""Image encoders: any timm network, its weights from the hub, a local file or a checkpoint of ours, with its own preprocessing."""

import ctypes
import hashlib
import json
from dataclasses import dataclass

import numpy as np
import timm
import timm.data
import torch
from safetensors import SafetensorError, safe_open

from attrib.config import digest
from attrib.errors import AttribError, first_line
from attrib.images import Preprocessing
from attrib.model import CHECKPOINT_KEY, AttributionModel, model_from_checkpoint
from attrib.settings import BackboneSettings
from attrib.storage import Storage, scratch_folder

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of malloc.h
CPU_BATCH_SIZE = 16  # activations of larger batches fall out of the cache
GPU_BATCH_SIZE = 128  # as many as a chunk holds by default; a larger one would mostly be padding


@dataclass(frozen=True)
class EncoderIdentity:
    """What must agree between an index and the queries put to it."""

    name: str
    model_digest: str  # of the network's name and every weight
    preprocessing: dict
    dimension: int

    def to_dict(self) -> dict:
        return {
            "name": self.name,
            "model_digest": self.model_digest,
            "preprocessing": self.preprocessing,
            "dimension": self.dimension,
        }


class Encoder:
    """A frozen network on one device that turns prepared pixels into vectors."""

    def __init__(
        self, model: torch.nn.Module, name: str, preprocessing: Preprocessing, device: str, batch_size: int | None
    ):
        self.preprocessing = preprocessing
        self.device = torch.device(device)
        self.batch_size = batch_size or (CPU_BATCH_SIZE if self.device.type == "cpu" else GPU_BATCH_SIZE)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.model = model.eval().to(self.device, memory_format=torch.channels_last)
        # timm's num_features is not always what the pooled output has (MobileNetV3 widens it in the head), so ask the network.
        probe = torch.zeros(1, 3, preprocessing.crop_px, preprocessing.crop_px, dtype=torch.uint8)
        dimension = self._forward(probe).shape[1]
        self.identity = EncoderIdentity(name, model_digest(name, model), preprocessing.to_dict(), dimension)

    @torch.inference_mode()
    def _forward(self, pixels: torch.Tensor) -> torch.Tensor:
        images = self.preprocessing.normalise(pixels, self.device, torch.float32)
        features = self.model(images.contiguous(memory_format=torch.channels_last))
        return features.float().cpu()

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [n, 3, h, w], resized and cropped -> float32 [n, d], not normalised.

        Every call of the network sees exactly `batch_size` images (the last batch is padded): kernels are chosen by shape, and one shape
        keeps an image's vector independent of how many images happened to stand beside it.
        """
        vectors = np.empty((len(pixels), self.identity.dimension), dtype=np.float32)
        for start in range(0, len(pixels), self.batch_size):
            batch = torch.from_numpy(pixels[start : start + self.batch_size])
            num_images = len(batch)
            if num_images < self.batch_size:
                batch = torch.cat([batch, batch[:1].expand(self.batch_size - num_images, -1, -1, -1)])
            vectors[start : start + num_images] = self._forward(batch)[:num_images].numpy()
        return vectors


@dataclass(frozen=True)
class Network:
    """A network with timm's description of its preprocessing. has_head: whether it is a model with a head (attrib/model.py)."""

    model: torch.nn.Module
    data_config: dict
    has_head: bool = False


def load_encoder(
    settings: BackboneSettings, storage: Storage, device: str = "cpu", batch_size: int | None = None
) -> Encoder:
    """Raises AttribError if the network is unknown to timm or the weights do not fit it."""
    network = load_network(settings, storage)
    return Encoder(network.model, settings.name, preprocessing_of(network, settings.name), device, batch_size)


def preprocessing_of(network: Network, name: str) -> Preprocessing:
    """Raises AttribError if it is not one that we can do."""
    try:
        return Preprocessing.from_timm(network.data_config)
    except (ValueError, KeyError, TypeError, ArithmeticError) as error:
        raise AttribError(f"the preprocessing of {name!r} is not supported: {error}") from error


def load_network(settings: BackboneSettings, storage: Storage) -> Network:
    """Raises AttribError if the network is unknown to timm or the weights do not fit it."""
    if settings.weights.endswith(".safetensors"):
        state, declared = _read_safetensors(settings.weights, storage)
        name = declared.get("name", settings.name)
        if name != settings.name:
            raise AttribError(f"{settings.weights} is a checkpoint of {name!r}, but backbone.name is {settings.name!r}")
        model = _create(name, pretrained=False)
        if "head" in declared:
            model = model_from_checkpoint(model.eval(), declared, state, settings.weights, settings.domain)
            return Network(model, declared["data_config"], has_head=True)
        _load_strictly(model, state, settings.weights)
        return Network(model, declared.get("data_config") or timm.data.resolve_data_config(model=model))
    if settings.weights == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            model = _create(settings.name, pretrained=False)
    else:
        model = _create(settings.name, pretrained=True)
    return Network(model, timm.data.resolve_data_config(model=model))


def _create(name: str, pretrained: bool) -> torch.nn.Module:
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0)
    except Exception as error:  # timm and its hub client raise many kinds
        if name.split(".")[0] not in timm.list_models():
            near = timm.list_models(f"*{name.split('.')[0][:8]}*")[:5]
            raise AttribError(
                f"timm has no network {name!r}" + (f"; near: {', '.join(near)}" if near else "")
            ) from error
        raise AttribError(
            f"timm could not provide {name!r} with its hub weights ({first_line(error)}); without a network give a local "
            "file: backbone.weights=/path/to/model.safetensors"
        ) from error


def _read_safetensors(uri: str, storage: Storage) -> tuple[dict[str, torch.Tensor], dict]:
    if not storage.exists(uri):
        raise AttribError(f"the weights {uri} do not exist")
    with scratch_folder() as folder:
        try:
            with safe_open(storage.localise(uri, folder), framework="pt") as file:
                state = {key: file.get_tensor(key) for key in file.keys()}
                declared = json.loads((file.metadata() or {}).get(CHECKPOINT_KEY, "{}"))
        except (SafetensorError, ValueError, RecursionError) as error:
            raise AttribError(f"{uri} is not a readable .safetensors file: {error}") from error
    if not isinstance(declared, dict):
        raise AttribError(
            f"{uri} is no checkpoint that this version understands: {CHECKPOINT_KEY} holds no JSON object"
        )
    return state, declared


def _load_strictly(model: torch.nn.Module, state: dict[str, torch.Tensor], origin: str) -> None:
    """Every weight of the headless network must be there; the classifier of a full checkpoint is left out."""
    heads = model.pretrained_cfg.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    state = {key: value for key, value in state.items() if not key.startswith(tuple(f"{head}." for head in heads))}
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise AttribError(f"{origin} does not fit the network: {' '.join(str(error).split())[:400]}") from error


def model_digest(name: str, model: torch.nn.Module) -> str:
    """The same for the same weights, wherever they were loaded from."""
    weights = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        weights.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        # Flattened in logical order, so that the memory format does not matter; as bytes, since NumPy has no bfloat16.
        weights.update(value.detach().cpu().flatten().view(torch.uint8).numpy())
    # As text: the order of the parts is that of the vector's dimensions, and digest() sorts keys.
    described = [json.dumps(model.description())] if isinstance(model, AttributionModel) else []
    return digest([name.split(".")[0], weights.hexdigest(), *described])


def keep_freed_memory() -> None:
    """Tell glibc to keep what is freed: by default every activation is mapped afresh and zeroed page by page."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        # Ray Data calls an encoder from a thread of its own, whose arena could not hold large blocks and would map them each time.
        mallopt(M_ARENA_MAX, 1)
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
