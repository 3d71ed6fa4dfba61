"""Outcomes on disk: what is read is what was written, and half of one is none."""

import io
import json
import os

import numpy as np
import pytest

from attrib.common.storage import Storage, join
from attrib.evaluate.ablation.results import ARRAYS, RECORD, read_outcome, write_outcome, write_vectors
from attrib.evaluate.ablation.variants import Outcome
from attrib.evaluate.collection import Collection
from attrib.evaluate.protocol import TruthRow, score_truth


def drawn_outcome(seed: int = 0) -> Outcome:
    """Real scores of drawn vectors, names beyond ASCII among them."""
    rng = np.random.default_rng(seed)
    sources, queries = (rng.standard_normal((n, 6)).astype(np.float32) for n in (9, 14))
    source_keys, query_keys = [f"日本/ü {i}.jpg" for i in range(9)], [f'q "{i}".jpg' for i in range(14)]
    truth = [TruthRow(key, role, f"g{i % 9}") for i, key in enumerate(query_keys) for role in ("content", "style")]
    scores = score_truth(
        Collection(source_keys, sources, {"group": [f"g{i}" for i in range(9)]}),
        Collection(query_keys, queries, {"method": [None, *["gan"] * 13]}),
        truth,
    )
    history = [
        {"epoch": -1, "loss": None, "criterion": 1 / 3},
        {"epoch": 0, "loss": np.float32(0.1), "criterion": np.float64(0.7)},
    ]
    return Outcome(scores, sources, queries, history)


def assert_same(found: Outcome, expected: Outcome) -> None:
    for name in ("sources", "queries"):
        mine, others = getattr(found, name), getattr(expected, name)
        assert mine.dtype == others.dtype == np.float32 and np.array_equal(mine, others)
    assert found.history == expected.history
    assert {**vars(found.scores), "values": None} == {**vars(expected.scores), "values": None}
    assert list(found.scores.values) == list(expected.scores.values)
    assert all(np.array_equal(found.scores.values[name], expected.scores.values[name]) for name in found.scores.values)


def test_what_is_read_is_what_was_written(tmp_path, local):
    storage, root = local, str(tmp_path / "store")
    expected = drawn_outcome()
    assert read_outcome(join(root, "a"), storage) is None
    write_outcome(join(root, "a"), expected, storage)
    write_outcome(join(root, "b"), drawn_outcome(1), storage)
    assert_same(read_outcome(join(root, "a"), storage), expected)
    write_outcome(join(root, "a"), drawn_outcome(2), storage)
    assert_same(read_outcome(join(root, "a"), storage), drawn_outcome(2))


def test_the_record_is_plain_json_and_the_arrays_hold_no_objects(local, tmp_path):
    write_outcome(str(tmp_path), drawn_outcome(), local)
    assert sorted(os.listdir(tmp_path)) == sorted([ARRAYS, RECORD])
    record = json.loads((tmp_path / RECORD).read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert record["history"][0] == {"epoch": -1, "loss": None, "criterion": 1 / 3}
    assert record["history"][1]["loss"] == float(np.float32(0.1))
    with np.load(tmp_path / ARRAYS, allow_pickle=False) as arrays:
        assert {name: arrays[name].dtype.kind for name in arrays.files} == dict.fromkeys(
            ["sources", "queries", "ap", "recall_at_1", "recall_at_10"], "f"
        )


class Bomb:
    """What a pickle could do."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_nothing_that_is_read_is_executed(local, tmp_path):
    folder, mark = str(tmp_path / "outcome"), str(tmp_path / "executed")
    expected = drawn_outcome()
    write_outcome(folder, expected, local)
    buffer = io.BytesIO()
    arrays = {"sources": np.array([Bomb(mark)], dtype=object), "queries": expected.queries, **expected.scores.values}
    np.savez(buffer, **arrays)
    local.write_bytes(join(folder, ARRAYS), buffer.getvalue())
    with pytest.raises(ValueError, match="allow_pickle=False"):
        read_outcome(folder, local)
    assert not os.path.exists(mark)


class Killed(Exception):
    pass


class DyingStorage(Storage):
    """The process ends after a number of files."""

    num_left = 1

    def write_bytes(self, uri, data):
        if not self.num_left:
            raise Killed
        self.num_left -= 1
        super().write_bytes(uri, data)


def test_an_outcome_half_written_is_none(local, tmp_path):
    folder = str(tmp_path / "outcome")
    with pytest.raises(Killed):
        write_outcome(folder, drawn_outcome(), DyingStorage(local.settings))
    assert os.listdir(folder) == [ARRAYS]  # the record is what declares it whole
    assert read_outcome(folder, local) is None
    write_outcome(folder, drawn_outcome(), local)
    assert_same(read_outcome(folder, local), drawn_outcome())


def test_vectors_stand_beside_their_files(local, tmp_path):
    outcome = drawn_outcome()
    files = [[f"sources/日本/ü {i}.jpg" for i in range(9)], [f"queries/{'long' * i}.jpg" for i in range(14)]]
    write_vectors(str(tmp_path / "vectors" / "v.npz"), files, outcome, local)
    with np.load(tmp_path / "vectors" / "v.npz", allow_pickle=False) as arrays:
        assert arrays.files == ["source_files", "query_files", "sources", "queries"]
        assert [arrays["source_files"].tolist(), arrays["query_files"].tolist()] == files
        assert np.array_equal(arrays["sources"], outcome.sources) and arrays["sources"].dtype == np.float32
        assert np.array_equal(arrays["queries"], outcome.queries) and arrays["queries"].dtype == np.float32
