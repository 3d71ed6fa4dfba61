"""Recall and the choice of nprobe, compared with real searches, naive loops and FAISS."""

import numpy as np
import pytest
from faiss.contrib.evaluation import knn_intersection_measure
from support.shards import exact_scores, make_index, make_plan, nearest, open_index_shards

from attrib.index.normalize import unit_rows
from attrib.index.recall import recall, recall_by_nprobe, smallest_nprobe, without_self
from attrib.index.search import merge, search_shard

NUM_LISTS, K = 12, 5


@pytest.fixture(scope="module")
def collection():
    generator = np.random.default_rng(8)
    vectors = generator.standard_normal((800, 12)).astype(np.float16)
    return generator.choice(1 << 62, 800, replace=False), vectors


def naive_recall(found: np.ndarray, truth: np.ndarray) -> float:
    hits = total = 0
    for f, t in zip(found.tolist(), truth.tolist()):
        wanted = [i for i in t if i >= 0]
        hits += sum(i in f for i in wanted)
        total += len(wanted)
    return hits / total if total else 0.0


def test_recall_by_nprobe_equals_measured_searches(collection, tmp_path, monkeypatch):
    monkeypatch.setattr("attrib.index.recall.LIST_ORDER_QUERIES", 32)
    ids, vectors = collection
    queries = unit_rows(vectors[:70] + np.random.default_rng(9).standard_normal((70, 12)))
    records = make_index(tmp_path, ids, vectors, make_plan("ivf_flat", NUM_LISTS), np.arange(800) % 2)
    shards = open_index_shards(tmp_path, records)
    truth, _ = nearest(exact_scores(queries, vectors), ids, K)
    truth[3, 2:] = -1  # a query with fewer neighbours
    list_of = dict(zip(ids.tolist(), shards[0].quantizer.quantizer.assign(unit_rows(vectors), 1)[:, 0].tolist()))
    neighbour_lists = np.array([[list_of.get(i, -1) for i in row] for row in truth.tolist()])
    predicted = recall_by_nprobe(shards[0].quantizer, queries, neighbour_lists)
    assert predicted.shape == (NUM_LISTS,)
    measured = []
    for nprobe in range(1, NUM_LISTS + 1):
        found = merge([search_shard(shard, queries, K, K, nprobe, False) for shard in shards], K)
        table = without_self(np.full(len(queries), -1), found.query, found.id, K)
        measured.append(naive_recall(table, truth))
        assert recall(table, truth) == pytest.approx(measured[-1])
    np.testing.assert_allclose(predicted, measured, atol=1e-12)
    assert measured[0] < 0.7 and measured[-1] == 1.0
    for target in (0.5, 0.9, 0.99, 1.0):
        smallest = 1 + next(i for i, value in enumerate(measured) if value >= target)
        assert int(np.searchsorted(predicted, target)) + 1 == smallest


def test_recall_by_nprobe_without_any_neighbour(collection, tmp_path):
    ids, vectors = collection
    records = make_index(tmp_path, ids, vectors, make_plan("ivf_flat", NUM_LISTS), np.zeros(800, int))
    lists = open_index_shards(tmp_path, records)[0].quantizer
    nothing = np.full((4, K), -1)
    assert recall_by_nprobe(lists, unit_rows(vectors[:4]), nothing).tolist() == [0.0] * NUM_LISTS


def test_recall_equals_a_naive_loop_and_faiss():
    generator = np.random.default_rng(10)
    for _ in range(20):
        truth = np.stack([generator.choice(12, 6, replace=False) for _ in range(9)])
        found = np.stack([generator.choice(12, 6, replace=False) for _ in range(9)])
        assert recall(found, truth) == pytest.approx(knn_intersection_measure(found, truth))
        truth[generator.random(truth.shape) < 0.2] = -1
        found[generator.random(found.shape) < 0.2] = -1
        assert recall(found, truth) == pytest.approx(naive_recall(found, truth))
    assert recall(np.full((2, 3), -1), np.full((2, 3), -1)) == 0.0


def test_without_self_equals_a_naive_loop():
    generator = np.random.default_rng(11)
    query_ids = generator.choice(50, 8, replace=False)
    rows = {i: generator.choice(50, generator.integers(0, 7), replace=False).tolist() for i in range(8)}
    rows[2], rows[5] = [], [int(query_ids[5])]  # one that found nothing, one that found itself only
    rows[6] = [int(query_ids[6]), 60, 61, 62, 63, 64]
    rows[7] = [70, 71, 72, int(query_ids[7])]
    query = np.repeat(np.arange(8), [len(rows[i]) for i in range(8)])
    ids = np.array([i for row in range(8) for i in rows[row]])
    for k in (1, 4, 9):
        expected = []
        for i in range(8):
            others = [found for found in rows[i] if found != query_ids[i]][:k]
            expected.append(others + [-1] * (k - len(others)))
        assert without_self(query_ids, query, ids, k).tolist() == expected


@pytest.mark.parametrize("first", [1, 5, 37])
def test_smallest_nprobe_tries_few_values(first):
    tried = []

    def measure(nprobe):
        tried.append(nprobe)
        return min(1.0, nprobe / 50)

    assert smallest_nprobe(measure, first, 1000, 0.8) == (40, 0.8)
    assert len(tried) <= 20


def test_smallest_nprobe_stops_where_recall_stops_rising():
    tried = []

    def measure(nprobe):
        tried.append(nprobe)
        return min(0.7, nprobe / 10)

    nprobe, found = smallest_nprobe(measure, 4, 65_536, 0.99)
    assert found == 0.7 and 7 <= nprobe <= 8 and max(tried) <= 10
    assert smallest_nprobe(lambda nprobe: nprobe / 100, 1, 8, 0.99) == (8, 0.08)
    assert smallest_nprobe(lambda nprobe: 1.0, 0, 0, 0.99) == (0, 1.0)
