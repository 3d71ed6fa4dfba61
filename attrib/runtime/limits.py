"""Whether a job may start: its estimate against the configured limits and the free space of the local disks."""

import os
import shutil
import tempfile

from attrib.common.errors import AttribError
from attrib.common.formats import GIB, gib
from attrib.common.settings import BudgetSettings
from attrib.common.storage import is_remote
from attrib.runtime.estimate import Estimate


def check_budget(estimate: Estimate, budget: BudgetSettings, remedies: dict[str, str]) -> None:
    """Raises AttribError with every limit that the estimate exceeds: both numbers, and what to change.

    remedies: what lowers the number, by limit (max_process_gib and so on).
    """
    largest, process = max((estimate.worker_bytes, "a worker"), (estimate.driver_bytes, "the driver"))
    output_gib = (estimate.output_bytes + estimate.temporary_bytes) / GIB
    currency = budget.prices.currency if budget.prices else ""
    compared = [
        ("max_process_gib", largest / GIB, f"memory of {process}", "GiB"),
        ("max_output_gib", output_gib, "output and temporary files", "GiB"),
        ("max_scratch_gib", estimate.scratch_bytes / GIB, "local disk of a worker", "GiB"),
        ("max_hours", estimate.seconds / 3600, "time", "h"),
        ("max_cost", estimate.cost(budget.prices) or 0.0, "cost", currency),
    ]
    over = []
    for name, needed, what, measure in compared:
        limit = getattr(budget, name)
        if limit is not None and needed > limit:
            remedy = f"{remedies[name]}, or raise the limit" if name in remedies else "raise the limit"
            over.append(f"  {what}: about {needed:.3g} {measure}, budget.{name} = {limit:g}; {remedy}")
    if over:
        raise AttribError("the job was not started, its estimate is over the budget:\n" + "\n".join(over))


def check_free_space(estimate: Estimate, output: str, num_local_workers: int) -> None:
    """Raises AttribError if the disks of this machine are too small for the output (if local) and the workers' scratch.

    Files that an earlier run of the same job left in the output folder are not counted again.
    """
    scratch = os.environ.get("ATTRIB_SCRATCH") or tempfile.gettempdir()
    needed: list[tuple[str, float]] = []
    if not is_remote(output):
        needed.append((output, max(0, estimate.output_bytes + estimate.temporary_bytes - _folder_bytes(output))))
    if estimate.scratch_bytes:
        needed.append((scratch, estimate.scratch_bytes * num_local_workers))
    by_disk: dict[int, list[tuple[str, float]]] = {}
    for folder, num_bytes in needed:
        by_disk.setdefault(os.stat(_existing(folder)).st_dev, []).append((folder, num_bytes))
    for folders in by_disk.values():
        free = shutil.disk_usage(_existing(folders[0][0])).free
        if sum(num_bytes for _, num_bytes in folders) > free:
            parts = " and ".join(f"{gib(num_bytes)} below {folder}" for folder, num_bytes in folders)
            raise AttribError(
                f"the job was not started: it needs about {parts}, and {gib(free)} are free there; free some space, "
                "choose another output, or name a larger disk for scratch in the environment variable ATTRIB_SCRATCH"
            )


def _existing(path: str) -> str:
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return path


def _folder_bytes(folder: str) -> int:
    return sum(os.lstat(os.path.join(parent, name)).st_size for parent, _, names in os.walk(folder) for name in names)
