"""The last step before the work of a job: compare its estimate with the budget, the disks and the cluster."""

import logging

import ray

from attrib.common.formats import gib
from attrib.common.settings import JobSettings
from attrib.common.storage import is_remote
from attrib.runtime.estimate import Estimate
from attrib.runtime.limits import check_budget, check_free_space

logger = logging.getLogger(__name__)

REMEDIES = {
    "max_process_gib": "lower what a worker holds at a time (chunk_rows, partition_rows, shard_rows, query_block_rows)",
    "max_output_gib": "take fewer images or a smaller dimension",
    "max_scratch_gib": "lower shard_rows",
    "max_hours": "take more or faster workers",
    "max_cost": "take fewer images or cheaper workers",
}


def admit(estimate: Estimate, settings: JobSettings, remedies: dict[str, str] | None = None) -> Estimate:
    """Log the estimate and return it.

    remedies: what to change in this job, by limit; they replace the general ones.
    Raises AttribError if the estimate is over the budget or local disks are too full.
    """
    if not is_remote(settings.output):
        estimate = estimate.remote(0, 0)
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
            "to all of its tasks: the system may kill it. "
            + REMEDIES["max_process_gib"].capitalize()
            + ", or take larger nodes"
        )
    return estimate
