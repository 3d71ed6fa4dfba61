"""SIGTERM and Ctrl-C end a working job with one line, an exit code and no process of its Ray left."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
JOB = """
import logging, signal, sys, time
from attrib.common import logs
from jobs.exit import reported

def work(*_):
    logs.set_up_worker()
    logging.getLogger("attrib").info("the work has started")
    time.sleep(600)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background processes with SIGINT ignored
logs.set_up("text")
with reported():
    from attrib.common.settings import RaySettings, StorageSettings
    from attrib.runtime.session import connect

    connect(RaySettings(num_cpus=1, object_store_gib=0.1), dashboard=TRAIN)
    if TRAIN:
        from attrib.common.storage import Storage
        from attrib.runtime.trainer import fit

        storage = Storage(StorageSettings())
        fit(work, (), job="train", num_workers=1, device="cpu", output=sys.argv[1], storage=storage)
    else:
        from attrib.runtime.tasks import run_units

        list(run_units(work, [()]))
"""
STARTED = "the work has started"


@pytest.mark.parametrize("train", [False, True], ids=["tasks", "Ray Train"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"])
def test_a_signal_ends_a_job_with_its_code_one_line_and_no_process_left(number, code, train, tmp_path):
    log = tmp_path / "stderr"
    script = JOB.replace("TRAIN", str(train))
    with open(log, "wb") as file:
        job = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, env=os.environ, stderr=file)
    try:
        deadline = time.monotonic() + 120
        while STARTED not in log.read_text() and job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert STARTED in log.read_text(), "the log line of the worker did not arrive: " + log.read_text()
        processes = psutil.Process(job.pid).children(recursive=True)
        job.send_signal(number)
        job.wait(timeout=120)
    finally:
        job.kill()
    # If several Rays run on the machine, a thread of Ray Train does not know which one is its own, and prints this.
    said = "\n".join(line for line in log.read_text().splitlines() if "PlacementGroupCleaner" not in line)
    assert job.returncode == code, said
    assert "Traceback" not in said and said.splitlines()[-1] == f"error: stopped by {number.name}", said
    assert processes, "the job had no Ray"
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive
