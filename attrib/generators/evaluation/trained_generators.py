"""Train generators of three kinds (DCGAN, VAE, diffusion) on photographs, to test methods on unseen generators.

The methods were trained on synthetic models only. These generators are small and their images are poor, but each has
the trace of a kind of generator that is really used. All are trained on the same photographs, so that the content
reveals little about the generator.
"""

import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attrib.common.errors import AttribError
from attrib.generators.evaluation.settings import GeneratorKind, TrainedSetSettings
from attrib.generators.synthesis.autoencoder import draw_batches, one_thread

Sampler = Callable[[int, torch.Generator], Tensor]  # number of images -> float32 [n, 3, px, px], -1..1
Step = Callable[[Tensor], float]  # a batch float32 [n, 3, px, px], -1..1 -> the loss before the optimiser step
Training = tuple[nn.Module, Step, Sampler]

LATENT_SIZE = 64  # of the DCGAN and the VAE
NUM_HALVINGS = 3  # from an image to the start of a generator
SAMPLED_AT_ONCE = 50
PIXEL_STD = 0.1  # of the VAE's pixel likelihood; with lower values, images are sharper and latents fit the prior less
NUM_SAMPLING_STEPS = 50  # of the diffusion model
FAST_FORMAT = torch.channels_last  # a quarter less time on a CPU
EMA_DECAY = 0.995  # of the diffusion model's weights, over a few hundred steps


def train_generator(
    kind: GeneratorKind, seed: int, photographs: Tensor, settings: TrainedSetSettings
) -> tuple[dict, Tensor]:
    """Train one generator on photographs, uint8 [m, 3, s, s], s >= settings.px.

    Returns {kind, seed, num_steps, num_parameters, loss: mean of the last tenth of the steps} and max_images images,
    uint8 [n, 3, px, px]. On a CPU the same arguments give the same bits. Raises AttribError if the loss is not finite.
    """
    num_steps = getattr(settings.num_steps, kind)
    start = {"dcgan": _dcgan, "vae": _vae, "diffusion": _diffusion}[kind]
    with one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        batches = draw_batches(photographs, settings.batch_size, settings.px, seed)
        network, step, sampler = start(settings, num_steps)
        losses = [step(2 * next(batches) - 1) for _ in range(num_steps)]
        last = losses[-max(1, num_steps // 10) :]
        loss = sum(last) / len(last)
        if not math.isfinite(loss):
            raise AttribError(f"the loss of {kind}-{seed} became {loss}; take another seed or fewer steps")
        samples = draw(sampler, settings.max_images, seed)
    num_parameters = sum(weights.numel() for weights in network.parameters())
    described = {"kind": kind, "seed": seed, "num_steps": num_steps, "num_parameters": num_parameters, "loss": loss}
    return described, samples


def _dcgan(settings: TrainedSetSettings, num_steps: int) -> Training:
    """A DCGAN with the non-saturating generator loss (arXiv 1406.2661)."""
    generator = DcganGenerator(settings.px, settings.width).to(memory_format=FAST_FORMAT)
    discriminator = DcganDiscriminator(settings.px, settings.width).to(memory_format=FAST_FORMAT)
    optimisers = [torch.optim.Adam(net.parameters(), 2e-4, betas=(0.5, 0.999)) for net in (generator, discriminator)]

    def step(real: Tensor) -> float:
        drawn = generator(torch.randn(len(real), LATENT_SIZE))
        loss = F.softplus(-discriminator(real)).mean() + F.softplus(discriminator(drawn.detach())).mean()
        _descend(optimisers[1], loss)
        return _descend(optimisers[0], F.softplus(-discriminator(drawn)).mean())

    return generator, step, lambda n, rng: generator.eval()(torch.randn(n, LATENT_SIZE, generator=rng))


def _vae(settings: TrainedSetSettings, num_steps: int) -> Training:
    """A variational autoencoder; a sample is the decoder's mean for a latent drawn from the prior."""
    vae = Vae(settings.px, settings.width).to(memory_format=FAST_FORMAT)
    optimiser = torch.optim.Adam(vae.parameters(), 1e-3)

    def step(images: Tensor) -> float:
        mean, log_variance = vae.encode(images)
        latents = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        error = (vae.decoder(latents) - images).square().sum() / (2 * PIXEL_STD**2)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum()
        return _descend(optimiser, (error + divergence) / len(images))

    return vae, step, lambda n, rng: vae.decoder(torch.randn(n, LATENT_SIZE, generator=rng))


def _diffusion(settings: TrainedSetSettings, num_steps: int) -> Training:
    """A diffusion model: a U-Net with an exponential moving average of its weights.

    At time t in 0..1 the noisy image is cos(pi t / 2) image + sin(pi t / 2) noise. The network predicts the velocity,
    cos(pi t / 2) noise - sin(pi t / 2) image (arXiv 2202.00512). Sampling is deterministic DDIM (arXiv 2010.02502).
    """
    network = UNet(settings.width).to(memory_format=FAST_FORMAT)
    averaged = torch.optim.swa_utils.AveragedModel(network, multi_avg_fn=_move_average)
    optimiser = torch.optim.Adam(network.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, num_steps, eta_min=1e-5)

    def step(images: Tensor) -> float:
        times = torch.rand(len(images))
        keep, add = _mixture(times[:, None, None, None])
        noise = torch.randn_like(images)
        predicted = network(keep * images + add * noise, times)
        loss = _descend(optimiser, F.mse_loss(predicted, keep * noise - add * images))
        schedule.step()
        averaged.update_parameters(network)
        return loss

    shape = (3, settings.px, settings.px)
    return averaged.module, step, lambda n, rng: denoise(averaged, torch.randn(n, *shape, generator=rng))


def denoise(network: nn.Module, noisy: Tensor, num_steps: int = NUM_SAMPLING_STEPS) -> Tensor:
    """Images from noise, float32 [n, 3, px, px] each, by DDIM from time 1 to 0, clamped at every step."""
    for now, after in itertools.pairwise(torch.linspace(1.0, 0.0, num_steps + 1)):
        keep, add = _mixture(now)
        velocity = network(noisy, now.expand(len(noisy)))
        image = (keep * noisy - add * velocity).clamp(-1, 1)
        noise = (noisy - keep * image) / add
        keep, add = _mixture(after)
        noisy = keep * image + add * noise
    return image


def _move_average(averaged: list[Tensor], current: list[Tensor], num_averaged: Tensor) -> None:
    """Exponential moving average with a lower decay at first, to forget the initial weights."""
    decay = min(EMA_DECAY, (1 + int(num_averaged)) / (10 + int(num_averaged)))
    torch._foreach_lerp_(averaged, current, 1 - decay)


def _mixture(times: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of image and noise at these times; their squares add to one."""
    return torch.cos(times * math.pi / 2), torch.sin(times * math.pi / 2)


@torch.no_grad()
def draw(sampler: Sampler, num_images: int, seed: int) -> Tensor:
    """Images of a sampler, uint8 [num_images, 3, px, px]."""
    rng = torch.Generator().manual_seed(seed)
    counts = [min(SAMPLED_AT_ONCE, num_images - start) for start in range(0, num_images, SAMPLED_AT_ONCE)]
    pixels = torch.cat([sampler(count, rng) for count in counts])
    return pixels.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).contiguous()


def _descend(optimiser: torch.optim.Optimizer, loss: Tensor) -> float:
    """One optimiser step. Returns the loss before it."""
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    optimiser.step()
    return float(loss.detach())


class DcganGenerator(nn.Sequential):
    """float32 [n, LATENT_SIZE] -> [n, 3, px, px]: transposed 4x4 convolutions with batch norm (arXiv 1511.06434)."""

    def __init__(self, px: int, width: int):
        first = nn.ConvTranspose2d(LATENT_SIZE, 4 * width, px // 2**NUM_HALVINGS, bias=False)
        layers = [nn.Unflatten(1, (LATENT_SIZE, 1, 1)), first, nn.BatchNorm2d(4 * width), nn.ReLU()]
        for channels in (2 * width, width):
            layers.append(nn.ConvTranspose2d(2 * channels, channels, 4, stride=2, padding=1, bias=False))
            layers += [nn.BatchNorm2d(channels), nn.ReLU()]
        super().__init__(*layers, nn.ConvTranspose2d(width, 3, 4, stride=2, padding=1), nn.Tanh())
        self.apply(_dcgan_start)


class DcganDiscriminator(nn.Sequential):
    """float32 [n, 3, px, px] -> [n], log-odds that an image is a photograph."""

    def __init__(self, px: int, width: int):
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for channels in (2 * width, 4 * width):
            layers.append(nn.Conv2d(channels // 2, channels, 4, stride=2, padding=1, bias=False))
            layers += [nn.BatchNorm2d(channels), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Conv2d(4 * width, 1, px // 2**NUM_HALVINGS), nn.Flatten(0))
        self.apply(_dcgan_start)


def _dcgan_start(module: nn.Module) -> None:
    """Initial weights of the paper; with the usual larger ones, training at this size collapses more often."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)


class Vae(nn.Module):
    """A variational autoencoder (arXiv 1312.6114). Its decoder upsamples by nearest neighbour and convolutions."""

    def __init__(self, px: int, width: int):
        super().__init__()
        start = px // 2**NUM_HALVINGS
        layers: list[nn.Module] = []
        for before, after in ((3, width), (width, 2 * width), (2 * width, 4 * width)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.SiLU()]
        self.encoder = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * width * start**2, 2 * LATENT_SIZE))
        layers = [nn.Linear(LATENT_SIZE, 4 * width * start**2), nn.Unflatten(1, (4 * width, start, start)), nn.SiLU()]
        for before, after in ((4 * width, 2 * width), (2 * width, width), (width, width)):
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(before, after, 3, padding=1), nn.SiLU()]
        self.decoder = nn.Sequential(*layers, nn.Conv2d(width, 3, 3, padding=1), nn.Tanh())

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of each image's latents, float32 [n, LATENT_SIZE] each."""
        mean, log_variance = self.encoder(images).chunk(2, dim=1)
        return mean, log_variance.clamp(-12, 12)


class UNet(nn.Module):
    """Predicts the velocity of noisy images float32 [n, 3, px, px] at times float32 [n] in 0..1."""

    def __init__(self, width: int):
        super().__init__()
        widths = (width // 2, width, 2 * width)
        self.time_size = 4 * width
        self.time = nn.Sequential(nn.Linear(self.time_size, self.time_size), nn.SiLU())
        self.enter = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList(UNetBlock(n, n, self.time_size) for n in widths[:2])
        self.halved = nn.ModuleList(nn.Conv2d(n, m, 3, stride=2, padding=1) for n, m in zip(widths, widths[1:]))
        self.middle = nn.ModuleList(UNetBlock(widths[2], widths[2], self.time_size) for _ in range(2))
        self.doubled = nn.ModuleList(nn.Conv2d(m, n, 3, padding=1) for n, m in zip(widths, widths[1:]))
        self.up = nn.ModuleList(UNetBlock(2 * n, n, self.time_size) for n in widths[:2])
        self.leave = nn.Sequential(nn.GroupNorm(4, widths[0]), nn.SiLU(), nn.Conv2d(widths[0], 3, 3, padding=1))
        nn.init.zeros_(self.leave[-1].weight)

    def forward(self, images: Tensor, times: Tensor) -> Tensor:
        time = self.time(_waves(times, self.time_size))
        maps, kept = self.enter(images), []
        for block, halve in zip(self.down, self.halved):
            maps = block(maps, time)
            kept.append(maps)
            maps = halve(maps)
        for block in self.middle:
            maps = block(maps, time)
        for level in reversed(range(len(kept))):
            maps = self.doubled[level](F.interpolate(maps, scale_factor=2))
            maps = self.up[level](torch.cat([maps, kept[level]], dim=1), time)
        return self.leave(maps)


class UNetBlock(nn.Module):
    """Residual block of two convolutions; the features of the time are added between them."""

    def __init__(self, num_in: int, num_out: int, time_size: int):
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(4, num_in), nn.SiLU(), nn.Conv2d(num_in, num_out, 3, padding=1))
        self.shift = nn.Linear(time_size, num_out)
        self.second = nn.Sequential(nn.GroupNorm(4, num_out), nn.SiLU(), nn.Conv2d(num_out, num_out, 3, padding=1))
        self.skip = nn.Identity() if num_in == num_out else nn.Conv2d(num_in, num_out, 1)

    def forward(self, maps: Tensor, time: Tensor) -> Tensor:
        return self.skip(maps) + self.second(self.first(maps) + self.shift(time)[:, :, None, None])


def _waves(times: Tensor, size: int) -> Tensor:
    """Sinusoidal embedding of times, float32 [n] in 0..1 -> [n, size], with angular frequencies from 1 to 1,000."""
    rates = torch.exp(torch.linspace(0.0, math.log(1000.0), size // 2, device=times.device))
    angles = times[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)
