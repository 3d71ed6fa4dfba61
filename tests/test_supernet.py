"""The supernet: a path is exactly the layers that it names, and a virtual model has statistics of its own."""

from itertools import islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from attrib.errors import AttribError
from attrib.generators.supernet import (
    CALIBRATION_BATCHES,
    DecoderPath,
    LevelPath,
    SubBlock,
    Supernet,
    draw_paths,
    train_supernet,
    virtual_model,
)
from attrib.generators.synthesis import draw_batches
from attrib.generators.synthesis_settings import GridSettings, SupernetSettings


def level(upsampler, *blocks):
    return LevelPath(upsampler=upsampler, sub_blocks=[SubBlock(parts=p, activation=a, norm=n) for p, a, n in blocks])


DEEP = DecoderPath(
    levels=[
        level("nearest", ("nac", "tanh", "batch")),
        level("transposed", ("can", "relu", "none"), ("anc", "silu", "group")),
    ]
)
SHALLOW = DecoderPath(levels=[level("nearest", ("cna", "relu", "none"))])
SETTINGS = SupernetSettings(num_levels=2, num_steps=60, batch_size=8, crop_px=16, learning_rate=4e-3)


@pytest.fixture(scope="module")
def photographs():
    """uint8 [16, 3, 24, 24]: soft ramps, which are quick to learn."""
    coarse = torch.rand(16, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, size=24, mode="bilinear").mul(255).to(torch.uint8)


@pytest.fixture
def supernet():
    torch.manual_seed(0)
    return Supernet(width=8, num_levels=2)


def test_paths_are_drawn_by_their_seed_and_from_the_grid():
    paths = draw_paths(60, GridSettings(), 2, seed=0)
    assert len(set(paths)) == len({path.name for path in paths}) == 60
    assert paths == draw_paths(60, GridSettings(), 2, seed=0) != draw_paths(60, GridSettings(), 2, seed=1)
    assert {len(path.levels) for path in paths} == {1, 2}
    narrow = GridSettings(upsamplers=("bicubic",), norms=("group",), activations=("silu",))
    for path in draw_paths(20, narrow, 2, seed=0):
        for step in path.levels:
            assert step.upsampler == "bicubic"
            assert {(b.norm, b.activation) for b in step.sub_blocks} == {("group", "silu")}
    with pytest.raises(AttribError, match="42 distinct"):  # one level of 6 orders once or 6 x 6 twice
        draw_paths(43, narrow, 1, seed=0)


def test_a_path_is_the_layers_that_it_names(supernet):
    supernet.eval()
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    conv = lambda module, x, stride=1: F.conv2d(x, module.weight, module.bias, stride=stride, padding=1)  # noqa: E731
    codes = conv(supernet.encoder[0][0], images, 2).relu()
    codes = conv(supernet.code[1], conv(supernet.encoder[1][0], codes, 2).relu())
    codes = codes.repeat_interleave(2, 2).repeat_interleave(2, 3)
    norm = supernet.decoder[0].norms[0]["batch"][0]
    codes = (codes - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + norm.eps).sqrt()
    codes = conv(
        supernet.decoder[0].convs[0], torch.tanh(codes * norm.weight[:, None, None] + norm.bias[:, None, None])
    )
    second = supernet.decoder[1]
    up = second.upsamplers["transposed"]
    codes = F.conv_transpose2d(codes, up.weight, up.bias, stride=2)
    codes = F.silu(conv(second.convs[0], codes).relu())
    group = second.norms[1]["group"][0]
    codes = conv(second.convs[1], F.group_norm(codes, 4, group.weight, group.bias))
    torch.testing.assert_close(supernet(images, DEEP), conv(supernet.to_rgb, codes))


def test_a_shallow_path_uses_the_level_next_to_the_image(supernet):
    images = torch.rand(2, 3, 16, 16)
    supernet(images, SHALLOW).sum().backward()
    used = {name for name, p in supernet.named_parameters() if p.grad is not None}
    assert used == {
        f"{module}.{kind}"
        for module in ("encoder.0.0", "code.0", "decoder.1.convs.0", "to_rgb")
        for kind in ("weight", "bias")
    }


def test_a_virtual_model_has_the_statistics_of_its_path(supernet, photographs):
    with torch.no_grad():
        for p in supernet.parameters():
            p.mul_(1.5)
    before = {name: value.clone() for name, value in supernet.state_dict().items()}
    virtual = virtual_model(supernet, DEEP, draw_batches(photographs, 4, 16, seed=0))
    means = []
    for batch in islice(draw_batches(photographs, 4, 16, seed=0), CALIBRATION_BATCHES):
        codes = supernet.encoder[1](supernet.encoder[0](batch))
        means.append(F.interpolate(supernet.code[1](codes), scale_factor=2).mean(dim=(0, 2, 3)).detach())
    found = virtual.supernet.decoder[0].norms[0]["batch"][0].running_mean
    torch.testing.assert_close(found, torch.stack(means).mean(dim=0), atol=1e-5, rtol=1e-4)
    assert not virtual.training
    assert all(torch.equal(value, before[name]) for name, value in supernet.state_dict().items())


def test_training_lowers_the_loss_and_repeats_itself(photographs):
    supernet, losses = train_supernet(photographs, GridSettings(), 8, SETTINGS, seed=0)
    assert len(losses) == 60 and np.mean(losses[-15:]) < 0.6 * np.mean(losses[:5])
    assert Supernet.sizes_of(supernet.state_dict()) == (8, 2)
    short = SETTINGS.model_copy(update={"num_steps": 4})
    first, again, other = (
        train_supernet(photographs, GridSettings(), 8, short, seed)[0].state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
