"""AbC's trained mappers: one linear layer for real images and one for synthetic images, on top of frozen features.

A released file is a dict {"real_mapper": {"weight", "bias"}, "synth_mapper": {...}} saved by torch. Flat names such as
"real_mapper.weight" (a module's state dict, or .safetensors) are read as well. A pickle can run code when it is loaded,
so torch reads it with weights_only, which refuses everything but tensors and plain containers.
"""

import io
import pickle
from dataclasses import dataclass

import numpy as np

from attrib.common.errors import AttribError, first_line
from attrib.common.storage import Storage

TORCH_SUFFIXES = (".pth", ".pt", ".ckpt")


@dataclass(frozen=True)
class LinearMapper:
    """x -> x @ weight.T + bias. weight: float64 [d_out, d_in]; bias: float64 [d_out]."""

    weight: np.ndarray
    bias: np.ndarray

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        """Map float64 [n, d_in] to [n, d_out]. Raises AttribError if the vectors have another dimension."""
        if vectors.shape[1] != self.weight.shape[1]:
            raise AttribError(
                f"the mapper takes {self.weight.shape[1]} numbers and these vectors have {vectors.shape[1]}; use the "
                "mapper that was trained on this backbone"
            )
        return vectors @ self.weight.T + self.bias


@dataclass(frozen=True)
class Mappers:
    """real: for sources, exemplars and distractors; synth: for generated images."""

    real: LinearMapper
    synth: LinearMapper


def load_mappers(uri: str | None, storage: Storage) -> Mappers | None:
    """Read the mappers of a file; None for None.

    Raises AttribError if the file is of another kind, holds more than tensors, or its layers are not two linear ones.
    """
    if uri is None:
        return None
    tensors = _flat(_load(uri, storage), uri)
    real, synth = (_linear(tensors, domain, uri) for domain in ("real_mapper", "synth_mapper"))
    if real.weight.shape != synth.weight.shape:
        raise AttribError(
            f"{uri}: real_mapper is {list(real.weight.shape)} and synth_mapper {list(synth.weight.shape)}; both must "
            "have one shape, or their results cannot be compared"
        )
    return Mappers(real, synth)


def _load(uri: str, storage: Storage) -> dict:
    # Local imports: torch and safetensors take seconds to load, and most methods have no mapper.
    suffix = "." + uri.rsplit(".", 1)[-1].lower()
    if suffix not in (*TORCH_SUFFIXES, ".safetensors"):
        raise AttribError(f"the mapper {uri} is neither .safetensors nor one of {', '.join(TORCH_SUFFIXES)}")
    if not storage.exists(uri):
        raise AttribError(f"the mapper {uri} does not exist; correct methods[].mapper")
    data = storage.read_bytes(uri)
    if suffix == ".safetensors":
        import safetensors.torch

        try:
            return safetensors.torch.load(data)
        except safetensors.SafetensorError as error:
            raise AttribError(f"the mapper {uri} is not a safetensors file: {first_line(error)}") from error
    import torch

    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise AttribError(
            f"the mapper {uri} was refused: it holds more than tensors and could run code when loaded, or is damaged; "
            f"save its state dict alone, as .safetensors if possible ({first_line(error)})"
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise AttribError(f"the mapper {uri} cannot be read: {first_line(error)}") from error


def _flat(found, uri: str) -> dict:
    """{dotted name: tensor} of nested dicts, without the prefixes of DistributedDataParallel and of a parent module."""
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict):
        raise AttribError(f"the mapper {uri} holds a {type(found).__name__}; save the state dict of the mappers")
    flat = {}
    for name, value in found.items():
        inner = {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
        flat |= {str(key).removeprefix("module.").removeprefix("model."): item for key, item in inner.items()}
    return flat


def _linear(tensors: dict, domain: str, uri: str) -> LinearMapper:
    import torch

    names = sorted(name for name in tensors if name.startswith(f"{domain}."))
    if names != [f"{domain}.bias", f"{domain}.weight"]:
        listed = ", ".join(sorted(tensors)[:8]) or "nothing"
        raise AttribError(
            f"{uri}: {domain} must be one linear layer, {domain}.weight and {domain}.bias; the file holds {listed}"
        )
    weight, bias = tensors[f"{domain}.weight"], tensors[f"{domain}.bias"]
    if not isinstance(weight, torch.Tensor) or not isinstance(bias, torch.Tensor):
        raise AttribError(f"{uri}: {domain}.weight and {domain}.bias must be tensors")
    if weight.ndim != 2 or bias.shape != weight.shape[:1]:
        raise AttribError(
            f"{uri}: {domain} has weight {list(weight.shape)} and bias {list(bias.shape)}; a linear layer has "
            "[out, in] and [out]"
        )
    layer = LinearMapper(weight.double().numpy(), bias.double().numpy())
    if not (np.isfinite(layer.weight).all() and np.isfinite(layer.bias).all()):
        raise AttribError(f"{uri}: {domain} holds values that are not finite")
    return layer
