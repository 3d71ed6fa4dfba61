"""The grid of synthetic generators against the paper's counts, and its blocks against plain functions."""

import pytest
import torch
import torch.nn.functional as F

from attrib.common.errors import AttribError
from attrib.generators.synthesis.architectures import (
    DecoderBlock,
    DecoderSpec,
    build_autoencoder,
    grid,
    sample_specs,
    upsampler,
)
from attrib.generators.synthesis.settings import GridSettings

# The 288 architectures of Model Synthesis (arXiv 2307.15977).
PAPER_GRID = GridSettings(
    upsamplers=("bilinear", "nearest", "transposed"),
    activations=("none", "relu", "sigmoid", "tanh"),
    norms=("none", "batch", "instance"),
    residual=(False,),
)

PLAIN = {
    "num_blocks": 1,
    "convs_per_block": 1,
    "upsampler": "nearest",
    "activation": "relu",
    "norm": "none",
    "width": 4,
}


def test_the_grid_extends_that_of_the_paper():
    paper, whole = grid(PAPER_GRID), grid()
    assert len(paper) == 288 and len(whole) == 2 * 2 * 5 * 5 * 4 * 2 * 2
    assert set(paper) < set(whole)
    assert len({spec.name for spec in whole}) == len(whole)
    assert grid() == whole
    assert (
        whole[0].name == "b1c1-bicubic-none-batch-cna-w16" and whole[-1].name == "b2c2-transposed-tanh-none-nac-res-w16"
    )


def test_an_axis_with_a_repeated_value_is_refused():
    with pytest.raises(ValueError, match="twice"):
        GridSettings(norms=("batch", "batch"))


def test_upsamplers_take_turns_and_disjoint_ranges_share_no_architecture():
    first, second = sample_specs(40, seed=3), sample_specs(40, seed=3, first=40)
    for specs in (first, second):
        assert [sum(spec.upsampler == family for spec in specs) for family in GridSettings().upsamplers] == [8] * 5
    assert len(set(first) | set(second)) == 80
    assert sample_specs(80, seed=3) == first + second
    assert set(sample_specs(40, seed=4)) != set(first)
    assert set(sample_specs(1600, seed=0)) == set(grid())


def test_upsamplers_that_are_left_out_do_not_occur():
    held_out = sample_specs(20, 0, settings=GridSettings(upsamplers=("bicubic", "pixel_shuffle")))
    assert {spec.upsampler for spec in held_out} == {"bicubic", "pixel_shuffle"}
    assert {spec.upsampler for spec in sample_specs(20, 0, settings=PAPER_GRID)} == set(PAPER_GRID.upsamplers)
    with pytest.raises(AttribError, match="the grid has 288"):
        sample_specs(280, 0, settings=PAPER_GRID, first=9)


def test_every_decoder_keeps_the_size_and_has_gradients_of_all_weights():
    images = torch.rand(2, 3, 16, 12, generator=torch.Generator().manual_seed(0))
    for spec in sample_specs(60, seed=0, width=4):
        model = build_autoencoder(spec, seed=0)
        made = model(images)
        assert made.shape == images.shape, spec.name
        F.mse_loss(made, images).backward()
        assert all(p.grad is not None for p in model.parameters()), spec.name


def test_weights_depend_on_the_seed_alone():
    spec = sample_specs(1, seed=0)[0]
    before = torch.get_rng_state()
    first = build_autoencoder(spec, 5).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    second, other = build_autoencoder(spec, 5).state_dict(), build_autoencoder(spec, 6).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("order", ["conv_norm_act", "norm_act_conv"])
@pytest.mark.parametrize("residual", [False, True])
def test_a_block_equals_its_definition(order, residual):
    spec = DecoderSpec(**PLAIN | {"norm": "instance", "order": order, "residual": residual})
    torch.manual_seed(0)
    block, codes = DecoderBlock(spec, 8, 4), torch.randn(2, 8, 5, 6)
    conv = next(m for m in block.convs if isinstance(m, torch.nn.Conv2d))
    raised = codes.repeat_interleave(2, 2).repeat_interleave(2, 3)

    def standardised(x):
        variance, mean = torch.var_mean(x, dim=(2, 3), keepdim=True, correction=0)
        return ((x - mean) / (variance + 1e-5).sqrt()).clamp_min(0)

    convolve = lambda x: F.conv2d(x, conv.weight, conv.bias, padding=1)  # noqa: E731
    expected = standardised(convolve(raised)) if order == "conv_norm_act" else convolve(standardised(raised))
    if residual:
        expected = (
            expected
            + torch.einsum("oi,nihw->nohw", block.skip.weight[:, :, 0, 0], raised)
            + block.skip.bias[:, None, None]
        )
    torch.testing.assert_close(block(codes), expected)


def test_upsamplers_equal_their_definition():
    codes = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for kind in ("bilinear", "bicubic"):
        expected = F.interpolate(codes, scale_factor=2, mode=kind, align_corners=False)
        assert torch.equal(upsampler(kind, 3)(codes), expected)
    transposed = upsampler("transposed", 3)
    made = transposed(codes)
    for row, column in ((0, 0), (5, 2), (7, 7)):
        weights = transposed.weight[:, :, row % 2, column % 2]  # [in, out]: each pixel comes from one code
        torch.testing.assert_close(
            made[0, :, row, column], codes[0, :, row // 2, column // 2] @ weights + transposed.bias
        )
    shuffle = upsampler("pixel_shuffle", 3)
    convolved = F.conv2d(codes, shuffle[0].weight, shuffle[0].bias, padding=1)
    for row, column in ((0, 0), (5, 2), (7, 7)):
        channel = 2 * (row % 2) + column % 2
        torch.testing.assert_close(shuffle(codes)[0, :, row, column], convolved[0, channel::4, row // 2, column // 2])
