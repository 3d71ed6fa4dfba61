"""A small generator for each exemplar, fitted to it alone, so that the true source of every generated image is known.

A generator maps a place to a colour: random Fourier features (Tancik et al., NeurIPS 2020, arXiv 2006.10739) with
weights that least squares fits to the exemplar's pixels. A sample changes the weights, moves the image, blends two
such images across a soft seam, and changes form and colours. As in AbC (Wang et al., ICCV 2023, arXiv
2306.09345), one image decides what a generator shows.
"""

import csv
import math
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.utils import save_image

from attrib.common.errors import AttribError

TRUTH_COLUMNS = ("query_key", "source_key")
NUM_FREQUENCIES = 1000
FREQUENCY_STD = 8.0  # cycles per image side
RIDGE = 2e-3  # per pixel
WEIGHT_STD = 0.15  # of the factor of every frequency


class Generator:
    """The generators of all exemplars: common frequencies, and weights of their own.

    Random numbers are those of torch's global generator.
    """

    def __init__(self, exemplars: torch.Tensor):
        """exemplars: float32 [n, 3, px, px] in 0..1."""
        self.px = px = exemplars.shape[-1]
        axis = (torch.arange(px) + 0.5) / px
        phase = 2 * math.pi * FREQUENCY_STD * torch.cartesian_prod(axis, axis) @ torch.randn(2, NUM_FREQUENCIES)
        self.features = torch.cat([phase.cos(), phase.sin()], 1)  # [pixels, 2 * NUM_FREQUENCIES]
        colours = exemplars.flatten(2).permute(2, 0, 1)  # [pixels, n, 3]
        self.mean = colours.mean(0)
        gram = self.features.T @ self.features + RIDGE * len(phase) * torch.eye(2 * NUM_FREQUENCIES)
        weights = torch.linalg.solve(gram, self.features.T @ (colours - self.mean).flatten(1))
        self.weights = weights.unflatten(1, (-1, 3)).transpose(0, 1)  # [n, 2 * NUM_FREQUENCIES, 3]
        self.move = torch.nn.Sequential(
            v2.Pad(px // 2, padding_mode="reflect"),
            v2.RandomAffine(18, (0.1, 0.1), (1.0, 1.5), interpolation=v2.InterpolationMode.BILINEAR),
            v2.CenterCrop(px + px // 3),  # the transform after it takes pixels from beyond the image
        )
        self.finish = torch.nn.Sequential(
            v2.ElasticTransform(alpha=3.5 * px, sigma=px / 10),
            v2.CenterCrop(px),
            v2.ColorJitter(brightness=0.2, contrast=0.3, saturation=0.5, hue=0.18),
        )

    def render(self, exemplar: int, factors: torch.Tensor) -> torch.Tensor:
        """Return float32 [3, px, px] in 0..1. factors: float32 [NUM_FREQUENCIES], of the fitted weights."""
        colours = self.features @ (self.weights[exemplar] * factors.repeat(2)[:, None]) + self.mean[exemplar]
        return colours.T.reshape(3, self.px, self.px).clamp(0, 1)

    def sample(self, exemplar: int) -> torch.Tensor:
        """Return a new image, float32 [3, px, px] in 0..1."""
        first, second = (
            self.move(self.render(exemplar, 1 + WEIGHT_STD * torch.randn(NUM_FREQUENCIES))) for _ in range(2)
        )
        height = torch.linspace(-1.3, 1.3, first.shape[1])[:, None]
        share = torch.sigmoid(6 * (height - torch.empty(()).uniform_(-1.2, 1.2)))
        return self.finish(torch.lerp(first, second, share))


def fit_and_sample(
    corpus: Path, keys: list[str], out_folder: Path, samples_per_exemplar: int, seed: int
) -> list[tuple[str, str]]:
    """Write <out_folder>/<generator>/<sample>.png and truth.csv (TRUTH_COLUMNS); return its rows.

    keys: paths of the exemplars below `corpus`; all have one size. Raises AttribError if there is none, or one is given
    twice.
    """
    if not keys or len(set(keys)) < len(keys):
        raise AttribError("give at least one exemplar, and each only once: a sample has one source")
    pairs = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = Generator(torch.stack([read_image(corpus / key) for key in keys]) / 255)
        for number, key in enumerate(keys):
            folder = f"model-{number:03d}"
            (out_folder / folder).mkdir(parents=True, exist_ok=True)
            for i in range(samples_per_exemplar):
                pairs.append((f"{folder}/sample-{i:02d}.png", key))
                save_image(generator.sample(number), out_folder / pairs[-1][0])
    with open(out_folder / "truth.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([TRUTH_COLUMNS, *pairs])
    return pairs


def read_image(file: Path) -> torch.Tensor:
    """Return an RGB image as uint8 [3, h, w]."""
    with Image.open(file) as image:
        return v2.functional.pil_to_tensor(image)
