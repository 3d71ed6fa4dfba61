"""Heads: parts of unit length, and untrained nets that equal the whitening control."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attrib.models.heads import Head, ResidualMlp, join_parts
from attrib.models.settings import FeatureSettings, HeadSettings
from attrib.train.whitening import fit_projections, projected_sizes

BLOCK_SIZES = {"pooled": 6, "moments": 10, "layout_1": 8}
PARTS = {
    "content": {"blocks": ["layout_1", "pooled"], "role": "content"},  # not in the order of the features
    "style": {"blocks": ["moments"], "role": "style"},
}
NUM_IMAGES = 40

pytestmark = pytest.mark.usefixtures("one_thread")


def features(seed: int = 0, num_images: int = NUM_IMAGES) -> torch.Tensor:
    """float32 [n, D], correlated and not centred."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(24, 24, generator=torch.Generator().manual_seed(99))
    return torch.randn(num_images, 24, generator=generator) @ mixing + 2


def split(rows: torch.Tensor) -> dict[str, np.ndarray]:
    return dict(zip(BLOCK_SIZES, (block.numpy() for block in rows.split(list(BLOCK_SIZES.values()), dim=1))))


def make_head(seed: int | None = None, **values) -> Head:
    """A head fitted to features(). seed: of random weights that replace the initial ones of the net."""
    settings = HeadSettings(**{"parts": PARTS} | values)
    head = Head(BLOCK_SIZES, projected_sizes(BLOCK_SIZES, NUM_IMAGES, settings), settings)
    for part in head.parts.values():
        fit_projections(part, split(features()), settings)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for part in head.parts.values():
            for weight in part.net.parameters():
                nn.init.normal_(weight, std=0.5, generator=generator)
    return head


@torch.no_grad()
def outputs(head: Head, rows: torch.Tensor) -> list[torch.Tensor]:
    """Split the embedding into its parts, float32 [n, d_part]."""
    return list(head(rows).split([part.dimension for part in head.parts.values()], dim=1))


def cosines(rows: torch.Tensor) -> torch.Tensor:
    rows = F.normalize(rows.double(), dim=1)
    return rows @ rows.T


@pytest.mark.parametrize("net", ["none", "linear", "mlp"])
@pytest.mark.parametrize("projection", ["identity", "centre", "standardise", "whiten", "standardise_whiten"])
def test_parts_have_unit_length_and_cosine_is_their_mean(projection, net):
    head = make_head(seed=1, projection=projection, net=net, hidden=5)
    new = features(seed=3, num_images=9)
    parts = outputs(head, new)
    assert [part.shape for part in parts] == [(9, 14), (9, 10)] and head.dimension == 24
    for part in parts:
        torch.testing.assert_close(part.norm(dim=1), torch.ones(9))
    mean = sum(cosines(part) for part in parts) / len(parts)
    torch.testing.assert_close(cosines(torch.cat(parts, dim=1)), mean, atol=1e-6, rtol=0)


@pytest.mark.parametrize("net", ["linear", "mlp"])
@pytest.mark.parametrize("projection", ["whiten", "standardise_whiten"])
def test_untrained_net_equals_the_whitening_control(projection, net):
    control = make_head(projection=projection, net="none")
    start = make_head(projection=projection, net=net)
    new = features(seed=4)
    with torch.no_grad():
        assert torch.equal(start(new), control(new))
        assert not torch.equal(make_head(seed=1, projection=projection, net=net)(new), control(new))


def test_part_may_have_fewer_or_more_dimensions_than_inputs():
    parts = {"content": PARTS["content"] | {"dimension": 3}, "style": PARTS["style"] | {"dimension": 13}}
    control, head = make_head(net="none"), make_head(parts=parts)
    assert (head.dimension, control.dimension) == (16, 24)
    content, style = outputs(control, features(seed=5))
    few, many = outputs(head, features(seed=5))
    torch.testing.assert_close(few, F.normalize(content[:, :3], dim=1))  # of whitened numbers, the first ones
    torch.testing.assert_close(many, F.pad(style, (0, 3)))


def test_dimension_is_ignored_without_a_net():
    parts = {"style": PARTS["style"] | {"dimension": 3}}
    assert make_head(parts=parts, net="none").dimension == 10


@torch.no_grad()
def test_inputs_are_normalised_projected_blocks_in_order():
    head, rows = make_head(projection="standardise"), features(seed=6, num_images=4)
    fitted, blocks = split(features()), split(rows)
    expected = []
    for name in ("layout_1", "pooled", "moments"):
        scaled = (blocks[name] - fitted[name].mean(axis=0)) / fitted[name].std(axis=0)
        expected.append(scaled / np.linalg.norm(scaled, axis=1, keepdims=True))
    np.testing.assert_allclose(head.inputs(rows), np.hstack(expected), atol=1e-5)


@torch.no_grad()
def test_head_applies_the_nets_to_its_inputs():
    head, rows = make_head(seed=2, net="mlp"), features(seed=7)
    inputs = head.inputs(rows)
    parts = head.part_outputs(inputs)
    assert torch.equal(head(rows), join_parts(parts))
    content = head.parts["content"].net(inputs[:, :14])
    torch.testing.assert_close(parts[0], content)
    assert not torch.allclose(parts[0].norm(dim=1), torch.ones(len(rows)), atol=0.1)  # what a loss sees has its length


@torch.no_grad()
def test_residual_mlp_equals_its_formula():
    net, x = ResidualMlp(nn.Linear(4, 3), 5), features(seed=8)[:, :4]
    nn.init.normal_(net.outer.weight, generator=torch.Generator().manual_seed(0))
    inner = (x @ net.inner.weight.T + net.inner.bias).double().numpy()
    gelu = inner * 0.5 * (1 + np.vectorize(math.erf)(inner / math.sqrt(2)))
    linear = (x @ net.linear.weight.T + net.linear.bias).double().numpy()
    np.testing.assert_allclose(net(x), linear + gelu @ net.outer.weight.double().numpy().T, atol=1e-4)


def test_zero_features_give_finite_values():
    head = make_head(projection="identity")
    rows = torch.zeros(2, 24, requires_grad=True)
    head(rows).sum().backward()
    assert rows.grad.isfinite().all() and torch.equal(head(rows), torch.zeros(2, 24))


def test_gradients_reach_the_net_of_every_part():
    head = make_head(net="mlp")
    (head(features(seed=1)) * features(seed=2)[:, :24]).sum().backward()
    for part in head.parts.values():
        assert part.net.linear.weight.grad.abs().sum() > 0 and part.net.outer.weight.grad.abs().sum() > 0


def test_missing_block_is_an_error():
    settings = HeadSettings(parts={"all": {"blocks": ["pooled", "layout_1"]}})
    settings.check(FeatureSettings(layout_levels=(1,)))
    with pytest.raises(ValueError, match=r"head.parts.all uses block 'layout_1', .* use one of pooled, layout_2"):
        settings.check(FeatureSettings(layout_levels=(2,)))
