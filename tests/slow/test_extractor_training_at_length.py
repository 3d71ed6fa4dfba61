"""The extractor learns to identify models within 120 steps."""

import math

import torch
from support.extractor import lattices, network_of, settings
from support.pool import smooth_images

from attrib.generators.extractor.batches import ExtractorBatches, PoolImages, Validation
from attrib.generators.extractor.network import Extractor, ExtractorPart
from attrib.generators.extractor.training import ExtractorRun

CPU = torch.device("cpu")


def test_training_learns(one_thread):
    """The learned part identifies trained models on new photographs, and models that were not trained on."""
    photographs = smooth_images(60, 24, 0)
    images = PoolImages([lattices(photographs[:30], seed) for seed in range(8)], [], photographs[:30])
    same_models, other_models = (
        Validation([lattices(photographs[30:], seed) for seed in seeds], 16) for seeds in (range(8), range(50, 58))
    )
    given = settings(
        contrast={"models_per_batch": 6, "images_per_model": 3},
        optimiser={"num_steps": 120, "learning_rate": 3e-3, "validation_steps": 40},
        degraded_share=0.0,
    )
    training = ExtractorRun(network_of(given), len(images.training), given, CPU)
    found = []

    def judged(extractor: Extractor) -> dict[str, float]:
        learned = ExtractorPart(extractor, "learned")
        found.append(same_models(learned)["none"])
        return other_models(learned)

    trainable = dict(training.network.named_parameters()) | {"prototypes": training.prototypes}
    start = {name: parameter.detach().clone() for name, parameter in trainable.items()}
    training.train(ExtractorBatches(images, given, 0, 1), judged, lambda _: None)
    assert [row["step"] for row in training.history] == [0, 40, 80, 120]
    assert found[0] < 0.5 and found[-1] > 0.9, found
    first, *_, last = (row["none"] for row in training.history)
    assert last > first + 0.25, (first, last)
    chance = math.log(6 * 3 - 1) + math.log(8)
    assert training.history[-1]["loss"] < chance / 2
    for name, parameter in trainable.items():
        assert not torch.equal(start[name], parameter), name
