"""Batches, validation and the training loop: exact draws, and resuming from a state."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.extractor import network_of, pool_images, settings, trained
from support.pool import smooth_images

from attrib.common.errors import AttribError
from attrib.generators.extractor.batches import ExtractorBatches, PoolImages, Validation, augmented
from attrib.generators.extractor.network import Extractor, FingerprintNetwork
from attrib.generators.extractor.training import LEARNED_IMAGES, ExtractorRun, classification, whiten, whitening_patches
from attrib.generators.signals.degradations import NONE, Degradation, degrade
from attrib.train.losses.contrastive import supervised_contrastive

CPU = torch.device("cpu")


def marked_pool() -> PoolImages:
    """The colour of a pixel is its model (red), image (green) and row (blue)."""
    images = torch.zeros(6, 20, 3, 24, 24, dtype=torch.uint8)
    images[:, :, 0] = torch.arange(6)[:, None, None, None]
    images[:, :, 1] = torch.arange(20)[None, :, None, None]
    images[:, :, 2] = torch.arange(24)[:, None]
    return PoolImages(list(images), [], images[0])


def test_labels_are_the_models_of_the_patches():
    given = settings(
        degraded_share=0.0, contrast={"models_per_batch": 4, "images_per_model": 3, "same_content_share": 0.5}
    )
    kinds = set()
    for batch in ExtractorBatches(marked_pool(), given, 0, 1).steps(0, 30):
        assert batch.patches.shape == (12, 3, 16, 16) and batch.patches.dtype == torch.uint8
        assert torch.equal(batch.patches[:, 0, 0, 0].long(), batch.labels)
        assert torch.equal(batch.labels, batch.labels[::3].repeat_interleave(3)) and len(batch.labels.unique()) == 4
        shown, tops = (batch.patches[:, channel, 0, 0].view(4, 3) for channel in (1, 2))
        assert all(len(row.unique()) == 3 for row in shown)
        same = bool((shown == shown[0]).all())
        assert not same or bool((tops == tops[0]).all())
        assert tops.max() <= 8
        kinds.add(same)
    assert kinds == {True, False}


def test_workers_split_a_batch_and_draws_depend_on_the_step_alone():
    given = settings(num_loaders=3)
    whole = list(ExtractorBatches(pool_images(), given, 0, 1).steps(0, 8))
    parts = [list(ExtractorBatches(pool_images(), given, rank, 2).steps(4, 8)) for rank in (0, 1)]
    for step, (first, second) in enumerate(zip(*parts), start=4):
        order = torch.tensor([0, 1, 2, 6, 7, 8, 3, 4, 5, 9, 10, 11])
        assert torch.equal(torch.cat([first.patches, second.patches]), whole[step].patches[order])
        assert torch.equal(torch.cat([first.labels, second.labels]), whole[step].labels[order])
    assert not torch.equal(whole[0].patches, whole[1].patches)


@pytest.mark.parametrize(
    "degradation", [Degradation("resize", 0.7), Degradation("crop", 0.67), Degradation("jpeg", 60), NONE]
)
def test_an_image_is_cut_before_or_after_the_degradation(degradation):
    image = smooth_images(1, 24, 1)[0]
    before, after = (augmented(image, degradation, torch.tensor([0.0, 0.0, order]), 16) for order in (0.1, 0.9))
    assert before.shape == after.shape == (3, 16, 16)
    assert torch.equal(after, degrade(image, degradation)[:, :16, :16])
    scale = degradation.strength if degradation.kind in ("resize", "crop") else 1
    side = min(24, math.ceil(16 / scale))
    assert torch.equal(before, degrade(image[:, :side, :side], degradation)[:, :16, :16])


def test_patches_start_at_every_multiple_of_the_period():
    image = torch.arange(37, dtype=torch.uint8).expand(3, 37, 37)
    lefts = {int(augmented(image, NONE, torch.tensor([0.0, x / 100, 0.9]), 16)[0, 0, 0]) for x in range(100)}
    assert lefts == {0, 8, 16}


class Chosen(Extractor):
    """An extractor that embeds by a function in place of a network."""

    def __init__(self, rule):
        self.rule, self.part_sizes, self.parts = rule, (2,), ("learned",)

    def embed_patches(self, cut):
        return F.normalize(self.rule(cut), dim=1)


def test_validation_is_the_share_of_identified_queries():
    held_out = [torch.full((15, 3, 16, 16), 10 * model + 5, dtype=torch.uint8) for model in range(4)]
    held_out[2][12] = held_out[0][0]  # one of five queries of model 2 looks like model 0
    validation = Validation(held_out, 16)
    angles = lambda cut: cut[:, 0, 8, 8].float() / 25  # noqa: E731
    found = validation(Chosen(lambda cut: torch.stack([angles(cut).cos(), angles(cut).sin()], dim=1)))
    assert found == {"none": pytest.approx(0.95), "jpeg-85": pytest.approx(0.95)}
    assert validation(Chosen(lambda cut: torch.ones(len(cut), 2)))["none"] == 0.0  # ties are wrong


class Scripted:
    """Returns the given criteria one after another."""

    def __init__(self, *criteria: float):
        self.criteria = list(criteria)

    def __call__(self, extractor: Extractor) -> dict[str, float]:
        return dict.fromkeys(("none", "jpeg-85"), self.criteria.pop(0))


def test_training_ends_with_the_weights_and_the_whitening_of_the_best_validation(one_thread):
    given, images, seen = settings(), pool_images(), []
    given = given.model_copy(update={"optimiser": given.optimiser.model_copy(update={"validation_steps": 2})})
    training = ExtractorRun(network_of(given), len(images.training), given, CPU)
    training.train(
        ExtractorBatches(images, given, 0, 1),
        Scripted(0.1, 0.3, 0.9, 0.5),
        lambda run: seen.append(run.state()["network"]),
    )
    assert [row["criterion"] for row in training.history] == pytest.approx([0.1, 0.3, 0.9, 0.5])
    kept = training.network.state_dict()
    for name in ("head.weight", "directions"):
        assert [torch.equal(kept[name], state[name]) for state in seen] == [False, False, True, False], name
    assert all(torch.equal(kept[name], value) for name, value in seen[2].items())


@pytest.mark.parametrize("weights", [(0.7, 1.3), (2.0, 0.0), (0.0, 2.0)])
def test_the_loss_of_a_step_is_the_weighted_sum_of_both(one_thread, weights):
    contrast = {"models_per_batch": 4, "images_per_model": 3, "temperature": 0.2, "class_scale": 10.0}
    contrast |= {"contrast_weight": weights[0], "classification_weight": weights[1]}
    given, images = settings(contrast=contrast), pool_images()
    batch = ExtractorBatches(images, given, 0, 1).make(0)
    training = ExtractorRun(network_of(given), len(images.training), given, CPU)
    with torch.no_grad():
        embedded = training.network.learned(batch.patches)
        expected = weights[0] * supervised_contrastive(embedded, batch.labels, 0.2)
        expected += weights[1] * classification(embedded, training.prototypes, batch.labels, 10.0)
    assert training.train_step(batch) == pytest.approx(float(expected), rel=1e-5)


def test_training_whitens_the_learned_part_alone(one_thread):
    """Weights and whitening are of the same validation."""
    images, given, start = pool_images(), settings(), network_of(settings())
    network = trained(given).network
    statistics = slice(0, network.columns("learned").start)
    learned = network.columns("learned")
    assert torch.equal(network.directions[statistics], start.directions[statistics])
    assert torch.equal(network.mean[statistics], start.mean[statistics])
    kept = network.directions[learned, learned].clone()
    assert not torch.equal(kept, start.directions[learned, learned])
    whiten(network, "learned", whitening_patches(images, given.network, LEARNED_IMAGES))
    torch.testing.assert_close(network.directions[learned, learned], kept)


def test_a_run_continues_from_its_state(one_thread):
    whole, states = trained(settings()), []
    images, given = pool_images(), settings()
    first = ExtractorRun(network_of(given), 6, given, CPU)

    class KilledError(Exception):
        pass

    def note(training):
        states.append(training.state())
        if training.step == 3:
            raise KilledError

    batches, validation = ExtractorBatches(images, given, 0, 1), Validation(images.held_out, 16)
    with pytest.raises(KilledError):
        first.train(batches, validation, note)
    second = ExtractorRun(FingerprintNetwork(given.network), 6, given, CPU)
    second.restore(states[-1])
    second.train(batches, validation, lambda _: None)
    assert second.history == whole.history
    for name, value in whole.network.state_dict().items():
        assert torch.equal(second.network.state_dict()[name], value), name


def test_a_loss_that_is_not_finite_is_an_error(one_thread):
    with pytest.raises(AttribError, match=r"not finite at step 3; lower optimiser\.learning_rate"):
        trained(settings(contrast={"models_per_batch": 4, "images_per_model": 3, "temperature": 1e-45}))


def test_weights_that_are_not_finite_are_an_error_before_whitening(one_thread):
    """The loss is still finite, because it belongs to the weights before the step."""
    optimiser = {"num_steps": 2, "learning_rate": 1e10, "warmup_share": 0, "validation_steps": 1}
    with pytest.raises(
        AttribError, match=r"training diverged: the learned part is NaN or infinite.*; lower optimiser\.learning_rate"
    ):
        trained(settings(optimiser=optimiser))


@pytest.mark.parametrize("noise", [0, 1e-9])
def test_a_constant_learned_part_is_reported_as_divergence(one_thread, noise):
    given = settings()
    network, shown = network_of(given), whitening_patches(pool_images(), given.network, LEARNED_IMAGES)
    whiten(network, "learned", shown)
    with torch.no_grad():
        network.head.weight.mul_(noise)
    with pytest.raises(AttribError, match=r"equal for all images of each model; lower optimiser\.learning_rate"):
        whiten(network, "learned", shown)
    whiten(network, "polyphase", shown)
