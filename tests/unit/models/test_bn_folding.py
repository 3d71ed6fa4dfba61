"""Folded networks give the same output; batch norms that cannot be folded safely are kept."""

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from attrib.models.bn_folding import fold_batch_norms

pytestmark = pytest.mark.usefixtures("one_thread")


def with_statistics(model: nn.Module) -> nn.Module:
    """Give batch norms random statistics; new ones scale by almost one."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.running_mean, module.weight.data, module.bias.data):
                value.normal_(0.5, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
    return model.eval()


def images(channels: int = 3, size: int = 64) -> torch.Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))


def num_norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "mobilenetv2_100"])
def test_folded_network_gives_the_same_output(name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = with_statistics(timm.create_model(name, num_classes=0))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    folded = fold_batch_norms(model, images())
    assert num_norms(folded) == 0 < num_norms(model)
    other = images()[:, :, :, 1:].flip(0)
    with torch.inference_mode():
        torch.testing.assert_close(folded(other), model(other), rtol=1e-4, atol=1e-5 * float(model(other).abs().max()))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_network_without_batch_norm_is_returned_unchanged():
    model = timm.create_model("test_vit", num_classes=0, img_size=64).eval()
    assert fold_batch_norms(model, images()) is model


class Branching(nn.Module):
    """A convolution output that is read twice, a norm that runs twice, or a norm before the convolution."""

    def __init__(self, how: str):
        super().__init__()
        self.how, self.conv, self.norm = how, nn.Conv2d(3, 3, 3, padding=1), BatchNormAct2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "read twice":
            x = self.conv(x)
            return x + self.norm(x)
        if self.how == "run twice":
            return self.norm(self.norm(self.conv(x)))
        return self.conv(self.norm(x))


@pytest.mark.parametrize("how", ["read twice", "run twice", "before"])
def test_unsafe_batch_norm_is_not_folded(how):
    model = with_statistics(Branching(how))
    assert fold_batch_norms(model, images()) is model
