"""Results of variants on disk: they are read as written, and unfinished ones are ignored."""

import io
import json
import os

import numpy as np
import pytest

from attrib.common.errors import AttribError
from attrib.common.json_records import CHECKSUM
from attrib.common.storage import Storage, join
from attrib.evaluate.ablation.results import ARRAYS, RECORD, read_result, write_result, write_vectors
from attrib.evaluate.ablation.variants import VariantResult
from attrib.evaluate.collection import Collection
from attrib.evaluate.protocol import TruthRow, score_truth


def drawn_result(seed: int = 0) -> VariantResult:
    """Scores of random vectors, with names that are not ASCII."""
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
    return VariantResult(scores, sources, queries, history)


def assert_same(found: VariantResult, expected: VariantResult) -> None:
    for name in ("sources", "queries"):
        mine, others = getattr(found, name), getattr(expected, name)
        assert mine.dtype == others.dtype == np.float32 and np.array_equal(mine, others)
    assert found.history == expected.history
    assert {**vars(found.scores), "values": None} == {**vars(expected.scores), "values": None}
    assert list(found.scores.values) == list(expected.scores.values)
    assert all(np.array_equal(found.scores.values[name], expected.scores.values[name]) for name in found.scores.values)


def test_results_are_read_as_they_were_written(tmp_path, local):
    storage, root = local, str(tmp_path / "store")
    expected = drawn_result()
    assert read_result(join(root, "a"), storage) is None
    write_result(join(root, "a"), expected, storage)
    write_result(join(root, "b"), drawn_result(1), storage)
    assert_same(read_result(join(root, "a"), storage), expected)
    write_result(join(root, "a"), drawn_result(2), storage)
    assert_same(read_result(join(root, "a"), storage), drawn_result(2))


def test_the_record_is_plain_json_and_the_arrays_hold_no_objects(local, tmp_path):
    write_result(str(tmp_path), drawn_result(), local)
    assert sorted(os.listdir(tmp_path)) == sorted([ARRAYS, RECORD])
    record = json.loads((tmp_path / RECORD).read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert record["history"][0] == {"epoch": -1, "loss": None, "criterion": 1 / 3}
    assert record["history"][1]["loss"] == float(np.float32(0.1))
    with np.load(tmp_path / ARRAYS, allow_pickle=False) as arrays:
        assert {name: arrays[name].dtype.kind for name in arrays.files} == dict.fromkeys(
            ["sources", "queries", "ap", "recall_at_1", "recall_at_10"], "f"
        )


class Hostile:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_arrays_with_pickles_are_refused(local, tmp_path):
    folder, mark = str(tmp_path / "outcome"), str(tmp_path / "executed")
    expected = drawn_result()
    write_result(folder, expected, local)
    buffer = io.BytesIO()
    arrays = {"sources": np.array([Hostile(mark)], dtype=object), "queries": expected.queries, **expected.scores.values}
    np.savez(buffer, **arrays)
    local.write_bytes(join(folder, ARRAYS), buffer.getvalue())
    with pytest.raises(AttribError, match=f"{ARRAYS} is damaged: its checksum differs"):
        read_result(folder, local)
    record = local.read_json(join(folder, RECORD))
    del record["arrays_sha256"], record[CHECKSUM]  # as in records of earlier versions
    local.write_json(join(folder, RECORD), record)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        read_result(folder, local)
    assert not os.path.exists(mark)


def test_a_damaged_result_is_named(local, tmp_path):
    write_result(str(tmp_path), drawn_result(), local)
    for name in (RECORD, ARRAYS):
        whole = (tmp_path / name).read_bytes()
        for damaged in (whole[:-20], whole.replace(b"0", b"1", 1), b""):
            (tmp_path / name).write_bytes(damaged)
            with pytest.raises(AttribError, match=f"{name} is damaged"):
                read_result(str(tmp_path), local)
        (tmp_path / name).write_bytes(whole)
    assert_same(read_result(str(tmp_path), local), drawn_result())


class Killed(Exception):
    pass


class InterruptedStorage(Storage):
    """Storage of a process that is killed after a number of files."""

    num_left = 1

    def write_bytes(self, uri, data):
        if not self.num_left:
            raise Killed
        self.num_left -= 1
        super().write_bytes(uri, data)


def test_an_unfinished_result_is_ignored(local, tmp_path):
    folder = str(tmp_path / "outcome")
    with pytest.raises(Killed):
        write_result(folder, drawn_result(), InterruptedStorage(local.settings))
    assert os.listdir(folder) == [ARRAYS]  # the record is written last
    assert read_result(folder, local) is None
    write_result(folder, drawn_result(), local)
    assert_same(read_result(folder, local), drawn_result())


def test_vectors_are_written_with_their_file_names(local, tmp_path):
    result = drawn_result()
    files = {
        "source_files": [f"sources/日本/ü {i}.jpg" for i in range(9)],
        "query_files": [f"queries/{'long' * i}.jpg" for i in range(14)],
    }
    write_vectors(str(tmp_path / "vectors" / "v.npz"), files, result, local)
    with np.load(tmp_path / "vectors" / "v.npz", allow_pickle=False) as arrays:
        assert arrays.files == ["source_files", "query_files", "sources", "queries"]
        assert {name: arrays[name].tolist() for name in files} == files
        assert np.array_equal(arrays["sources"], result.sources) and arrays["sources"].dtype == np.float32
        assert np.array_equal(arrays["queries"], result.queries) and arrays["queries"].dtype == np.float32
