"""Independent units of work as Ray tasks: a bounded window in flight, retried when a worker or its node is lost."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ray
from ray.exceptions import RayTaskError

from attrib.distributed.session import num_cluster_cpus
from attrib.errors import AttribError

MAX_RETRIES = 8  # of a unit whose worker died; an exception in the unit itself is not retried


def run_units(
    function: Callable, units: Iterable[tuple], *, num_cpus: float = 1, num_gpus: float = 0
) -> Iterator[tuple[int, Any]]:
    """Yield (position, function(*unit)) as units finish. Errors that the user can mend arrive as themselves, without Ray's wrapping.

    Units must be idempotent: after the loss of a node a unit may run twice.
    """
    remote = ray.remote(function).options(
        num_cpus=num_cpus, num_gpus=num_gpus, max_retries=MAX_RETRIES, scheduling_strategy="SPREAD"
    )
    waiting = enumerate(units)
    running: dict[ray.ObjectRef, int] = {}
    exhausted = False
    while running or not exhausted:
        # Twice the CPUs keeps every worker busy; a longer queue would only hold arguments in memory.
        while not exhausted and len(running) < 2 * num_cluster_cpus():
            position, unit = next(waiting, (None, None))
            if unit is None:
                exhausted = True
            else:
                running[remote.remote(*unit)] = position
        if not running:
            return
        (finished, *_), _ = ray.wait(list(running))
        position = running.pop(finished)
        yield position, _result(finished)


def _result(reference: ray.ObjectRef):
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, AttribError):
            raise error.cause from None
        raise
