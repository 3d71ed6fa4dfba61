"""A pool of synthetic models on disk, as of jobs.synthesize, with random filters in place of trained models."""

import torch
import torch.nn.functional as F
from torch import Tensor

from attrib.common.json_records import with_checksum
from attrib.common.storage import Storage, bytes_sha256, join
from attrib.generators.synthesis.architectures import DecoderSpec
from attrib.generators.synthesis.pool import PHOTOGRAPHS, RECORD, PoolModel, pool_digest, samples_uri

SPEC = DecoderSpec(
    num_blocks=1, convs_per_block=1, upsampler="nearest", activation="relu", norm="none", order="conv_norm_act"
)


def smooth_images(count: int, px: int, seed: int) -> Tensor:
    """uint8 [count, 3, px, px]: blobs of colour with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    smooth = F.interpolate(coarse, size=(px, px), mode="bicubic", align_corners=False)
    noisy = smooth + 0.03 * torch.randn(smooth.shape, generator=generator)
    return (255 * noisy).round().clamp(0, 255).to(torch.uint8)


def traced(photographs: Tensor, seed: int, strength: float = 0.12) -> Tensor:
    """The photographs through a random 3x3 filter by the seed: a trace that content does not hide."""
    kernel = strength * torch.randn(3, 1, 3, 3, generator=torch.Generator().manual_seed(1000 + seed))
    kernel[:, 0, 1, 1] += 1 - kernel.sum(dim=(1, 2, 3))
    pixels = F.conv2d(F.pad(photographs.float(), (1, 1, 1, 1), mode="reflect"), kernel, groups=3)
    return pixels.round().clamp(0, 255).to(torch.uint8)


def write_tiny_pool(
    uri: str, storage: Storage, num_models: int, num_images: int, px: int, seed: int = 0, num_bicubic: int = 0
) -> None:
    """num_bicubic: how many models, the last ones, have the bicubic upsampler."""
    photographs = smooth_images(num_images, px, seed)
    storage.write_array(join(uri, PHOTOGRAPHS), photographs.numpy())
    models = []
    for number in range(num_models):
        model_id, samples = f"m{number:03}", traced(photographs, number).numpy()
        storage.write_array(samples_uri(uri, model_id), samples)
        digest = bytes_sha256(samples.tobytes())
        spec = SPEC.model_copy(update={"upsampler": "bicubic"}) if number >= num_models - num_bicubic else SPEC
        models.append(
            PoolModel(model_id=model_id, spec=spec, seed=number, loss=0.001, num_steps=1, samples_sha256=digest)
        )
    sha256 = bytes_sha256(photographs.numpy().tobytes())
    record = {
        "models": [model.model_dump(mode="json") for model in models],
        "settings": {"px": px, "num_photographs": num_images},
        "digest": pool_digest(models, sha256),
        "photographs_sha256": sha256,
    }
    storage.write_json(join(uri, RECORD), with_checksum(record))


def replace_photographs(uri: str, photographs: Tensor, storage: Storage) -> None:
    """photographs: uint8 [n, 3, px, px]."""
    record = storage.read_json(join(uri, RECORD)) | {"photographs_sha256": bytes_sha256(photographs.numpy().tobytes())}
    storage.write_array(join(uri, PHOTOGRAPHS), photographs.numpy())
    storage.write_json(join(uri, RECORD), with_checksum(record))
