"""Shared fixtures: development images, a local Ray, an S3 server, and jobs as processes."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from attrib.common.settings import RaySettings, StorageSettings
from attrib.common.storage import Storage

ROOT = Path(__file__).resolve().parents[1]
pytest.register_assert_rewrite("support.prevalence")  # its asserts are tests
if "PYTEST_XDIST_WORKER" in os.environ:
    # One thread of torch and OpenMP in each of the parallel workers: more would wait for one another.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before any Ray worker starts: workers inherit the environment of the process that started Ray.
os.environ |= {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_EC2_METADATA_DISABLED": "true",
    "HF_HUB_OFFLINE": "1",
    # A worker that has imported the libraries serves the jobs of later tests; Ray would end it after a second.
    "RAY_idle_worker_killing_time_threshold_ms": "600000",
    "RAY_num_workers_soft_limit": "4",
    # By default Ray merges lines of workers that differ only in numbers, so lines of a restarted worker are lost.
    "RAY_DEDUP_LOGS": "0",
    # One process less in every training run: these machines announce no preemption.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="also run the cluster tests that take minutes")
    parser.addoption("--faults", type=int, default=12, help="number of faults of tests/slow/test_fault_campaign.py")
    parser.addoption("--only-fault", type=int, help="repeat one fault of the campaign, by its number")
    parser.addoption("--fuzz", type=int, default=400, help="number of inputs of tests/slow/test_fuzz.py")
    parser.addoption("--only-input", type=int, help="repeat one input of the fuzz tier, by its number")
    parser.addoption("--seed", type=int, default=17, help="of the fault campaign and the fuzz tier")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """The tests of a file of the two slower tiers share fixtures, so they run in one xdist worker."""
    for item in items:
        tier = item.path.relative_to(ROOT / "tests").parts[0]
        if tier in ("integration", "slow"):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
        if tier == "slow":
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session):
    """An xdist that cannot group tests does not say so: each worker would make every shared fixture again."""
    grouped = [item for item in session.items if item.get_closest_marker("xdist_group")]
    if getattr(session.config.option, "loadgroup", False) and not all("@" in item.nodeid for item in grouped):
        raise pytest.UsageError("this pytest-xdist does not group tests under this pytest; install the pinned versions")


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Folder of the development images, which are not part of the project. Skips the test without them."""
    folder = Path(os.environ.get("ATTRIB_DATA") or ROOT.parent / "shared" / "data")
    if not (folder / "dev" / "sources").is_dir():
        pytest.skip(f"no images under {folder}; set ATTRIB_DATA to the folder that holds dev/sources")
    return folder


@pytest.fixture
def one_thread():
    """torch with one thread: for small tensors, more threads are slower."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def real_images(data_folder) -> list[bytes]:
    return [path.read_bytes() for path in sorted((data_folder / "dev" / "sources").glob("*.jpg"))[:40]]


@pytest.fixture(scope="session")
def gloo_pool():
    """Two processes in one torch.distributed group; `gloo_pool.run(function, *arguments)`."""
    from support.gloo import GlooPool

    pool = GlooPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def local_ray():
    """One local Ray with two CPUs for all tests. Gives its address, for jobs in other processes."""
    import ray

    from attrib.runtime.session import connect

    # Ray Train asks the dashboard whether its controller is alive. Without its own dashboard it asks port 8265. If
    # that belongs to another Ray, it assumes that the controller is dead and ends the run.
    connect(RaySettings(num_cpus=2, object_store_gib=0.25), dashboard=True)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture(scope="session")
def s3_endpoint() -> str:
    """Endpoint of an S3 server over HTTP with the bucket `attrib`."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1").create_bucket(Bucket="attrib")
    yield endpoint
    server.stop()


@pytest.fixture
def local() -> Storage:
    return Storage(StorageSettings())


@pytest.fixture(scope="session")
def start_job():
    """start_job("embed", values, folder) starts `python -m jobs.embed` on a config of these values."""

    def start(job: str, values: dict, folder: Path, **environment) -> subprocess.Popen:
        config = folder / f"{job}.yaml"
        config.write_text(yaml.safe_dump(values), encoding="utf-8")
        return subprocess.Popen(
            [sys.executable, "-m", f"jobs.{job}", "--config", str(config)],
            cwd=ROOT,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start
