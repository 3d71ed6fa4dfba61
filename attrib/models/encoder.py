"""Image encoders: a timm network, its weights (hub, local file or attrib checkpoint) and its preprocessing."""

import ctypes
import json
from dataclasses import asdict, dataclass, replace

import numpy as np
import timm
import timm.data
import torch
from safetensors import SafetensorError, safe_open

from attrib.common.errors import AttribError, first_line
from attrib.common.json_records import parse_record
from attrib.common.scratch import scratch_folder
from attrib.common.storage import Storage, join
from attrib.models.bn_folding import fold_batch_norms
from attrib.models.model import CHECKPOINT_KEY, TRAIN_RECORD, TRAINED_MODEL, model_digest, model_from_checkpoint
from attrib.models.preprocessing import Preprocessing
from attrib.models.settings import BackboneSettings

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # constants of malloc.h
KEEP_FROM_BYTES, KEEP_UP_TO_BYTES = 1 << 30, (1 << 31) - 1
# Environment variables of a process that encodes outside its main thread. glibc gives such a thread an arena of at most
# 64 MB and maps every large block again in spite of `keep_freed_memory`: 3,000 page faults per image.
KEEP_FREED_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(KEEP_FROM_BYTES),
    "MALLOC_TRIM_THRESHOLD_": str(KEEP_UP_TO_BYTES),
}
CPU_BATCH_SIZE = 16  # activations of larger batches do not fit the cache
GPU_BATCH_SIZE = 128  # the default number of images per chunk; a larger batch would be mostly padding


@dataclass(frozen=True)
class EncoderIdentity:
    """Identifies an encoder. An index and its queries must have been embedded by the same one."""

    name: str
    model_digest: str  # of the network name and all weights
    preprocessing: dict
    dimension: int

    def to_dict(self) -> dict:
        return asdict(self)


class ImageEncoder:
    """A frozen network on one device that encodes prepared pixels as vectors."""

    def __init__(
        self, model: torch.nn.Module, name: str, preprocessing: Preprocessing, device: str, batch_size: int | None
    ):
        self.preprocessing = preprocessing
        self.device = torch.device(device)
        self.batch_size = batch_size or (CPU_BATCH_SIZE if self.device.type == "cpu" else GPU_BATCH_SIZE)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.model = model.eval().to(self.device, memory_format=torch.channels_last)
        shape = (2, 3, preprocessing.crop_px, preprocessing.crop_px)
        probe = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        self._network = fold_batch_norms(self.model, self._normalise(probe))
        # Measured, because timm's num_features may differ from the pooled output (MobileNetV3 widens it in the head).
        dimension = self._forward(probe).shape[1]
        self.identity = EncoderIdentity(name, model_digest(name, model), preprocessing.to_dict(), dimension)

    def _normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        images = self.preprocessing.normalise(pixels, self.device, torch.float32)
        return images.contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def _forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self._network(self._normalise(pixels)).float().cpu()

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """Return vectors float32 [n, d], not normalised, of resized and cropped pixels uint8 [n, 3, h, w].

        The last batch is padded to `batch_size`: libraries choose kernels by shape, so one shape keeps the vector of an
        image independent of its batch.
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
    """A network and timm's description of its preprocessing. has_head: whether it is an AttributionModel."""

    model: torch.nn.Module
    data_config: dict
    has_head: bool = False


def load_encoder(
    settings: BackboneSettings,
    storage: Storage,
    device: str = "cpu",
    batch_size: int | None = None,
    jpeg_margin: float | None = None,
) -> ImageEncoder:
    """Return the encoder of the settings. jpeg_margin: see Preprocessing. Raises what load_network raises."""
    network = load_network(settings, storage)
    preprocessing = replace(preprocessing_of(network, settings.name), jpeg_margin=jpeg_margin)
    return ImageEncoder(network.model, settings.name, preprocessing, device, batch_size)


def preprocessing_of(network: Network, name: str) -> Preprocessing:
    """Return the preprocessing of a network. Raises AttribError if it is not supported."""
    try:
        return Preprocessing.from_timm(network.data_config)
    except (ValueError, KeyError, TypeError, ArithmeticError) as error:
        raise AttribError(f"the preprocessing of {name!r} is not supported ({error}); use another network") from error


def load_network(settings: BackboneSettings, storage: Storage) -> Network:
    """Load a network. Raises AttribError if timm does not know it or the weights do not fit it."""
    if settings.weights.endswith(".safetensors"):
        state, declared = _read_safetensors(settings.weights, storage)
        name = declared.get("name", settings.name)
        if name != settings.name:
            raise AttribError(
                f"{settings.weights} is a checkpoint of {name!r}, not of backbone.name = {settings.name!r}; change one"
            )
        model = _create(name, pretrained=False)
        if "head" in declared:
            model = model_from_checkpoint(model.eval(), declared, state, settings.weights, settings.domain)
            _check_trained(settings.weights, name, model, storage)
            return Network(model, declared["data_config"], has_head=True)
        _load_strictly(model, name, state, settings.weights)
        return Network(model, declared.get("data_config") or timm.data.resolve_data_config(model=model))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = _create(settings.name, pretrained=settings.weights == "hub")
    return Network(model, timm.data.resolve_data_config(model=model))


def _check_trained(uri: str, name: str, model: torch.nn.Module, storage: Storage) -> None:
    """Raise AttribError if the record of the training, beside the model, names other weights."""
    folder, _, file = uri.rpartition("/")
    record_uri = join(folder, TRAIN_RECORD)
    if file != TRAINED_MODEL or not storage.exists(record_uri):
        return
    stated = parse_record(record_uri, storage.read_bytes(record_uri)).get("model_digest")
    if stated and stated != model_digest(name, model):
        raise AttribError(
            f"{uri} is damaged: it does not hold the weights of {TRAIN_RECORD} beside it; restore it from a copy, or "
            "train again"
        )


def _create(name: str, pretrained: bool) -> torch.nn.Module:
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0)
    except Exception as error:  # timm and its hub client raise many exception types
        base = name.split(".")[0]
        if base not in timm.list_models():
            near = timm.list_models(f"*{base[:8]}*")[:5]
            suggestion = f" (similar names: {', '.join(near)})" if near else ""
            raise AttribError(f"timm has no network {name!r}{suggestion}; correct backbone.name") from error
        raise AttribError(
            f"timm could not provide {name!r} with its hub weights ({first_line(error)}); if the hub cannot be "
            "reached, give a local file: backbone.weights=/path/to/model.safetensors"
        ) from error


def _read_safetensors(uri: str, storage: Storage) -> tuple[dict[str, torch.Tensor], dict]:
    if not storage.exists(uri):
        raise AttribError(f"the file {uri} does not exist; correct backbone.weights")
    with scratch_folder() as folder:
        try:
            with safe_open(storage.localise(uri, folder), framework="pt") as file:
                state = {key: file.get_tensor(key) for key in file.keys()}
                declared = json.loads((file.metadata() or {}).get(CHECKPOINT_KEY, "{}"))
        except (SafetensorError, ValueError, RecursionError) as error:
            raise AttribError(f"{uri} is not a readable .safetensors file ({error}); download it again") from error
    if not isinstance(declared, dict):
        raise AttribError(f"{uri} is not a checkpoint ({CHECKPOINT_KEY} is not a JSON object); download or retrain it")
    return state, declared


def _load_strictly(model: torch.nn.Module, name: str, state: dict[str, torch.Tensor], origin: str) -> None:
    """Load all weights of the network; the classifier of a full checkpoint is ignored."""
    heads = model.pretrained_cfg.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    state = {key: value for key, value in state.items() if not key.startswith(tuple(f"{head}." for head in heads))}
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise AttribError(
            f"{origin} holds weights of another network than backbone.name = {name!r}; set backbone.name to the "
            f"network of the file ({' '.join(str(error).split())[:200]})"
        ) from error


def keep_freed_memory() -> None:
    """Make glibc keep freed memory in the main thread, instead of mapping and zeroing every activation again."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_ARENA_MAX, 1)
        mallopt(M_MMAP_THRESHOLD, KEEP_FROM_BYTES)
        mallopt(M_TRIM_THRESHOLD, KEEP_UP_TO_BYTES)
