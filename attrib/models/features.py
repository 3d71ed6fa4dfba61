"""What a head sees of a backbone: statistics of its feature levels, in named blocks.

Stylisation keeps *where* things are and changes *how* they look, so the levels are read in two ways that part the two. `layout` maps are
instance-normalised, which removes each channel's mean and deviation, the carriers of style (Ulyanov et al., arXiv 1607.08022; Huang and Belongie,
arXiv 1703.06868), and pooled to a coarse grid, which keeps places. `moments` and `covariance` forget places and keep style (Gatys et al.,
arXiv 1508.06576). `pooled` is the network's own output.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from attrib.common.errors import AttribError
from attrib.models.settings import FeatureSettings

MAX_BLOCK = 16_384  # numbers; whitening holds a square matrix of them in float64, 2 GiB
DEVIATION_FLOOR = 1e-5  # a channel that is dead on an image has no layout: zero, not noise blown up


class FeatureExtractor(nn.Module):
    """float32 [n, 3, h, w], normalised -> float32 [n, dimension], the blocks of `sizes` side by side."""

    def __init__(self, backbone: nn.Module, settings: FeatureSettings, image_px: int):
        """Raises AttribError if the network has no such level."""
        super().__init__()
        self.backbone, self.settings = backbone, settings
        if settings.levels and not hasattr(backbone, "forward_intermediates"):
            raise AttribError("this network does not give its levels (timm's forward_intermediates); use pooled only")
        num_levels = len(backbone.feature_info) if settings.levels else 0
        missing = [level for level in settings.levels if level >= num_levels]
        if missing:
            raise AttribError(f"features name level {missing[0]}, but the network has levels 0 to {num_levels - 1}")
        was_training = backbone.training
        backbone.eval()  # batch norm shall not count the probe as an image
        with torch.inference_mode():
            probe = self.blocks(next(backbone.parameters()).new_zeros(1, 3, image_px, image_px))
            self.sizes = {name: block.shape[1] for name, block in probe.items()}
        backbone.train(was_training)
        largest = max(self.sizes, key=self.sizes.get)
        if self.sizes[largest] > MAX_BLOCK:
            raise AttribError(
                f"features: {largest} has {self.sizes[largest]:,} numbers per image, more than {MAX_BLOCK:,}; covariances grow with the "
                "square of a level's channels and layouts with the grid's: name shallower levels or a smaller layout_grid"
            )

    @property
    def dimension(self) -> int:
        return sum(self.sizes.values())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat(list(self.blocks(images).values()), dim=1)

    def blocks(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """{name: float32 [n, size]} in a fixed order."""
        if not self.settings.levels:
            return {"pooled": self.backbone(images).float()}
        final, levels = self.backbone.forward_intermediates(images, norm=False)
        # Statistics in float32: sums over thousands of places lose too much under autocast.
        return {name: block for name, block in self._blocks(final, [level.float() for level in levels])}

    def _blocks(self, final: torch.Tensor, levels: list[torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        settings = self.settings
        if settings.pooled:
            yield "pooled", self.backbone.forward_head(final, pre_logits=True).float()
        if settings.moment_levels:
            yield "moments", torch.cat([moments(levels[i]) for i in settings.moment_levels], dim=1)
        if settings.covariance_levels:
            yield "covariance", torch.cat([channel_covariance(levels[i]) for i in settings.covariance_levels], dim=1)
        for i in settings.layout_levels:
            yield f"layout_{i}", layout(levels[i], settings.layout_grid)


def moments(level: torch.Tensor) -> torch.Tensor:
    """[n, c, h, w] -> [n, 2 c]: mean and deviation of every channel."""
    deviation, mean = torch.std_mean(level.flatten(2), dim=2, correction=0)
    return torch.cat([mean, deviation], dim=1)


def channel_covariance(level: torch.Tensor) -> torch.Tensor:
    """[n, c, h, w] -> [n, c (c + 1) / 2]: signed square roots of the upper triangle of the channels' covariance.

    Square roots are on the scale of the activations, so that no channel of large variance outweighs all others.
    """
    rows = level.flatten(2)
    rows = rows - rows.mean(dim=2, keepdim=True)
    with torch.autocast(level.device.type, enabled=False):  # which would round products of float32, too
        covariance = rows @ rows.transpose(1, 2) / rows.shape[2]
    first, second = torch.triu_indices(rows.shape[1], rows.shape[1], device=level.device)
    upper = covariance[:, first, second]
    return upper.sign() * upper.abs().clamp_min(1e-12).sqrt()  # clamped: the root's slope at zero is infinite


def layout(level: torch.Tensor, grid: int) -> torch.Tensor:
    """[n, c, h, w] -> [n, c grid^2]: instance-normalised maps, pooled to a grid."""
    deviation, mean = torch.std_mean(level, dim=(2, 3), correction=0, keepdim=True)
    return F.adaptive_avg_pool2d((level - mean) / (deviation + DEVIATION_FLOOR), grid).flatten(1)
