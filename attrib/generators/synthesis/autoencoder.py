"""Train one synthetic generator, and reproduce photographs with it."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attrib.common.errors import AttribError
from attrib.generators.synthesis.architectures import DecoderSpec, build_autoencoder
from attrib.generators.synthesis.settings import AutoencoderSettings

CHECKED_PHOTOGRAPHS = 16  # held-out photographs that the stopping criterion uses
RENDER_BATCH = 32


class Trained(NamedTuple):
    """model: in eval mode, on the CPU; loss: MSE on held-out photographs, pixels in 0..1."""

    model: nn.Module
    loss: float
    num_steps: int


def train_autoencoder(
    spec: DecoderSpec,
    seed: int,
    training: Tensor,
    held_out: Tensor,
    settings: AutoencoderSettings,
    device: str = "cpu",
) -> Trained:
    """Train one model of the pool until target_mse is reached on held-out photographs, or for max_steps.

    training, held_out: uint8 [m, 3, px, px]; only the first CHECKED_PHOTOGRAPHS of held_out are used. On a CPU the same
    arguments give the same bits. Raises AttribError if the loss is not finite.
    """
    with one_thread():
        model = build_autoencoder(spec, seed).to(device, memory_format=torch.channels_last)
        checked = as_floats(held_out[:CHECKED_PHOTOGRAPHS].to(device))
        batches = draw_batches(training.to(device), settings.batch_size, settings.crop_px, seed)
        optimiser = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, settings.max_steps)
        for step in range(1, settings.max_steps + 1):
            batch = next(batches)
            loss = F.mse_loss(model(batch), batch)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
            if step % settings.check_steps == 0 and _reconstruction_mse(model, checked) <= settings.target_mse:
                break
        found = _reconstruction_mse(model, checked)
    if not math.isfinite(found):
        raise AttribError(f"{spec.name}: the loss became {found}; lower learning_rate ({settings.learning_rate:g})")
    return Trained(model.eval().to("cpu"), found, step)


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one torch thread: several threads add gradients in a varying order and are not faster on small layers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def draw_batches(images: Tensor, batch_size: int, crop_px: int, seed: int) -> Iterator[Tensor]:
    """Endless random crops, float32 [batch_size, 3, crop_px, crop_px] in 0..1; position and flip drawn per batch."""
    generator = torch.Generator().manual_seed(seed)
    places = images.shape[-1] - crop_px + 1
    while True:
        chosen = torch.randint(len(images), (batch_size,), generator=generator).to(images.device)
        top, left, mirrored = (int(torch.randint(choices, (), generator=generator)) for choices in (places, places, 2))
        crops = as_floats(images[chosen, :, top : top + crop_px, left : left + crop_px])
        yield crops.flip(3) if mirrored else crops


def as_floats(images: Tensor) -> Tensor:
    """uint8 [n, 3, h, w] -> float32 in 0..1, channels last."""
    return images.to(torch.float32, memory_format=torch.channels_last).div_(255)


@torch.no_grad()
def _reconstruction_mse(model: nn.Module, images: Tensor) -> float:
    """MSE of the model's reconstructions in eval mode; the model is then in training mode. float32 [n, 3, h, w]."""
    found = float(F.mse_loss(model.eval()(images), images))
    model.train()
    return found


@torch.no_grad()
def render(reconstruct: Callable[[Tensor], Tensor], photographs: Tensor) -> Tensor:
    """Photographs reproduced by a model in eval mode on the CPU: uint8 [n, 3, px, px] -> the same shape."""
    with one_thread():
        made = [reconstruct(as_floats(batch)) for batch in photographs.split(RENDER_BATCH)]
    return torch.cat(made).clamp_(0, 1).mul_(255).round_().to(torch.uint8).contiguous()
