"""One contender in a process of its own: python -m attrib.benchmark.contender MODULE:FUNCTION JOB.json RESULT.json THREADS

FUNCTION(job: dict, clock: Clock) -> dict loads its inputs, warms up, and times its laps; what it returns goes into the result. Nothing but the
standard library is imported here: autofaiss runs in an environment of its own.
"""

import importlib
import json
import resource
import sys
import time
from contextlib import contextmanager


class Clock:
    """Named laps of wall and CPU seconds, this process's children included once they have ended.

    works_elsewhere: most of the work is done by processes that are none of its children's; then CPU seconds are None.
    """

    def __init__(self):
        self.works_elsewhere = False
        self.laps: dict[str, dict] = {}
        self.start_mib = peak_mib()

    @contextmanager
    def lap(self, name: str, scale: float = 1.0):
        """scale: of the seconds, where only a part of the work is done; the result says so."""
        cpu, wall = cpu_seconds(), time.perf_counter()
        yield
        self.note(name, time.perf_counter() - wall, cpu_seconds() - cpu, scale)

    def note(self, name: str, seconds: float, cpu: float, scale: float = 1.0) -> None:
        self.laps[name] = {
            "seconds": seconds * scale,
            "cpu_seconds": None if self.works_elsewhere else cpu * scale,
            "scale": scale,
            "peak_mib": peak_mib(),  # so far
        }


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def peak_mib() -> float:
    """Of resident memory. Not ru_maxrss where there is a choice: across fork and exec it keeps the peak of the parent."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on a Mac


def set_threads(threads: int) -> None:
    """Of whatever the contender has loaded; the environment did so for BLAS and OpenMP."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(threads)
    if faiss := sys.modules.get("faiss"):
        faiss.omp_set_num_threads(threads)
    if pyarrow := sys.modules.get("pyarrow"):
        pyarrow.set_cpu_count(threads)
        pyarrow.set_io_thread_count(threads)


def threads_seen() -> dict[str, int]:
    """Read at the end, in case that the contender changed them."""
    asked = {"torch": "get_num_threads", "faiss": "omp_get_max_threads", "pyarrow": "cpu_count"}
    return {name: getattr(sys.modules[name], function)() for name, function in asked.items() if name in sys.modules}


def main(target: str, job_path: str, result_path: str, threads: str) -> None:
    module, name = target.split(":")
    function = getattr(importlib.import_module(module), name)
    set_threads(int(threads))
    with open(job_path, encoding="utf-8") as file:
        job = json.load(file)
    clock = Clock()
    found = function(job, clock) or {}
    result = {
        "laps": clock.laps,
        "found": found,
        "threads_seen": threads_seen(),
        "start_mib": clock.start_mib,
        "peak_mib": peak_mib(),
    }
    with open(result_path, "w", encoding="utf-8") as file:
        json.dump(result, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
