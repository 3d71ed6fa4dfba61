"""Independent work units as Ray tasks: a bounded number in flight, retried when a worker or its node is lost."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import ray

from attrib.common.errors import AttribError, FailedShareError, MismatchError
from attrib.common.progress import Progress
from attrib.runtime.session import num_cluster_cpus

logger = logging.getLogger(__name__)

USER_ERRORS = (AttribError, FailedShareError, MismatchError, OSError, PermissionError, FileNotFoundError)
MAX_RETRIES = 8  # of a work unit whose worker died; an exception in the work unit itself is not retried


def run_units(
    function: Callable, units: Iterable[tuple], *, num_cpus: float = 1, num_gpus: float = 0
) -> Iterator[tuple[int, Any]]:
    """Yield (position, function(*unit)) for every work unit, in the order in which they finish.

    Work units must be idempotent: after the loss of a node, one may run twice. Errors that the user can fix are raised
    as themselves.
    """
    _warn_if_too_large({"CPU": num_cpus, "GPU": num_gpus})
    remote = ray.remote(function).options(
        num_cpus=num_cpus, num_gpus=num_gpus, max_retries=MAX_RETRIES, scheduling_strategy="SPREAD"
    )
    waiting = enumerate(units)
    running: dict[ray.ObjectRef, int] = {}
    while True:
        # Twice the CPUs keeps every worker busy; a longer queue would only hold arguments in memory.
        for position, unit in islice(waiting, max(0, 2 * num_cluster_cpus() - len(running))):
            running[remote.remote(*unit)] = position
        if not running:
            return
        (finished, *_), _ = ray.wait(list(running))
        position = running.pop(finished)
        with plain_errors():
            result = ray.get(finished)
        yield position, result


def run_all(
    function: Callable,
    units: Iterable[tuple],
    label: str = "",
    counted: str = "",
    counts: Sequence[int] = (),
    already_done: int = 0,
    **resources: float,
) -> list[Any]:
    """Return function(*unit) of every work unit, in their order. resources: as `run_units`.

    label: of a progress bar; none if empty. counts: number of items of each work unit; counted: what they are.
    """
    progress = Progress(label, sum(counts) + already_done, counted, already_done) if label else None
    results: dict[int, Any] = {}
    for i, results[i] in run_units(function, units, **resources):
        if progress:
            progress.update(counts[i])
    if progress:
        progress.close()
    return [results[i] for i in sorted(results)]


@contextmanager
def plain_errors():
    """Raise errors that the user can fix as themselves. Ray wraps what a worker raised, Ray Train more than once."""
    try:
        yield
    except Exception as error:
        inner = error
        while inner is not None and type(inner) not in USER_ERRORS:
            inner = getattr(inner, "cause", None) or inner.__cause__
        if inner is None or inner is error:
            raise
        raise inner from None


def _warn_if_too_large(needed: dict[str, float]) -> None:
    """Warn of a task that fits no node, for which Ray waits silently. No error: an autoscaler may add a larger node."""
    for name, amount in needed.items():
        largest = max(node["Resources"].get(name, 0) for node in ray.nodes() if node["Alive"])
        if amount > largest:
            logger.warning(
                f"a task needs {amount:g} {name} and the largest node has {largest:g}: waiting for a larger node. "
                "If none will come, stop and lower threads_per_task"
            )
