"""What goes wrong inside a process: it ends at a write, or its files may not grow. For forks of support.fork_server.

Tasks of such a process run one after another in it, without Ray: a Ray of its own, with new workers, costs each fault
seconds. A crash then ends driver and tasks at once, as when a machine loses its power. Faults with Ray are among the
kinds of support.campaign, too.
"""

import resource
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict

import ray

from attrib.attribute import merge
from attrib.embed import job as embed_job
from attrib.runtime import tasks
from support.crashes import Counter, count_writes


def inject(
    crash_at: int = 0, mode: str = "after", max_file_bytes: int = 0, count_to: str = "", use_ray: bool = False
) -> None:
    """Set up the faults of this process.

    crash_at: number of the write at which it ends, 0 for none; mode: one of MODES, where half leaves a temporary file
    or half of a folder. max_file_bytes: the size at which writing to a file fails, as on a full disk; 0 for no limit.
    count_to: a file that gets one byte per write.
    """
    if not use_ray:
        without_ray()
    if max_file_bytes:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
    if crash_at or count_to:
        count_writes(Counter(count_to), crash_at, mode)


def without_ray() -> None:
    """Run all tasks of this process in itself."""
    node = {"CPU": 1.0, "memory": 8 * 2**30, f"node:{ray.util.get_node_ip_address()}": 1.0}
    ray.is_initialized = lambda: True
    ray.nodes = lambda: [{"Alive": True, "Resources": node}]
    ray.cluster_resources = lambda: node
    tasks.run_units = embed_job.run_units = merge.run_units = _run_units
    embed_job.map_chunks = _map_chunks


def _run_units(function: Callable, units, **_) -> Iterator[tuple]:
    for position, unit in enumerate(units):
        yield position, function(*unit)


def _map_chunks(worker: type, arguments: tuple, chunks, *_, **__) -> Iterator[dict]:
    made = worker(*arguments)
    for chunk in chunks:
        yield made(asdict(chunk))
