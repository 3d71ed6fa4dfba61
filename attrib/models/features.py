"""Statistics of the feature levels of a backbone, in named blocks: the input of a head.

Stylisation keeps the layout of an image and changes its appearance, so separate blocks describe the two:

`layout_<level>`         instance-normalised maps, pooled to a coarse grid; this removes channel means and deviations,
                         which carry style (Ulyanov et al., arXiv 1607.08022; Huang and Belongie, arXiv 1703.06868).
`moments`, `covariance`  channel statistics without positions: style (Gatys et al., arXiv 1508.06576).
`pooled`                 the output of the network.
"""

import torch
import torch.nn.functional as F
from torch import nn

from attrib.common.errors import AttribError
from attrib.models.settings import FeatureSettings

MAX_BLOCK = 16_384  # values; whitening holds a square float64 matrix of this size, 2 GiB
DEVIATION_FLOOR = 1e-5  # a constant channel gets layout zero instead of amplified noise


class FeatureExtractor(nn.Module):
    """Computes feature blocks: normalised images float32 [n, 3, h, w] -> float32 [n, dimension], blocks concatenated.

    sizes: the number of values of each block. Raises AttribError if the network lacks a level or a block is too large.
    """

    def __init__(self, backbone: nn.Module, settings: FeatureSettings, image_px: int):
        super().__init__()
        self.backbone, self.settings = backbone, settings
        if settings.levels and not hasattr(backbone, "forward_intermediates"):
            raise AttribError(
                "timm cannot return intermediate feature maps of this network; choose another backbone.name, or use "
                "features.pooled alone, without moment_levels, covariance_levels and layout_levels"
            )
        num_levels = len(backbone.feature_info) if settings.levels else 0
        missing = [level for level in settings.levels if level >= num_levels]
        if missing:
            raise AttribError(f"features use level {missing[0]}; use levels of the network, 0 to {num_levels - 1}")
        was_training = backbone.training
        backbone.eval()  # the probe must not change the statistics of batch norm
        with torch.inference_mode():
            probe = self.blocks(next(backbone.parameters()).new_zeros(1, 3, image_px, image_px))
            self.sizes = {name: block.shape[1] for name, block in probe.items()}
        backbone.train(was_training)
        largest = max(self.sizes, key=self.sizes.get)
        if self.sizes[largest] > MAX_BLOCK:
            raise AttribError(
                f"feature block {largest} has {self.sizes[largest]:,} values per image, more than {MAX_BLOCK:,}; use "
                "shallower levels, which have fewer channels, or a smaller layout_grid"
            )

    @property
    def dimension(self) -> int:
        return sum(self.sizes.values())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat(list(self.blocks(images).values()), dim=1)

    def blocks(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return {name: float32 [n, size]} in a fixed order."""
        settings = self.settings
        if not settings.levels:
            return {"pooled": self.backbone(images).float()}
        final, levels = self.backbone.forward_intermediates(images, norm=False)
        levels = [level.float() for level in levels]  # sums over thousands of positions need float32 under autocast
        blocks = {}
        if settings.pooled:
            blocks["pooled"] = self.backbone.forward_head(final, pre_logits=True).float()
        if settings.moment_levels:
            blocks["moments"] = torch.cat([moments(levels[i]) for i in settings.moment_levels], dim=1)
        if settings.covariance_levels:
            blocks["covariance"] = torch.cat([channel_covariance(levels[i]) for i in settings.covariance_levels], dim=1)
        for i in settings.layout_levels:
            blocks[f"layout_{i}"] = layout(levels[i], settings.layout_grid)
        return blocks


def moments(level: torch.Tensor) -> torch.Tensor:
    """Return mean and deviation of every channel: [n, c, h, w] -> [n, 2 c]."""
    deviation, mean = torch.std_mean(level.flatten(2), dim=2, correction=0)
    return torch.cat([mean, deviation], dim=1)


def channel_covariance(level: torch.Tensor) -> torch.Tensor:
    """Return signed square roots of the upper triangle of the channel covariance: [n, c, h, w] -> [n, c (c + 1) / 2].

    Square roots are on the scale of the activations, so a channel of large variance does not dominate the others.
    """
    rows = level.flatten(2)
    rows = rows - rows.mean(dim=2, keepdim=True)
    with torch.autocast(level.device.type, enabled=False):  # autocast would round the factors
        covariance = rows @ rows.transpose(1, 2) / rows.shape[2]
    first, second = torch.triu_indices(rows.shape[1], rows.shape[1], device=level.device)
    upper = covariance[:, first, second]
    return upper.sign() * upper.abs().clamp_min(1e-12).sqrt()  # clamped: the square root has an infinite slope at zero


def layout(level: torch.Tensor, grid: int) -> torch.Tensor:
    """Return instance-normalised maps, average-pooled to a grid: [n, c, h, w] -> [n, c grid^2]."""
    deviation, mean = torch.std_mean(level, dim=(2, 3), correction=0, keepdim=True)
    return F.adaptive_avg_pool2d((level - mean) / (deviation + DEVIATION_FLOOR), grid).flatten(1)
