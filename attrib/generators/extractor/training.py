"""The training loop of the extractor: fitting the first whitening, steps, validation, and a state to resume from.

The weights of the best validation are kept. Its criterion is the identification accuracy with ten references per model,
the mean of original images and JPEG 85. The models have an upsampler that is not used in training, and they show other
photographs. No image of a real generator is used.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from attrib.common.errors import AttribError
from attrib.generators.extractor.batches import VALIDATION, ExtractorBatch, ExtractorBatches, PoolImages, Validation
from attrib.generators.extractor.network import STATISTICS, Extractor, FingerprintNetwork, PartName
from attrib.generators.extractor.settings import FingerprintSettings, NetworkSettings
from attrib.generators.fingerprints.discriminant import fit_whitening, model_statistics
from attrib.generators.signals.degradations import degrade
from attrib.generators.signals.spectrum import patches
from attrib.train.all_gather import gather, gather_fixed
from attrib.train.loop import rate
from attrib.train.losses.contrastive import supervised_contrastive

START_IMAGES = 64  # of each model, to fit the whitening of the statistics
LEARNED_IMAGES = 16  # of each model, to fit the whitening of the learned part, which is smaller, at every validation
PATCHES_AT_ONCE = 256  # each takes about 0.4 MB while its windows are in memory
SHRINKAGE = 0.15  # of the covariance
MIN_RANGE = 1e-6  # of a value of the learned part (length one) within a class; a smaller range is rounding

# Patches uint8 [n, 3, s, s] of models and of photographs; a class under one degradation of VALIDATION is one tensor.
WhiteningPatches = tuple[list[Tensor], list[Tensor]]


class ExtractorRun:
    """A training run and its state. All workers hold the same network and prototypes, and each a part of a batch."""

    def __init__(
        self, network: FingerprintNetwork, num_classes: int, settings: FingerprintSettings, device: torch.device
    ):
        self.network, self.settings, self.device = network.to(device), settings, device
        generator = torch.Generator().manual_seed(settings.seed)
        prototypes = torch.randn(num_classes, settings.network.num_learned, generator=generator)
        self.prototypes = nn.Parameter(F.normalize(prototypes, dim=1).to(device))
        self.parameters = [*self.network.parameters(), self.prototypes]
        options = settings.optimiser
        self.optimiser = torch.optim.AdamW(self.parameters, lr=options.learning_rate, weight_decay=options.weight_decay)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimiser, lambda step: rate(step, options.num_steps, options.warmup_share)
        )
        self.step = 0
        self.history: list[dict] = []  # per validation: step, loss, criterion, and the accuracy under each degradation
        self.best = _copied(self.network)

    def train(
        self, batches: ExtractorBatches, validation: Validation, on_validation: Callable[["ExtractorRun"], None]
    ) -> None:
        """Train to the last step and load the best weights. on_validation: called after each validation.

        Raises AttribError if the loss is not finite or the learned part cannot be whitened.
        """
        shown = whitening_patches(batches.images, self.settings.network, LEARNED_IMAGES)
        if not self.history:
            self._validate(None, shown, validation)
            on_validation(self)
        total, options = 0.0, self.settings.optimiser
        for batch in batches.steps(self.step, options.num_steps):
            total += self.train_step(batch)
            self.step += 1
            if self.step % options.validation_steps and self.step < options.num_steps:
                continue
            if not math.isfinite(total):
                raise AttribError(f"the loss is not finite at step {self.step}; lower optimiser.learning_rate")
            self._validate(total / (self.step - self.history[-1]["step"]), shown, validation)
            total = 0.0
            on_validation(self)
        self.network.load_state_dict(self.best)

    def train_step(self, batch: ExtractorBatch) -> float:
        """One optimiser step on the batches of all workers. Returns the loss before it."""
        self.network.train()
        self.optimiser.zero_grad(set_to_none=True)
        own = self.network.learned(batch.patches.to(self.device))
        loss = self._loss(gather(own), gather_fixed(batch.labels.to(self.device)))
        loss.backward()
        average_gradients(self.parameters)
        self.optimiser.step()
        self.schedule.step()
        return float(loss.detach())

    def _loss(self, embedded: Tensor, labels: Tensor) -> Tensor:
        contrast = self.settings.contrast
        loss = embedded.new_zeros(())
        if contrast.contrast_weight:
            loss = loss + contrast.contrast_weight * supervised_contrastive(embedded, labels, contrast.temperature)
        if contrast.classification_weight:
            found = classification(embedded, self.prototypes, labels, contrast.class_scale)
            loss = loss + contrast.classification_weight * found
        return loss

    def _validate(self, loss: float | None, shown: WhiteningPatches, validation: Validation) -> None:
        whiten(self.network, "learned", shown)
        found = validation(Extractor(self.network, self.device))
        criterion = sum(found.values()) / len(found)
        if criterion > max((row["criterion"] for row in self.history), default=-math.inf):
            self.best = _copied(self.network)
        self.history.append({"step": self.step, "loss": loss, "criterion": criterion, **found})

    def progress(self) -> str:
        """The last validation as one line."""
        last, best = self.history[-1], max(row["criterion"] for row in self.history)
        loss = "-" if last["loss"] is None else f"{last['loss']:.4f}"
        accuracies = "  ".join(f"{degradation.name} {last[degradation.name]:.3f}" for degradation in VALIDATION)
        return (
            f"fingerprint: step {last['step']:,} of {self.settings.optimiser.num_steps:,}  loss {loss}  "
            f"held-out models: {accuracies}  (best mean {best:.3f})"
        )

    def state(self) -> dict:
        """Tensors and plain values only, for torch.load(weights_only=True)."""
        return {
            "network": _copied(self.network),
            "prototypes": self.prototypes.detach().clone(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "history": self.history,
            "best": self.best,
        }

    def restore(self, state: dict) -> None:
        self.network.load_state_dict(state["network"])
        with torch.no_grad():
            self.prototypes.copy_(state["prototypes"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.history, self.best = state["step"], list(state["history"]), state["best"]
        self.schedule.last_epoch = self.step  # the optimiser has the rates; LambdaLR.load_state_dict needs lambdas


def classification(embeddings: Tensor, prototypes: Tensor, labels: Tensor, scale: float) -> Tensor:
    """Cross-entropy of scaled cosines. embeddings: float32 [n, d], L2-normalised; prototypes: float32 [m, d]."""
    return F.cross_entropy(scale * embeddings @ F.normalize(prototypes, dim=1).T, labels)


def initial_network(images: PoolImages, settings: FingerprintSettings) -> FingerprintNetwork:
    """A new network: the whitening of its statistics is fitted, the learned part has random weights by the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = FingerprintNetwork(settings.network)
    shown = whitening_patches(images, settings.network, START_IMAGES)
    for name in STATISTICS:
        whiten(network, name, shown)
    return network


def whitening_patches(images: PoolImages, network: NetworkSettings, num_images: int) -> WhiteningPatches:
    """One patch of each of a model's first num_images images, and max_patches patches of each photograph."""

    def degraded(classes: list[Tensor], max_patches: int) -> list[Tensor]:
        return [
            torch.cat([patches(degrade(image, degradation), network.patch_px, max_patches) for image in shown])
            for degradation in VALIDATION
            for shown in classes
        ]

    models = degraded([shown[:num_images] for shown in images.training], 1)
    return models, degraded([images.photographs], network.max_patches)


@torch.no_grad()
def whiten(network: FingerprintNetwork, name: PartName, shown: WhiteningPatches) -> None:
    """Fit the whitening of one part to the mean of two covariances: within the pool's models, and between photographs.

    The synthetic models smooth fine detail away. With their covariance alone, the content of a real generator's images
    would keep too large a weight. Raises AttribError if the learned part is not finite, or constant within each class,
    because the training has then diverged.
    """
    device, found = network.mean.device, []
    for classes in shown:
        groups = (
            torch.cat([network.parts(some.to(device), [name])[name] for some in cut.split(PATCHES_AT_ONCE)])
            for cut in classes
        )
        rows = (of_class.cpu().numpy() for of_class in groups)
        if name == "learned":
            rows = list(rows)
            # Too high a learning rate shows here before it shows in the loss. A NaN makes the comparison false.
            if not np.max([np.ptp(of_class, axis=0).max() for of_class in rows]) > MIN_RANGE:
                raise AttribError(
                    "training diverged: the learned part is NaN or infinite, or equal for all images of each model; "
                    "lower optimiser.learning_rate"
                )
        found.append(model_statistics(rows))
    mean = sum(statistics.means.mean(axis=0) for statistics in found) / 2
    mixed = sum(statistics.covariance / np.trace(statistics.covariance) for statistics in found)
    whitening = fit_whitening(mean, mixed, SHRINKAGE, without_level=False)
    network.whiten(name, torch.from_numpy(mean).float(), torch.from_numpy(whitening.projection).float())


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Average gradients over the workers in one message.

    All workers compute the loss of the same gathered rows, so the result equals that of a single process.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat, op=dist.ReduceOp.SUM)
    flat /= dist.get_world_size()
    for gradient, averaged in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(averaged.view_as(gradient))


def _copied(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in network.state_dict().items()}
