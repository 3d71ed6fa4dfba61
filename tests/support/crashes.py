"""A process that ends at one of its writes. Imports little, because workers of Ray import it, too."""

import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path

from attrib.common.storage import Storage

CRASH_CODE = 137
WRITES = ("write_bytes", "publish", "delete_file", "delete_folder")
MODES = ("before", "half", "after")


class Counter:
    """Counts in a file, if it has a path, so that several processes can count together."""

    def __init__(self, path: str = ""):
        self.path, self.count = path, 0

    def add(self) -> int:
        self.count += 1
        if self.path:
            file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.write(file, b".")
            self.count = os.fstat(file).st_size
            os.close(file)
        return self.count


def count_writes(counter: Counter, crash_at: int, mode: str) -> Callable[[], None]:
    """Count what this process writes and deletes, and end it at one write. Returns what undoes that."""
    ordinary = {name: getattr(Storage, name) for name in WRITES}

    def counted(name: str, method: Callable) -> Callable:
        @wraps(method)
        def write(self, *arguments):
            if counter.add() != crash_at:
                return method(self, *arguments)
            if mode == "half":
                _half(self, name, arguments)
            if mode != "before":
                method(self, *arguments)
            os._exit(CRASH_CODE)

        return write

    def undo() -> None:
        for name, method in ordinary.items():
            setattr(Storage, name, method)

    for name, method in ordinary.items():
        setattr(Storage, name, counted(name, method))
    return undo


def _half(storage: Storage, name: str, arguments: tuple) -> None:
    """Half of a write or of a deletion, then the end. An object of a store has no half."""
    if name == "delete_folder" and os.path.isdir(arguments[0]):
        files = sorted(path for path in Path(arguments[0]).rglob("*") if path.is_file())
        for path in files[: (len(files) + 1) // 2]:
            path.unlink()
        os._exit(CRASH_CODE)

    def never(source, target):
        os.truncate(source, os.path.getsize(source) // 2)
        os._exit(CRASH_CODE)

    os.replace = never


def at_write_of_a_task(function: Callable, crash_at: int, mode: str, folder: str) -> Callable:
    """A task whose worker process ends at one write, once; all tasks of the same folder count together."""

    def task(*arguments):
        undo = count_writes(Counter(os.path.join(folder, "writes")), crash_at, mode)
        try:
            return function(*arguments)
        finally:
            undo()

    return task


def dying_at_write(worker: type, crash_at: int, mode: str, folder: str) -> type:
    """A worker of map_chunks whose process ends at one write, once."""

    class Dying(worker):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            count_writes(Counter(os.path.join(folder, "writes")), crash_at, mode)

    return Dying
