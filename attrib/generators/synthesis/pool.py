"""A pool of synthetic generators on disk: what each is, its weights, and what each makes of the same photographs.

<pool>/pool.json                         written last: models, px, digest, measures, settings, versions
<pool>/photographs.npy                   uint8 [n, 3, px, px]
<pool>/samples/<model_id>.npy            uint8 [n, 3, px, px]: row i shows photograph i, for every model
<pool>/models/<model_id>.safetensors     written after the samples: a model with weights is done; metadata "attrib.generator" describes it
"""

import json
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from attrib.common.config import digest
from attrib.common.errors import AttribError
from attrib.common.settings import Positive, Settings
from attrib.common.storage import Storage, bytes_sha256, join, scratch_folder
from attrib.generators.synthesis.architectures import DecoderSpec

RECORD = "pool.json"
PHOTOGRAPHS = "photographs.npy"
CARD_KEY = "attrib.generator"


class PoolModel(Settings):
    """One synthetic generator. loss: MSE on held-out photographs, pixels in 0..1; num_steps: of its training."""

    model_id: str
    spec: DecoderSpec
    seed: int
    loss: float
    num_steps: Positive
    samples_sha256: str


@dataclass(frozen=True)
class Pool:
    """A finished pool. digest: of all models and photographs; px: of each side of photographs and samples."""

    uri: str
    models: list[PoolModel]
    px: int
    num_photographs: int
    digest: str

    def photographs(self, storage: Storage) -> Tensor:
        """uint8 [n, 3, px, px]."""
        return torch.from_numpy(storage.read_array(join(self.uri, PHOTOGRAPHS)))

    def samples(self, model_id: str, storage: Storage) -> Tensor:
        """uint8 [n, 3, px, px]: what the model makes of each photograph."""
        return torch.from_numpy(storage.read_array(samples_uri(self.uri, model_id)))


def open_pool(uri: str, storage: Storage) -> Pool:
    """Raises AttribError if there is no finished pool."""
    record = storage.require(join(uri, RECORD), "jobs.synthesize")
    models = [PoolModel.model_validate(model) for model in record["models"]]
    return Pool(uri, models, record["settings"]["px"], record["settings"]["num_photographs"], record["digest"])


def pool_digest(models: list[PoolModel], photographs_digest: str) -> str:
    return digest([[model.model_dump(mode="json") for model in models], photographs_digest])


def samples_uri(pool: str, model_id: str) -> str:
    return join(pool, "samples", f"{model_id}.npy")


def model_uri(pool: str, model_id: str) -> str:
    return join(pool, "models", f"{model_id}.safetensors")


def write_model(
    pool: str,
    model_id: str,
    spec: DecoderSpec,
    seed: int,
    model: nn.Module,
    loss: float,
    num_steps: int,
    samples: Tensor,
    storage: Storage,
) -> PoolModel:
    """Commit a trained model; samples: uint8 [n, 3, px, px]. Its weights come last, so that what has weights is whole."""
    array = samples.numpy()
    card = PoolModel(
        model_id=model_id,
        spec=spec,
        seed=seed,
        loss=loss,
        num_steps=num_steps,
        samples_sha256=bytes_sha256(array.tobytes()),
    )
    storage.write_array(samples_uri(pool, model_id), array)
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    data = save(state, metadata={CARD_KEY: card.model_dump_json()})
    storage.write_bytes(model_uri(pool, model_id), data)
    return card


def read_card(pool: str, model_id: str, storage: Storage) -> PoolModel:
    """What a committed model says of itself. Raises AttribError if it is no model of this version."""
    uri = model_uri(pool, model_id)
    with scratch_folder() as folder, safe_open(storage.localise(uri, folder), framework="np") as file:
        try:
            return PoolModel.model_validate(json.loads((file.metadata() or {})[CARD_KEY]))
        except (KeyError, ValidationError) as error:
            raise AttribError(
                f"{uri} is no synthetic generator that this version understands; delete it and run jobs.synthesize again"
            ) from error


def stack_samples(pool: Pool, models: list[PoolModel], num_images: int, storage: Storage) -> np.ndarray:
    """uint8 [len(models), num_images, 3, px, px]: the first images of some models."""
    return np.stack([pool.samples(model.model_id, storage)[:num_images].numpy() for model in models])
