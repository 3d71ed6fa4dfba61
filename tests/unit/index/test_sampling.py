"""Samples of embeddings: independent of partitions, and of the requested size."""

import numpy as np
import pytest

from attrib.data.ids import sampling_rank
from attrib.index.sampling import lowest_ranked, sampling_rank_limit


@pytest.mark.parametrize("wanted", [1, 30, 300, 800, 5000])
def test_sample_does_not_depend_on_partitions(wanted):
    generator = np.random.default_rng(8)
    vectors = generator.standard_normal((800, 12)).astype(np.float16)
    ids = generator.choice(1 << 62, 800, replace=False)
    threshold = sampling_rank_limit(wanted, len(ids))
    order = sorted(range(len(ids)), key=lambda i: int(sampling_rank(ids[i : i + 1])[0]))[:wanted]
    generator = np.random.default_rng(12)
    for num_partitions in (1, 3, 40):
        partition_of, shuffled = generator.integers(0, num_partitions, len(ids)), generator.permutation(len(ids))
        parts = [shuffled[partition_of == p] for p in range(num_partitions)]
        kept = np.concatenate([part[sampling_rank(ids[part]) <= threshold] for part in parts])
        sampled_ids, sampled = lowest_ranked(ids[kept], vectors[kept], wanted)
        assert np.array_equal(sampled_ids, ids[order]) and np.array_equal(sampled, vectors[order])


def test_threshold_admits_slightly_more_than_the_requested_images():
    ids = np.random.default_rng(13).choice(1 << 62, 100_000, replace=False)
    for wanted in (10, 1_000, 20_000):
        num_sampled = (sampling_rank(ids) <= sampling_rank_limit(wanted, len(ids))).sum()
        assert wanted <= num_sampled <= wanted + 12 * wanted**0.5 + 40
