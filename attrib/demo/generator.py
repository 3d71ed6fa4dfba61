"""A small generator fitted to single pictures of the corpus, so that the source of every picture it makes is known by construction.

Generative latent optimisation (Bojanowski et al., ICML 2018, arXiv 1707.05776): a decoder and one free latent vector per training image
are fitted together to reproduce the images; new pictures are decoded from a Gaussian over the fitted latents. The training images are
random views of each exemplar. A decoder that paints pixels needs hours on a laptop, so this one learns a canvas of features per exemplar
and, from the latent, how to bend and colour two readings of it and where to blend them. Only these few layers are shared; as in AbC
(arXiv 2306.09345), where a model is customised on one exemplar at a time, one picture decides what a sample shows.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from attrib.common.errors import AttribError
from attrib.demo.views import NUM_PARAMETERS, ViewRange, draw_parameters, render_views

GENERATED_PX = 96
TRUTH_COLUMNS = ("query_key", "source_key")
VIEWS = ViewRange(
    zoom=(0.6, 1.0),
    stretch=1.4,
    turn_turns=0.05,
    shift=0.1,
    bend=0.1,
    mirror_share=0.0,
    hue_turns=0.2,
    saturation=(0.5, 1.4),
    contrast=(0.7, 1.2),
    brightness=0.1,
    grey_share=0.0,
    blur_share=0.0,
)
LATENT_DIM = 2 * NUM_PARAMETERS + 1
FLOW_KNOTS = 5  # per axis, of the displacement and blending fields
READ_STEP = 2  # while fitting, every second row and column is read, from a random one


@dataclass(frozen=True)
class Fit:
    """decoder; latents: float32 [num_exemplars, num_views, LATENT_DIM]; losses: mean absolute pixel error (of 1) at every step."""

    decoder: "Decoder"
    latents: torch.Tensor
    losses: list[float]


class Decoder(nn.Module):
    """A learned canvas per exemplar, read twice through bent grids, recoloured and blended."""

    def __init__(self, num_exemplars: int, hidden: int = 128):
        super().__init__()
        self.canvases = nn.Parameter(0.1 * torch.randn(num_exemplars, 3, GENERATED_PX, GENERATED_PX))
        self.trunk = nn.Sequential(nn.Linear(NUM_PARAMETERS, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU())
        self.frame = nn.Linear(hidden, 6)
        self.bend = nn.Linear(hidden, 2 * FLOW_KNOTS**2)
        self.colour = nn.Linear(hidden, 12)
        self.seam = nn.Linear(LATENT_DIM, FLOW_KNOTS**2)
        # It begins by reading most of the canvas as it is.
        for layer, bias in (
            (self.frame, [0.75, 0, 0, 0, 0.75, 0]),
            (self.bend, None),
            (self.colour, [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0]),
        ):
            nn.init.normal_(layer.weight, std=0.01)
            layer.bias.data = torch.zeros_like(layer.bias) if bias is None else torch.tensor(bias, dtype=torch.float32)

    def forward(
        self, exemplar: torch.Tensor, latent: torch.Tensor, step: int = 1, offset: tuple[int, int] = (0, 0)
    ) -> torch.Tensor:
        """int64 [n] and float32 [n, LATENT_DIM] -> float32 [n, 3, h, w] in 0..1; every `step`-th pixel from `offset` = (row, column)."""
        num, size = len(latent), (GENERATED_PX, GENERATED_PX)
        rows, columns = slice(offset[0], None, step), slice(offset[1], None, step)
        hidden = self.trunk(latent[:, : 2 * NUM_PARAMETERS].reshape(2 * num, NUM_PARAMETERS))
        whole = torch.eye(2, 3).expand(1, 2, 3)
        points = F.affine_grid(whole, [1, 1, *size], align_corners=False)[0, rows, columns]
        height, width = points.shape[:2]
        frame = self.frame(hidden).view(-1, 2, 3)
        grid = points.reshape(1, -1, 2) @ frame[:, :, :2].transpose(1, 2) + frame[:, None, :, 2]
        knots = _smooth(height, width, points)
        bend = self.bend(hidden).view(2 * num, 2, -1) @ knots
        grid = (grid + bend.transpose(1, 2)).view(2 * num, height, width, 2)
        canvases = self.canvases[exemplar].repeat_interleave(2, 0)
        read = F.grid_sample(canvases, grid, padding_mode="reflection", align_corners=False).flatten(2)
        colour = self.colour(hidden).view(-1, 3, 4)
        painted = (colour[:, :, :3] @ read + colour[:, :, 3:]).view(num, 2, 3, -1)
        share = torch.sigmoid(4 * self.seam(latent)[:, None] @ knots)
        return torch.sigmoid(4 * torch.lerp(painted[:, 0], painted[:, 1], share)).view(num, 3, height, width)


def _smooth(height: int, width: int, points: torch.Tensor) -> torch.Tensor:
    """Weights [FLOW_KNOTS ** 2, height * width] that spread values at a coarse grid of knots over the points by Gaussians that sum to 1."""
    knots = torch.linspace(-1, 1, FLOW_KNOTS)
    near = [
        torch.softmax(-((axis[:, None] - knots) ** 2) * FLOW_KNOTS**2 / 4, 1)
        for axis in (points[:, 0, 1], points[0, :, 0])
    ]
    return torch.einsum("hk,wm->kmhw", *near).reshape(FLOW_KNOTS**2, height * width)


def draw_views(
    exemplars: torch.Tensor, num_views: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Views float32 [n * num_views, 3, GENERATED_PX, GENERATED_PX], each a soft collage of two, and the parameters of both and the seam."""
    repeated = exemplars.repeat_interleave(num_views, 0)
    first, second = draw_parameters(len(repeated), generator), draw_parameters(len(repeated), generator)
    seam = 2 * torch.rand(len(repeated), 1, generator=generator) - 1
    height = torch.linspace(-1, 1, GENERATED_PX).view(1, 1, GENERATED_PX, 1)
    share = torch.sigmoid(6 * (height + 2.4 * seam[:, :, None, None] - 1.0))
    views = torch.lerp(*(render_views(repeated, p, GENERATED_PX, VIEWS) for p in (first, second)), share)
    return views, torch.cat([first, second, seam], 1)


def fit(exemplars: torch.Tensor, num_steps: int, seed: int, num_views: int = 24, batch_size: int = 64) -> Fit:
    """Fits one decoder to `num_views` random views of each exemplar; exemplars: float32 [n, 3, h, w] in 0..1.

    On one thread: several add up a canvas's gradients in an order of their own, and two runs would differ.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _fit(exemplars, num_steps, seed, num_views, batch_size)
    finally:
        torch.set_num_threads(num_threads)


def _fit(exemplars: torch.Tensor, num_steps: int, seed: int, num_views: int, batch_size: int) -> Fit:
    num_exemplars = len(exemplars)
    chance = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = Decoder(num_exemplars)
    views, parameters = draw_views(exemplars, num_views, chance)
    owner = torch.arange(num_exemplars).repeat_interleave(num_views)
    latents = nn.Parameter(parameters)
    rates = [2e-2, 5e-3, 1e-2]
    layers = [p for name, p in decoder.named_parameters() if name != "canvases"]
    groups = [{"params": [decoder.canvases]}, {"params": layers}, {"params": [latents]}]
    optimiser = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=rates, total_steps=num_steps, pct_start=0.2)
    losses = []
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(num_steps):
        if len(order) < batch_size:
            order = torch.cat([order, torch.randperm(len(views), generator=chance)])
        batch, order = order[:batch_size], order[batch_size:]
        row, column = torch.randint(READ_STEP, (2,), generator=chance).tolist()
        target = views[batch, :, row::READ_STEP, column::READ_STEP]
        loss = F.l1_loss(decoder(owner[batch], latents[batch], READ_STEP, (row, column)), target)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return Fit(decoder.eval(), latents.detach().view(num_exemplars, num_views, LATENT_DIM), losses)


@torch.inference_mode()
def sample(fitted: Fit, samples_per_exemplar: int, seed: int, spread: float = 0.8) -> torch.Tensor:
    """New pictures, uint8 [num_exemplars, samples_per_exemplar, GENERATED_PX, GENERATED_PX, 3].

    A latent is the mean of its exemplar's fitted ones plus `spread` standard deviations of their Gaussian: a random mixture of the
    fitted latents about their mean, which has exactly their covariance.
    """
    num_exemplars, num_views, _ = fitted.latents.shape
    chance = torch.Generator().manual_seed(seed)
    mean = fitted.latents.mean(dim=1, keepdim=True)
    mixture = torch.randn(num_exemplars, samples_per_exemplar, num_views, generator=chance) / num_views**0.5
    latents = mean + spread * mixture @ (fitted.latents - mean)
    owner = torch.arange(num_exemplars).repeat_interleave(samples_per_exemplar)
    pictures = fitted.decoder(owner, latents.flatten(0, 1)).mul(255).round().to(torch.uint8)
    return pictures.permute(0, 2, 3, 1).unflatten(0, (num_exemplars, samples_per_exemplar))


def fit_and_sample(
    exemplar_files: list[Path],
    out_folder: Path,
    samples_per_exemplar: int,
    seed: int,
    corpus_folder: Path,
    num_steps: int = 400,
) -> list[tuple[str, str]]:
    """Writes <out_folder>/<exemplar>/<sample>.png and truth.csv (TRUTH_COLUMNS); returns its rows, (generated key, exemplar key).

    A generated key is a path below `out_folder`, an exemplar's key one below `corpus_folder`. Raises AttribError if there is no exemplar,
    an exemplar is given twice or lies outside the corpus.
    """
    keys = []
    for file in exemplar_files:
        if not file.is_relative_to(corpus_folder):
            raise AttribError(f"the exemplar {file} is not below the corpus {corpus_folder}")
        keys.append(file.relative_to(corpus_folder).as_posix())
    if not keys or len(set(keys)) < len(keys):
        raise AttribError("give at least one exemplar, and each only once: a sample has one source")
    exemplars = torch.stack([_read(file) for file in exemplar_files])
    pictures = sample(fit(exemplars, num_steps, seed), samples_per_exemplar, seed).numpy()
    pairs = []
    for number, (key, own) in enumerate(zip(keys, pictures)):
        folder = f"model-{number:03d}"
        (out_folder / folder).mkdir(parents=True, exist_ok=True)
        for i, picture in enumerate(own):
            Image.fromarray(picture).save(out_folder / folder / f"sample-{i:02d}.png")
            pairs.append((f"{folder}/sample-{i:02d}.png", key))
    with open(out_folder / "truth.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(TRUTH_COLUMNS)
        writer.writerows(pairs)
    return pairs


def _read(file: Path) -> torch.Tensor:
    with Image.open(file) as image:
        image = image.convert("RGB").resize((GENERATED_PX, GENERATED_PX), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
