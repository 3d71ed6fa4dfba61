"""A small extractor, and images with periodic traces, for the tests of its training."""

import torch

from attrib.generators.extractor.batches import ExtractorBatches, PoolImages, Validation
from attrib.generators.extractor.network import FingerprintNetwork
from attrib.generators.extractor.settings import FingerprintSettings
from attrib.generators.extractor.training import ExtractorRun
from support.pool import smooth_images, traced


def settings(**changes) -> FingerprintSettings:
    values = {
        "pool": "pool",
        "output": "output",
        "network": {"patch_px": 16, "window_px": 4, "num_learned": 24, "width": 8},
        "contrast": {"models_per_batch": 4, "images_per_model": 3},
        "optimiser": {"num_steps": 6, "learning_rate": 3e-3, "validation_steps": 3},
    }
    return FingerprintSettings(**values | changes)


def network_of(given: FingerprintSettings) -> FingerprintNetwork:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FingerprintNetwork(given.network)


def lattices(photographs: torch.Tensor, seed: int) -> torch.Tensor:
    """The photographs with a pattern of period 8 px and a colour mix by the seed, which the CNN learns in seconds."""
    generator = torch.Generator().manual_seed(seed)
    pattern = 5 * torch.randn(3, 8, 8, generator=generator)
    mix = torch.eye(3) + 0.05 * torch.randn(3, 3, generator=generator)
    mixed = torch.einsum("ij,njhw->nihw", mix, photographs.float() - 128) + 128
    repeats = photographs.shape[-1] // 8
    return (mixed + pattern.tile(1, repeats, repeats)).round().clamp(0, 255).to(torch.uint8)


def pool_images(px: int = 24) -> PoolImages:
    photographs = smooth_images(20, px, 0)
    held_out = [traced(photographs, seed) for seed in (50, 51, 52)]
    return PoolImages([traced(photographs, seed) for seed in range(6)], held_out, photographs)


def trained(given: FingerprintSettings, rank: int = 0, num_workers: int = 1) -> ExtractorRun:
    images = pool_images()
    training = ExtractorRun(network_of(given), len(images.training), given, torch.device("cpu"))
    training.train(ExtractorBatches(images, given, rank, num_workers), Validation(images.held_out, 16), lambda _: None)
    return training
