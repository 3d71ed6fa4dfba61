"""Search, compared with brute force over the stored vectors, for every kind and sharding, with ties."""

import faiss
import numpy as np
import pytest
from support.shards import KINDS, exact_scores, flat_shard, make_index, make_plan, nearest, open_index_shards

from attrib.index import search
from attrib.index import shard as shard_module
from attrib.index.cpu_kernel import SCAN_TOLERANCE
from attrib.index.normalize import unit_rows
from attrib.index.search import Candidates, merge, probed_lists, ranks, search_shard

NUM_LISTS, K = 8, 10
COMPRESSED = ("ivf_sq8", "ivf_pq")


@pytest.fixture(scope="module")
def collection():
    """Unsorted ids int64 [n] and clustered vectors float16 [n, d]: 60 are equal, 30 differ in one last bit."""
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((12, 24))
    vectors = (centres[generator.integers(0, 12, 700)] + 0.5 * generator.standard_normal((700, 24))).astype(np.float16)
    vectors[100:160] = vectors[100]
    vectors[200:230] = vectors[200]
    bits = vectors[200:230].view(np.uint16)
    bits[np.arange(30), np.arange(30) % 24] += 1
    return generator.choice(1 << 62, 700, replace=False), vectors


@pytest.fixture(scope="module")
def queries(collection):
    """Unit vectors float32 [m, d]: sources, the repeated vector, a near-duplicate, and vectors of no source."""
    _, vectors = collection
    generator = np.random.default_rng(1)
    fresh = generator.standard_normal((40, 24)) + vectors[:40]
    return unit_rows(np.concatenate([vectors[[100, 205, 3]], fresh, vectors[300:320]]))


@pytest.fixture(scope="module")
def open_shards(collection, tmp_path_factory):
    """open_shards(kind, num_shards): the shards of an index of the collection; image i is in shard i % num_shards."""
    made = {}

    def open_shards(kind, num_shards):
        if (kind, num_shards) not in made:
            ids, vectors = collection
            folder = tmp_path_factory.mktemp(f"{kind}-{num_shards}")
            records = make_index(folder, ids, vectors, make_plan(kind, NUM_LISTS), np.arange(len(ids)) % num_shards)
            made[kind, num_shards] = open_index_shards(folder, records)
        return made[kind, num_shards]

    return open_shards


def search_all(shards, queries, k, num_candidates, nprobe, kind):
    compressed = kind in COMPRESSED
    parts = [search_shard(shard, queries, k, num_candidates, nprobe, compressed) for shard in shards]
    return merge(parts, k, num_candidates if compressed else None)


def assert_same(found: Candidates, expected: tuple[np.ndarray, np.ndarray]) -> None:
    """expected: ids and scores [n, k], padded with id -1 at the end."""
    ids, scores = expected
    real = ids >= 0
    assert np.array_equal(found.query, np.nonzero(real)[0])
    assert np.array_equal(found.id, ids[real])
    np.testing.assert_allclose(found.score, scores[real], rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_queries", [1, 3, 60])
@pytest.mark.parametrize("num_shards", [1, 2, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_full_probe_equals_brute_force(kind, num_shards, num_queries, collection, queries, open_shards, monkeypatch):
    monkeypatch.setattr(search, "BLOCK_ROWS", 128)
    ids, vectors = collection
    num_candidates = len(ids) if kind in COMPRESSED else 20
    found = search_all(open_shards(kind, num_shards), queries[:num_queries], K, num_candidates, NUM_LISTS, kind)
    assert_same(found, nearest(exact_scores(queries[:num_queries], vectors), ids, K))


@pytest.mark.parametrize("kind", KINDS)
def test_results_do_not_depend_on_block_sizes(kind, queries, open_shards, monkeypatch):
    expected = search_all(open_shards(kind, 2), queries, K, 40, 5, kind)
    assert len(expected.id) == K * len(queries)
    monkeypatch.setattr(search, "BLOCK_ROWS", 23)
    monkeypatch.setattr(search, "SCORE_CELLS", 200)
    monkeypatch.setattr(search, "SCAN_CELLS", 100)
    monkeypatch.setattr(search, "RESCORE_BYTES", 8 * 24 * 7)
    monkeypatch.setattr(search, "MAX_KEPT", 0)
    found = search_all(open_shards(kind, 2), queries, K, 40, 5, kind)
    assert_same(found, (expected.id.reshape(-1, K), expected.score.reshape(-1, K)))


@pytest.mark.parametrize("num_shards", [1, 2, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_ties_beyond_the_candidates_are_resolved_exactly(kind, num_shards, collection, open_shards):
    """Of 60 equal vectors the lowest ids win; of 30 vectors with equal codes, the nearest."""
    ids, vectors = collection
    near = unit_rows(vectors[[100, 205, 229]])
    found = search_all(open_shards(kind, num_shards), near, K, K, NUM_LISTS, kind)
    assert_same(found, nearest(exact_scores(near, vectors), ids, K))
    assert np.array_equal(found.id[:K], np.sort(ids[100:160])[:K])


@pytest.mark.parametrize("num_queries", [3, 60])
@pytest.mark.parametrize("kind", ["ivf_flat", "ivf_sq8", "ivf_pq"])
def test_results_do_not_depend_on_sharding(kind, num_queries, queries, open_shards):
    one, two, five = (search_all(open_shards(kind, n), queries[:num_queries], K, 2 * K, 3, kind) for n in (1, 2, 5))
    for other in (two, five):
        assert_same(other, (one.id.reshape(-1, K), one.score.reshape(-1, K)))


def in_probed_lists(template: faiss.IndexIVF, queries: np.ndarray, vectors: np.ndarray, nprobe: int) -> np.ndarray:
    """Return bool [n, m]: vector j is in one of the nprobe lists nearest to query i, by float64 distances."""
    centroids = template.quantizer.reconstruct_n(0, template.nlist).astype(np.float64)
    distances = [((rows[:, None] - centroids) ** 2).sum(axis=2) for rows in (queries, unit_rows(vectors))]
    probed = np.argsort(distances[0], axis=1)[:, :nprobe]
    return (probed[:, :, None] == distances[1].argmin(axis=1)).any(axis=1)


@pytest.mark.parametrize("nprobe", [1, 2, 5])
@pytest.mark.parametrize("num_queries", [2, 60])
@pytest.mark.parametrize("kind", ["ivf_flat", "ivf_sq8", "ivf_pq"])
def test_partial_probe_equals_brute_force_over_the_probed_lists(
    kind, num_queries, nprobe, collection, queries, open_shards
):
    ids, vectors = collection
    shards, queries = open_shards(kind, 2), queries[3 : 3 + num_queries]
    probed = in_probed_lists(shards[0].quantizer, queries, vectors, nprobe)
    assert 0 < probed.sum() < probed.size
    found = search_all(shards, queries, K, len(ids), nprobe, kind)
    assert_same(found, nearest(np.where(probed, exact_scores(queries, vectors), -np.inf), ids, K))


def test_precomputed_lists_give_the_same_results(queries, open_shards, monkeypatch):
    shards = open_shards("ivf_flat", 2)
    expected = search_all(shards, queries, K, K, 3, "ivf_flat")
    lists = probed_lists(shards[0].quantizer, queries, 3)
    assert lists.shape == (len(queries), 3) and lists.dtype == np.int32
    monkeypatch.setattr(search, "SCAN_CELLS", 60)
    found = merge([search_shard(shard, queries, K, K, 3, False, lists=lists) for shard in shards], K)
    assert np.array_equal(found.id, expected.id) and np.array_equal(found.score, expected.score)


@pytest.mark.parametrize("kind", KINDS)
def test_k_beyond_the_vectors_and_shards_of_one_vector(kind, collection, queries, tmp_path):
    ids, vectors = collection
    ids, vectors = ids[:9], vectors[:9]
    partition_of = np.array([0, 1, 1, 1, 1, 1, 1, 1, 2])
    shards = open_index_shards(tmp_path, make_index(tmp_path, ids, vectors, make_plan(kind, 3), partition_of))
    for num_queries in (2, 60):
        found = search_all(shards, queries[:num_queries], 12, 24, 3, kind)
        assert_same(found, nearest(exact_scores(queries[:num_queries], vectors), ids, 12))


@pytest.mark.parametrize("kind", KINDS)
def test_no_queries(kind, queries, open_shards):
    found = search_shard(open_shards(kind, 1)[0], queries[:0], K, 80, NUM_LISTS, kind in COMPRESSED)
    assert [len(found.query), len(found.id), len(found.scan_score), len(found.score)] == [0] * 4
    assert found.query.dtype == found.id.dtype == np.int64 and found.score.dtype == np.float32
    assert len(merge([found], K, 80).id) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_results_do_not_depend_on_threads(kind, queries, open_shards):
    before = faiss.omp_get_max_threads()
    try:
        found = []
        for threads in (1, 2):
            faiss.omp_set_num_threads(threads)
            found.append(search_all(open_shards(kind, 1), queries, K, 2 * K, 3, kind))
    finally:
        faiss.omp_set_num_threads(before)
    assert_same(found[1], (found[0].id.reshape(-1, K), found[0].score.reshape(-1, K)))


@pytest.mark.parametrize("kind", COMPRESSED)
def test_more_candidates_raise_recall(kind, collection, queries, open_shards):
    """Recall with the default rerank factor; codes of one byte per 6 dimensions lose much precision."""
    ids, vectors = collection
    queries = queries[3:]
    truth, _ = nearest(exact_scores(queries, vectors), ids, K)
    recalls = []
    for factor in (1, 2, 8):
        found = search_all(open_shards(kind, 2), queries, K, factor * K, NUM_LISTS, kind).id.reshape(-1, K)
        recalls.append(np.mean([len(set(f) & set(t)) / K for f, t in zip(found.tolist(), truth.tolist())]))
    if kind == "ivf_pq":
        assert 0.3 < recalls[0] < recalls[1] < recalls[2]
    else:
        assert 0.9 < recalls[0] <= recalls[1] <= recalls[2]
    assert recalls[2] > {"ivf_pq": 0.9, "ivf_sq8": 0.999}[kind]


@pytest.mark.parametrize("dimension", [7, 256, 2048])
@pytest.mark.parametrize("spread", [1.0, 1e-3])  # of the vectors around a common direction; small: all but identical
def test_scan_scores_stay_well_within_their_tolerance(spread, dimension):
    generator = np.random.default_rng(2)
    vectors = np.abs(generator.standard_normal(dimension)) + spread * generator.standard_normal((300, dimension))
    vectors = vectors.astype(np.float16)
    queries = unit_rows(vectors[:40])
    expected = exact_scores(queries, vectors)
    for num_queries in (1, 40):
        found = search_shard(flat_shard(np.arange(300), vectors), queries[:num_queries], 300, 300, 0, False)
        error = np.abs(found.scan_score - expected[found.query, found.id]).max()
        assert 0 < error < SCAN_TOLERANCE / 4


def test_smallest_and_largest_float16_vectors_are_normalised():
    """Denormal and very large components must neither vanish nor overflow in the normalisation."""
    tiny, huge = np.float16(6e-8), np.float16(65504)
    vectors = np.array([[tiny, 0, 0, 0], [huge, huge, huge, huge], [0, -huge, 0, tiny], [0, 0, 1, 0]], np.float16)
    assert (vectors != 0).any(axis=1).all()
    queries = unit_rows(vectors)
    found = search_shard(flat_shard(np.arange(4), vectors), queries, 4, 4, 0, False)
    assert_same(found, nearest(exact_scores(queries, vectors), np.arange(4), 4))
    assert found.score[found.query == found.id] == pytest.approx(1.0, abs=1e-6)


def test_merge_equals_a_naive_loop():
    generator = np.random.default_rng(3)
    parts, by_query = [], {}
    for part in range(3):
        size = (40, 0, 25)[part]
        query = generator.integers(0, 6, size)
        ids = 100 * part + generator.permutation(size)
        scan, score = (generator.integers(0, 6, (2, size)) / 8).astype(np.float32)
        parts.append(Candidates(query, ids, scan, score))
        for row in zip(query.tolist(), ids.tolist(), scan.tolist(), score.tolist()):
            by_query.setdefault(row[0], []).append(row)
    for num_candidates in (None, 3, 8, 50):
        expected = []
        for query in sorted(by_query):
            rows = by_query[query]
            if num_candidates is not None:
                scans = sorted((row[2] for row in rows), reverse=True)
                floor = scans[num_candidates - 1] if len(scans) >= num_candidates else -np.inf
                rows = [row for row in rows if row[2] >= floor]
            expected += sorted(rows, key=lambda row: (-row[3], row[1]))[:4]
        found = merge(parts, 4, num_candidates)
        columns = found.query.tolist(), found.id.tolist(), found.scan_score.tolist(), found.score.tolist()
        assert list(zip(*columns)) == expected


def test_ranks():
    assert ranks(np.array([2, 2, 2, 5, 7, 7])).tolist() == [0, 1, 2, 0, 0, 1]
    assert ranks(np.empty(0, np.int64)).tolist() == []


def test_shard_does_not_depend_on_the_block_size_of_the_build(collection, queries, open_shards, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_module, "BLOCK_BYTES", 4 * 24 * 64)
    ids, vectors = collection
    records = make_index(tmp_path, ids, vectors, make_plan("ivf_flat", NUM_LISTS), np.zeros(len(ids), int))
    found = search_all(open_index_shards(tmp_path, records), queries, K, 80, NUM_LISTS, "ivf_flat")
    assert_same(found, nearest(exact_scores(queries, vectors), ids, K))
