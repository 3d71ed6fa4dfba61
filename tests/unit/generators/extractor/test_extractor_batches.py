"""Batches of P models x K images, and the classification loss against a loop."""

import math

import pytest
import torch
import torch.nn.functional as F

from attrib.generators.extractor.batches import draw_batch
from attrib.generators.extractor.settings import ContrastSettings
from attrib.generators.extractor.training import classification


def draws(count: int, share: float, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    contrast = ContrastSettings(models_per_batch=5, images_per_model=4, same_content_share=share)
    return [draw_batch(9, 12, contrast, generator) for _ in range(count)]


def test_models_and_images_of_a_batch_are_distinct():
    for draw in draws(50, 0.5):
        assert draw.models.shape == (5,) and draw.images.shape == (5, 4)
        assert len(set(draw.models.tolist())) == 5 and 0 <= draw.models.min() and draw.models.max() < 9
        for row in draw.images.tolist():
            assert len(set(row)) == 4 and min(row) >= 0 and max(row) < 12
        assert draw.same_content == bool((draw.images == draw.images[0]).all())


def test_the_share_of_same_content_batches():
    assert all(draw.same_content for draw in draws(20, 1.0))
    assert not any(draw.same_content for draw in draws(20, 0.0))
    assert 60 < sum(draw.same_content for draw in draws(300, 0.3)) < 125


def test_all_models_and_images_are_drawn():
    found = draws(200, 0.5)
    assert set(torch.stack([draw.models for draw in found]).flatten().tolist()) == set(range(9))
    assert set(torch.stack([draw.images for draw in found]).flatten().tolist()) == set(range(12))
    again = draws(200, 0.5)
    assert all(torch.equal(a.images, b.images) and torch.equal(a.models, b.models) for a, b in zip(found, again))


def unit_vectors(count: int, dimension: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, dimension, dtype=torch.float64, generator=generator), dim=1)


def test_classification_is_the_cross_entropy_of_scaled_cosines():
    embeddings, prototypes, labels = unit_vectors(4, 3, 3), 5 * unit_vectors(6, 3, 4), [2, 0, 5, 5]
    expected = 0.0
    for row, label in zip(embeddings, labels):
        cosines = [float(row @ prototype / prototype.norm()) for prototype in prototypes]
        expected -= 7 * cosines[label] - math.log(sum(math.exp(7 * cosine) for cosine in cosines))
    found = classification(embeddings, prototypes, torch.tensor(labels), 7.0)
    assert float(found) == pytest.approx(expected / 4, rel=1e-9)
