"""A sample of embeddings that is the same however they are partitioned."""

import numpy as np

from attrib.common.progress import Progress
from attrib.common.storage import Storage
from attrib.data.ids import sampling_rank
from attrib.embed.embeddings import Embeddings, read_vectors
from attrib.index.recall import lowest_ranked, sample_threshold
from attrib.runtime.tasks import run_units


def sample_vectors(embeddings: Embeddings, num_wanted: int, storage: Storage) -> tuple[np.ndarray, np.ndarray]:
    """ids int64 [n] and vectors float16 [n, d] of the `num_wanted` images (fewer, if there are) first in the order of sampling_rank."""
    threshold = sample_threshold(num_wanted, sum(embeddings.num_embedded))
    parts = [p for p, rows in enumerate(embeddings.num_embedded) if rows]
    progress = Progress("sample", len(parts), "partitions")
    found = {}
    for i, sampled in run_units(_sample_partition, ((embeddings, p, threshold, storage) for p in parts)):
        found[i] = sampled
        progress.update(1)
    progress.close()
    ids, vectors = (np.concatenate([found[i][column] for i in sorted(found)]) for column in (0, 1))
    return lowest_ranked(ids, vectors, num_wanted)


def _sample_partition(
    embeddings: Embeddings, partition: int, threshold: np.uint64, storage: Storage
) -> tuple[np.ndarray, np.ndarray]:
    ids, vectors = read_vectors(embeddings, partition, storage)
    chosen = sampling_rank(ids) <= threshold
    return ids[chosen], vectors[chosen]
