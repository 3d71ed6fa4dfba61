"""The generators that the evaluation trains: shapes, learning, and equal bits for equal seeds."""

import pytest
import torch
from support.pool import smooth_images

from attrib.common.errors import AttribError
from attrib.generators.evaluation.settings import NumStepsSettings, TrainedSetSettings
from attrib.generators.evaluation.trained_generators import (
    LATENT_SIZE,
    DcganDiscriminator,
    DcganGenerator,
    UNet,
    Vae,
    denoise,
    draw,
    train_generator,
)

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = ("dcgan", "vae", "diffusion")


def options(num_steps: int = 4, **changes) -> TrainedSetSettings:
    values = {
        "photographs": {"name": "pictures", "uri": "/"},
        "photograph_px": 24,
        "px": 16,
        "width": 8,
        "batch_size": 8,
        "max_images": 7,
        "num_steps": NumStepsSettings(**dict.fromkeys(KINDS, num_steps)),
    }
    return TrainedSetSettings.model_validate(values | changes)


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
def test_images_depend_on_the_seed_alone(kind):
    photographs = smooth_images(12, 24, seed=0)
    before = torch.get_rng_state()
    first, again, other = (train_generator(kind, seed, photographs, options(30)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before), "the global random state is unchanged"
    described, samples = first
    assert samples.shape == (7, 3, 16, 16) and samples.dtype == torch.uint8
    assert torch.equal(samples, again[1]) and described == again[0]
    assert not torch.equal(samples, other[1])
    assert (described["kind"], described["seed"], described["num_steps"]) == (kind, 0, 30)
    assert described["num_parameters"] > 1000
    assert not torch.equal(samples[0], samples[1]), "images of one generator differ"


@pytest.mark.parametrize("kind", KINDS)
def test_training_moves_samples_towards_the_photographs(kind):
    """Uniform reddish photographs: the colours of samples move there in a few steps, those of a GAN slowly."""
    generator = torch.Generator().manual_seed(0)
    colours = torch.tensor([220, 60, 40]) + torch.randint(-20, 20, (16, 3), generator=generator)
    photographs = colours[:, :, None, None].expand(16, 3, 24, 24).to(torch.uint8).contiguous()
    mean = photographs.float().mean(dim=(0, 2, 3))
    distances = [
        float((train_generator(kind, 0, photographs, options(steps))[1].float().mean(dim=(0, 2, 3)) - mean).norm())
        for steps in (1, 150)
    ]
    assert distances[1] < 0.8 * distances[0]


def test_denoising_with_a_perfect_network_gives_its_image():
    """If the velocity is that of one image, every path from noise ends at it."""
    image = torch.rand(1, 3, 8, 8) * 2 - 1

    def velocity(noisy, times):
        angle = times[0] * torch.pi / 2
        noise = (noisy - torch.cos(angle) * image) / torch.sin(angle)
        return torch.cos(angle) * noise - torch.sin(angle) * image

    found = denoise(velocity, torch.randn(1, 3, 8, 8), num_steps=10)
    assert torch.allclose(found, image, atol=1e-4)


def test_drawing_rounds_to_8_bits():
    def sampler(count, rng):
        return torch.tensor([-1.5, -1.0, 0.0, 1.0, 2.0])[None, :, None, None].expand(count, 5, 1, 1)

    drawn = draw(sampler, 120, seed=0)
    assert drawn.shape == (120, 5, 1, 1)
    assert drawn[0].flatten().tolist() == [0, 0, 128, 255, 255]


def test_a_loss_that_is_not_finite_is_an_error(monkeypatch):
    from attrib.generators.evaluation import trained_generators

    monkeypatch.setattr(trained_generators, "PIXEL_STD", 0.0)
    with pytest.raises(AttribError, match="vae-0 became nan; take another seed"):
        train_generator("vae", 0, smooth_images(8, 24, seed=0), options(2))
