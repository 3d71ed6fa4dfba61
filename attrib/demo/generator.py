"""A small generator for each exemplar, fitted to it alone, so that the true source of every generated image is known.

A generator maps a place to a colour: random Fourier features (Tancik et al., NeurIPS 2020, arXiv 2006.10739) with
weights that least squares fits to the exemplar's pixels. A sample moves and bends the places, changes the weights,
blends two such images across a soft seam, and changes the colours. As in AbC (Wang et al., ICCV 2023, arXiv
2306.09345), one image decides what a generator shows.
"""

import csv
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from attrib.common.errors import AttribError

GENERATED_PX = 96
TRUTH_COLUMNS = ("query_key", "source_key")
NUM_FREQUENCIES = 1000
FREQUENCY_STD = 8.0  # cycles per image side
RIDGE = 2e-3  # per pixel
ZOOM, SHIFT, TURNS, BEND = (0.65, 1.0), 0.12, 0.05, 0.12  # of the places; lengths in halves of the image's side
WEIGHT_STD = 0.15  # of the factor of every frequency
HUE_TURNS, SATURATION, CONTRAST, BRIGHTNESS = 0.18, (0.5, 1.4), (0.7, 1.2), 0.1
BEND_KNOTS = 4  # per axis


class Generator:
    """The generators of all exemplars: common frequencies, and weights of their own."""

    def __init__(self, exemplars: torch.Tensor, seed: int):
        """exemplars: float32 [n, 3, GENERATED_PX, GENERATED_PX] in 0..1."""
        frequencies = FREQUENCY_STD / 2 * torch.randn(2, NUM_FREQUENCIES, generator=torch.Generator().manual_seed(seed))
        phase = 2 * math.pi * _grid(torch.eye(2, 3)).reshape(-1, 2) @ frequencies
        self.features = torch.cat([phase.cos(), phase.sin()], 1)  # [pixels, 2 * NUM_FREQUENCIES]
        colours = exemplars.flatten(2).permute(2, 0, 1)  # [pixels, n, 3]
        self.mean = colours.mean(0)
        gram = self.features.T @ self.features + RIDGE * len(phase) * torch.eye(2 * NUM_FREQUENCIES)
        weights = torch.linalg.solve(gram, self.features.T @ (colours - self.mean).flatten(1))
        self.weights = weights.unflatten(1, (-1, 3)).transpose(0, 1)  # [n, 2 * NUM_FREQUENCIES, 3]

    def render(self, exemplar: int, factors: torch.Tensor) -> torch.Tensor:
        """float32 [1, 3, GENERATED_PX, GENERATED_PX]; factors: float32 [NUM_FREQUENCIES], of the fitted weights."""
        colours = self.features @ (self.weights[exemplar] * factors.repeat(2)[:, None]) + self.mean[exemplar]
        return colours.T.reshape(1, 3, GENERATED_PX, GENERATED_PX)

    def sample(self, exemplar: int, chance: torch.Generator) -> torch.Tensor:
        """A new image, uint8 [GENERATED_PX, GENERATED_PX, 3]."""
        first, second = (
            F.grid_sample(
                self.render(exemplar, 1 + WEIGHT_STD * torch.randn(NUM_FREQUENCIES, generator=chance)),
                _bent_places(chance)[None],
                padding_mode="reflection",
                align_corners=False,
            )[0].permute(1, 2, 0)
            for _ in range(2)
        )
        height = torch.linspace(-1, 1, GENERATED_PX)[:, None, None]
        share = torch.sigmoid(6 * (height - _between(-1.2, 2.4, chance)))
        return _recoloured(torch.lerp(first, second, share), chance).mul(255).round().to(torch.uint8)


def _between(low: float, high: float, chance: torch.Generator) -> float:
    return low + (high - low) * torch.rand((), generator=chance).item()


def _grid(affine: torch.Tensor) -> torch.Tensor:
    """float32 [2, 3] -> places float32 [GENERATED_PX, GENERATED_PX, 2]."""
    return F.affine_grid(affine[None], [1, 3, GENERATED_PX, GENERATED_PX], align_corners=False)[0]


def _bent_places(chance: torch.Generator) -> torch.Tensor:
    """float32 [GENERATED_PX, GENERATED_PX, 2]: a random part of the exemplar, turned and bent."""
    angle, zoom = 2 * math.pi * _between(-TURNS, TURNS, chance), _between(*ZOOM, chance)
    cos, sin, room = zoom * math.cos(angle), zoom * math.sin(angle), 1 - zoom + SHIFT
    x, y = _between(-room, room, chance), _between(-room, room, chance)
    knots = BEND * (2 * torch.rand(1, 2, BEND_KNOTS, BEND_KNOTS, generator=chance) - 1)
    bend = F.interpolate(knots, size=(GENERATED_PX, GENERATED_PX), mode="bicubic")[0].permute(1, 2, 0)
    return _grid(torch.tensor([[cos, -sin, x], [sin, cos, y]])) + bend


def _recoloured(image: torch.Tensor, chance: torch.Generator) -> torch.Tensor:
    """float32 [h, w, 3], hue turned about the grey axis, saturation, contrast and brightness changed, within 0..1."""
    angle, saturation = 2 * math.pi * _between(-HUE_TURNS, HUE_TURNS, chance), _between(*SATURATION, chance)
    grey = torch.full((3, 3), 1 / 3)
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    turn = grey + saturation * (math.cos(angle) * (torch.eye(3) - grey) + math.sin(angle) * cross)
    image = image @ turn.T
    mean, offset = image.mean(), _between(-BRIGHTNESS, BRIGHTNESS, chance)
    return (mean + _between(*CONTRAST, chance) * (image - mean) + offset).clamp(0, 1)


def fit_and_sample(
    exemplar_files: list[Path], out_folder: Path, samples_per_exemplar: int, seed: int, corpus_folder: Path
) -> list[tuple[str, str]]:
    """Write <out_folder>/<generator>/<sample>.png and truth.csv (TRUTH_COLUMNS); return its rows.

    Keys are paths below `out_folder` and `corpus_folder`. Raises AttribError if there is no exemplar, or an exemplar is
    given twice or lies outside the corpus.
    """
    outside = [file for file in exemplar_files if not file.is_relative_to(corpus_folder)]
    if outside:
        raise AttribError(f"the exemplar {outside[0]} is not below the corpus {corpus_folder}")
    keys = [file.relative_to(corpus_folder).as_posix() for file in exemplar_files]
    if not keys or len(set(keys)) < len(keys):
        raise AttribError("give at least one exemplar, and each only once: a sample has one source")
    generator = Generator(torch.stack([read_image(file) for file in exemplar_files]), seed)
    pairs = []
    for number, key in enumerate(keys):
        folder, chance = f"model-{number:03d}", torch.Generator().manual_seed(seed * 100_003 + number)
        (out_folder / folder).mkdir(parents=True, exist_ok=True)
        for i in range(samples_per_exemplar):
            pairs.append((f"{folder}/sample-{i:02d}.png", key))
            Image.fromarray(generator.sample(number, chance).numpy()).save(out_folder / pairs[-1][0])
    with open(out_folder / "truth.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([TRUTH_COLUMNS, *pairs])
    return pairs


def read_image(file: Path) -> torch.Tensor:
    """float32 [3, GENERATED_PX, GENERATED_PX] in 0..1."""
    with Image.open(file) as image:
        image = image.convert("RGB").resize((GENERATED_PX, GENERATED_PX), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
