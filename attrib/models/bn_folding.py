"""Fold batch normalisation into the preceding convolution, which saves a pass over memory at inference."""

import copy
from collections import Counter
from contextlib import ExitStack

import torch
from timm.layers import BatchNormAct2d
from torch import nn

NORMS = (nn.BatchNorm2d, BatchNormAct2d)  # not their subclasses, which may compute more
MAX_DIFFERENCE = 1e-4  # of the outputs, relative to the largest: rounding gives 1e-6, a wrong fold about 1


@torch.inference_mode()
def fold_batch_norms(model: nn.Module, images: torch.Tensor) -> nn.Module:
    """Return a copy of `model` with folded batch norms, or `model` itself if there is nothing to fold.

    images: a small batch of input that is not constant. One forward pass shows which normalisation reads the output of
    which convolution, but not whether another layer reads it too, so nothing is folded if the outputs before and after
    differ. The model must be in evaluation mode.
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
    """Return the names of (convolution, normalisation of its output) that run once each, and the model output."""
    names = {module: name for name, module in model.named_modules()}
    producers: dict[int, tuple[str, torch.Tensor]] = {}  # keeps the tensor, so that its id() is not reused
    num_calls: Counter[str] = Counter()
    pairs: list[tuple[str, str]] = []

    def record_call(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        num_calls[names[module]] += 1
        if isinstance(module, nn.Conv2d):
            producers[id(output)] = (names[module], output)
        elif id(inputs[0]) in producers:
            pairs.append((producers[id(inputs[0])][0], names[module]))

    with ExitStack() as handles:
        for module in names:
            if isinstance(module, nn.Conv2d) or type(module) in NORMS:
                handles.enter_context(module.register_forward_hook(record_call))
        output = model(images)
    return [(conv, norm) for conv, norm in pairs if num_calls[conv] == num_calls[norm] == 1], output
