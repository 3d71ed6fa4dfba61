"""Cluster unknown images into candidate generators by average linkage, with exemplars to view and to register.

Clusters are merged down to a cut, the cosine that best separates pairs of references of the same generator from pairs
of different generators. Copies of one image are no evidence of a generator, so a candidate needs distinct images.

The fingerprints of an image set may not fit into memory. They are read twice in batches: first for a sample, which is
clustered, then to assign all others. The result does not depend on the order of the images, except for which of several
copies is shown.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from attrib.data.ids import sampling_rank

MAX_CUT_REFERENCES = 20  # of each generator: pairs grow with the square
SAME_COSINE = 0.9999  # above it two images are copies; the last bits of a fingerprint depend on its batch
CUT_TOLERANCE = 1e-12  # so that clusters with a mean cosine equal to the cut are merged in spite of rounding

FingerprintBatches = Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]]


@dataclass(frozen=True, eq=False)
class Candidate:
    """One cluster of unknown images.

    ids: int64, ascending. num_distinct: number of images, copies counted once. exemplars: int64, ids of distinct
    images, nearest to the mean first. cohesion: mean cosine of two distinct images. clustered: float32 [m, d],
    fingerprints of its images in the sample.
    """

    ids: np.ndarray
    num_distinct: int
    exemplars: np.ndarray
    cohesion: float
    clustered: np.ndarray


def find_candidates(
    batches: FingerprintBatches, cut: float, *, max_clustered: int, min_images: int, num_exemplars: int
) -> list[Candidate]:
    """Clusters of at least min_images distinct images, the largest first. batches(): ids and unit rows float32 [n, d].

    A sample of max_clustered distinct images is clustered. Each other image joins the cluster with the highest mean
    cosine if this is at least the cut; a copy joins the cluster of its original. Memory: the sample, one batch, and 16
    bytes per image.
    """
    ids, vectors = _sample(batches(), max_clustered)
    if not len(ids):
        return []
    clusters = _Clusters(ids, vectors, average_linkage(vectors, cut), cut, num_exemplars)
    for some, rows in batches():
        clusters.add(some, rows)
    found = clusters.candidates(max(2, min_images))
    return sorted(found, key=lambda candidate: (-len(candidate.ids), candidate.ids[0]))


class _Clusters:
    """The clusters of a sample [s, d] and the images that joined them."""

    def __init__(self, ids: np.ndarray, vectors: np.ndarray, label: np.ndarray, cut: float, num_exemplars: int):
        order = np.argsort(label, kind="stable")
        self.vectors, self.label = vectors[order], label[order]
        self.cut, self.num_exemplars = cut, num_exemplars
        self.num_distinct = np.bincount(label)
        self.sizes = self.num_distinct.copy()
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.sums = np.add.reduceat(self.vectors.astype(np.float64), self.starts)
        self.seen = np.empty(0, np.uint64)
        self.joined: list[tuple[np.ndarray, np.ndarray]] = []
        own = np.einsum("sd,sd->s", self.vectors, (self.sums / self.sizes[:, None])[self.label])
        self.exemplars = self._best(ids[order], self.label, own)

    def add(self, ids: np.ndarray, vectors: np.ndarray) -> None:
        near = vectors @ self.vectors.T
        twin = near.argmax(axis=1)
        at = np.arange(len(near))
        is_copy = near[at, twin] > SAME_COSINE
        means = np.add.reduceat(near, self.starts, axis=1) / self.sizes
        label = np.where(is_copy, self.label[twin], means.argmax(axis=1))
        joins = is_copy | (means[at, label] >= self.cut)
        self.joined.append((ids[joins], label[joins].astype(np.int32)))
        others = np.flatnonzero(joins & ~is_copy)
        keys, first = np.unique(_keys(vectors[others]), return_index=True)
        place = np.searchsorted(self.seen, keys)
        is_new = place == np.searchsorted(self.seen, keys, "right")
        self.seen = np.insert(self.seen, place[is_new], keys[is_new])
        new = others[first[is_new]]
        np.add.at(self.sums, label[new], vectors[new])
        np.add.at(self.num_distinct, label[new], 1)
        added = ids[new], label[new], means[new, label[new]]
        self.exemplars = self._best(*map(np.concatenate, zip(self.exemplars, added)))

    def candidates(self, min_images: int) -> list[Candidate]:
        ids = np.concatenate([some for some, _ in self.joined])
        label = np.concatenate([labels for _, labels in self.joined])
        found = []
        for cluster in np.flatnonzero(self.num_distinct >= min_images):
            count, exemplars = int(self.num_distinct[cluster]), self.exemplars[0][self.exemplars[1] == cluster]
            mean = self.sums[cluster] / count
            cohesion = (count * float(mean @ mean) - 1) / (count - 1)
            own, clustered = np.sort(ids[label == cluster]), self.vectors[self.label == cluster]
            found.append(Candidate(own, count, exemplars, cohesion, clustered))
        return found

    def _best(self, ids: np.ndarray, label: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, ...]:
        """The num_exemplars images of highest score per cluster. Scores are rounded, so that batches do not matter."""
        order = np.lexsort((ids, -np.round(scores, 6), label))
        _, first = np.unique(label[order], return_index=True)
        place = np.arange(len(order)) - np.repeat(first, np.diff([*first, len(order)]))
        kept = order[place < self.num_exemplars]
        return ids[kept], label[kept], scores[kept]


def _sample(batches: Iterable[tuple[np.ndarray, np.ndarray]], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and vectors of the first `count` distinct fingerprints in the order of sampling_rank, without near copies."""
    held = None
    for ids, vectors in batches:
        some = ids, vectors, _keys(vectors)
        ids, vectors, keys = some if held is None else map(np.concatenate, zip(held, some))
        order = np.argsort(sampling_rank(ids), kind="stable")
        _, first = np.unique(keys[order], return_index=True)
        kept = order[np.sort(first)[:count]]
        held = ids[kept], vectors[kept], keys[kept]
    if held is None:
        return np.empty(0, np.int64), np.empty((0, 0), np.float32)
    ids, vectors, _ = held
    same = vectors @ vectors.T > SAME_COSINE
    kept = np.ones(len(ids), bool)
    for i in range(len(ids)):
        if kept[i]:
            kept[i + 1 :] &= ~same[i, i + 1 :]
    return ids[kept], vectors[kept]


def _keys(vectors: np.ndarray) -> np.ndarray:
    """uint64 [n]: a hash of each row as stored in float16."""
    digests = b"".join(hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in vectors.astype(np.float16))
    return np.frombuffer(digests, np.uint64)


def average_linkage(vectors: np.ndarray, cut: float) -> np.ndarray:
    """Cluster labels by average linkage, int64 [n], numbered 0, 1, ... by first appearance.

    Clusters of unit rows float32 [n, d] are merged while their mean cosine is at least the cut. Time and memory grow
    with n^2.
    """
    if len(vectors) == 1:
        return np.zeros(1, np.int64)
    # Rounding can take the cosine of equal vectors above 1; scipy refuses distances below 0.
    similarity = (vectors @ vectors.T).astype(np.float64)
    distances = np.maximum(0.0, squareform(1.0 - similarity, checks=False))
    label = fcluster(linkage(distances, "average"), 1.0 - cut + CUT_TOLERANCE, "distance")
    _, first, label = np.unique(label, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[label]


def reference_cut(references: list[np.ndarray]) -> float:
    """Cosine that best separates reference pairs of the same generator from pairs of different ones.

    Both error rates have the same weight. With one generator it is the 5th percentile of its pairs. references: unit
    rows float32 [r_g, d] of each generator or family.
    """
    references = [rows[:: -(-len(rows) // MAX_CUT_REFERENCES)] for rows in references]
    rows = np.concatenate(references)
    owner = np.repeat(np.arange(len(references)), [len(group) for group in references])
    first, second = np.triu_indices(len(rows), 1)
    cosine = np.einsum("nd,nd->n", rows[first], rows[second]).astype(np.float64)
    same = owner[first] == owner[second]
    if same.all():
        return float(np.percentile(cosine, 5))
    order = np.argsort(cosine, kind="stable")
    same = same[order]
    # For a cut above the i lowest pairs: shares of same-generator pairs below it and of other pairs above it.
    lost = np.concatenate([[0], np.cumsum(same)]) / same.sum()
    kept = 1 - np.concatenate([[0], np.cumsum(~same)]) / (~same).sum()
    best = int((lost + kept).argmin())
    edges = np.concatenate([[cosine[order[0]]], cosine[order], [cosine[order[-1]]]])
    return float((edges[best] + edges[best + 1]) / 2)
