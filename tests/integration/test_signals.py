"""SIGTERM and Ctrl-C end a job in the middle of its work: one line, an exit code, and no process of its Ray left."""

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
import sys, time
from attrib.common import logs
from jobs.exit import reported

def work(path):
    open(path, "w").close()
    time.sleep(600)

logs.set_up("text")
with reported():
    from attrib.common.settings import RaySettings
    from attrib.runtime.session import connect
    from attrib.runtime.tasks import run_units

    connect(RaySettings(num_cpus=1, object_store_gib=0.1))
    list(run_units(work, [(sys.argv[1],)]))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"])
def test_a_signal_ends_a_job_with_its_code_one_line_and_no_process_left(number, code, tmp_path):
    started = tmp_path / "started"
    job = subprocess.Popen(
        [sys.executable, "-c", JOB, str(started)], cwd=ROOT, env=os.environ, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 120
        while not started.exists() and job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert job.poll() is None and started.exists(), "the work did not start"
        processes = psutil.Process(job.pid).children(recursive=True)
        job.send_signal(number)
        _, said = job.communicate(timeout=120)
    except AssertionError:
        job.kill()
        raise AssertionError(job.communicate()[1]) from None
    finally:
        job.kill()
    assert job.returncode == code, said
    assert "Traceback" not in said and said.splitlines()[-1] == f"error: stopped by {number.name}", said
    assert processes, "the job had no Ray"
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive
