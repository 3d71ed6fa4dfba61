"""Harness, settings and vectors of the benchmark. tests/slow/test_benchmark_job.py runs the job itself."""

import os
import subprocess
import sys

import numpy as np
import pytest
from support import contenders as contenders_of_tests

from attrib.benchmark import autofaiss_build, vectors
from attrib.benchmark.harness import PACKAGE_FOLDER, Contender, compare, format_table, run_contender
from attrib.benchmark.job import Bench
from attrib.benchmark.settings import BenchmarkSettings
from attrib.common.errors import AttribError


def test_rounds_are_interleaved_and_rows_hold_ratios_to_the_first_contender(tmp_path):
    log = tmp_path / "log"

    def sleeper(name: str, seconds: float, answers: str = "", **more) -> Contender:
        job = {"name": name, "seconds": seconds, "log": str(log), "answers": answers}
        return Contender(name, contenders_of_tests.sleeper, job, **more)

    contenders = [
        sleeper("A", 0.1, "same", threads=3),
        sleeper("B", 0.3),
        Contender("C", contenders_of_tests.refuser, {}, may_fail=True),
        Contender("D", contenders_of_tests.sleeper, {}, unavailable="no environment"),
    ]
    rows = compare("stage", {"nap": "a nap", "part": "a part"}, contenders, num_rounds=2)
    assert log.read_text() == "ABAB"
    assert [(row["size"], row["contender"]) for row in rows] == [(s, c) for s in ("a nap", "a part") for c in "ABCD"]
    nap, part = ({row["contender"]: row for row in rows if row["size"] == size} for size in ("a nap", "a part"))
    first = nap["A"]
    assert first["ratio"] == first["ratio_lowest"] == first["ratio_highest"] == 1 and first["num_rounds"] == 2
    assert 0.1 <= first["lowest"] <= first["seconds"] <= first["highest"]
    assert nap["B"]["seconds"] >= 0.3 and nap["B"]["ratio_lowest"] > 1
    assert part["A"]["seconds"] >= 0.1 and "timed on 1/10 of it and scaled" in part["A"]["note"]
    assert nap["C"]["seconds"] is None and "no such library here" in nap["C"]["note"]
    assert nap["D"]["note"] == "not measured: no environment" and nap["D"].keys() == first.keys()
    assert set(first["found"]["environment"].values()) == {"3"}
    assert first["found"]["identical"] and not nap["B"]["found"]["identical"]
    shown = format_table(rows)
    assert sum("time / first" in line for line in shown.splitlines()) == 2  # one table per size
    assert "not measured: C ended with code 1" in shown


def test_a_failure_or_a_change_of_threads_ends_the_run():
    with pytest.raises(AttribError, match="no such library here"):
        compare("stage", {"nap": ""}, [Contender("A", contenders_of_tests.refuser, {})], num_rounds=1)
    with pytest.raises(AttribError, match="faiss runs 2 threads in place of 1"):
        run_contender(Contender("A", contenders_of_tests.thread_changer, {}))


def test_memory_peaks_exclude_the_parent_process():
    here = np.ones(300 << 20, np.uint8)  # must not count
    ended = run_contender(Contender("A", contenders_of_tests.filler, {"mib": 128}))
    del here
    # The kernel counts pages in batches, so up to half a MiB may be missing.
    assert ended["start_mib"] + 15 <= ended["laps"]["small"]["peak_mib"] <= ended["start_mib"] + 64
    assert ended["start_mib"] + 120 <= ended["peak_mib"] <= ended["start_mib"] + 180
    assert ended["peak_mib"] < 300 and 120 <= ended["anonymous_mib"] <= ended["peak_mib"]


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
    with pytest.raises(AttribError, match=r"holds files that jobs\.benchmark did not make"):
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


def test_a_missing_environment_of_autofaiss_names_the_remedy(tmp_path):
    folder = str(tmp_path / "autofaiss")
    assert autofaiss_build.missing(folder).startswith(f"no environment in {folder}; create it as attrib/benchmark/")
    (tmp_path / "autofaiss" / "bin").mkdir(parents=True)
    (tmp_path / "autofaiss" / "bin" / "python").touch()
    assert autofaiss_build.missing(folder) == ""


def test_contenders_of_build_and_search_do_not_load_torch():
    code = "import sys, attrib.benchmark.index_build, attrib.benchmark.search; print('torch' in sys.modules)"
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": PACKAGE_FOLDER}
    )
    assert ended.stdout == "False\n", ended.stderr
