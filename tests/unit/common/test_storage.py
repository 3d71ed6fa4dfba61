"""Storage on a local disk: atomic writes and odd names. tests/integration/test_storage_clients.py tests all clients."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.files import files_below, full_disk

from attrib.common.errors import AttribError
from attrib.common.settings import StorageSettings
from attrib.common.storage import Storage, fresh_folder

ROOT = Path(__file__).resolve().parents[3]


def test_a_failed_local_write_leaves_the_old_file_and_nothing_else(tmp_path, local):
    target = tmp_path / "out" / "file.bin"
    local.write_bytes(str(target), b"old")

    def fail(file):
        file.write(b"half of the new")
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError):
        Storage._write_local(str(target), fail)
    assert target.read_bytes() == b"old" and files_below(tmp_path) == [str(target)]


def test_a_writer_killed_half_way_leaves_no_target(tmp_path):
    target = tmp_path / "file.bin"
    script = (
        "import sys, time\nfrom attrib.common.storage import Storage\n"
        "def write(file):\n    file.write(b'x' * (1 << 20)); file.flush(); print('half', flush=True); time.sleep(60)\n"
        "Storage._write_local(sys.argv[1], write)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", script, str(target)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "half\n"
    assert len(files_below(tmp_path)) == 1  # the temporary file exists
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    assert not target.exists()
    assert [name for name in files_below(tmp_path) if not name.endswith(".tmp")] == []


def test_an_unreachable_store_fails_within_its_limits():
    settings = StorageSettings(endpoint="http://127.0.0.1:9", max_attempts=1, connect_timeout_seconds=1)
    start = time.monotonic()
    with pytest.raises(OSError):
        Storage(settings).read_bytes("s3://attrib/x")
    assert time.monotonic() - start < 20


def test_a_name_that_is_not_utf_8_is_named(tmp_path, local):
    try:
        (tmp_path / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"x")
    except OSError:
        pytest.skip("this file system refuses names that are not UTF-8")
    with pytest.raises(AttribError, match=r"not UTF-8.*rename"):
        local.list_folder(str(tmp_path))


def test_a_full_disk_is_an_error_that_names_the_file(monkeypatch, tmp_path, local):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/a.bin'"):
        local.write_bytes(str(tmp_path / "a.bin"), b"x")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_takes_no_more_leaves_nothing_and_is_named(tmp_path, local):
    with full_disk(1 << 16), pytest.raises(OSError, match=f"File too large: '{tmp_path}/a.bin'"):
        local.write_bytes(str(tmp_path / "a.bin"), bytes(1 << 17))
    assert list(tmp_path.iterdir()) == []


def test_a_job_whose_disk_is_full_ends_with_one_line_that_names_the_file(tmp_path):
    script = (
        "import sys\nfrom attrib.common.settings import StorageSettings\nfrom attrib.common.storage import Storage\n"
        "from jobs.exit import reported\nfrom support.files import full_disk\n"
        "with reported(), full_disk(1 << 16):\n"
        "    Storage(StorageSettings()).write_bytes(sys.argv[1], bytes(1 << 17))\n"
    )
    path = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-c", script, str(tmp_path / "a.bin")]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert f"OSError: [Errno {errno.EFBIG}] File too large: '{tmp_path}/a.bin'" in done.stderr


def test_a_fresh_folder_loses_only_the_names_that_the_job_makes(tmp_path):
    folder = str(tmp_path / "run")
    fresh_folder(folder, "jobs.demo", ("made",))
    for path in ("made/a", "mine/b"):
        (tmp_path / "run" / path).parent.mkdir()
        (tmp_path / "run" / path).write_text("x")
    fresh_folder(folder, "jobs.demo", ("made",))
    assert not (tmp_path / "run/made").exists() and (tmp_path / "run/mine/b").read_text() == "x"
