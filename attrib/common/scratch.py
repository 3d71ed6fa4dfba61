"""Local files that end with the process that made them, and those that dead processes left.

A name holds a mark of its owner: machine with its boot, process number and start. Only files of processes that are dead
on this machine are deleted, so the machines that share a folder leave each other's alone.
"""

import logging
import os
import re
import shutil
import tempfile
import uuid
from functools import cache
from hashlib import sha256

from attrib.common.processes import is_alive, this_process

OWNER = r"(?P<machine>[0-9a-f]{8})-(?P<pid>[0-9a-f]+)-(?P<started>[0-9a-f]+)"
IS_SCRATCH = re.compile(rf"attrib-{OWNER}-\w+").fullmatch
IS_UNFINISHED = re.compile(rf"\..+\.{OWNER}-[0-9a-f]{{8}}\.tmp", re.DOTALL).fullmatch

logger = logging.getLogger(__name__)


def scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """A temporary local folder for the large files of one task, below ATTRIB_SCRATCH if that is set."""
    sweep_scratch(scratch_parent())
    return tempfile.TemporaryDirectory(prefix=f"attrib-{_mark(os.getpid())}-", dir=scratch_parent())


def unfinished_path(path: str) -> str:
    """A new name beside `path` for a file that takes its place when it is whole."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name}.{_mark(os.getpid())}-{uuid.uuid4().hex[:8]}.tmp")


@cache  # once per process: each node of a cluster sweeps its own disk
def sweep_scratch(parent: str) -> None:
    """Delete the scratch folders of dead processes."""
    if not os.path.isdir(parent):  # the driver may lack what the workers have
        return
    left = [name for name in os.listdir(parent) if _is_left(IS_SCRATCH(name))]
    for name in left:
        shutil.rmtree(os.path.join(parent, name), ignore_errors=True)  # another job may delete it, too
    if left:
        logger.info(f"{parent}: deleted {len(left)} scratch folder(s) of jobs that were killed")


def sweep_unfinished(folder: str) -> None:
    """Delete the files below a local folder that dead processes did not finish."""
    for base, _, names in os.walk(folder):
        for name in names:
            if _is_left(IS_UNFINISHED(name)):
                try:
                    os.unlink(os.path.join(base, name))
                except OSError as error:
                    logger.warning(f"a file of a job that was killed cannot be deleted: {error}")


def scratch_parent() -> str:
    return os.environ.get("ATTRIB_SCRATCH") or tempfile.gettempdir()


@cache  # by process: a fork has a number of its own
def _mark(pid: int) -> str:
    process = this_process()
    return f"{_machine()}-{pid:x}-{process['started']:x}"


@cache
def _machine() -> str:
    process = this_process()
    return sha256(f"{process['machine']} {process['namespace']}".encode()).hexdigest()[:8]


def _is_left(found: re.Match[str] | None) -> bool:
    """Whether the name holds the mark of a process that is dead on this machine."""
    if found is None or found["machine"] != _machine():
        return False
    return not is_alive(int(found["pid"], 16), int(found["started"], 16))
