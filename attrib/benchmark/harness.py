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
# Read by OpenMP (faiss, torch, pyarrow), BLAS and the file access of Arrow, also in child processes.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "ARROW_IO_THREADS")
THREAD_COUNTS = {"torch": "get_num_threads", "faiss": "omp_get_max_threads", "pyarrow": "cpu_count"}
MAX_NOTE_CHARS = 160
SHOWN = ("recall", "nprobe", "num_lists", "images_per_second", "identical")  # keys of `found` in the table
MEASURED = ("seconds", "lowest", "highest", "cpu_seconds", "peak_mib", "anonymous_mib", "start_mib", "ratio")
MEASURED += ("ratio_lowest", "ratio_highest")


class Clock:
    """Named laps of wall and CPU seconds. CPU seconds include child processes that have ended."""

    def __init__(self):
        self.laps: dict[str, dict] = {}

    @contextmanager
    def lap(self, name: str, scale: float = 1.0):
        """Time the block. scale: factor for the seconds if only a part of the work is done."""
        cpu, wall = cpu_seconds(), time.perf_counter()
        yield
        self.note(name, time.perf_counter() - wall, cpu_seconds() - cpu, scale)

    def note(self, name: str, seconds: float, cpu: float, scale: float = 1.0) -> None:
        """Store a lap, with the peak memory of the process so far."""
        lap = {"seconds": seconds * scale, "cpu_seconds": cpu * scale, "scale": scale, "peak_mib": peak_mib()}
        self.laps[name] = lap


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def peak_mib() -> float:
    """Peak resident memory of this process, or of its largest child process that has ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    try:  # for this process, ru_maxrss would include the parent's peak after fork and exec
        with open("/proc/self/status", encoding="ascii") as file:
            own = next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
        return max(own, children) / 1024
    except OSError:  # macOS, in bytes
        return max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, children) / 2**20


def main(folder: str) -> None:
    """Run the contender of <folder>/job.json in this process and write <folder>/result.json.

    Raises RuntimeError if the contender changes its number of threads.
    """
    asked = json.loads(Path(folder, "job.json").read_text(encoding="utf-8"))
    function = getattr(importlib.import_module(asked["module"]), asked["function"])
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(asked["threads"])  # from the environment it takes no more than there are cores
    clock, start_mib = Clock(), peak_mib()
    found = function(asked["job"], clock)
    for library in THREAD_COUNTS.keys() & sys.modules.keys():
        seen = getattr(sys.modules[library], THREAD_COUNTS[library])()
        if seen != asked["threads"]:
            raise RuntimeError(f"{library} runs {seen} threads in place of {asked['threads']}")
    result = {"laps": clock.laps, "found": found, "start_mib": start_mib}
    Path(folder, "result.json").write_text(json.dumps(result), encoding="utf-8")


@dataclass(frozen=True)
class Contender:
    """threads: per process; workers: number of processes that work at once; python: its interpreter."""

    name: str
    function: Callable[[dict, Clock], dict]
    job: dict
    threads: int = 1
    workers: int = 1
    note: str = ""
    python: str = sys.executable
    may_fail: bool = False  # the row then holds the reason


def run_contender(contender: Contender) -> dict:
    """The result of one run: laps, found, start_mib, anonymous_mib.

    Raises AttribError with the last line of its output if the contender fails or changes its number of threads.
    """
    if not os.path.exists(contender.python):
        folder = Path(contender.python).parents[1]
        raise AttribError(f"no environment in {folder}; create it as attrib/benchmark/RESULTS.md says")
    environment = os.environ | dict.fromkeys(THREAD_VARIABLES, str(contender.threads))
    # Another environment has this project not installed, and must not see the libraries of this one.
    paths = [path for path in sys.path if path] if contender.python == sys.executable else [PACKAGE_FOLDER]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    asked = {"module": contender.function.__module__, "function": contender.function.__name__}
    asked |= {"job": contender.job, "threads": contender.threads}
    with tempfile.TemporaryDirectory(prefix="attrib-benchmark-") as folder:
        Path(folder, "job.json").write_text(json.dumps(asked), encoding="utf-8")
        command, output = [contender.python, "-m", "attrib.benchmark.harness", folder], Path(folder, "output")
        with open(output, "w", encoding="utf-8") as file:
            process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, stdin=subprocess.DEVNULL)
            anonymous_mib = _watch(process)
        if process.returncode:
            lines = output.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"]
            raise AttribError(f"{contender.name} ended with code {process.returncode}: {lines[-1][:MAX_NOTE_CHARS]}")
        result = json.loads(Path(folder, "result.json").read_text(encoding="utf-8"))
    return result | {"anonymous_mib": anonymous_mib}


def _watch(process: subprocess.Popen) -> float:
    """Poll until the end: peak MiB of the anonymous memory of the process and its children together."""
    import psutil  # not at the top: see the docstring of this module

    highest, root = 0.0, psutil.Process(process.pid)
    while process.poll() is None:
        with suppress(psutil.NoSuchProcess):
            used = [one.memory_info() for one in (root, *root.children(recursive=True))]
            highest = max(highest, sum(one.rss - getattr(one, "shared", 0) for one in used) / 2**20)
        time.sleep(POLL_SECONDS)
    return highest


def compare(stage: str, sizes: dict[str, str], contenders: list[Contender], num_rounds: int) -> list[dict]:
    """One row per lap and contender. sizes: {lap: description of the work}; the first contender must have all laps.

    Seconds, CPU seconds and ratios of a row are medians over rounds; None: not measured. peak_mib: resident memory of
    the largest process. anonymous_mib: of all processes, without memory-mapped files. start_mib: resident memory
    after the libraries were loaded. Raises AttribError if a contender fails that may not.
    """
    results: dict[str, list[dict]] = {contender.name: [] for contender in contenders}
    failed: dict[str, str] = {}
    for turn in range(num_rounds):
        for contender in contenders:
            if contender.name in failed:
                continue
            logger.info(f"benchmark: round {turn + 1} of {num_rounds}: {contender.name}")
            try:
                results[contender.name].append(run_contender(contender))
            except AttribError as error:
                if not contender.may_fail:
                    raise
                failed[contender.name] = f"not measured: {error}"
    rows = []
    for lap, size in sizes.items():
        first = [result["laps"][lap]["seconds"] for result in results[contenders[0].name]]
        for contender in contenders:
            row = {"stage": stage, "size": size, "contender": contender.name}
            row |= {"threads": contender.threads, "workers": contender.workers}
            if contender.name in failed:
                reason = {"num_rounds": 0, "note": failed[contender.name], "found": {}}
                rows.append(row | dict.fromkeys(MEASURED) | reason)
            elif lap in results[contender.name][0]["laps"]:
                rows.append(row | _measured(contender.note, lap, results[contender.name], first))
    return rows


def _measured(note: str, lap: str, results: list[dict], first: list[float]) -> dict:
    """MEASURED, num_rounds, note and found of a row. first: seconds of the first contender."""
    laps = [result["laps"][lap] for result in results]
    seconds = [lap["seconds"] for lap in laps]
    ratios = [mine / other for mine, other in zip(seconds, first)]
    if laps[0]["scale"] > 1:  # a scale below one gives seconds per image
        note += f"{'; ' if note else ''}timed on 1/{laps[0]['scale']:g} of it and scaled"
    found = dict(results[-1]["found"])
    if "answers" in found and len(results) > 1:
        found["identical"] = len({result["found"]["answers"] for result in results}) == 1
    values = (
        *(statistics.median(seconds), min(seconds), max(seconds)),
        statistics.median(lap["cpu_seconds"] for lap in laps),
        max(lap["peak_mib"] for lap in laps),
        *(max(result[name] for result in results) for name in ("anonymous_mib", "start_mib")),
        *(statistics.median(ratios), min(ratios), max(ratios)),
    )
    return dict(zip(MEASURED, values)) | {"num_rounds": len(seconds), "note": note, "found": found}


def format_table(rows: list[dict]) -> str:
    """One table per stage and size."""
    from attrib.common.formats import text_table  # not at the top: see the docstring of this module

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
    return [row["contender"], threads, *numbers, ratio, "; ".join(filter(None, [row["note"], *texts]))]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


if __name__ == "__main__":
    main(*sys.argv[1:])
