"""One synthetic generator: batches are crops of photographs; training stops at target_mse and is deterministic."""

from itertools import islice

import numpy as np
import pytest
import torch
from support.images import picture

from attrib.common.errors import AttribError
from attrib.generators.synthesis.architectures import DecoderSpec
from attrib.generators.synthesis.autoencoder import CHECKED_PHOTOGRAPHS, draw_batches, render, train_autoencoder
from attrib.generators.synthesis.photographs import shrink_and_crop
from attrib.generators.synthesis.settings import AutoencoderSettings

SPEC = DecoderSpec(
    num_blocks=1,
    convs_per_block=1,
    upsampler="transposed",
    activation="relu",
    norm="batch",
    order="norm_act_conv",
    width=8,
)
SETTINGS = AutoencoderSettings(target_mse=0.01, max_steps=200, check_steps=10, batch_size=8, crop_px=16)


@pytest.fixture(scope="module")
def photographs():
    """uint8 [24, 3, 24, 24]."""
    pixels = [torch.from_numpy(np.array(picture(seed))).permute(2, 0, 1) for seed in range(24)]
    return torch.stack([shrink_and_crop(image, 24) for image in pixels])


def test_the_centre_of_an_image_is_taken():
    image = torch.arange(3 * 8 * 20, dtype=torch.int32).remainder(256).to(torch.uint8).reshape(3, 8, 20)
    assert torch.equal(shrink_and_crop(image, 8), image[:, :, 6:14])
    assert shrink_and_crop(image, 4).shape == (3, 4, 4)


def test_batches_are_crops_of_the_images(photographs):
    for batch in islice(draw_batches(photographs, 4, 16, seed=1), 6):
        assert batch.shape == (4, 3, 16, 16)
        windows = photographs.unfold(2, 16, 1).unfold(3, 16, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, 16, 16)
        windows = torch.cat([windows, windows.flip(3)])
        for crop in batch.mul(255).round().to(torch.uint8):
            assert (windows == crop).flatten(1).all(dim=1).any()
    first, again, other = (torch.stack(list(islice(draw_batches(photographs, 4, 16, seed), 6))) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_training_stops_at_its_target_and_returns_the_held_out_error(photographs):
    training, held_out = photographs[:20], photographs[20:]
    trained = train_autoencoder(SPEC, 0, training, held_out, SETTINGS)
    images = held_out.float() / 255
    with torch.no_grad():
        expected = (trained.model(images) - images).square().mean()
    assert trained.loss == pytest.approx(float(expected), rel=1e-4)
    assert (
        trained.loss <= SETTINGS.target_mse and trained.num_steps < SETTINGS.max_steps and trained.num_steps % 10 == 0
    )
    hurried = train_autoencoder(SPEC, 0, training, held_out, SETTINGS.model_copy(update={"max_steps": 7}))
    assert hurried.num_steps == 7 and hurried.loss > SETTINGS.target_mse


def test_equal_seeds_give_equal_weights(photographs):
    short = SETTINGS.model_copy(update={"max_steps": 5})
    threads = torch.get_num_threads()
    first, again, other = (
        train_autoencoder(SPEC, seed, photographs[:20], photographs[20:], short).model.state_dict()
        for seed in (3, 3, 4)
    )
    assert torch.get_num_threads() == threads
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_a_loss_that_is_not_finite_is_an_error(photographs):
    with pytest.raises(AttribError, match=f"{SPEC.name}.*learning_rate"):
        wild = SETTINGS.model_copy(update={"learning_rate": 1e30, "max_steps": 5})
        train_autoencoder(SPEC, 0, photographs[:20], photographs[20:], wild)


def test_rendered_images_are_rounded_and_clamped():
    photographs = torch.arange(256).to(torch.uint8).reshape(1, 1, 16, 16).expand(70, 3, 16, 16)
    made = render(lambda images: 1.5 * images - 0.099, photographs)
    expected = np.rint(np.clip(1.5 * photographs.numpy().astype(np.float64) - 25.245, 0, 255))
    assert made.dtype == torch.uint8 and made.shape == photographs.shape
    assert np.abs(made.numpy() - expected).max() == 0
    assert torch.equal(render(lambda images: images, photographs), photographs)


def test_only_the_first_held_out_photographs_are_used(photographs):
    many = photographs[:1].expand(CHECKED_PHOTOGRAPHS + 1, -1, -1, -1).clone()
    many[-1] = 255 - many[-1]
    short = SETTINGS.model_copy(update={"max_steps": 2})
    losses = [train_autoencoder(SPEC, 0, photographs, held_out, short).loss for held_out in (many, many[:-1])]
    assert losses[0] == losses[1]
