"""Contenders of the benchmark in processes of their own."""

import os
import subprocess
import sys

import numpy as np
import pytest
from support import contenders

from attrib.benchmark.harness import PACKAGE_FOLDER, Contender, run_contender
from attrib.common.errors import AttribError


def test_a_contender_has_its_threads_and_times_its_laps(tmp_path):
    job = {"name": "A", "seconds": 0.1, "log": str(tmp_path / "log"), "answers": ""}
    ended = run_contender(Contender("A", contenders.sleeper, job, threads=3))
    assert (tmp_path / "log").read_text() == "A"
    assert set(ended["found"]["environment"].values()) == {"3"} and ended["found"]["answers"] != str(os.getpid())
    assert ended["laps"]["nap"]["seconds"] >= 0.1 and ended["laps"]["nap"]["scale"] == 1
    assert ended["laps"]["part"]["seconds"] >= 0.1 and ended["laps"]["part"]["scale"] == 10


@pytest.mark.parametrize(
    ("contender", "message"),
    [
        (Contender("A", contenders.refuser, {}), "A ended with code 1: RuntimeError: no such library here"),
        (Contender("A", contenders.thread_changer, {}), "faiss runs 2 threads in place of 1"),
        (
            Contender("A", contenders.refuser, {}, python="/nowhere/bin/python"),
            "no environment in /nowhere; create it as attrib/benchmark/RESULTS.md says",
        ),
    ],
)
def test_a_failure_or_a_change_of_threads_is_reported(contender, message):
    with pytest.raises(AttribError, match=message):
        run_contender(contender)


def test_memory_peaks_exclude_the_parent_process():
    here = np.ones(300 << 20, np.uint8)  # must not count
    ended = run_contender(Contender("A", contenders.filler, {"mib": 128}))
    del here
    # The kernel counts pages in batches, so up to half a MiB may be missing.
    assert ended["start_mib"] + 15 <= ended["laps"]["small"]["peak_mib"] <= ended["start_mib"] + 64
    peak_mib = ended["laps"]["large"]["peak_mib"]
    assert ended["start_mib"] + 120 <= peak_mib <= ended["start_mib"] + 180
    assert peak_mib < 300 and 120 <= ended["anonymous_mib"] <= peak_mib


def test_contenders_of_build_and_search_do_not_load_torch():
    code = "import sys, attrib.benchmark.index_build, attrib.benchmark.search; print('torch' in sys.modules)"
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": PACKAGE_FOLDER}
    )
    assert ended.stdout == "False\n", ended.stderr
