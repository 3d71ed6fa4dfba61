"""What every task of an attribution run needs to know."""

import faiss
import pyarrow as pa

from attrib.attribution import block_name, plan_blocks
from attrib.distributed.session import num_cluster_cpus
from attrib.errors import AttribError
from attrib.index import Index, Shard, open_shard
from attrib.kernels import CpuKernel
from attrib.manifest import Manifest
from attrib.search_plan import SearchPlan
from attrib.settings import AttributeSettings
from attrib.storage import Storage, join
from attrib.vectors import Embeddings


class AttributionJob:
    """The run's settings, inputs and plan. device: "cpu" or "cuda", known once the cluster is joined."""

    def __init__(
        self, settings: AttributeSettings, index: Index, queries: Embeddings, manifest: Manifest, plan: SearchPlan
    ):
        if plan.engine == "codes" and not index.is_compressed:
            raise AttribError(
                f"attribute.engine is 'codes', but {index.uri} is of kind {index.kind}, which has none; use lists"
            )
        self.settings, self.index, self.queries, self.manifest, self.plan = settings, index, queries, manifest, plan
        self.blocks = plan_blocks(queries.num_rows, settings.query_block_rows)
        self.num_candidates = settings.top_k * (settings.rerank_factor or index.rerank_factor)
        self.device = "cpu"

    @property
    def scans_codes(self) -> bool:
        return self.plan.engine == "codes"

    @property
    def shares_lists(self) -> bool:
        """Whether the lists that queries probe are found ahead of the search, for all shards."""
        return self.plan.engine != "exact" and len(self.index.shards) > 1

    def describe(self) -> str:
        engine = (
            "exact search" if self.plan.engine == "exact" else f"nprobe {self.plan.nprobe} of {self.index.num_lists:,}"
        )
        return (
            f"attribute: {sum(self.queries.num_rows):,} queries in {len(self.blocks)} block(s) against {self.index.num_vectors:,} vectors in "
            f"{len(self.index.shards)} shard(s) of kind {self.index.kind}, {engine} ({self.plan.reason}), "
            f"on {'GPUs' if self.device == 'cuda' else 'CPUs'}"
        )

    def open_shard(self, shard: int, storage: Storage, folder: str) -> Shard:
        template = None if self.plan.engine == "exact" else self.index.read_template(storage)
        return open_shard(self.index.shard_uri(shard), self.index.shards[shard], storage, folder, template)

    def kernel(self) -> type[CpuKernel]:
        if self.device == "cpu":
            return CpuKernel
        from attrib.torch_kernel import TorchKernel  # not above: CPU workers do without torch

        return TorchKernel


def pending_blocks(job: AttributionJob, storage: Storage) -> list[int]:
    """The blocks without their final rows."""
    finished = set(storage.names(join(job.settings.output, "outcomes"), suffix=".parquet"))
    return [b for b in range(len(job.blocks)) if block_name(b) not in finished]


def parts_per_shard(job: AttributionJob) -> int:
    """Few shards: their work is cut, or workers would idle; many shards: each is opened only once."""
    return max(1, -(-num_cluster_cpus() // (len(job.index.shards) * job.settings.threads_per_task)))


def use_threads(job: AttributionJob) -> None:
    faiss.omp_set_num_threads(job.settings.threads_per_task)
    pa.set_cpu_count(job.settings.threads_per_task)
