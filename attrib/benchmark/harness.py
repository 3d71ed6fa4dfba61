"""Contenders in processes of their own, in interleaved rounds (A B C A B C), and the table of their measurements.

A ratio is the seconds of a contender divided by those of the first contender in the same round, so that a slow
phase of the machine affects both sides; above one, the first contender is faster.

A contender is a function `f(job: dict, clock: Clock) -> dict`. It loads its inputs, warms up and times its
laps; the dict that it returns becomes `found` of its row. It runs as `python -m attrib.benchmark.harness`. The
environment of autofaiss has neither this project's dependencies nor psutil, so this module imports only the
standard library at its top.
"""

import importlib
import json
import logging
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

from attrib.common.errors import AttribError

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.2
PACKAGE_FOLDER = str(Path(__file__).resolve().parents[2])
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")
MAX_NOTE_CHARS = 160
# Keys of `found` that the table shows.
SHOWN = ("recall", "nprobe", "num_lists", "images_per_second", "identical")


class Clock:
    """Named laps of wall and CPU seconds. CPU seconds include child processes that have ended."""

    def __init__(self):
        self.laps: dict[str, dict] = {}
        self.start_mib = peak_mib()

    @contextmanager
    def lap(self, name: str, scale: float = 1.0):
        """Time the block. scale: factor for the seconds if only a part of the work is done; the result names it."""
        cpu, wall = cpu_seconds(), time.perf_counter()
        yield
        self.note(name, time.perf_counter() - wall, cpu_seconds() - cpu, scale)

    def note(self, name: str, seconds: float, cpu: float, scale: float = 1.0) -> None:
        peak = peak_mib()  # of the process so far
        self.laps[name] = {"seconds": seconds * scale, "cpu_seconds": cpu * scale, "scale": scale, "peak_mib": peak}


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def peak_mib() -> float:
    """Peak resident memory of this process. ru_maxrss would include the parent's peak after fork and exec."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS


def set_threads(threads: int) -> None:
    """Set the threads of the loaded libraries. BLAS and OpenMP read the environment."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(threads)
    if faiss := sys.modules.get("faiss"):
        faiss.omp_set_num_threads(threads)
    if pyarrow := sys.modules.get("pyarrow"):
        pyarrow.set_cpu_count(threads)
        pyarrow.set_io_thread_count(threads)


def _threads_seen() -> dict[str, int]:
    """Threads of the loaded libraries at the end, to detect a contender that changed them."""
    asked = {"torch": "get_num_threads", "faiss": "omp_get_max_threads", "pyarrow": "cpu_count"}
    return {name: getattr(sys.modules[name], function)() for name, function in asked.items() if name in sys.modules}


def main(module: str, name: str, job_path: str, result_path: str, threads: str) -> None:
    """Run one contender in this process and write its result."""
    function = getattr(importlib.import_module(module), name)
    set_threads(int(threads))
    clock = Clock()
    found = function(json.loads(Path(job_path).read_text(encoding="utf-8")), clock) or {}
    result = {"laps": clock.laps, "found": found, "threads_seen": _threads_seen()}
    result |= {"start_mib": clock.start_mib, "peak_mib": peak_mib()}
    Path(result_path).write_text(json.dumps(result), encoding="utf-8")


@dataclass(frozen=True)
class Contender:
    """threads: per process; workers: number of processes that work at once.

    may_fail: the row then holds the reason. unavailable: why the contender cannot run here; it is then not started.
    """

    name: str
    function: Callable[[dict, Clock], dict]
    job: dict
    threads: int = 1
    workers: int = 1
    note: str = ""
    python: str = sys.executable
    may_fail: bool = False
    unavailable: str = ""
    max_rounds: int | None = None


@dataclass(frozen=True)
class Row:
    """Seconds, CPU seconds and ratios are medians over rounds. None: not measured.

    peak_mib: resident memory of the largest process. anonymous_mib: of all processes, without memory-mapped files.
    start_mib: resident memory after the libraries were loaded.
    """

    stage: str
    size: str
    contender: str
    threads: int
    workers: int
    seconds: float | None
    lowest: float | None
    highest: float | None
    cpu_seconds: float | None
    peak_mib: float | None
    anonymous_mib: float | None
    start_mib: float | None
    ratio: float | None
    ratio_lowest: float | None
    ratio_highest: float | None
    num_rounds: int
    note: str
    found: dict

    def to_dict(self) -> dict:
        return asdict(self)


def run_contender(contender: Contender) -> dict:
    """The result of one run: laps, found, threads_seen, start_mib, peak_mib, anonymous_mib.

    Raises AttribError with the last line of its output if the contender fails or changes its number of threads.
    """
    environment = os.environ | {name: str(contender.threads) for name in THREAD_VARIABLES}
    # Another environment has this project not installed, and must not see the libraries of this one.
    paths = [path for path in sys.path if path] if contender.python == sys.executable else [PACKAGE_FOLDER]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    target = [contender.function.__module__, contender.function.__name__]
    with tempfile.TemporaryDirectory(prefix="attrib-benchmark-") as folder:
        job, result_path, output = (Path(folder, name) for name in ("job.json", "result.json", "output"))
        job.write_text(json.dumps(contender.job), encoding="utf-8")
        command = [contender.python, "-m", "attrib.benchmark.harness", *target, str(job), str(result_path)]
        with open(output, "w", encoding="utf-8") as file:
            process = subprocess.Popen(
                [*command, str(contender.threads)], env=environment, stdout=file, stderr=file, stdin=subprocess.DEVNULL
            )
            child_mib, anonymous_mib = _watch(process)
        if process.returncode:
            lines = output.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"]
            raise AttribError(f"{contender.name} ended with code {process.returncode}: {lines[-1][:MAX_NOTE_CHARS]}")
        result = json.loads(result_path.read_text(encoding="utf-8"))
    for library, threads in result["threads_seen"].items():
        if threads != contender.threads:
            raise AttribError(f"{contender.name}: {library} runs {threads} threads in place of {contender.threads}")
    return result | {"peak_mib": max(result["peak_mib"], child_mib), "anonymous_mib": anonymous_mib}


def _watch(process: subprocess.Popen) -> tuple[float, float]:
    """Poll until the end: peak MiB of the largest child process, and of the anonymous memory of all processes."""
    import psutil  # not at the top: see the docstring of this module

    child_mib = anonymous_mib = 0.0
    root = psutil.Process(process.pid)
    while process.poll() is None:
        total = 0.0
        with suppress(psutil.NoSuchProcess):
            for one in (root, *root.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    used = one.memory_info()
                    total += (used.rss - getattr(used, "shared", 0)) / 2**20
                    if one.pid != process.pid:
                        child_mib = max(child_mib, used.rss / 2**20)
        anonymous_mib = max(anonymous_mib, total)
        time.sleep(POLL_SECONDS)
    return child_mib, anonymous_mib


def interleave(contenders: list[Contender], num_rounds: int) -> list[list[dict | str]]:
    """For each contender the result of every round that it ran in, or the reason why it has none."""
    results: list[list[dict | str]] = [[] for _ in contenders]
    for turn in range(num_rounds):
        for contender, mine in zip(contenders, results):
            if turn >= (contender.max_rounds or num_rounds) or (mine and isinstance(mine[-1], str)):
                continue
            logger.info(f"benchmark: round {turn + 1} of {num_rounds}: {contender.name}")
            try:
                mine.append(contender.unavailable or run_contender(contender))
            except AttribError as error:
                if not contender.may_fail:
                    raise
                mine.append(str(error))
    return results


def compare(stage: str, sizes: dict[str, str], contenders: list[Contender], num_rounds: int) -> list[Row]:
    """One row per lap and contender. sizes: {lap: description of the work}; the first contender must have all laps."""
    results = interleave(contenders, num_rounds)
    rows = []
    for lap, size in sizes.items():
        first = [result["laps"][lap]["seconds"] for result in results[0]]
        for contender, mine in zip(contenders, results):
            failed = [result for result in mine if isinstance(result, str)]
            if failed:
                rows.append(_absent(stage, size, contender, failed[0]))
            elif lap in mine[0]["laps"]:
                rows.append(_row(stage, size, contender, [(r["laps"][lap], r) for r in mine], first))
    return rows


def _row(stage: str, size: str, contender: Contender, measured: list[tuple[dict, dict]], first: list[float]) -> Row:
    seconds = [lap["seconds"] for lap, _ in measured]
    ratios = [mine / other for mine, other in zip(seconds, first)]
    notes = [contender.note] if contender.note else []
    if measured[0][0]["scale"] > 1:  # a scale below one gives seconds per image
        notes.append(f"timed on 1/{measured[0][0]['scale']:g} of it and scaled")
    if len(seconds) < len(first):
        notes.append(f"{len(seconds)} round(s)")
    found = dict(measured[-1][1]["found"])
    if "answers" in found and len(measured) > 1:
        found["identical"] = len({whole["found"]["answers"] for _, whole in measured}) == 1
    return Row(
        stage=stage,
        size=size,
        contender=contender.name,
        threads=contender.threads,
        workers=contender.workers,
        seconds=statistics.median(seconds),
        lowest=min(seconds),
        highest=max(seconds),
        cpu_seconds=statistics.median(lap["cpu_seconds"] for lap, _ in measured),
        # A lap holds the peak of its process so far. Child processes are measured for the whole run only.
        peak_mib=max(lap["peak_mib"] if len(whole["laps"]) > 1 else whole["peak_mib"] for lap, whole in measured),
        anonymous_mib=max(whole["anonymous_mib"] for _, whole in measured),
        start_mib=max(whole["start_mib"] for _, whole in measured),
        ratio=statistics.median(ratios),
        ratio_lowest=min(ratios),
        ratio_highest=max(ratios),
        num_rounds=len(seconds),
        note="; ".join(notes),
        found=found,
    )


def _absent(stage: str, size: str, contender: Contender, reason: str) -> Row:
    kept = ("stage", "size", "contender", "threads", "workers", "num_rounds", "note", "found")
    nothing = {name: None for name in Row.__dataclass_fields__ if name not in kept}
    who = {"contender": contender.name, "threads": contender.threads, "workers": contender.workers}
    return Row(stage=stage, size=size, num_rounds=0, note=f"not measured: {reason}", found={}, **who, **nothing)


def format_table(rows: list[Row]) -> str:
    """One table per stage and size."""
    from attrib.common.tables import text_table  # not at the top: see the docstring of this module

    columns = {"contender": "left"} | dict.fromkeys(("threads", "seconds", "CPU s", "peak MiB"), "right")
    columns |= {"time / first": "left", "note": "left"}
    blocks = []
    for (stage, size), block in groupby(rows, key=lambda row: (row.stage, row.size)):
        blocks.append(f"{stage}: {size}\n{text_table(columns, map(_cells, block), '  ')}")
    return "\n\n".join(blocks)


def _cells(row: Row) -> list[str]:
    threads = f"{row.workers} x {row.threads}" if row.workers > 1 else str(row.threads)
    ratio = "" if row.ratio is None else f"{row.ratio:.2f} ({row.ratio_lowest:.2f} to {row.ratio_highest:.2f})"
    found = {name: value for name, value in row.found.items() if name in SHOWN}
    texts = [f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in found.items()]
    numbers = [_number(value) for value in (row.seconds, row.cpu_seconds, row.peak_mib)]
    return [row.contender, threads, *numbers, ratio, "; ".join([*([row.note] if row.note else []), *texts])]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


if __name__ == "__main__":
    main(*sys.argv[1:])
