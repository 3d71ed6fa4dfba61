"""What tells a process from every other, now and later: to see whether the one that left a file is still alive."""

import os
import platform
from contextlib import suppress
from typing import Any

import psutil


def this_process() -> dict[str, Any]:
    """Machine with its boot, namespace of process numbers, number and start of this process."""
    machine = platform.node()
    with suppress(OSError), open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        machine += f" {file.read().strip()}"
    namespace = ""
    with suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return {"machine": machine, "namespace": namespace, "pid": os.getpid(), "started": started(os.getpid())}


def is_alive(pid: int, when: int) -> bool:
    """Whether the process with this number and start is alive on this machine."""
    try:
        return started(pid) == when
    except (psutil.NoSuchProcess, ValueError):
        return False


def started(pid: int) -> int:
    """The start of a process. Linux: in clock ticks since the boot; elsewhere: in hundredths of a second.

    psutil adds the time of the boot, which moves when the clock is set. Raises psutil.NoSuchProcess.
    """
    with suppress(OSError, IndexError, ValueError), open(f"/proc/{pid}/stat", "rb") as file:
        # The name of the program, in brackets, may hold anything. A zombie has ended.
        state, *fields = file.read().rpartition(b")")[2].split()
        if state in (b"Z", b"X"):
            raise psutil.NoSuchProcess(pid)
        return int(fields[18])
    return int(psutil.Process(pid).create_time() * 100)
