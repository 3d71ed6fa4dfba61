"""Seeded damage to files that a job reads: each is read, or refused by one error of the kind that its reader promises.

No other exception, no crash, no hang, no more time and memory than support/fuzz.py allows. `--fuzz 20000` is the long
form. `--seed S --only-input K` repeats one input.
"""

import importlib
import os
import random
import signal
import time
from collections import Counter

import numpy as np
import pytest
from support.fuzz import Input, Target, run_inputs, table

from attrib.common.errors import AttribError

MODULE = "support.fuzz_targets"  # imported by tests alone: processes with the stubs below should start fast


def fuzzed_input(number: int, seed: int, targets: dict[str, Target], corpora: dict[str, dict[str, bytes]]) -> Input:
    """One changed file. corpora: whole files of each target."""
    from support.mutations import mutated

    rng = random.Random(f"{seed}-{number}")
    name = rng.choices(list(targets), [target.weight for target in targets.values()])[0]
    target, files = targets[name], corpora[name]
    file, other = rng.choice(list(files)), rng.choice(list(files.values()))
    if target.change and rng.random() < 0.5:
        return Input(number, name, file, target.change.__name__, target.change(rng, files[file]))
    data, how = mutated(rng, files[file], other, target.repair)
    return Input(number, name, file, how, data)


@pytest.fixture(scope="module")
def targets():
    return importlib.import_module(MODULE).TARGETS


@pytest.fixture(scope="module")
def corpora(targets):
    return {name: target.files() for name, target in targets.items()}


def test_every_whole_file_is_read(corpora, tmp_path):
    inputs = [Input(0, name, file, "whole", data) for name, files in corpora.items() for file, data in files.items()]
    reports = list(run_inputs(inputs, MODULE, tmp_path, 1))
    others = {report.doing: report.detail for report in reports if report.outcome != "read"}
    others = {doing: detail for doing, detail in others.items() if "decode: not supported: BMP" not in detail}
    assert len(reports) == len(inputs) and others == {}


@pytest.mark.timeout(7200)
def test_every_damaged_file_is_read_or_refused(targets, corpora, request, tmp_path):
    seed, only = request.config.getoption("--seed"), request.config.getoption("--only-input")
    numbers = range(request.config.getoption("--fuzz")) if only is None else [only]
    inputs = (fuzzed_input(number, seed, targets, corpora) for number in numbers)
    reports, findings, started = [], [], time.monotonic()
    for report in run_inputs(inputs, MODULE, tmp_path, min(len(numbers) // 500 + 1, os.cpu_count())):
        reports.append(report)
        text = f"{report.target}, {report.doing}: {report.outcome} {report.detail}"
        if report.is_finding:
            findings.append(f"--seed {seed} --only-input {report.number}: {text}")
            print(findings[-1], flush=True)
        elif only is not None:
            print(text)
    print(f"\n{table(reports)}\n{len(reports)} inputs in {time.monotonic() - started:.0f} s, seed {seed}")
    assert len(reports) == len(numbers) and not findings, "\n\n".join(findings)


def _do(name: str, data: bytes, folder) -> None:
    """Stands for a reader with every fault that the processes must see; `name` tells which."""
    match name:
        case "refused":
            raise AttribError("refused")
        case "two lines":
            raise AttribError("one\ntwo")
        case "another error":
            raise KeyError(name)
        case "read wrong":
            assert data == b"right"
        case "killed":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "loops":
            while True:
                pass
        case "waits":
            time.sleep(1000)
        case "claims memory":
            bytes(8 << 30)
        case "fills memory":
            np.ones(100 << 20)


TARGETS = {"stub": Target(dict, _do)}
EXPECTED = {
    "read": "read",
    "refused": "refused",
    "two lines": "UNCLEAR",
    "another error": "WRONG ERROR",
    "read wrong": "READ WRONG",
    "killed": "CRASH",
    "loops": "TOO SLOW",
    "waits": "HANG",
    "claims memory": "WRONG ERROR",  # a MemoryError
    "fills memory": "TOO MUCH MEMORY",
}


def test_every_fault_of_a_reader_is_found_and_the_next_file_is_read(tmp_path, monkeypatch):
    for name, seconds in {"MAX_SECONDS": 6, "MAX_CPU_SECONDS": 2}.items():
        monkeypatch.setattr(f"support.fuzz.{name}", seconds)
    inputs = [Input(i, "stub", name, "", b"") for i, name in enumerate(name for n in EXPECTED for name in (n, "read"))]
    reports = list(run_inputs(inputs, "test_fuzz", tmp_path, 2))
    found = {inputs[report.number].name: report.outcome for report in reports}
    assert found == EXPECTED and len(reports) == len(inputs)
    assert Counter(report.is_finding for report in reports)[True] == len(EXPECTED) - 2
    assert table(reports).splitlines()[-1].split()[:5] == ["all", "20", "11", "1", "8"]
