"""The pool of synthetic generators on disk: descriptions, weights, and reproductions of the same photographs.

<pool>/pool.json                       written last: models, px, digest, measures, settings, versions
<pool>/photographs.npy                 uint8 [n, 3, px, px]
<pool>/samples/<model_id>.npy          uint8 [n, 3, px, px]: row i reproduces photograph i, for every model
<pool>/models/<model_id>.safetensors   weights, written after the samples, so that a model with weights is complete;
                                       the metadata key "attrib.generator" holds its description
"""

import json
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from attrib.common.config import digest
from attrib.common.errors import AttribError, first_line
from attrib.common.scratch import scratch_folder
from attrib.common.settings import Positive, Settings
from attrib.common.storage import Storage, bytes_sha256, join
from attrib.generators.synthesis.architectures import DecoderSpec
from attrib.generators.synthesis.autoencoder import Trained

RECORD = "pool.json"
PHOTOGRAPHS = "photographs.npy"
CARD_KEY = "attrib.generator"


class PlannedModel(Settings):
    """A synthetic generator to train. model_id: distinct in the pool, and fit for file names."""

    model_id: str
    spec: DecoderSpec
    seed: int


class PoolModel(PlannedModel):
    """A trained synthetic generator. loss: MSE on held-out photographs, pixels in 0..1."""

    loss: float
    num_steps: Positive
    samples_sha256: str


@dataclass(frozen=True)
class Pool:
    """A finished pool. digest: of all models and photographs; px: side of photographs and samples."""

    uri: str
    models: list[PoolModel]
    px: int
    num_photographs: int
    digest: str
    photographs_sha256: str | None = None  # None: of an earlier version

    def photographs(self, storage: Storage) -> Tensor:
        """uint8 [n, 3, px, px]."""
        return torch.from_numpy(self._array(PHOTOGRAPHS, self.photographs_sha256, storage))

    def samples(self, model_id: str, storage: Storage) -> Tensor:
        """uint8 [n, 3, px, px]: the model's reproduction of each photograph."""
        sha256 = next((model.samples_sha256 for model in self.models if model.model_id == model_id), None)
        return torch.from_numpy(self._array(f"samples/{model_id}.npy", sha256, storage))

    def _array(self, name: str, sha256: str | None, storage: Storage) -> np.ndarray:
        """An array of the pool. Raises AttribError if it is missing or the digest of its values is not sha256."""
        uri = join(self.uri, name)
        try:
            array = storage.read_array(uri)
        except FileNotFoundError:
            raise AttribError(f"{uri} is missing; restore it from a copy, or make another pool") from None
        if sha256 and bytes_sha256(array.tobytes()) != sha256:
            raise AttribError(f"{uri} is damaged: its checksum differs; restore it from a copy, or make another pool")
        return array


def open_pool(uri: str, storage: Storage) -> Pool:
    """A finished pool. Raises AttribError if there is none."""
    record = storage.require(join(uri, RECORD), "jobs.synthesize")
    try:
        models = [PoolModel.model_validate(model) for model in record["models"]]
        settings, sha256 = record["settings"], record.get("photographs_sha256")
        return Pool(uri, models, settings["px"], settings["num_photographs"], record["digest"], sha256)
    except (ValidationError, LookupError, TypeError) as error:
        raise AttribError(f"{join(uri, RECORD)} is no record of a pool ({first_line(error)})") from error


def pool_digest(models: list[PoolModel], photographs_digest: str) -> str:
    return digest([[model.model_dump(mode="json") for model in models], photographs_digest])


def samples_uri(pool: str, model_id: str) -> str:
    return join(pool, "samples", f"{model_id}.npy")


def model_uri(pool: str, model_id: str) -> str:
    return join(pool, "models", f"{model_id}.safetensors")


def write_model(pool: str, planned: PlannedModel, trained: Trained, samples: Tensor, storage: Storage) -> PoolModel:
    """Write a trained model and its samples, uint8 [n, 3, px, px]. The weights are last and mark it as complete."""
    array = samples.numpy()
    card = PoolModel(
        **dict(planned),
        loss=trained.loss,
        num_steps=trained.num_steps,
        samples_sha256=bytes_sha256(array.tobytes()),
    )
    storage.write_array(samples_uri(pool, card.model_id), array)
    state = {name: value.detach().cpu().contiguous() for name, value in trained.model.state_dict().items()}
    storage.write_bytes(model_uri(pool, card.model_id), save(state, metadata={CARD_KEY: card.model_dump_json()}))
    return card


def read_card(pool: str, model_id: str, storage: Storage) -> PoolModel:
    """The description of a committed model. Raises AttribError if this version cannot read it."""
    uri = model_uri(pool, model_id)
    try:
        with scratch_folder() as folder, safe_open(storage.localise(uri, folder), framework="np") as file:
            return PoolModel.model_validate(json.loads((file.metadata() or {})[CARD_KEY]))
    except (SafetensorError, LookupError, ValueError, RecursionError) as error:
        raise AttribError(
            f"this version cannot read the synthetic generator {uri} ({first_line(error)}); delete it and run "
            "jobs.synthesize again"
        ) from error
