"""Classifiers that look at no trace of a generator: what they get right leaks through what is shown or through the files.

They measure a test, they are no methods: a table in which one of them does well says little about the others. None is ever shipped.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from attrib.common.config import digest
from attrib.data.decoding import FORMATS
from attrib.generators.fingerprints.base import Method
from attrib.generators.fingerprints.scoring import unit_or_zero
from attrib.generators.signals.samples import Sample

THUMBNAIL_PX = 8
FREQUENCIES = 2.0 ** np.arange(-3, 5)  # cycles per doubling of a size: from any size at all to 4 % of one


class ContentOnly(Method):
    """An 8 x 8 thumbnail and the colours: averages of whole areas, in which no pattern of single pixels is left."""

    name = "content-only"
    looks_at_trace = False
    scoring = "logistic"

    def __init__(self):
        self.digest = digest([self.name, THUMBNAIL_PX])

    def embed(self, samples: Sequence[Sample]) -> np.ndarray:
        rows = np.stack([_content(sample.image) for sample in samples])
        # One constant beside the others: a row's length, its contrast, is then not lost when it is made 1.
        return unit_or_zero(np.column_stack([rows, np.ones(len(rows))])).astype(np.float32)


def _content(image: torch.Tensor) -> np.ndarray:
    """float64 [3 * 64 + 6]: thumbnail around mid-grey, then mean and deviation of each channel of a 4 times larger one."""
    pixels = image[None].float() / 255 - 0.5
    thumbnail = F.adaptive_avg_pool2d(pixels, THUMBNAIL_PX)
    deviation, mean = torch.std_mean(F.adaptive_avg_pool2d(pixels, 2 * THUMBNAIL_PX), dim=(2, 3), correction=0)
    return torch.cat([thumbnail.flatten(), mean[0], deviation[0]]).double().numpy()


class CodecAndSize(Method):
    """The file's format, its bytes and the image's sides, and no pixel.

    Each size is a set of cosines and sines of its logarithm, so that rows of length one keep it, and the cosine of two rows falls with the
    ratio of their sizes.
    """

    name = "codec-and-size"
    looks_at_trace = False

    def __init__(self):
        self.digest = digest([self.name, list(FORMATS), FREQUENCIES.tolist()])

    def embed(self, samples: Sequence[Sample]) -> np.ndarray:
        codecs = np.array([[sample.codec == codec for codec in FORMATS] for sample in samples], np.float64)
        sizes = np.log2([[max(sample.num_bytes, 1), *sample.image.shape[1:]] for sample in samples])
        angles = (2 * np.pi * sizes[:, :, None] * FREQUENCIES).reshape(len(samples), -1)
        waves = np.concatenate([np.cos(angles), np.sin(angles)], axis=1) / np.sqrt(len(FREQUENCIES))
        return unit_or_zero(np.concatenate([codecs, waves], axis=1)).astype(np.float32)
