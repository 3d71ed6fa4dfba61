"""Unknown images grouped into candidate generators: average-linkage clustering of fingerprints, with exemplars to look at and to register.

The cut is the registry's own: the cosine that best separates pairs of references of one generator from pairs of two. Everything is
deterministic and depends on the images alone, not on their order.
"""

from dataclasses import dataclass

import numpy as np

from attrib.identity import sampling_rank

MAX_CUT_REFERENCES = 20  # of each generator: pairs grow with the square


@dataclass(frozen=True)
class Candidate:
    """ids: int64, the images of a cluster, ascending; exemplars: int64, those nearest to its mean first; cohesion: mean cosine of two of them."""

    ids: np.ndarray
    exemplars: np.ndarray
    cohesion: float


def find_candidates(
    ids: np.ndarray, vectors: np.ndarray, cut: float, *, max_clustered: int, min_images: int, num_exemplars: int
) -> list[Candidate]:
    """Clusters of min_images or more, the largest first. ids: int64 [n]; vectors: float32 [n, d], unit rows.

    Of more than max_clustered images a sample is clustered, chosen by a hash of the ids; each other image joins the cluster to which its mean
    cosine is highest, if that is at least the cut.
    """
    if not len(ids):
        return []
    order = np.argsort(sampling_rank(ids), kind="stable")
    ids, vectors = ids[order], vectors[order]
    num_first = min(max_clustered, len(ids))
    label = np.full(len(ids), -1)
    label[:num_first] = average_linkage(vectors[:num_first], cut)
    sums = np.stack([vectors[label == cluster].mean(axis=0) for cluster in range(label.max() + 1)])
    if num_first < len(ids):
        near = vectors[num_first:] @ sums.T
        nearest = near.argmax(axis=1)
        joins = near[np.arange(len(near)), nearest] >= cut
        label[num_first:][joins] = nearest[joins]
    found = []
    for cluster in range(label.max() + 1):
        members = np.flatnonzero(label == cluster)
        if len(members) < max(2, min_images):
            continue
        mean = vectors[members].astype(np.float64).mean(axis=0)
        typical = np.lexsort((ids[members], -np.round(vectors[members] @ mean, 6)))[:num_exemplars]
        count = len(members)
        cohesion = (count * float(mean @ mean) - 1) / (count - 1)
        found.append(Candidate(np.sort(ids[members]), ids[members][typical], cohesion))
    return sorted(found, key=lambda candidate: (-len(candidate.ids), candidate.ids[0]))


def average_linkage(vectors: np.ndarray, cut: float) -> np.ndarray:
    """int64 [n], labels 0, 1, ... by first appearance: clusters are joined while the mean cosine between two of them is at least the cut.

    vectors: float32 [n, d], unit rows. By chains of nearest neighbours (Murtagh, Computer Journal 26, 1983), n^2 in time and memory.
    """
    count = len(vectors)
    similarity = (vectors @ vectors.T).astype(np.float64)
    np.fill_diagonal(similarity, -np.inf)
    size = np.ones(count)
    parent = np.arange(count)
    active = np.ones(count, bool)
    chain: list[int] = []
    for _ in range(count - 1):
        if not chain:
            chain = [int(np.flatnonzero(active)[0])]
        while True:
            last = chain[-1]
            nearest = int(similarity[last].argmax())
            # Equals go back along the chain, which otherwise might never end.
            if len(chain) > 1 and similarity[last, chain[-2]] >= similarity[last, nearest]:
                nearest = chain[-2]
            if len(chain) > 1 and nearest == chain[-2]:
                break
            chain.append(nearest)
        a, b = sorted((chain.pop(), chain.pop()))
        # Clusters that are further apart stay apart, but the chain needs them joined to go on.
        if similarity[a, b] >= cut:
            parent[b] = a
        merged = (size[a] * similarity[a] + size[b] * similarity[b]) / (size[a] + size[b])
        merged[[a, b]] = -np.inf
        merged[~active] = -np.inf
        similarity[a], similarity[:, a] = merged, merged
        similarity[b], similarity[:, b] = -np.inf, -np.inf
        size[a] += size[b]
        active[b] = False
    roots = np.arange(count)
    while not np.array_equal(roots, parent[roots]):
        roots = parent[roots]
    _, first, label = np.unique(roots, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[label]


def reference_cut(references: list[np.ndarray]) -> float:
    """The cosine at which pairs of references of one generator and of two are best told apart, both kinds of pairs counting the same.

    references: float32 [r_g, d] of each generator, or family, unit rows. With one generator, the 5th percentile of its pairs.
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
    # At a cut above the first i pairs: pairs of one generator lost, pairs of two kept.
    lost = np.concatenate([[0], np.cumsum(same)]) / same.sum()
    kept = 1 - np.concatenate([[0], np.cumsum(~same)]) / (~same).sum()
    best = int((lost + kept).argmin())
    edges = np.concatenate([[cosine[order[0]]], cosine[order], [cosine[order[-1]]]])
    return float((edges[best] + edges[best + 1]) / 2)
