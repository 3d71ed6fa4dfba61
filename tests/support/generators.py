"""Images of simulated generators, and fingerprints without images.

All generators share the kind of content. Each adds noise upsampled with its own kernel, the trace.
"""

import json

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import save

from attrib.common.settings import StorageSettings
from attrib.common.storage import Storage, join
from attrib.generators.evaluation.controls import ContentOnly
from attrib.generators.fingerprints.base import Rescored
from attrib.generators.fingerprints.discriminant import FILE_KEY
from attrib.generators.fingerprints.spectrum import DISCRIMINANT, LogSpectrum
from attrib.generators.settings import ScoringName, SpectrumSettings
from attrib.generators.signals.samples import Sample, drawn_sample
from support.hostile import encode

STORAGE = Storage(StorageSettings())
PATCH_PX = 16
SPECTRUM = SpectrumSettings(patch_px=PATCH_PX, max_patches=9)
KERNELS = {
    "nearest": [[1, 1], [1, 1]],
    "stripes": [[1, 1], [0, 0]],
    "checker": [[1, -1], [-1, 1]],
    "diagonal": [[1, 0], [0, 1]],
}


def drawn(trace: str | None, seed: int, px: int = 48) -> np.ndarray:
    """uint8 [px, px, 3]: smooth content of the seed plus noise upsampled by the trace's kernel; None: plain noise."""
    generator = np.random.default_rng([seed, px])
    coarse = generator.integers(40, 216, (4, 4, 3), dtype=np.uint8)
    content = np.asarray(Image.fromarray(coarse).resize((px, px), Image.Resampling.BICUBIC), float)
    if trace is None:
        noise = generator.standard_normal((px, px, 3)) * 6
    else:
        noise = np.kron(generator.standard_normal((px // 2, px // 2, 3)).transpose(2, 0, 1), np.array(KERNELS[trace]))
        noise = noise.transpose(1, 2, 0) * 8 + generator.standard_normal((px, px, 3))
    return np.clip(np.rint(content + noise), 0, 255).astype(np.uint8)


def drawn_file(trace: str | None, seed: int, px: int = 48, format: str = "PNG", **options) -> bytes:
    return encode(Image.fromarray(drawn(trace, seed, px)), format, **options)


def drawn_samples(trace: str | None, seeds, px: int = 48) -> list[Sample]:
    return [drawn_sample(torch.from_numpy(drawn(trace, seed, px)).permute(2, 0, 1)) for seed in seeds]


def spectrum_method() -> LogSpectrum:
    return LogSpectrum(_mean(), SPECTRUM)


def write_spectrum_method(folder: str, storage: Storage) -> None:
    """Write lda.safetensors, from which the method "log-spectrum" reads its mean."""
    mean = _mean()
    metadata = {FILE_KEY: json.dumps({"shrinkage": 1.0, "declared": {"spectrum": SPECTRUM.model_dump(mode="json")}})}
    arrays = {"mean": mean, "projection": np.eye(len(mean), 2)}
    storage.write_bytes(join(folder, DISCRIMINANT), save(arrays, metadata=metadata))


def _mean() -> np.ndarray:
    """Mean log spectrum over all traces, as fitted on the synthetic models of a pool."""
    from attrib.generators.fingerprints.spectrum import spectra

    samples = [sample for trace in (None, *KERNELS) for sample in drawn_samples(trace, range(900, 904))]
    return spectra(samples, SPECTRUM).astype(np.float64).mean(axis=0)


class Vectors(Rescored):
    """Method for tests that supply vectors: only its scoring is used."""

    def __init__(self, scoring: ScoringName = "cosine"):
        super().__init__(ContentOnly(), scoring)


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def around(centre: np.ndarray, count: int, spread: float, generator) -> np.ndarray:
    return unit(centre + spread * generator.standard_normal((count, len(centre))))
