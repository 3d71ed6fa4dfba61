"""Scratch folders and unfinished files of dead processes are deleted; those of living ones and of others are not."""

import os
import subprocess
import sys

import pytest
from support.files import LOCAL, files_below

from attrib.common import scratch
from attrib.common.lease import Lease
from attrib.common.processes import is_alive, started, this_process

OWNER_SCRIPT = """
import sys, time
from attrib.common.scratch import scratch_folder
from attrib.common.storage import Storage
def write(file):
    file.write(b"x"); file.flush()
    print(folder, flush=True)
    time.sleep(60)
with scratch_folder() as folder:
    Storage._write_local(sys.argv[1], write)
"""


@pytest.fixture
def parent(tmp_path, monkeypatch) -> str:
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setenv("ATTRIB_SCRATCH", str(folder))
    return str(folder)


@pytest.fixture
def owner(parent, tmp_path):
    """A process with a scratch folder, half-way through a write to `out/deep/file.bin`."""
    command = [sys.executable, "-c", OWNER_SCRIPT, str(tmp_path / "out/deep/file.bin")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert os.path.isdir(process.stdout.readline().strip())
    yield process
    process.kill()
    process.communicate()


def sweep(parent: str, output: str) -> None:
    scratch.sweep_scratch.cache_clear()  # as in another process
    scratch.sweep_scratch(parent)
    with Lease(output, LOCAL):
        pass


def test_what_a_killed_process_left_is_deleted(owner, parent, tmp_path):
    out = tmp_path / "out"
    sweep(parent, str(out))
    assert len(os.listdir(parent)) == 1 and len(os.listdir(out / "deep")) == 1  # it is alive
    owner.kill()
    owner.wait()
    sweep(parent, str(out))
    assert os.listdir(parent) == [] and os.listdir(out / "deep") == []


def test_what_a_worker_left_that_died_is_deleted_when_its_driver_ends(owner, tmp_path):
    with Lease(str(tmp_path / "out"), LOCAL):
        owner.kill()
        owner.wait()
        assert os.listdir(tmp_path / "out/deep")
    assert os.listdir(tmp_path / "out/deep") == []


def test_nothing_else_is_deleted(parent, tmp_path):
    """Folders without a mark, of another machine, of this process, and files of a user."""
    mark = scratch._mark(os.getpid())
    machine, pid, since = mark.split("-")
    others = ["attrib-", "attrib-x", f"attrib-{mark}", f"attrib-{'0' * 8}-{pid}-0-x", f"my-{machine}-{pid}-0-x"]
    for name in others:
        os.makedirs(os.path.join(parent, name))
    files = [".a.tmp", f".a.{mark}-00000000.tmp", f".a.{'0' * 8}-{pid}-0-00000000.tmp", f"a.{machine}-{pid}-0-1.tmp"]
    for name in files:
        LOCAL.write_bytes(str(tmp_path / "out" / name), b"x")
    with scratch.scratch_folder() as mine:
        before = os.listdir(parent), files_below(tmp_path / "out")
        sweep(parent, str(tmp_path / "out"))
        kept = [name for name in files_below(tmp_path / "out") if ".writer.json" not in name]
        assert (os.listdir(parent), kept) == before and os.path.isdir(mine)
    ours = os.path.join(parent, f"attrib-{machine}-{pid}-{int(since, 16) + 1:x}-x")
    os.mkdir(ours)  # an earlier process had the number of this one
    sweep(parent, str(tmp_path / "out"))
    assert not os.path.exists(ours)


def test_a_process_that_has_ended_is_not_alive_although_nobody_waited_for_it():
    ended = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    when = started(ended.pid)
    assert is_alive(ended.pid, when)
    ended.stdout.read()
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    assert not is_alive(ended.pid, when)
    ended.communicate()
    assert is_alive(os.getpid(), this_process()["started"])
