"""Contenders in processes of their own, in interleaved rounds (A B C A B C), and the table of their measurements.

A ratio is the seconds of a contender divided by those of the first contender in the same round, so that a slow
phase of the machine affects both sides; above one, the first contender is faster.

A contender is a function `f(job: dict, clock: Clock) -> dict`. It times its laps; what it returns becomes `found` of
its row. It runs as `python -m attrib.benchmark.harness`. The environment of autofaiss has none of this project's
dependencies, so this module imports only the standard library at its top.
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
from dataclasses import dataclass
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
MEASURED = ("seconds", "lowest", "highest", "cpu_seconds", "peak_mib", "anonymous_mib", "start_mib", "ratio")
MEASURED += ("ratio_lowest", "ratio_highest")


class Clock:
    """Named laps of wall and CPU seconds. CPU seconds include child processes that have ended."""

    def __init__(self):
        self.laps: dict[str, dict] = {}
        self.start_mib = peak_mib()

    @contextmanager
    def lap(self, name: str, scale: float = 1.0):
        """Time the block. scale: factor for the seconds if only a part of the work is done."""
        cpu, wall = cpu_seconds(), time.perf_counter()
        yield
        self.note(name, time.perf_counter() - wall, cpu_seconds() - cpu, scale)

    def note(self, name: str, seconds: float, cpu: float, scale: float = 1.0) -> None:
        self.laps[name] = {"seconds": seconds * scale, "cpu_seconds": cpu * scale, "scale": scale}
        self.laps[name]["peak_mib"] = peak_mib()  # of the process so far


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


def main(module: str, name: str, job_path: str, result_path: str, threads: str) -> None:
    """Run one contender in this process and write its result."""
    function = getattr(importlib.import_module(module), name)
    set_threads(int(threads))
    clock = Clock()
    found = function(json.loads(Path(job_path).read_text(encoding="utf-8")), clock) or {}
    asked = {"torch": "get_num_threads", "faiss": "omp_get_max_threads", "pyarrow": "cpu_count"}
    seen = {name: getattr(sys.modules[name], get)() for name, get in asked.items() if name in sys.modules}
    result = {"laps": clock.laps, "found": found, "threads_seen": seen, "start_mib": clock.start_mib}
    Path(result_path).write_text(json.dumps(result | {"peak_mib": peak_mib()}), encoding="utf-8")


@dataclass(frozen=True)
class Contender:
    """threads: per process; workers: number of processes that work at once.

    unavailable: why the contender cannot run here; its row then holds this reason.
    """

    name: str
    function: Callable[[dict, Clock], dict]
    job: dict
    threads: int = 1
    workers: int = 1
    note: str = ""
    python: str = sys.executable
    may_fail: bool = False  # the row then holds the reason
    unavailable: str = ""


def run_contender(contender: Contender) -> dict:
    """The result of one run: laps, found, threads_seen, start_mib, peak_mib, anonymous_mib.

    Raises AttribError with the last line of its output if the contender fails or changes its number of threads.
    """
    environment = os.environ | dict.fromkeys(THREAD_VARIABLES, str(contender.threads))
    # Another environment has this project not installed, and must not see the libraries of this one.
    paths = [path for path in sys.path if path] if contender.python == sys.executable else [PACKAGE_FOLDER]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    target = [contender.function.__module__, contender.function.__name__]
    with tempfile.TemporaryDirectory(prefix="attrib-benchmark-") as folder:
        job, result_path, output = (Path(folder, name) for name in ("job.json", "result.json", "output"))
        job.write_text(json.dumps(contender.job), encoding="utf-8")
        arguments = [*target, str(job), str(result_path), str(contender.threads)]
        command = [contender.python, "-m", "attrib.benchmark.harness", *arguments]
        with open(output, "w", encoding="utf-8") as file:
            process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, stdin=subprocess.DEVNULL)
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


def compare(stage: str, sizes: dict[str, str], contenders: list[Contender], num_rounds: int) -> list[dict]:
    """One row per lap and contender. sizes: {lap: description of the work}; the first contender must have all laps.

    Seconds, CPU seconds and ratios of a row are medians over rounds; None: not measured. peak_mib: resident memory of
    the largest process. anonymous_mib: of all processes, without memory-mapped files. start_mib: resident memory
    after the libraries were loaded. Raises AttribError if a contender fails that may not.
    """
    results: list[list[dict]] = [[] for _ in contenders]
    failed: dict[str, str] = {one.name: one.unavailable for one in contenders if one.unavailable}
    for turn in range(num_rounds):
        for contender, mine in zip(contenders, results):
            if contender.name in failed:
                continue
            logger.info(f"benchmark: round {turn + 1} of {num_rounds}: {contender.name}")
            try:
                mine.append(run_contender(contender))
            except AttribError as error:
                if not contender.may_fail:
                    raise
                failed[contender.name] = str(error)
    rows = []
    for lap, size in sizes.items():
        first = [result["laps"][lap]["seconds"] for result in results[0]]
        for contender, mine in zip(contenders, results):
            row = {"stage": stage, "size": size, "contender": contender.name}
            row |= {"threads": contender.threads, "workers": contender.workers}
            if contender.name in failed:
                reason = f"not measured: {failed[contender.name]}"
                rows.append(row | dict.fromkeys(MEASURED) | {"num_rounds": 0, "note": reason, "found": {}})
            elif lap in mine[0]["laps"]:
                rows.append(row | _measured(contender, lap, mine, first))
    return rows


def _measured(contender: Contender, lap: str, results: list[dict], first: list[float]) -> dict:
    """MEASURED, num_rounds, note and found of a row. first: seconds of the first contender."""
    laps = [result["laps"][lap] for result in results]
    seconds = [lap["seconds"] for lap in laps]
    ratios = [mine / other for mine, other in zip(seconds, first)]
    notes = [contender.note] if contender.note else []
    if laps[0]["scale"] > 1:  # a scale below one gives seconds per image
        notes.append(f"timed on 1/{laps[0]['scale']:g} of it and scaled")
    found = dict(results[-1]["found"])
    if "answers" in found and len(results) > 1:
        found["identical"] = len({result["found"]["answers"] for result in results}) == 1
    # A lap holds the peak of its process so far. Child processes are measured for the whole run only.
    peaks = [result if len(result["laps"]) == 1 else lap for lap, result in zip(laps, results)]
    values = (
        *(
            statistics.median(seconds),
            min(seconds),
            max(seconds),
            statistics.median(lap["cpu_seconds"] for lap in laps),
        ),
        max(peak["peak_mib"] for peak in peaks),
        *(max(result[name] for result in results) for name in ("anonymous_mib", "start_mib")),
        *(statistics.median(ratios), min(ratios), max(ratios)),
    )
    return dict(zip(MEASURED, values)) | {"num_rounds": len(seconds), "note": "; ".join(notes), "found": found}


def format_table(rows: list[dict]) -> str:
    """One table per stage and size."""
    from attrib.common.tables import text_table  # not at the top: see the docstring of this module

    columns = {"contender": "left"} | dict.fromkeys(("threads", "seconds", "CPU s", "peak MiB"), "right")
    columns |= {"time / first": "left", "note": "left"}
    blocks = []
    for (stage, size), block in groupby(rows, key=lambda row: (row["stage"], row["size"])):
        blocks.append(f"{stage}: {size}\n{text_table(columns, map(_cells, block), '  ')}")
    return "\n\n".join(blocks)


def _cells(row: dict) -> list[str]:
    threads = f"{row['workers']} x {row['threads']}" if row["workers"] > 1 else str(row["threads"])
    ratio = "{ratio:.2f} ({ratio_lowest:.2f} to {ratio_highest:.2f})".format(**row) if row["ratio"] else ""
    found = {name: value for name, value in row["found"].items() if name in SHOWN}
    texts = [f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in found.items()]
    numbers = [_number(row[name]) for name in ("seconds", "cpu_seconds", "peak_mib")]
    return [row["contender"], threads, *numbers, ratio, "; ".join([*([row["note"]] if row["note"] else []), *texts])]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


if __name__ == "__main__":
    main(*sys.argv[1:])
