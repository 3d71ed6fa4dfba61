"""The generators that the evaluation trains: what they take and give, that they learn, and that the same call gives the same bits."""

import pytest
import torch
from support.pool import smooth_images

from attrib.common.errors import AttribError
from attrib.generators.evaluation.settings import NumStepsSettings, TrainedTierSettings
from attrib.generators.evaluation.trained_generators import (
    LATENT_SIZE,
    DcganDiscriminator,
    DcganGenerator,
    UNet,
    Vae,
    denoise,
    draw,
    generator_name,
    train_generator,
)

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = ("dcgan", "vae", "diffusion")


def tier(num_steps: int = 4, **changes) -> TrainedTierSettings:
    values = {
        "photographs": {"name": "pictures", "uri": "/"},
        "photograph_px": 24,
        "px": 16,
        "width": 8,
        "batch_size": 8,
        "max_images": 7,
        "num_steps": NumStepsSettings(**dict.fromkeys(KINDS, num_steps)),
    }
    return TrainedTierSettings.model_validate(values | changes)


@pytest.mark.parametrize("px", [16, 32])
def test_networks_keep_their_shapes(px):
    latents, images = torch.randn(2, LATENT_SIZE), torch.rand(2, 3, px, px)
    drawn = DcganGenerator(px, 8)(latents)
    assert drawn.shape == images.shape and drawn.abs().max() <= 1
    assert DcganDiscriminator(px, 8)(images).shape == (2,)
    vae = Vae(px, 8)
    mean, log_variance = vae.encode(images)
    assert mean.shape == log_variance.shape == (2, LATENT_SIZE)
    assert vae.decoder(latents).shape == images.shape
    assert UNet(8)(images, torch.tensor([0.0, 1.0])).shape == images.shape


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_images_and_another_gives_others(kind):
    photographs = smooth_images(12, 24, seed=0)
    before = torch.get_rng_state()
    first, again, other = (train_generator(kind, seed, photographs, tier(30)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before), "random numbers elsewhere are not touched"
    assert first.samples.shape == (7, 3, 16, 16) and first.samples.dtype == torch.uint8
    assert torch.equal(first.samples, again.samples) and first.loss == again.loss
    assert not torch.equal(first.samples, other.samples)
    assert first.name == generator_name(kind, 0) and first.num_steps == 30 and first.num_parameters > 1000
    assert not torch.equal(first.samples[0], first.samples[1]), "images differ within one generator"


@pytest.mark.parametrize("kind", KINDS)
def test_training_brings_samples_nearer_to_the_photographs(kind):
    """Photographs of one colour each, all reddish: in a few steps the drawn colours move there, those of a GAN slowly."""
    generator = torch.Generator().manual_seed(0)
    colours = torch.tensor([220, 60, 40]) + torch.randint(-20, 20, (16, 3), generator=generator)
    photographs = colours[:, :, None, None].expand(16, 3, 24, 24).to(torch.uint8).contiguous()
    mean = photographs.float().mean(dim=(0, 2, 3))
    distances = [
        float((train_generator(kind, 0, photographs, tier(steps)).samples.float().mean(dim=(0, 2, 3)) - mean).norm())
        for steps in (1, 150)
    ]
    assert distances[1] < 0.8 * distances[0]


def test_denoising_finds_the_image_that_a_perfect_network_knows():
    """Where the velocity is that of one image, every path from noise ends there."""
    image = torch.rand(1, 3, 8, 8) * 2 - 1

    def velocity(noisy, times):
        angle = times[0] * torch.pi / 2
        noise = (noisy - torch.cos(angle) * image) / torch.sin(angle)
        return torch.cos(angle) * noise - torch.sin(angle) * image

    found = denoise(velocity, torch.randn(1, 3, 8, 8), num_steps=10)
    assert torch.allclose(found, image, atol=1e-4)


def test_drawing_rounds_to_the_nearest_of_256():
    def sampler(count, rng):
        return torch.tensor([-1.5, -1.0, 0.0, 1.0, 2.0])[None, :, None, None].expand(count, 5, 1, 1)

    drawn = draw(sampler, 120, seed=0)
    assert drawn.shape == (120, 5, 1, 1)
    assert drawn[0].flatten().tolist() == [0, 0, 128, 255, 255]


def test_a_loss_that_is_not_finite_ends_with_a_remedy(monkeypatch):
    from attrib.generators.evaluation import trained_generators

    monkeypatch.setattr(trained_generators, "PIXEL_STD", 0.0)
    with pytest.raises(AttribError, match="vae-0 became nan; take another seed"):
        train_generator("vae", 0, smooth_images(8, 24, seed=0), tier(2))
