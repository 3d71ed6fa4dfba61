"""A log of what a process asks of `Storage`, kept by Ray's set-up hook while jobs are simulated.

A module of its own, which imports little: every worker of a simulation loads it, whatever its tasks need.
"""

import os
from functools import wraps

import ray

from attrib.common.storage import Storage

LOG_FOLDER = "ATTRIB_SIMULATION_LOG"
HOOK = "attrib.capacity.storage_log.count_storage"


def count_storage() -> None:
    """From here on, note every operation of `Storage` in this process: kind, bytes and URI, in a file of its own below the folder that LOG_FOLDER names."""
    node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else "driver"
    path = os.path.join(os.environ[LOG_FOLDER], f"{node}-{os.getpid()}.log")
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(kind: str, uri: str, num_bytes: int) -> None:
        os.write(log, f"{kind}\t{num_bytes}\t{uri}\n".encode())  # one call a line, since threads read at the same time

    def counted(name: str, kind: str, num_bytes=lambda *_: 0):
        original = getattr(Storage, name)

        @wraps(original)
        def method(self, *arguments, **options):
            found = original(self, *arguments, **options)
            uri = arguments[1] if name == "publish" else arguments[0]
            for one in uri if isinstance(uri, list) else [uri]:
                note(kind, one, num_bytes(*arguments))
            return found

        setattr(Storage, name, method)

    counted("write_bytes", "write", lambda _, data: memoryview(data).nbytes)
    counted("publish", "write", lambda _, uri: os.path.getsize(uri))  # the local file has gone
    for name in ("open", "read_table", "dataset", "localise"):
        counted(name, "read")
    counted("exists", "head")
    counted("list_folder", "list")
    for name in ("delete_file", "delete_folder"):
        counted(name, "delete")
