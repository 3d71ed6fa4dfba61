"""Compare the estimate of a job with the budget, the free disk space and the cluster before its work starts."""

import logging
import os
import shutil
from dataclasses import replace

import ray

from attrib.common.errors import AttribError
from attrib.common.formats import GIB, gib
from attrib.common.scratch import scratch_parent
from attrib.common.settings import BudgetSettings, JobSettings
from attrib.common.storage import is_remote
from attrib.runtime.estimate import Estimate

logger = logging.getLogger(__name__)

REMEDIES = {
    "max_process_gib": "lower what a worker holds at a time (chunk_rows, partition_rows, shard_rows, query_block_rows)",
    "max_output_gib": "take fewer images or a smaller dimension",
    "max_scratch_gib": "lower shard_rows",
    "max_hours": "take more or faster workers",
    "max_cost": "take fewer images or cheaper workers",
}


def admit(estimate: Estimate, settings: JobSettings, remedies: dict[str, str] | None = None) -> Estimate:
    """Log the estimate and return it, without requests if the output is local.

    remedies: advice for this job by limit, instead of REMEDIES. Raises AttribError if the estimate exceeds the budget
    or the free space of local disks.
    """
    if not is_remote(settings.output):
        estimate = replace(estimate, num_writes=0, num_reads=0)
    logger.info(estimate.describe(settings.budget.prices))
    check_budget(estimate, settings.budget, REMEDIES | (remedies or {}))
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    here = f"node:{ray.util.get_node_ip_address()}"
    on_this_node = sum(int(node.get("CPU", 0)) for node in nodes if here in node)
    check_free_space(estimate, settings.output, min(estimate.num_workers, max(1, on_this_node)))
    largest = max(node.get("memory", 0) for node in nodes)
    if estimate.worker_bytes > largest:
        logger.warning(
            f"a worker is estimated at {gib(estimate.worker_bytes)} and the largest node offers {gib(largest)} "
            f"to all of its tasks: the system may kill it. {REMEDIES['max_process_gib'].capitalize()}, or take larger "
            "nodes"
        )
    return estimate


def check_budget(estimate: Estimate, budget: BudgetSettings, remedies: dict[str, str]) -> None:
    """Raise AttribError with every limit that the estimate exceeds, both numbers and a remedy.

    remedies: advice by limit (max_process_gib and so on).
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
    """Raise AttribError if the disks of this machine are too small for a local output and the workers' scratch files.

    Files that an earlier run left in the output folder count as written.
    """
    needed: list[tuple[str, float]] = []
    if not is_remote(output):
        written = sum(
            os.lstat(os.path.join(parent, name)).st_size for parent, _, names in os.walk(output) for name in names
        )
        needed.append((output, max(0, estimate.output_bytes + estimate.temporary_bytes - written)))
    if estimate.scratch_bytes:
        scratch = scratch_parent()
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
