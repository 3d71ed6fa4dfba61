"""Whether a job may start: its estimate against the configured limits and the free space of local disks."""

import os
import shutil
import tempfile

from attrib.common.errors import AttribError
from attrib.common.formats import GIB, gib
from attrib.common.settings import BudgetSettings
from attrib.common.storage import is_remote
from attrib.runtime.estimate import Estimate


def check_budget(estimate: Estimate, budget: BudgetSettings, remedies: dict[str, str]) -> None:
    """Raises AttribError that lists every limit the estimate exceeds, with both numbers and what to change.

    remedies: what lowers it, by limit (max_process_gib and so on); a limit without one is left to the general advice.
    """
    # Of the driver and the workers, each is its own process with its own limit.
    largest, which = max((estimate.worker_bytes, "a worker"), (estimate.driver_bytes, "the driver"))
    prices = budget.prices
    compared = [
        ("max_process_gib", largest / GIB, f"memory of {which}", "GiB"),
        (
            "max_output_gib",
            (estimate.output_bytes + estimate.temporary_bytes) / GIB,
            "output and temporary files",
            "GiB",
        ),
        ("max_scratch_gib", estimate.scratch_bytes / GIB, "local disk of a worker", "GiB"),
        ("max_hours", estimate.seconds / 3600, "time", "h"),
        ("max_cost", estimate.cost(prices) or 0.0, "cost", prices.currency if prices else ""),
    ]
    over = []
    for name, needed, what, unit in compared:
        limit = getattr(budget, name)
        if limit is not None and needed > limit:
            remedy = f"{remedies[name]}, or raise the limit" if name in remedies else "raise the limit"
            over.append(f"  {what}: about {needed:.3g} {unit}, budget.{name} = {limit:g}; {remedy}")
    if over:
        raise AttribError("the job was not started, its estimate is over the budget:\n" + "\n".join(over))


def check_free_space(estimate: Estimate, output: str, num_local_workers: int) -> None:
    """Raises AttribError if this machine's disks have less free space than the output (where it is local) and its workers' scratch need.

    What an earlier run of the same job left in the output folder is not needed again.
    """
    scratch = os.environ.get("ATTRIB_SCRATCH") or tempfile.gettempdir()
    needed: dict[int, list[tuple[str, float]]] = {}
    if not is_remote(output):
        missing = max(0, estimate.output_bytes + estimate.temporary_bytes - _folder_bytes(output))
        needed.setdefault(_device(output), []).append((output, missing))
    if estimate.scratch_bytes:
        needed.setdefault(_device(scratch), []).append((scratch, estimate.scratch_bytes * num_local_workers))
    for places in needed.values():
        free = shutil.disk_usage(_existing(places[0][0])).free
        total = sum(num_bytes for _, num_bytes in places)
        if total > free:
            parts = " and ".join(f"{gib(num_bytes)} below {place}" for place, num_bytes in places)
            raise AttribError(
                f"the job was not started: it needs about {parts}, and {gib(free)} are free there; free some space, "
                "choose another output, or name a larger disk for scratch in the environment variable ATTRIB_SCRATCH"
            )


def _existing(path: str) -> str:
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return path


def _device(path: str) -> int:
    return os.stat(_existing(path)).st_dev


def _folder_bytes(folder: str) -> int:
    return sum(os.lstat(os.path.join(parent, name)).st_size for parent, _, names in os.walk(folder) for name in names)
