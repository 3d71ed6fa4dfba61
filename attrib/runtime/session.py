"""Connect a job to Ray, and ask the cluster for its CPUs, GPUs and devices.

What Ray itself writes to a job's output, and why it is left there:

- `(name pid=123, ip=...)` in front of a line: Ray forwards what a worker prints, and names the worker. This is how the
  errors and warnings of workers arrive, so forwarding stays on.
- `(raylet) ...` and `(autoscaler) ...`: a worker was killed for its memory, or no node is large enough. Both explain
  why a job waits.
- `Actor ... has constructor arguments in the object store`, once per job that streams chunks: harmless, see
  attrib/runtime/chunk_stream.py.
- A traceback of `PlacementGroupCleaner` that ends in `Found multiple active Ray instances`, once per training run while
  several Rays run on the machine: harmless, it only frees the workers of a controller that was killed.
"""

import logging
import os
import signal
import threading
from typing import Any

import ray

from attrib.common import logs
from attrib.common.errors import AttribError
from attrib.common.scratch import scratch_parent, sweep_scratch
from attrib.common.settings import RaySettings

logger = logging.getLogger(__name__)


def connect(settings: RaySettings, dashboard: bool = False) -> None:
    """Connect to `address` or RAY_ADDRESS (set by `ray job submit`), or start a local Ray that ends with the process.

    dashboard: start the dashboard of a local Ray. Ray Train asks it whether its controller is alive; without a
    dashboard it logs a complaint every second.
    """
    sweep_scratch(scratch_parent())
    if ray.is_initialized():
        return
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    # Ray replaces the handler of SIGTERM, in C++ by one that aborts the process with a stack trace.
    on_main_thread, on_sigterm = threading.current_thread() is threading.main_thread(), signal.getsignal(signal.SIGTERM)
    address = settings.address or os.environ.get("RAY_ADDRESS")
    if address:
        # Workers of a local Ray inherit the environment; those of a cluster must be told of another log format.
        environment = {"env_vars": {logs.FORMAT_VARIABLE: "json"}} if logs.is_json() else None
        ray.init(address=address, logging_level=logging.WARNING, runtime_env=environment)
    else:
        # ERROR, because at WARNING each worker prints Ray's advice on authentication; a local Ray needs none.
        memory = int(settings.object_store_gib * 2**30) if settings.object_store_gib else None
        ray.init(
            address="local",
            num_cpus=settings.num_cpus,
            object_store_memory=memory,
            include_dashboard=dashboard,
            logging_level=logging.ERROR,
        )
    if on_main_thread:
        signal.signal(signal.SIGTERM, on_sigterm)
    resources = ray.cluster_resources()
    nodes = sum(node["Alive"] for node in ray.nodes())
    logger.info(
        f"Ray {ray.__version__}: {nodes} node(s), {resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs, "
        f"{resources.get('memory', 0) / 2**30:.1f} GiB for tasks"
    )


def put(value: Any) -> Any:
    """Store a large argument of many tasks once. Returns a reference; a task that takes it receives the value."""
    return ray.put(value)


def num_cluster_cpus() -> int:
    return int(ray.cluster_resources().get("CPU", 1))


def num_cluster_gpus() -> int:
    return int(ray.cluster_resources().get("GPU", 0))


def num_node_cpus() -> int:
    """CPUs of the largest node: the most that one task can use."""
    return int(max(node["Resources"].get("CPU", 1) for node in ray.nodes() if node["Alive"]))


def device_of(wanted: str, job: str) -> str:
    """Return "cuda" or "cpu" for `wanted` = "auto", "cpu" or "cuda".

    Raises AttribError if `wanted` is "cuda" and the cluster has no GPU: a job never replaces an explicit setting.
    """
    if wanted == "cuda" and not num_cluster_gpus():
        raise AttribError(f"device is 'cuda' (job {job}), but the cluster has no GPU; set it to 'auto' or 'cpu'")
    return "cuda" if wanted != "cpu" and num_cluster_gpus() else "cpu"
