"""Batch normalisation folded into the convolutions before it: at inference both are linear, and the pass over memory between them costs."""

import copy

import torch
from timm.layers import BatchNormAct2d
from torch import nn

NORMS = (nn.BatchNorm2d, BatchNormAct2d)  # exactly these: a subclass may do more
MAX_DIFFERENCE = 1e-4  # of the folded outputs, as a part of the largest; rounding makes 1e-6, a wrong fold about 1


@torch.inference_mode()
def fold_batch_norms(model: nn.Module, images: torch.Tensor) -> nn.Module:
    """A copy of `model`, in evaluation mode, that computes the same from fewer layers; `model` itself where there is nothing to fold.

    images: a small batch as the model takes it, not constant. One pass over it shows which normalisation reads the output of which
    convolution. That nothing else reads that output cannot be seen so; the outputs before and after are compared, and if they differ nothing
    is folded.
    """
    pairs, expected = _pairs(model, images)
    if not pairs:
        return model
    folded = copy.deepcopy(model)
    for conv, norm in pairs:
        fused = nn.utils.fuse_conv_bn_eval(folded.get_submodule(conv), folded.get_submodule(norm))
        folded.set_submodule(conv, fused)
        folded.set_submodule(norm, getattr(folded.get_submodule(norm), "act", nn.Identity()))
    folded = folded.to(memory_format=torch.channels_last)
    difference = (folded(images) - expected).abs().max()
    return folded if difference <= MAX_DIFFERENCE * expected.abs().max() else model


def _pairs(model: nn.Module, images: torch.Tensor) -> tuple[list[tuple[str, str]], torch.Tensor]:
    """The names of (convolution, normalisation) that run once each, one on the other's output; and the model's output."""
    makers: dict[int, tuple[str, torch.Tensor]] = {}  # with the tensor, so that its id is not given to another
    num_calls: dict[str, int] = {}
    pairs: list[tuple[str, str]] = []

    def ran(name: str, module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        num_calls[name] = num_calls.get(name, 0) + 1
        if isinstance(module, nn.Conv2d):
            makers[id(output)] = (name, output)
        elif id(inputs[0]) in makers:
            pairs.append((makers[id(inputs[0])][0], name))

    handles = [
        module.register_forward_hook(lambda module, inputs, output, name=name: ran(name, module, inputs, output))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) or type(module) in NORMS
    ]
    try:
        output = model(images)
    finally:
        for handle in handles:
            handle.remove()
    return [(conv, norm) for conv, norm in pairs if num_calls[conv] == num_calls[norm] == 1], output
