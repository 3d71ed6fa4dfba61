"""Jobs on a two-node Ray cluster over S3 with killed nodes and drivers give the rows of an undisturbed run.

The cluster is that of cluster/local_two_nodes.py: separate processes and folders, token authentication, jobs by
`ray job submit`. To kill a node in the middle of a stage, whatever the timing, the S3 server holds writes until both
nodes wait.
"""

import importlib.util
import json
import re
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
import yaml
from support import cluster as cluster_tools
from support.cluster import S3Server, drawn_image, submit

from attrib.common.settings import StorageSettings
from attrib.common.storage import Storage
from attrib.pipeline import job as pipeline_job
from attrib.pipeline.settings import PipelineSettings

ROOT = Path(__file__).resolve().parents[2]
NUM_SOURCES, NUM_GENERATED, CHUNK_ROWS = 60, 24, 4
SOURCE_CHUNKS = r"/sources/embeddings/_chunks/.+\.parquet$"
SHARD_RECORDS = r"/index/shard-\d+/shard\.json$"
PARTIALS = r"/attributions/_partials/.+\.parquet$"
UNITS = "|".join([SOURCE_CHUNKS, SHARD_RECORDS, PARTIALS])  # committed work units, which a restart reuses
IMAGES = r"/(sources|generated)/\d+\.png$"


def load_local_two_nodes():
    specification = importlib.util.spec_from_file_location("local_two_nodes", ROOT / "cluster" / "local_two_nodes.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


class Site:
    """A corpus on S3, an undisturbed run of it, and a cluster."""

    def __init__(self, folder: Path, server: S3Server, cluster):
        self.folder, self.server, self.cluster = folder, server, cluster
        self.storage = Storage(StorageSettings(endpoint=server.endpoint))
        server.client.create_bucket(Bucket="images")
        for role, count, first in (("sources", NUM_SOURCES, 0), ("generated", NUM_GENERATED, 1000)):
            for i in range(count):
                server.client.put_object(Bucket="images", Key=f"{role}/{i:03}.png", Body=drawn_image(first + i))
        server.forget()
        alone = {"embed": {"chunk_rows": CHUNK_ROWS, "num_workers": 1}}
        pipeline_job.run(PipelineSettings(**self.settings("undisturbed") | alone))
        self.undisturbed = self.rows("undisturbed")
        self.undisturbed_work = self.work("undisturbed")

    def settings(self, run: str) -> dict:
        return {
            "sources": {"name": "sources", "uri": "s3://images/sources"},
            "generated": {"name": "generated", "uri": "s3://images/generated"},
            "output": f"s3://images/runs/{run}",
            "storage": {"endpoint": self.server.endpoint},
            "backbone": {"name": "test_resnet", "weights": "random"},
            "manifest": {"partition_rows": 16},
            "embed": {"chunk_rows": CHUNK_ROWS},
            "index": {"kind": "ivf_flat", "num_lists": 4, "shard_rows": 16, "held_out_rows": 8},
            "attribute": {"query_block_rows": 16, "top_k": 5},
        }

    def submit(self, run: str, attempt: int = 1) -> cluster_tools.Job:
        config = self.folder / f"{run}.yaml"
        config.write_text(yaml.safe_dump(self.settings(run)))
        return submit(self.cluster, self.folder, f"{run}-{attempt}", "jobs.pipeline", config)

    def hold(self, run: str, pattern: str, allowed: int) -> cluster_tools.Hold:
        return self.server.hold(f"/runs/{run}{pattern}", allowed)

    def rows(self, run: str) -> dict:
        """Stored results of a run: vectors, the digest of the index files, attributions and outcomes."""
        folder = f"s3://images/runs/{run}"
        found = {"index": self.storage.read_json(f"{folder}/index/index.json")["digest"]}
        for name in (
            "sources/embeddings",
            "generated/embeddings",
            "attributions/attributions",
            "attributions/outcomes",
        ):
            files = [f for f in self.storage.names(f"{folder}/{name}", suffix=".parquet") if f != "failures.parquet"]
            found[name] = pa.concat_tables(self.storage.read_table(f"{folder}/{name}/{file}") for file in files)
        return found

    def check_same_rows(self, run: str) -> None:
        found = self.rows(run)
        for name, expected in self.undisturbed.items():
            assert found[name] == expected, f"{name} of {run} differ from those of the undisturbed run"

    def work(self, run: str) -> Counter:
        """Number of reads of each image and of writes of each file of the run since the last `forget`."""
        return self.server.reads(r"^/images/(sources|generated)/") + self.server.writes(f"^/images/runs/{run}/")

    def units(self, run: str) -> Counter:
        """Number of commits of each work unit of the run."""
        return self.server.writes(f"^/images/runs/{run}({UNITS})")

    def repeated_work(self, run: str) -> Counter:
        """Reads and writes of a run beyond those of the undisturbed run."""
        found = Counter()
        for path, count in self.work(run).items():
            found[path.replace(f"/runs/{run}/", "/runs/undisturbed/")] += count
        return found - self.undisturbed_work


@pytest.fixture(scope="module")
def site(tmp_path_factory, local_ray):
    server = S3Server()
    try:
        with load_local_two_nodes().LocalCluster() as cluster:
            yield Site(tmp_path_factory.mktemp("cluster"), server, cluster)
    finally:
        server.stop()


def matching(work: Counter, pattern: str) -> int:
    return sum(count for path, count in work.items() if re.search(pattern, path))


def replace_worker(site: Site) -> None:
    worker = site.cluster.nodes[-1]
    site.cluster.kill(worker)
    site.cluster.add_worker()


def test_the_cluster_refuses_requests_without_its_token(site):
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(site.cluster.address + "/api/jobs/", timeout=10)
    assert isinstance(json.loads(site.cluster.get("/api/jobs/")), list)


def test_nodes_killed_in_every_stage_change_no_row(site):
    """A job loses a worker node while it embeds, again while it builds the index, and again while it attributes."""
    site.server.forget()
    holds = {
        pattern: site.hold("killed-nodes", pattern, allowed)
        for pattern, allowed in ((SOURCE_CHUNKS, 5), (SHARD_RECORDS, 1), (PARTIALS, 2))
    }
    job = site.submit("killed-nodes")
    for hold in holds.values():
        hold.wait(2)
        replace_worker(site)
        hold.release()
    assert job.wait() == 0, job.output()
    site.check_same_rows("killed-nodes")
    repeated = site.repeated_work("killed-nodes")
    # Only work in progress on a lost node is repeated: one chunk of images, one shard, one list of candidates.
    assert matching(repeated, IMAGES) <= 2 * CHUNK_ROWS, repeated
    assert matching(repeated, UNITS) == 0, repeated


def test_the_job_ends_on_the_remaining_node(site, request):
    """A lost node, e.g. a spot instance, is not replaced."""
    if not request.config.getoption("--long"):
        pytest.skip("takes a minute or two; run with --long")
    hold = site.hold("shrunk", SOURCE_CHUNKS, 5)
    job = site.submit("shrunk")
    try:
        hold.wait(2)
        site.cluster.kill(site.cluster.nodes[-1])
        hold.release()
        assert job.wait(300) == 0, job.output()
    finally:
        hold.release()
        site.cluster.add_worker()
    site.check_same_rows("shrunk")


def test_killed_drivers_lose_no_committed_work(site, request):
    """The driver dies while the job embeds, and again while it attributes. The same job submitted again continues."""
    if not request.config.getoption("--long"):
        pytest.skip("takes a minute or two; run with --long")
    site.server.forget()
    committed = Counter()
    for attempt, (pattern, allowed) in enumerate(((SOURCE_CHUNKS, 5), (PARTIALS, 2)), 1):
        hold = site.hold("killed-drivers", pattern, allowed)
        job = site.submit("killed-drivers", attempt)
        hold.wait(2)
        committed |= site.units("killed-drivers")
        job.kill_driver()
        assert job.wait() != 0
        hold.release()
    job = site.submit("killed-drivers", attempt=3)
    assert job.wait() == 0, job.output()
    site.check_same_rows("killed-drivers")
    # Only work in progress when the driver died is repeated. An orphaned worker may have finished it.
    assert len(committed) == 15 + 4 + 2
    assert {path: count for path, count in site.units("killed-drivers").items() if path in committed} == committed
    assert matching(site.repeated_work("killed-drivers"), IMAGES) <= 2 * CHUNK_ROWS
