"""Settings of an evaluation, a generator set of three colours, and methods whose results on it are known."""

import numpy as np
import torch

from attrib.generators.evaluation.generator_sets import as_samples, make_set
from attrib.generators.evaluation.settings import EvaluateGeneratorsSettings, SetSettings
from attrib.generators.fingerprints.base import Method

PX, NUM_IMAGES = 32, 16


class MeanColour(Method):
    """The direction of an image's mean colour, which re-encoding and cropping change little."""

    name = digest = "mean-colour"
    min_side_px = 20

    def embed(self, samples):
        colours = np.stack([sample.image.float().mean(dim=(1, 2)).numpy() for sample in samples])
        return (colours / np.linalg.norm(colours, axis=1, keepdims=True)).astype(np.float32)


class Blind(Method):
    name = digest = "blind"

    def embed(self, samples):
        return np.ones((len(samples), 1), np.float32)


class Noise(Method):
    """A random vector by the sum of pixels: neither perfect nor constant, so that every measure varies."""

    name = digest = "noise"

    def embed(self, samples):
        seeds = [int(sample.image.long().sum()) for sample in samples]
        rows = np.stack([np.random.default_rng(seed).standard_normal(4) for seed in seeds]) + [1, 0, 0, 0]
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def noisy_set(families=None, judged=True, **options):
    """Three generators of the same noise, which no method can tell apart; JPEG changes every image."""
    pixels = torch.from_numpy(np.random.default_rng(5).integers(0, 256, (4, NUM_IMAGES, 3, PX, PX), dtype=np.uint8))
    images = {name: as_samples(pixels[g]) for g, name in enumerate(("a", "b", "c"))}
    return make_set(
        "noise", SetSettings(judged=judged, num_splits=3), images, as_samples(pixels[3]), families, **options
    )


def settings(**changes) -> EvaluateGeneratorsSettings:
    values = {
        "output": "/out",
        "pool": "/pool",
        "pools": {"unseen": {"uri": "/unseen"}},
        "num_references": 6,
        "reference_counts": [1, 6, 50],
        "set_sizes": [1, 3, 20],
        "degradations": ["none", "jpeg-85", "resize-0.5"],
    }
    return EvaluateGeneratorsSettings.model_validate(values | changes)


def coloured_set(families=None, judged=True, num_images=NUM_IMAGES, real=True, **options):
    """Three generators, each of one colour in different brightness; real images are white."""
    rng = np.random.default_rng(0)
    images = {}
    for name, colour in (("red", (200, 30, 30)), ("green", (30, 200, 30)), ("blue", (30, 30, 200))):
        light = rng.uniform(0.7, 1.2, num_images)
        pixels = (np.array(colour)[None, :] * light[:, None]).astype(np.uint8)
        images[name] = as_samples(torch.from_numpy(pixels)[:, :, None, None].expand(-1, -1, PX, PX).contiguous())
    white = as_samples(torch.full((8, 3, PX, PX), 230, dtype=torch.uint8)) if real else ()
    given = SetSettings(judged=judged, num_splits=3)
    return make_set("colours", given, images, white, families, **options)
