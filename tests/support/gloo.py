"""Two processes in one gloo group that run a function of a test module on both ranks.

Starting a process and importing torch takes seconds, so all tests of two workers share these processes.
"""

import io
import multiprocessing
import sys
import tempfile
import traceback
from collections.abc import Callable

import torch
import torch.distributed as dist

WORLD_SIZE = 2
TIMEOUT_SECONDS = 100


class GlooPool:
    """`run(function, *arguments)` calls `function(rank, *arguments)` on both ranks; results in rank order."""

    def __init__(self):
        context = multiprocessing.get_context("spawn")  # torch is loaded here; its threads do not survive a fork
        self._folder = tempfile.TemporaryDirectory(prefix="gloo-")
        self._pipes, self._processes = [], []
        for rank in range(WORLD_SIZE):
            pipe, end = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self._folder.name, end), daemon=True)
            process.start()
            self._pipes.append(pipe)
            self._processes.append(process)

    def run(self, function: Callable, *arguments) -> list:
        """Raises RuntimeError with the traceback of the first rank that failed; the pool is closed then."""
        for pipe in self._pipes:
            pipe.send(sys.path)  # first, so that the module of the function can be found
            pipe.send((function, arguments))
        found = []
        for rank, pipe in enumerate(self._pipes):
            # If one rank fails, the other waits for it forever. So the first error ends both.
            if not pipe.poll(TIMEOUT_SECONDS):
                self.close()
                raise RuntimeError(f"rank {rank} gave no result of {function.__name__} in {TIMEOUT_SECONDS} s")
            ok, value = pipe.recv()
            if not ok:
                self.close()
                raise RuntimeError(f"rank {rank}:\n{value}")
            found.append(torch.load(io.BytesIO(value), weights_only=False))
        return found

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()


def _serve(rank: int, folder: str, pipe) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD_SIZE)
    while True:
        sys.path[:] = pipe.recv()
        try:
            function, arguments = pipe.recv()
            buffer = io.BytesIO()
            torch.save(function(rank, *arguments), buffer)
            pipe.send((True, buffer.getvalue()))
        except Exception:
            pipe.send((False, traceback.format_exc()))
