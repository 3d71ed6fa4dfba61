"""Feature blocks: compared with naive loops, invariances of style and layout, levels of the network."""

import math
from functools import lru_cache

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from support.images import picture
from timm import create_model

from attrib.common.errors import AttribError
from attrib.models import features
from attrib.models.features import FeatureExtractor, channel_covariance, layout, moments
from attrib.models.settings import FeatureSettings

NETWORKS = ("test_resnet", "test_vit", "test_efficientnet")
IMAGE_PX = 160  # what test_vit insists on
ALL_BLOCKS = FeatureSettings(moment_levels=(2, 0), covariance_levels=(1,), layout_levels=(3, 1), layout_grid=3)

pytestmark = pytest.mark.usefixtures("one_thread")


@lru_cache
def network(name: str) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return create_model(name, num_classes=0).eval()


@lru_cache
def images() -> torch.Tensor:
    pixels = np.stack([np.array(picture(seed, IMAGE_PX, IMAGE_PX)) for seed in range(2)])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 128 - 1


@lru_cache
def levels_by_hooks(name: str) -> list[np.ndarray]:
    """Return float64 [n, c, h, w] of each level, captured at the module that timm's feature_info names."""
    model, caught = network(name), []
    infos = getattr(model.feature_info, "info", model.feature_info)
    hooks = [
        model.get_submodule(info["module"]).register_forward_hook(lambda *call: caught.append(call[2].clone()))
        for info in infos
    ]
    with torch.inference_mode():
        model(images())
    for hook in hooks:
        hook.remove()
    if caught[0].dim() == 3:  # tokens of a transformer, class token first
        side = math.isqrt(caught[0].shape[1])
        caught = [tokens[:, -side * side :].transpose(1, 2).unflatten(2, (side, side)) for tokens in caught]
    return [level.double().numpy() for level in caught]


def slow_moments(level: np.ndarray) -> np.ndarray:
    rows = []
    for image in level:
        means = [sum(channel.ravel()) / channel.size for channel in image]
        squares = [sum((channel.ravel() - mean) ** 2) / channel.size for channel, mean in zip(image, means)]
        rows.append(means + [math.sqrt(square) for square in squares])
    return np.array(rows)


def slow_covariance(level: np.ndarray) -> np.ndarray:
    rows = []
    for image in level:
        row = []
        for i in range(len(image)):
            for j in range(i, len(image)):
                covariance = np.mean((image[i] - image[i].mean()) * (image[j] - image[j].mean()))
                row.append(math.copysign(math.sqrt(abs(covariance)), covariance))
        rows.append(row)
    return np.array(rows)


def slow_layout(level: np.ndarray, grid: int) -> np.ndarray:
    """Cell r of a side of length h covers floor(r h / grid) to ceil((r + 1) h / grid)."""
    height, width = level.shape[2:]
    rows = []
    for image in level:
        row = []
        for channel in image:
            shown = (channel - channel.mean()) / (channel.std() + 1e-5)
            for r in range(grid):
                for c in range(grid):
                    top, bottom = r * height // grid, -(-(r + 1) * height // grid)
                    left, right = c * width // grid, -(-(c + 1) * width // grid)
                    row.append(shown[top:bottom, left:right].mean())
        rows.append(row)
    return np.array(rows)


def random_level(*shape: int, seed: int = 0) -> torch.Tensor:
    """Correlated channels with different means and deviations."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    channels = torch.arange(1, shape[1] + 1).view(-1, 1, 1)
    return (drawn + 0.5 * drawn.roll(1, dims=1)) * channels + channels.cos()


@pytest.mark.parametrize("shape", [(2, 4, 9, 11), (1, 3, 2, 2), (2, 5, 7, 7), (1, 1, 1, 1)])
def test_blocks_equal_naive_loops(shape):
    level = random_level(*shape)
    exact = level.double().numpy()
    np.testing.assert_allclose(moments(level), slow_moments(exact), atol=1e-5)
    np.testing.assert_allclose(channel_covariance(level) ** 2, slow_covariance(exact) ** 2, atol=2e-5)
    np.testing.assert_array_equal(np.sign(channel_covariance(level)), np.sign(slow_covariance(exact)))
    for grid in (1, 3, 7):  # 7: also finer than the level
        np.testing.assert_allclose(layout(level, grid), slow_layout(exact, grid), atol=1e-5)


def test_covariance_is_the_upper_triangle_by_rows():
    level = random_level(1, 3, 8, 8)
    root = channel_covariance(level)[0]
    full = np.cov(level[0].flatten(1).numpy(), bias=True)
    expected = [full[0, 0], full[0, 1], full[0, 2], full[1, 1], full[1, 2], full[2, 2]]
    np.testing.assert_allclose(root.sign() * root**2, expected, rtol=1e-4)
    opposite = channel_covariance(torch.stack([level[0, 0], -level[0, 0]])[None])[0]
    assert torch.allclose(opposite, opposite[0] * torch.tensor([1.0, -1.0, 1.0]))  # the sign of a covariance is kept


def test_style_blocks_do_not_depend_on_positions():
    level = random_level(2, 4, 6, 8)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(1))
    moved = level.flatten(2)[:, :, order].unflatten(2, (6, 8))
    torch.testing.assert_close(moments(moved), moments(level))
    torch.testing.assert_close(channel_covariance(moved), channel_covariance(level), atol=1e-3, rtol=1e-4)
    assert not torch.allclose(layout(moved, 3), layout(level, 3), atol=0.05)


def test_layout_does_not_depend_on_channel_scale_and_offset():
    level = random_level(2, 4, 6, 8)
    scale, offset = (torch.tensor(values).view(4, 1, 1) for values in ([0.2, 1.0, 3.0, 40.0], [5.0, -3.0, 0.0, 90.0]))
    torch.testing.assert_close(layout(level * scale + offset, 3), layout(level, 3), atol=1e-3, rtol=0)
    torch.testing.assert_close(layout(-level, 3), -layout(level, 3))  # a channel upside down is another layout
    assert not torch.allclose(moments(level * scale + offset), moments(level), atol=0.5)


@pytest.mark.parametrize("value", [0.0, 3.7, -1000.0])
def test_constant_channel_gives_zero_and_finite_gradients(value):
    level = random_level(1, 3, 6, 6)
    level[:, 1] = value
    level.requires_grad_()
    found = [moments(level), channel_covariance(level), layout(level, 2)]
    mean, deviation = found[0][0].detach().unflatten(0, (2, 3))
    assert mean[1] == pytest.approx(value) and deviation[1] < 1e-6
    assert found[1][0, [1, 3, 4]].abs().max() <= 2e-3  # every pair with the dead channel
    assert found[2][0, 4:8].abs().max() <= 1e-3
    sum(block.sum() for block in found).backward()
    assert level.grad.isfinite().all()


@pytest.mark.parametrize("name", NETWORKS)
def test_extractor_returns_the_blocks_of_its_levels(name):
    extractor, exact = FeatureExtractor(network(name), ALL_BLOCKS, IMAGE_PX), levels_by_hooks(name)
    with torch.inference_mode():
        blocks = extractor.blocks(images())
        joined = extractor(images())
        pooled = network(name)(images())
    assert tuple(blocks) == ALL_BLOCKS.block_names == ("pooled", "moments", "covariance", "layout_3", "layout_1")
    assert {block: tuple(value.shape) for block, value in blocks.items()} == {
        block: (2, size) for block, size in extractor.sizes.items()
    }
    assert torch.equal(joined, torch.cat(list(blocks.values()), dim=1)) and joined.shape == (2, extractor.dimension)
    torch.testing.assert_close(blocks["pooled"], pooled)
    np.testing.assert_allclose(
        blocks["moments"], np.hstack([slow_moments(exact[2]), slow_moments(exact[0])]), rtol=1e-4, atol=1e-5
    )
    covariance = blocks["covariance"].double().numpy()
    np.testing.assert_allclose(covariance * abs(covariance), np_covariance(exact[1]), rtol=1e-3, atol=1e-5)
    for level in (3, 1):
        np.testing.assert_allclose(blocks[f"layout_{level}"], slow_layout(exact[level], 3), rtol=1e-3, atol=1e-3)


def np_covariance(level: np.ndarray) -> np.ndarray:
    """Signed squares of slow_covariance, without its slow loops."""
    upper = np.triu_indices(level.shape[1])
    return np.stack([np.cov(image.reshape(len(image), -1), bias=True)[upper] for image in level])


def test_default_is_the_pooled_output():
    extractor = FeatureExtractor(network("test_resnet"), FeatureSettings(), IMAGE_PX)
    with torch.inference_mode():
        assert torch.equal(extractor(images()), network("test_resnet")(images()))
    assert extractor.sizes == {"pooled": 96} and FeatureSettings().block_names == ("pooled",)


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"pooled": False, "moment_levels": [1]}, ("moments",)),
        ({"pooled": False, "layout_levels": [2, 0]}, ("layout_2", "layout_0")),
        ({"covariance_levels": [0, 1]}, ("pooled", "covariance")),
        ({"pooled": False, "covariance_levels": [0], "layout_levels": [1]}, ("covariance", "layout_1")),
    ],
)
def test_block_names_follow_the_settings(values, names):
    settings = FeatureSettings(**values)
    assert tuple(FeatureExtractor(network("test_resnet"), settings, 64).sizes) == settings.block_names == names


def test_features_without_blocks_are_an_error():
    with pytest.raises(ValidationError, match="features are empty"):
        FeatureSettings(pooled=False)


def test_the_error_names_a_missing_level():
    with pytest.raises(AttribError, match="features use level 5; use levels of the network, 0 to 4"):
        FeatureExtractor(network("test_resnet"), FeatureSettings(moment_levels=(1, 5)), 64)
    plain = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    assert FeatureExtractor(plain, FeatureSettings(), 64).sizes == {"pooled": 4}
    with pytest.raises(AttribError, match="timm cannot return intermediate feature maps of this network"):
        FeatureExtractor(plain, FeatureSettings(moment_levels=(0,)), 64)


def test_the_error_names_a_too_large_block_and_a_remedy(monkeypatch):
    assert features.MAX_BLOCK == 16_384
    expected = (
        "^feature block layout_0 has 16,928 values per image, more than 16,384; use shallower levels, which have fewer "
        "channels, or a smaller layout_grid$"
    )
    with pytest.raises(AttribError, match=expected):  # 32 channels on a grid of 23
        FeatureExtractor(network("test_resnet"), FeatureSettings(layout_levels=(0,), layout_grid=23), 64)
    fits = FeatureExtractor(network("test_resnet"), FeatureSettings(layout_levels=(0, 1), layout_grid=22), 64)
    assert fits.sizes["layout_0"] == 32 * 22**2 and fits.dimension > 16_384  # each block is whitened by itself
    covariance = FeatureSettings(moment_levels=(0,), covariance_levels=(0,))
    monkeypatch.setattr(features, "MAX_BLOCK", 528)
    assert FeatureExtractor(network("test_resnet"), covariance, 64).sizes["covariance"] == 528
    monkeypatch.setattr(features, "MAX_BLOCK", 527)
    with pytest.raises(AttribError, match="feature block covariance has 528 values per image, more than 527;"):
        FeatureExtractor(network("test_resnet"), covariance, 64)


def test_extractor_keeps_training_mode_and_batch_statistics():
    model = create_model("test_resnet", num_classes=0).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    FeatureExtractor(model, ALL_BLOCKS, 64)
    assert model.training and all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_statistics_are_float32_under_autocast():
    level = random_level(1, 4, 20, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = [moments(level), channel_covariance(level), layout(level, 2)]
        blocks = FeatureExtractor(network("test_resnet"), ALL_BLOCKS, 64).blocks(images()[:, :, :64, :64])
    for block, expected in zip(found, [moments(level), channel_covariance(level), layout(level, 2)]):
        assert torch.equal(block, expected)
    assert {block.dtype for block in blocks.values()} == {torch.float32}
