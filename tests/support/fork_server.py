"""Runs jobs in processes that start in milliseconds: forks of a process that has imported the libraries.

The server does nothing but import, so that its forks are as new processes. A fork runs `python -m jobs.<job>` from its
entry point on: the same command, exit code and output.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
TRACEBACK_CODE, HANG_CODE = 70, 71


@dataclass
class Command:
    """One process. kill_after: seconds until SIGKILL; kill: whom, "job" or the raylet of its own Ray."""

    job: str
    config: str
    inject: dict = field(default_factory=dict)  # arguments of support.faults.inject
    kill_after: float | None = None
    kill: str = "job"


@dataclass
class Ended:
    """code: exit status, negative after a signal. output: stdout and stderr together. seconds: until it ended."""

    code: int
    output: str
    seconds: float

    @property
    def message(self) -> str:
        """The error that the job reported, or the end of its output."""
        errors = [line for line in self.output.splitlines() if "ERROR" in line]
        return (errors or self.output.strip().splitlines() or [""])[-1]


class ForkServer:
    """A context manager. `run` starts commands at the same time and returns when all have ended."""

    def __init__(self):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.fork_server"],
            **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment},
        )

    def run(self, *commands: Command, seconds: float = 60) -> list[Ended]:
        """seconds: a command that runs for longer is killed, and its code is HANG_CODE."""
        request = {"commands": [asdict(command) for command in commands], "seconds": seconds}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return [Ended(**ended) for ended in json.loads(self._process.stdout.readline())]

    def __enter__(self) -> "ForkServer":
        return self

    def __exit__(self, *_) -> None:
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


@dataclass
class _Child:
    command: Command
    pid: int
    pipe: int
    output: bytes = b""
    code: int | None = None
    seconds: float = 0.0
    killed: bool = False

    def poll(self, elapsed: float, limit: float) -> None:
        """Read what it printed, kill it if its time has come, and note how it ended."""
        while select.select([self.pipe], [], [], 0)[0] and (block := os.read(self.pipe, 1 << 16)):
            self.output += block
        command = self.command
        if not self.killed and command.kill_after is not None and elapsed >= command.kill_after:
            self.killed = command.kill == "job" or _has_raylet(self.pid)
            for pid in [self.pid] if command.kill == "job" else _raylets(self.pid):
                os.kill(pid, signal.SIGKILL)
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid == 0 and elapsed >= limit:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            status, pid = HANG_CODE << 8, self.pid
        if pid:
            self.code, self.seconds = os.waitstatus_to_exitcode(status), elapsed
            while select.select([self.pipe], [], [], 0)[0] and (block := os.read(self.pipe, 1 << 16)):
                self.output += block
            os.close(self.pipe)


def _raylets(pid: int) -> list[int]:
    import psutil

    with suppress(psutil.NoSuchProcess):
        return [child.pid for child in psutil.Process(pid).children(recursive=True) if child.name() == "raylet"]
    return []


def _has_raylet(pid: int) -> bool:
    return bool(_raylets(pid))


def _start(command: Command) -> _Child:
    receive, send = os.pipe()
    if pid := os.fork():
        os.close(send)
        return _Child(command, pid, receive)
    code = TRACEBACK_CODE
    try:
        os.close(receive)
        for number in (1, 2):
            os.dup2(send, number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in (1, 2))
        code = _main(command)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _main(command: Command) -> int:
    import importlib

    from support.faults import inject

    module = importlib.import_module(f"jobs.{command.job}")
    sys.argv = [f"jobs.{command.job}", "--config", command.config]
    inject(**command.inject)
    try:
        module.main()
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    finally:
        import ray

        if command.inject.get("use_ray"):
            ray.shutdown()
    return 0


def serve() -> None:
    import attrib.generators.registry.registration
    import attrib.pipeline.job  # noqa: F401  # and with it all stages

    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    for line in requests:
        request = json.loads(line)
        started = time.monotonic()
        children = [_start(Command(**command)) for command in request["commands"]]
        while running := [child for child in children if child.code is None]:
            for child in running:
                child.poll(time.monotonic() - started, request["seconds"])
            time.sleep(0.005)
        ended = [Ended(child.code, child.output.decode(errors="replace"), child.seconds) for child in children]
        answers.write(json.dumps([asdict(one) for one in ended]) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
