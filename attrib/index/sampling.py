"""Samples of embeddings that do not depend on how the embeddings are partitioned."""

import numpy as np

from attrib.common.storage import Storage
from attrib.data.ids import sampling_rank
from attrib.embed.embeddings import Embeddings, read_vectors
from attrib.runtime.tasks import run_all


def sampling_rank_limit(wanted: int, num_vectors: int) -> np.uint64:
    """Return a limit of sampling_rank that at least `wanted` images do not exceed (margin: six standard deviations)."""
    share = min(1.0, (wanted + 6 * wanted**0.5 + 8) / max(1, num_vectors))
    return np.uint64(min(share * 2**64, 2**64 - 2048))


def lowest_ranked(ids: np.ndarray, vectors: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and vectors of the `count` images with the lowest sampling_rank, in that order."""
    order = np.argsort(sampling_rank(ids))[:count]
    return ids[order], vectors[order]


def sample_vectors(embeddings: Embeddings, num_wanted: int, storage: Storage) -> tuple[np.ndarray, np.ndarray]:
    """Return ids int64 [n] and vectors float16 [n, d] of the (at most num_wanted) images of lowest sampling_rank."""
    threshold = sampling_rank_limit(num_wanted, sum(embeddings.num_embedded))
    units = [(embeddings, p, threshold, storage) for p, rows in enumerate(embeddings.num_embedded) if rows]
    found = run_all(_sample_partition, units, "sample", "partitions", [1] * len(units))
    ids, vectors = (np.concatenate(column) for column in zip(*found))
    return lowest_ranked(ids, vectors, num_wanted)


def _sample_partition(
    embeddings: Embeddings, partition: int, threshold: np.uint64, storage: Storage
) -> tuple[np.ndarray, np.ndarray]:
    ids, vectors = read_vectors(embeddings, partition, storage)
    chosen = sampling_rank(ids) <= threshold
    return ids[chosen], vectors[chosen]
