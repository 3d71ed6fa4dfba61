"""Contenders in turn, A B C A B C, and the rows of the table that they make.

A ratio is a contender's seconds over those of the first contender, round by round, so that a machine that is slow for a while is slow for both;
above one the first is faster.
"""

import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from attrib.common.errors import AttribError

logger = logging.getLogger(__name__)

# Of a process, its highest is kept by the system; to look often at all of a job's processes would take from what is measured.
POLL_SECONDS, SLOW_POLL_SECONDS, FEW_PROCESSES = 0.2, 1.0, 4
PACKAGE_FOLDER = str(Path(__file__).resolve().parents[2])
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")
MAX_NOTE_CHARS = 160


@dataclass(frozen=True)
class Contender:
    """function: "module:name" (attrib/benchmark/contender.py). threads: of each process; workers: processes of its own that work at once.

    may_fail: a peer that the machine may not be able to run; its row then says why. unavailable: why it need not be tried. max_rounds: of slow ones, which run in the first rounds.
    """

    name: str
    function: str
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
    """Seconds, CPU seconds and ratios are medians of the rounds. peak_mib: of the largest process, anonymous_mib: of all together, without
    mapped files; start_mib: of the contender once its libraries were loaded. None where that was not measured."""

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
    """laps, found, threads_seen, peak_mib, anonymous_mib of one run. Raises AttribError with the last line that it wrote if it fails."""
    environment = os.environ | {name: str(contender.threads) for name in THREAD_VARIABLES}
    environment["PYTHONPATH"] = PACKAGE_FOLDER  # an environment of its own does not have the project installed
    with tempfile.TemporaryDirectory(prefix="attrib-benchmark-") as folder:
        job_path, result_path, said_path = (os.path.join(folder, name) for name in ("job.json", "result.json", "said"))
        Path(job_path).write_text(json.dumps(contender.job), encoding="utf-8")
        command = [contender.python, "-m", "attrib.benchmark.contender", contender.function, job_path, result_path]
        with open(said_path, "w", encoding="utf-8") as said:
            process = subprocess.Popen(
                [*command, str(contender.threads)], env=environment, stdout=said, stderr=said, stdin=subprocess.DEVNULL
            )
            peaks, anonymous_mib = _watch(process)
        if process.returncode:
            lines = Path(said_path).read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no word"]
            raise AttribError(f"{contender.name} ended with code {process.returncode}: {lines[-1][:MAX_NOTE_CHARS]}")
        result = json.loads(Path(result_path).read_text(encoding="utf-8"))
    for library, threads in result["threads_seen"].items():
        if threads != contender.threads:
            raise AttribError(f"{contender.name}: {library} runs {threads} threads in place of {contender.threads}")
    return result | {"peak_mib": max([result["peak_mib"], *peaks]), "anonymous_mib": anonymous_mib}


def _watch(process: subprocess.Popen) -> tuple[list[float], float]:
    """Peak resident MiB of each process below `process`, and the highest sum of their anonymous memory, until it ends."""
    peaks: dict[int, float] = {}
    highest = 0.0
    while process.poll() is None:
        total, below = 0.0, process_tree(process.pid)
        for pid in below:
            values = _status(pid)
            peaks[pid] = max(peaks.get(pid, 0.0), values.get("VmHWM", 0.0))
            total += values.get("RssAnon", 0.0)
        highest = max(highest, total)
        time.sleep(POLL_SECONDS if len(below) <= FEW_PROCESSES else SLOW_POLL_SECONDS)
    return list(peaks.values()), highest


def process_tree(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for parent in found:
        try:
            with open(f"/proc/{parent}/task/{parent}/children", encoding="ascii") as file:
                found += map(int, file.read().split())
        except OSError:
            continue  # it has ended, or the system keeps no such file
    return found


def _status(pid: int) -> dict[str, float]:
    """MiB."""
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8") as file:
            lines = [line.split() for line in file if line.startswith(("VmHWM", "RssAnon"))]
    except OSError:
        return {}
    return {name.rstrip(":"): int(value) / 1024 for name, value, _ in lines}


def interleave(contenders: list[Contender], num_rounds: int) -> list[list[dict | str]]:
    """For each contender its result, or the reason why there is none, for every round that it ran in; all contenders take turns."""
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
    """Rows of every contender for each lap. sizes: {lap: what it worked on, for the table}; the first contender is ours, with all laps."""
    results = interleave(contenders, num_rounds)
    rows = []
    for lap, size in sizes.items():
        ours = [result["laps"][lap]["seconds"] for result in results[0]]
        for contender, mine in zip(contenders, results):
            failed = [result for result in mine if isinstance(result, str)]
            if failed:
                rows.append(_absent(stage, size, contender, failed[0]))
            elif lap in mine[0]["laps"]:
                rows.append(_row(stage, size, contender, [(r["laps"][lap], r) for r in mine], ours))
    return rows


def _row(stage: str, size: str, contender: Contender, measured: list[tuple[dict, dict]], ours: list[float]) -> Row:
    seconds = [lap["seconds"] for lap, _ in measured]
    cpu = [lap["cpu_seconds"] for lap, _ in measured]
    ratios = [mine / first for mine, first in zip(seconds, ours)]
    notes = [contender.note] if contender.note else []
    if measured[0][0]["scale"] > 1:  # below one seconds are per image, not of all that was timed
        notes.append(f"timed on 1/{measured[0][0]['scale']:g} of it and scaled")
    if len(seconds) < len(ours):
        notes.append(f"{len(seconds)} round(s)")
    return Row(
        stage=stage,
        size=size,
        contender=contender.name,
        threads=contender.threads,
        workers=contender.workers,
        seconds=statistics.median(seconds),
        lowest=min(seconds),
        highest=max(seconds),
        cpu_seconds=None if None in cpu else statistics.median(cpu),
        # A lap knows the peak of its own process so far; what ran below it is known for the whole.
        peak_mib=max(lap["peak_mib"] if len(whole["laps"]) > 1 else whole["peak_mib"] for lap, whole in measured),
        anonymous_mib=max(whole["anonymous_mib"] for _, whole in measured),
        start_mib=max(whole["start_mib"] for _, whole in measured),
        ratio=statistics.median(ratios),
        ratio_lowest=min(ratios),
        ratio_highest=max(ratios),
        num_rounds=len(seconds),
        note="; ".join(notes),
        found=_found([whole["found"] for _, whole in measured]),
    )


def _found(rounds: list[dict]) -> dict:
    """Of the last round; several rounds with answers tell whether all were the same."""
    found = dict(rounds[-1])
    if "answers" in found and len(rounds) > 1:
        found["identical"] = len({one["answers"] for one in rounds}) == 1
    return found


def _absent(stage: str, size: str, contender: Contender, reason: str) -> Row:
    nothing = dict.fromkeys(
        "seconds lowest highest cpu_seconds peak_mib anonymous_mib start_mib ratio ratio_lowest ratio_highest".split()
    )
    note = f"not measured: {reason}"
    return Row(
        stage, size, contender.name, contender.threads, contender.workers, **nothing, num_rounds=0, note=note, found={}
    )
