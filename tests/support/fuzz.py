"""Processes that read one damaged file after the other, each within limits of time and memory.

A process that dies or hangs is replaced; the reader of the file that killed it is known. `python -m support.fuzz MODULE
FOLDER` is such a process: it serves the TARGETS of a module.
"""

import importlib
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path

from attrib.common.errors import AttribError
from attrib.common.formats import text_table

TESTS = Path(__file__).resolve().parents[1]
MAX_CPU_SECONDS = 5  # of an input of at most 256 KiB
MAX_SECONDS = 60  # with a machine that does other work; what takes so long without processor time waits for something
MAX_ADDRESS_BYTES = 2 << 30  # above those of the process after its imports
MAX_RESIDENT_BYTES = 512 << 20  # above those before the input; unpacked text of a PNG may have 64 MiB
READ, REFUSED = "read", "refused"


@dataclass(frozen=True)
class Target:
    """A kind of files and their reader.

    files: {name: content} of whole ones. read(name, data, folder): reads the file, in a folder of its own; raises one
    of `refusals` if it cannot be read, and AssertionError if it was read wrong. repair: of checksums. change: an own
    mutation, of half of the inputs.
    """

    files: Callable[[], dict[str, bytes]]
    read: Callable[[str, bytes, Path], None]
    refusals: tuple[type[Exception], ...] = (AttribError,)
    repair: Callable[[bytes], bytes] | None = None
    change: Callable | None = None
    weight: int = 1


@dataclass(frozen=True)
class Input:
    number: int
    target: str
    name: str
    how: str  # it was mutated
    data: bytes


@dataclass(frozen=True)
class Report:
    """What came of an input. outcome: READ, REFUSED or a finding. resident_bytes: above those before it."""

    number: int
    target: str
    doing: str
    outcome: str
    detail: str = ""
    cpu_seconds: float = 0.0
    resident_bytes: int = 0

    @property
    def is_finding(self) -> bool:
        return self.outcome not in (READ, REFUSED)


class _Child:
    def __init__(self, module: str, folder: Path):
        self.pipe, theirs = Pipe()
        self.input: Input | None = None
        self.deadline = 0.0
        paths = [str(TESTS), str(TESTS.parent), *filter(None, sys.path)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "support.fuzz", module, str(folder), str(theirs.fileno())],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
            pass_fds=[theirs.fileno()],
            stderr=subprocess.DEVNULL,  # warnings of decoders
        )
        theirs.close()
        self.pipe.recv()  # it has imported everything

    def start(self, one: Input) -> None:
        self.input, self.deadline = one, time.monotonic() + MAX_SECONDS
        self.pipe.send((one.target, one.name, one.data, MAX_CPU_SECONDS))

    def report(self) -> Report | None:
        """What came of the input; None while it is read. A process that hangs is killed."""
        one = self.input
        place = one.number, one.target, f"{one.name} {one.how}"
        if self.pipe.poll():
            try:
                return Report(*place, *self.pipe.recv())
            except EOFError:
                code = self.process.wait()
                if code == -signal.SIGXCPU:
                    return Report(*place, "TOO SLOW", f"more than {MAX_CPU_SECONDS} s", MAX_CPU_SECONDS)
                return Report(*place, "CRASH", f"the process ended with {code}")
        if time.monotonic() > self.deadline:
            return Report(*place, "HANG", f"nothing for {MAX_SECONDS} s")
        return None

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.pipe.close()


def run_inputs(inputs: Iterable[Input], module: str, folder: Path, num_processes: int) -> Iterator[Report]:
    """Yield the report of each input, in the order in which they end. module: with TARGETS, for the processes."""
    inputs = iter(inputs)
    children: list[_Child] = []
    try:
        while True:
            for child in children[:]:
                if child.input and (report := child.report()):
                    child.input = None
                    if report.outcome in ("TOO SLOW", "CRASH", "HANG", "TOO MUCH MEMORY"):
                        children.remove(child)
                        child.close()
                    yield report
            while len(children) < num_processes or any(child.input is None for child in children):
                if (one := next(inputs, None)) is None:
                    break
                idle = next((child for child in children if child.input is None), None)
                if idle is None:
                    folder.mkdir(parents=True, exist_ok=True)
                    children.append(idle := _Child(module, folder))
                idle.start(one)
            if not (busy := [child.pipe for child in children if child.input]):
                return
            wait(busy, timeout=1)
    finally:
        for child in children:
            child.close()


def _status_bytes(name: str) -> int:
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10


def _answer(target: Target, name: str, data: bytes, folder: Path, max_cpu_seconds: int) -> tuple[str, str, float, int]:
    """Outcome, detail, seconds and bytes of one input."""
    resident = _status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # from here on, VmHWM is the peak of this input
    began = time.process_time()
    # The kernel ends the process if it needs more: also in code that does not return to Python.
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(began) + 1 + max_cpu_seconds, hard))
    outcome, detail = READ, ""
    try:
        target.read(name, data, folder)
    except target.refusals as error:
        outcome, detail = REFUSED, str(error)
        if len(detail.splitlines()) != 1 or "out of memory" in detail:
            outcome = "UNCLEAR"
    except AssertionError:
        outcome, detail = "READ WRONG", traceback.format_exc(limit=-3)
    except BaseException:
        outcome, detail = "WRONG ERROR", traceback.format_exc(limit=-6)
    seconds, peak = time.process_time() - began, max(0, _status_bytes("VmHWM") - resident)
    if peak > MAX_RESIDENT_BYTES:
        outcome, detail = "TOO MUCH MEMORY", f"{peak >> 20} MiB; {detail}"
    elif seconds > max_cpu_seconds:
        outcome = "TOO SLOW"
    return outcome, detail, seconds, peak


def serve(module: str, folder: Path, descriptor: int) -> None:
    targets: dict[str, Target] = importlib.import_module(module).TARGETS
    pipe = Connection(descriptor)
    folder = folder / str(os.getpid())
    resource.setrlimit(resource.RLIMIT_AS, (_status_bytes("VmSize") + MAX_ADDRESS_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pipe.send("ready")
    number = 0
    while True:
        try:
            target, name, data, max_cpu_seconds = pipe.recv()
        except EOFError:
            return
        number += 1
        place = folder / str(number)  # a new one, so that no reader knows the file already
        place.mkdir(parents=True)
        pipe.send(_answer(targets[target], name, data, place, max_cpu_seconds))
        shutil.rmtree(place)


def table(reports: list[Report]) -> str:
    """target x outcome, with the slowest input and the largest memory, as text."""
    names = list(dict.fromkeys(report.target for report in reports))
    columns = ("inputs", READ, REFUSED, "findings", "slowest s", "peak MiB")
    rows = [_row(name, [report for report in reports if report.target == name]) for name in sorted(names)]
    return text_table({"target": "left"} | dict.fromkeys(columns, "right"), [*rows, _row("all", reports)])


def _row(name: str, reports: list[Report]) -> list[str]:
    counts = [sum(report.outcome == outcome for report in reports) for outcome in (READ, REFUSED)]
    findings = sum(report.is_finding for report in reports)
    slowest = max((report.cpu_seconds for report in reports), default=0)
    peak = max((report.resident_bytes for report in reports), default=0)
    return [name, *map(str, (len(reports), *counts, findings)), f"{slowest:.2f}", str(peak >> 20)]


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
