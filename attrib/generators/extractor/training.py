"""The extractor's training loop, read from top to bottom: whitened statistics at its start, steps, validation, a state to resume from.

The criterion is identification from ten references among models of the pool whose upsampler no trained model has, of photographs that were not
trained on, untouched and at JPEG 85. No image of a real generator takes part.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from attrib.common.errors import AttribError
from attrib.generators.extractor.batches import VALIDATION, ExtractorBatch, ExtractorBatches, PoolImages, Validation
from attrib.generators.extractor.losses import classification
from attrib.generators.extractor.network import STATISTICS, Extractor, FingerprintNetwork, PartName
from attrib.generators.extractor.settings import FingerprintSettings, NetworkSettings
from attrib.generators.fingerprints.discriminant import fit_whitening, model_statistics
from attrib.generators.signals.degradations import degrade
from attrib.generators.signals.spectrum import patches
from attrib.train.all_gather import gather, gather_fixed
from attrib.train.losses.contrastive import supervised_contrastive
from attrib.train.schedule import rate

START_IMAGES = 64  # of each model, that whiten the statistics
LEARNED_IMAGES = 16  # that whiten what is learned, which has fewer numbers, with every validation
PATCHES_AT_ONCE = 256  # patches, of about .4 MB each while their windows are held
SHRINKAGE = 0.15  # of the covariance that is whitened
LEAST_SPREAD = 1e-6  # of what is learned, of length one, between images of one class: less is rounding


@dataclass(frozen=True, eq=False)
class WhiteningPatches:
    """uint8 [n, 3, s, s] of each class under each degradation of VALIDATION: degraded alike, a class of its own."""

    models: list[Tensor]
    photographs: list[Tensor]


class ExtractorRun:
    """A training run and its state. Every worker holds the same network and prototypes, and sees its part of each batch."""

    def __init__(
        self, network: FingerprintNetwork, num_classes: int, settings: FingerprintSettings, device: torch.device
    ):
        self.network, self.settings, self.device = network.to(device), settings, device
        generator = torch.Generator().manual_seed(settings.seed)
        prototypes = torch.randn(num_classes, settings.network.num_learned, generator=generator)
        self.prototypes = nn.Parameter(F.normalize(prototypes, dim=1).to(device))
        self.parameters = [*self.network.parameters(), self.prototypes]
        optimiser = settings.optimiser
        self.optimiser = torch.optim.AdamW(
            self.parameters, lr=optimiser.learning_rate, weight_decay=optimiser.weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimiser, lambda step: rate(step, optimiser.num_steps, optimiser.warmup_share)
        )
        self.step = 0
        self.history: list[dict] = []  # per validation: step, loss, criterion, and the accuracy under each degradation
        self.best = _copied(self.network)

    def train(
        self, batches: ExtractorBatches, validation: Validation, on_validation: Callable[["ExtractorRun"], None]
    ) -> None:
        """Until the steps are done; `on_validation` is called before the first and after each validation. Ends with the best weights.

        Raises AttribError if the loss is not finite, or what is learned cannot be whitened.
        """
        shown = whitening_patches(batches.images, self.settings.network, LEARNED_IMAGES)
        if not self.history:
            self._note(None, shown, validation)
            on_validation(self)
        total = 0.0
        optimiser = self.settings.optimiser
        for batch in batches.steps(self.step, optimiser.num_steps):
            total += self.train_step(batch)
            self.step += 1
            is_last = self.step == optimiser.num_steps
            if self.step % optimiser.validation_steps and not is_last:
                continue
            if not math.isfinite(total):
                raise AttribError(f"the loss is not finite at step {self.step}; lower optimiser.learning_rate")
            self._note(total / (self.step - self.history[-1]["step"]), shown, validation)
            total = 0.0
            on_validation(self)
        self.network.load_state_dict(self.best)

    def train_step(self, batch: ExtractorBatch) -> float:
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

    def _note(self, loss: float | None, shown: WhiteningPatches, validation: Validation) -> None:
        whiten(self.network, "learned", shown)
        found = validation(Extractor(self.network, self.device))
        criterion = sum(found.values()) / len(found)
        if criterion > max((row["criterion"] for row in self.history), default=-math.inf):
            self.best = _copied(self.network)
        self.history.append({"step": self.step, "loss": loss, "criterion": criterion, **found})

    def progress(self) -> str:
        last, best = self.history[-1], max(row["criterion"] for row in self.history)
        loss = "-" if last["loss"] is None else f"{last['loss']:.4f}"
        accuracies = "  ".join(f"{degradation.name} {last[degradation.name]:.3f}" for degradation in VALIDATION)
        num_steps = self.settings.optimiser.num_steps
        return f"fingerprint: step {last['step']:,} of {num_steps:,}  loss {loss}  held-out models: {accuracies}  (best mean {best:.3f})"

    def state(self) -> dict:
        """Tensors and plain values only, so that it loads with torch.load(weights_only=True)."""
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
        self.schedule.last_epoch = self.step  # the rates are the optimiser's; load_state_dict wants lambdas


def started_network(images: PoolImages, settings: FingerprintSettings) -> FingerprintNetwork:
    """A network whose statistics are whitened by what varies between pictures; what is learned is drawn by the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = FingerprintNetwork(settings.network)
    shown = whitening_patches(images, settings.network, START_IMAGES)
    for name in STATISTICS:
        whiten(network, name, shown)
    return network


def whitening_patches(images: PoolImages, network: NetworkSettings, num_images: int) -> WhiteningPatches:
    """One patch of each model's first images, and max_patches of each photograph."""
    first = [of_model[:num_images] for of_model in images.training]
    models = _degraded_patches(first, network.patch_px, max_patches=1)
    return WhiteningPatches(models, _degraded_patches([images.photographs], network.patch_px, network.max_patches))


def _degraded_patches(classes: list[Tensor], patch_px: int, max_patches: int) -> list[Tensor]:
    return [
        torch.cat([patches(degrade(image, degradation), patch_px, max_patches) for image in images])
        for degradation in VALIDATION
        for images in classes
    ]


@torch.no_grad()
def whiten(network: FingerprintNetwork, name: PartName, shown: WhiteningPatches) -> None:
    """One part of the network as it is. What varies between pictures is, by half, what does within the pool's models, and what does between photographs:
    models smooth fine detail away, so that they alone would leave a real generator's content in it.

    Raises AttribError if what is learned is not finite, or alike for all pictures of each class: the statistics were whitened from the same pool
    before, so that it is the training which has gone wrong and not the pool.
    """
    found = []
    for classes in (shown.models, shown.photographs):
        rows = (_rows(network, name, cut) for cut in classes)
        found.append(model_statistics(_that_vary(rows) if name == "learned" else rows))
    mean = sum(statistics.means.mean(axis=0) for statistics in found) / 2
    mixed = sum(statistics.covariance / np.trace(statistics.covariance) for statistics in found)
    whitening = fit_whitening(mean, mixed, SHRINKAGE, without_level=False)
    network.whiten(name, torch.from_numpy(mean).float(), torch.from_numpy(whitening.projection).float())


def _rows(network: FingerprintNetwork, name: PartName, cut: Tensor) -> np.ndarray:
    """float32 [n, size] of one part, before any whitening."""
    device = network.mean.device
    return (
        torch.cat([network.parts(some.to(device), [name])[name] for some in cut.split(PATCHES_AT_ONCE)]).cpu().numpy()
    )


def _that_vary(groups: Iterable[np.ndarray]) -> list[np.ndarray]:
    """The same rows, float32 [n_g, size] of each class. A step that is too long is seen here before it is in a loss, which is of the weights before it."""
    groups = list(groups)
    # NaN fails the comparison, and np.max passes it on.
    if not np.max([np.ptp(rows, axis=0).max() for rows in groups]) > LEAST_SPREAD:
        raise AttribError(
            "what is learned is no longer finite, or the same for all images of each model; lower optimiser.learning_rate"
        )
    return groups


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Over the workers, in one message. Where all compute the same loss of gathered rows this gives the gradient of one process."""
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
