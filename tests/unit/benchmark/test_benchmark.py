"""Harness, settings and vectors of the benchmark.

tests/integration/test_benchmark_processes.py runs contenders, tests/slow/test_benchmark_job.py the job itself.
"""

import numpy as np
import pytest

from attrib.benchmark import harness, vectors
from attrib.benchmark.harness import Contender
from attrib.benchmark.job import Bench
from attrib.benchmark.settings import BenchmarkSettings
from attrib.common.errors import AttribError


def test_rounds_are_interleaved_and_rows_hold_ratios_to_the_first_contender(monkeypatch):
    seconds = {"A": [1.0, 2.0], "B": [3.0, 4.0]}
    order = []

    def run(contender: Contender) -> dict:
        order.append(contender.name)
        if contender.name == "C":
            raise AttribError("no such library here")
        turn = order.count(contender.name) - 1
        lap = {"seconds": seconds[contender.name][turn], "cpu_seconds": 0.5, "scale": 1, "peak_mib": 100.0 + turn}
        laps = {"nap": lap} if contender.name == "B" else {"nap": lap, "part": lap | {"scale": 10}}
        found = {"answers": "same" if contender.name == "A" else str(turn)}
        return {"laps": laps, "found": found, "start_mib": 50.0, "anonymous_mib": 60.0 - turn}

    monkeypatch.setattr(harness, "run_contender", run)
    contenders = [Contender(name, run, {}, note="n" * (name == "A"), may_fail=name == "C") for name in "ABC"]
    rows = harness.compare("stage", {"nap": "a nap", "part": "a part"}, contenders, num_rounds=2)
    assert "".join(order) == "ABCAB"
    assert [(row["size"], row["contender"]) for row in rows] == [("a nap", name) for name in "ABC"] + [
        ("a part", name) for name in "AC"
    ]
    ours, theirs, failed, part = rows[:4]
    assert (ours["ratio"], ours["ratio_lowest"], ours["ratio_highest"], ours["num_rounds"]) == (1, 1, 1, 2)
    assert (theirs["seconds"], theirs["lowest"], theirs["highest"], theirs["cpu_seconds"]) == (3.5, 3, 4, 0.5)
    assert (theirs["ratio"], theirs["ratio_lowest"], theirs["ratio_highest"]) == (2.5, 2, 3)
    assert (theirs["peak_mib"], theirs["anonymous_mib"], theirs["start_mib"]) == (101, 60, 50)
    assert failed["seconds"] is None and failed["note"] == "not measured: no such library here"
    assert failed.keys() == ours.keys()
    assert part["note"] == "n; timed on 1/10 of it and scaled"
    assert ours["found"]["identical"] and not theirs["found"]["identical"]
    shown = harness.format_table(rows)
    assert sum("time / first" in line for line in shown.splitlines()) == 2  # one table per size
    assert "2.50 (2.00 to 3.00)" in shown and "not measured: no such library here" in shown
    with pytest.raises(AttribError, match="no such library here"):
        harness.compare("stage", {"nap": ""}, [Contender("C", run, {})], num_rounds=1)


def test_means_under_windows_weight_cells_by_overlap():
    generator = np.random.default_rng(0)
    feature_map = generator.standard_normal((5, 5, 4)).astype(np.float32)
    fine = (np.arange(1000) + 0.5) / 200  # 200 points per cell
    windows = vectors._windows(20, 5, generator)
    assert (windows[:, 2:] - windows[:, :2] >= 3).all() and windows.min() >= 0 and windows.max() <= 5
    for window, found in zip(windows, vectors._means(feature_map, windows)):
        rows, columns = ((fine > start) & (fine < stop) for start, stop in (window[::2], window[1::2]))
        expected = feature_map[fine[rows].astype(int)][:, fine[columns].astype(int)].mean((0, 1), np.float64)
        assert np.allclose(found, expected, atol=0.01)


def test_mosaics_are_means_of_crops_by_area():
    crops = np.eye(40, dtype=np.float32)
    made = vectors.mosaics(crops, 500, seed=0)
    assert made.dtype == np.float16 and np.array_equal(made, vectors.mosaics(crops, 500, seed=0))
    # The crops are orthogonal, so a coordinate is the relative area of a crop.
    assert (made >= 0).all() and np.allclose(np.linalg.norm(made.astype(np.float32), axis=1), 1, atol=2e-3)
    num_shown = (made > 1e-3).sum(axis=1)
    assert num_shown.max() == vectors.CROPS_PER_MOSAIC and num_shown.mean() > 3.5
    areas = made.astype(np.float32) / made.astype(np.float32).sum(axis=1, keepdims=True)
    assert areas.sum(axis=0) == pytest.approx(500 / 40, rel=0.5)  # crops are drawn uniformly


def test_an_output_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(AttribError, match=r"holds files that this job did not make"):
        Bench(BenchmarkSettings(output=str(tmp_path)))
    assert (tmp_path / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": "s3://bucket/x"}, "needs a local path"),
        ({"vectors": {"sizes": [10, 5]}}, "sizes must ascend"),
        ({"images": {"min_megapixels": 3}}, "is above max_megapixels"),
        ({"only": ["searching"]}, "only"),
        ({"only": ["ray", "resume"]}, "no longer measured, see attrib/benchmark/RESULTS.md"),
    ],
)
def test_invalid_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        BenchmarkSettings.model_validate({"output": "out"} | changes)


def test_keys_and_stages_of_earlier_versions_are_accepted_with_a_warning(caplog):
    old = {"train": {"num_epochs": 4}, "num_ray_tasks": 256, "vectors": {"num_shards": 4, "top_k": 5}}
    old |= {"images": {"chunk_rows": 128}, "only": ["build", "attribute"]}
    settings = BenchmarkSettings.model_validate({"output": "out"} | old)
    assert settings.only == ("build",) and settings.vectors.top_k == 5
    warned = [record.getMessage().split()[0] for record in caplog.records]
    assert warned == ["train", "num_ray_tasks", "stage", "chunk_rows", "num_shards"]
