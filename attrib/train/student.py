"""The part of a model that is trained, the student (without a teacher): the nets of the heads, or the network."""

import torch
from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from attrib.common.errors import AttribError
from attrib.models.heads import Head, join_parts
from attrib.models.model import AttributionModel
from attrib.models.preprocessing import Preprocessing
from attrib.models.settings import Domain
from attrib.train.settings import TrainSettings


class Student(nn.Module):
    """The trained network: maps inputs to float32 [n, d], the parts concatenated, not normalised.

    trunk(inputs, domain) returns the parts. With separate domains, anchors are real and views synthetic images.
    """

    def __init__(self, trunk: nn.Module, head: Head, separate_domains: bool = False):
        super().__init__()
        self.trunk, self.separate_domains = trunk, separate_domains
        self.part_sizes = [part.dimension for part in head.parts.values()]
        self.roles = [part.role for part in head.parts.values()]

    def forward(self, anchors: Tensor, views: Tensor) -> tuple[Tensor, Tensor]:
        """Encode both in one call, because DistributedDataParallel needs one forward per backward."""
        if self.separate_domains:
            return self.encode(anchors, "real"), self.encode(views, "synthetic")
        both = self.encode(torch.cat([anchors, views]), "real")
        return both[: len(anchors)], both[len(anchors) :]

    def encode(self, inputs: Tensor, domain: Domain) -> Tensor:
        return torch.cat([part.float() for part in self.trunk(inputs, domain)], dim=1)

    def parts(self, outputs: Tensor) -> list[Tensor]:
        return list(outputs.split(self.part_sizes, dim=1))

    def embedding(self, outputs: Tensor) -> Tensor:
        return join_parts(self.parts(outputs))


class HeadTrunk(nn.Module):
    """The nets of the heads, on precomputed inputs (Head.inputs)."""

    def __init__(self, heads: nn.ModuleDict):
        super().__init__()
        self.heads = heads

    def forward(self, inputs: Tensor, domain: Domain) -> list[Tensor]:
        return self.heads[domain if domain in self.heads else "real"].part_outputs(inputs)


class PixelTrunk(nn.Module):
    """The whole network: maps pixels uint8 [n, 3, h, w] to the head's parts. Batch norm stays frozen."""

    def __init__(self, model: AttributionModel, precision: str):
        super().__init__()
        self.model, self.precision = model, precision
        self.preprocessing = Preprocessing.from_timm(model.data_config)

    def forward(self, pixels: Tensor, domain: Domain) -> list[Tensor]:
        device = pixels.device
        images = self.preprocessing.normalise(pixels, device, torch.float32)
        use_bfloat16 = self.precision == "bfloat16" or (self.precision == "auto" and device.type == "cuda")
        with torch.autocast(device.type, torch.bfloat16, enabled=use_bfloat16):
            features = self.model.extractor(images.contiguous(memory_format=torch.channels_last))
        head = self.model.head(domain)
        return head.part_outputs(head.inputs(features.float()))

    def train(self, mode: bool = True) -> "PixelTrunk":
        return super().train(False)


def unfreeze_last_blocks(backbone: nn.Module, num_blocks: int | str) -> None:
    """Make the last groups of layers trainable, as timm groups them, with scale and shift of their batch norms.

    Raises AttribError if the network has fewer groups.
    """
    groups = list(group_parameters(backbone, backbone.group_matcher(coarse=True)).values())
    num = len(groups) if num_blocks == "all" else num_blocks
    if num > len(groups):
        raise AttribError(
            f"fine_tune.num_blocks is {num}, but the network has {len(groups)} groups of layers; lower it"
        )
    chosen = {name for group in groups[-num:] for name in group}
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(name in chosen)


def student_of(model: AttributionModel, settings: TrainSettings) -> Student:
    """Return the student: it trains the nets and, end to end, the last blocks of the backbone; the rest is frozen."""
    model.requires_grad_(False)
    for head in model.heads.values():
        for part in head.parts.values():
            part.net.requires_grad_(True)
    if settings.fine_tune:
        unfreeze_last_blocks(model.extractor.backbone, settings.fine_tune.num_blocks)
        trunk = PixelTrunk(model, settings.fine_tune.precision)
    else:
        trunk = HeadTrunk(model.heads)
    return Student(trunk, model.heads["real"], settings.head.separate_domains)


def parallel(student: Student, settings: TrainSettings, device: torch.device) -> nn.Module:
    """Return the student within DistributedDataParallel."""
    # Without the pooled output, it can happen that no block reads the last layers, which are trainable.
    unused = settings.fine_tune is not None and not settings.features.pooled
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(student, device_ids=devices, find_unused_parameters=unused)


def trained_groups(student: Student, settings: TrainSettings) -> list[dict]:
    """Return the parameter groups of the optimiser; the backbone has its own learning rate."""
    head, backbone = [], []
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            (backbone if ".backbone." in name else head).append(parameter)
    groups = [{"params": head, "lr": settings.optimiser.learning_rate}]
    return groups + ([{"params": backbone, "lr": settings.fine_tune.learning_rate}] if backbone else [])
