"""A small encoder trained by contrast on the corpus alone, and what it must beat: the same network untrained, and a colour histogram.

SimCLR (Chen et al., ICML 2020, arXiv 2002.05709): two random views of an image attract each other and repel the rest of the batch.
"""

import json
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from attrib.common.errors import AttribError
from attrib.demo.views import ViewRange, draw_parameters, render_views
from attrib.models.encoder import CHECKPOINT_KEY

BACKBONE = "test_resnet"
IMAGE_PX = 48
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
DATA_CONFIG = {
    "input_size": [3, IMAGE_PX, IMAGE_PX],
    "interpolation": "bicubic",
    "mean": list(MEAN),
    "std": list(STD),
    "crop_pct": 1.0,
    "crop_mode": "center",
}
VIEWS = ViewRange(
    zoom=(0.5, 1.0),
    stretch=1.4,
    turn_turns=0.08,
    shift=0.05,
    bend=0.12,
    mirror_share=0.5,
    hue_turns=0.25,
    saturation=(0.4, 1.5),
    contrast=(0.6, 1.3),
    brightness=0.12,
    grey_share=0.15,
    blur_share=0.5,
)
PROJECTION_DIM = 64
TEMPERATURE = 0.1


def info_nce(first: torch.Tensor, second: torch.Tensor, temperature: float = TEMPERATURE) -> torch.Tensor:
    """NT-Xent loss of two views, float32 [n, d] each: every view must find its twin among the 2 n - 1 others by cosine."""
    both = F.normalize(torch.cat([first, second]), dim=1)
    similarity = both @ both.T / temperature
    similarity.fill_diagonal_(float("-inf"))
    num = len(first)
    twin = torch.arange(2 * num, device=both.device).roll(num)
    return F.cross_entropy(similarity, twin)


def train_contrast(files: list[Path], path: Path, seed: int, num_epochs: int = 30, batch_size: int = 64) -> list[float]:
    """Trains BACKBONE on the images `files` and saves it as safetensors; returns the mean loss of each epoch.

    Raises AttribError if there are fewer images than one batch.
    """
    if len(files) < batch_size:
        raise AttribError(f"{len(files)} images are fewer than one batch of {batch_size}; draw a larger corpus")
    images = torch.stack([_read(file) for file in files])
    model = _create(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        head = nn.Sequential(
            nn.Linear(model.num_features, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, PROJECTION_DIM)
        )
    model = model.to(memory_format=torch.channels_last).train()
    parameters = [*model.parameters(), *head.parameters()]
    num_batches = len(files) // batch_size
    optimiser = torch.optim.AdamW(parameters, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=3e-3, total_steps=num_epochs * num_batches, pct_start=0.2
    )
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    chance = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(num_epochs):
        total = 0.0
        for batch in torch.randperm(len(files), generator=chance)[: num_batches * batch_size].split(batch_size):
            pairs = images[batch].float().div(255).repeat(2, 1, 1, 1)
            views = render_views(pairs, draw_parameters(2 * batch_size, chance), IMAGE_PX, VIEWS)
            views = ((views - mean) / std).contiguous(memory_format=torch.channels_last)
            loss = info_nce(*head(model(views)).chunk(2))
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
            total += float(loss.detach())
        losses.append(total / num_batches)
    _save(model, path)
    return losses


def save_untrained(path: Path, seed: int) -> None:
    """The network that `train_contrast` starts from with the same seed."""
    _save(_create(seed), path)


def colour_histogram(image: np.ndarray, bins: int = 4) -> np.ndarray:
    """uint8 [h, w, 3] RGB -> float32 [bins ** 3]: square roots of a joint histogram, so a dot product is the Bhattacharyya coefficient."""
    level = image.reshape(-1, 3).astype(np.int64) * bins // 256
    counts = np.bincount((level[:, 0] * bins + level[:, 1]) * bins + level[:, 2], minlength=bins**3)
    return np.sqrt(counts / counts.sum()).astype(np.float32)


def _create(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return timm.create_model(BACKBONE, num_classes=0)


def _save(model: nn.Module, path: Path) -> None:
    state = {key: value.detach().contiguous() for key, value in model.state_dict().items()}
    save_file(state, path, metadata={CHECKPOINT_KEY: json.dumps({"name": BACKBONE, "data_config": DATA_CONFIG})})


def _read(file: Path) -> torch.Tensor:
    """uint8 [3, h, w], a little larger than a view, so that a crop is not an enlargement only."""
    with Image.open(file) as image:
        side_px = IMAGE_PX * 3 // 2
        return torch.from_numpy(
            np.array(image.convert("RGB").resize((side_px, side_px), Image.Resampling.BICUBIC))
        ).permute(2, 0, 1)
