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

What listens where. A local Ray has no token: who reaches a port of it can run code as the user of the job.

- All its processes listen on loopback only: driver, GCS, raylet, workers, agents, monitor, dashboard. Other users of
  the same machine still reach them; if they are not trusted, use a cluster with a token.
- Gloo, which joins the workers of a training run on CPUs, listens on loopback too.
- Not bound to loopback, because PyTorch has no option for it: the key-value store of torch.distributed, one port on all
  addresses while a training run lasts. NCCL, on GPUs, chooses its interface by NCCL_SOCKET_IFNAME.
- A cluster listens where its `ray start` says, see cluster/README.md; a job that joins one listens there as well.
"""

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import ray
from ray._private import ray_constants

from attrib.common import logs
from attrib.common.errors import AttribError
from attrib.common.scratch import scratch_parent, sweep_scratch
from attrib.common.settings import RaySettings

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
LOOPBACK_INTERFACE = "lo" if sys.platform == "linux" else "lo0"


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
        # Ray would replace a loopback address by that of the network, on which a local Ray does not listen.
        with _on_loopback() if _is_loopback(address) else contextlib.nullcontext():
            ray.init(address=address, logging_level=logging.WARNING, runtime_env=environment)
    else:
        # ERROR, because at WARNING each worker prints Ray's advice on authentication; a local Ray needs none.
        memory = int(settings.object_store_gib * 2**30) if settings.object_store_gib else None
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK_INTERFACE)  # inherited by the workers
        with _on_loopback():
            ray.init(
                address="local",
                num_cpus=settings.num_cpus,
                object_store_memory=memory,
                include_dashboard=dashboard,
                dashboard_host=LOOPBACK,
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


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """Let `ray.init` start a Ray whose processes listen on loopback only, or join one by its loopback address.

    On Linux, Ray replaces a loopback `_node_ip_address` by the address of the network, since other nodes may join.
    Where it takes no other nodes (its default on macOS and Windows), it keeps to loopback. Ray reads its own switch for
    this from the environment at import, before it is known whether a job joins a cluster, which must be reachable.
    """
    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _is_loopback(address: str) -> bool:
    return address.rpartition(":")[0] in (LOOPBACK, "localhost", "[::1]")


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
