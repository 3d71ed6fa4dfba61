"""Settings, inputs and plan of an attribution run, as all its tasks share them."""

import faiss
import numpy as np
import pyarrow as pa

from attrib.attribute.blocks import block_name, block_rows, plan_blocks, read_block
from attrib.attribute.estimate import AttributeTask
from attrib.attribute.settings import AttributeSettings
from attrib.common.errors import AttribError
from attrib.common.storage import Storage, join
from attrib.data.manifest import Manifest, Slice
from attrib.embed.embeddings import Embeddings
from attrib.generators.identify.files import Identified
from attrib.index.cost_model import SearchPlan
from attrib.index.cpu_kernel import CpuKernel
from attrib.index.estimate import READ_ROWS
from attrib.index.index import Index
from attrib.index.planning import group_partitions
from attrib.index.shard import Shard, open_shard


class AttributionJob:
    """An attribution run.

    device: "cpu" or "cuda", set when the cluster is connected. num_workers: search tasks that run at a time.
    identified: verdicts on the generators of the queries, None if they were not asked for.
    """

    def __init__(
        self, settings: AttributeSettings, index: Index, queries: Embeddings, manifest: Manifest, plan: SearchPlan
    ):
        if plan.engine == "codes" and not index.plan.is_compressed:
            raise AttribError(
                f"engine is 'codes', but {index.uri} is of kind {index.plan.kind}, without codes; set engine to lists"
            )
        self.settings, self.index, self.queries, self.manifest, self.plan = settings, index, queries, manifest, plan
        self.blocks = plan_blocks(queries.num_rows, settings.query_block_rows)
        self.num_candidates = settings.top_k * (settings.rerank_factor or index.rerank_factor)
        self.device, self.num_workers = "cpu", 1
        self.identified: Identified | None = None
        self.num_tasks: dict[AttributeTask, int] = {}  # by kind, for the record

    @property
    def scans_codes(self) -> bool:
        return self.plan.engine == "codes"

    @property
    def shares_lists(self) -> bool:
        """Whether the probed lists of the queries are computed before the search, once for all shards."""
        return self.plan.engine != "exact" and len(self.index.shards) > 1

    @property
    def num_checked(self) -> int:
        """Number of queries that are also searched exactly, to measure recall."""
        wanted = min(self.settings.recall_check_queries, sum(self.queries.num_embedded))
        return 0 if self.plan.engine == "exact" else wanted

    def describe(self) -> str:
        plan, index = self.plan, self.index
        engine = "exact search" if plan.engine == "exact" else f"nprobe {plan.nprobe} of {index.num_lists:,}"
        return (
            f"attribute: {sum(self.queries.num_rows):,} queries in {len(self.blocks)} block(s) against "
            f"{index.num_vectors:,} vectors in {len(index.shards)} shard(s) of kind {index.plan.kind}, {engine} "
            f"({plan.reason}), on {'GPUs' if self.device == 'cuda' else 'CPUs'}"
        )

    def pending_blocks(self, storage: Storage) -> list[int]:
        """Return the blocks without final rows."""
        finished = set(storage.names(join(self.settings.output, "outcomes"), suffix=".parquet"))
        return [block for block in range(len(self.blocks)) if block_name(block) not in finished]

    def open_shard(self, shard: int, storage: Storage, folder: str) -> Shard:
        quantizer = None if self.plan.engine == "exact" else self.index.read_quantizer(storage)
        return open_shard(self.index.shard_uri(shard), self.index.shards[shard], storage, folder, quantizer)

    def together(self, blocks: list[int], max_rows: int) -> list[list[int]]:
        """Group consecutive blocks so that a group holds at most `max_rows` queries, or one larger block."""
        groups = group_partitions([block_rows(self.blocks[block]) for block in blocks], max_rows)
        return [[blocks[i] for i in group] for group in groups]

    def block_ids(self, block: int, storage: Storage) -> np.ndarray:
        """Return the ids of all queries of a block, int64 [n] ascending, including those without a vector."""
        return np.sort(self._ids(_joined(self.blocks[block]), storage))

    def _ids(self, slices: list[Slice], storage: Storage) -> np.ndarray:
        rows = [
            storage.read_rows(self.queries.checked_uri(part.table, storage), part.start, part.stop, ["id"])
            for part in slices
        ]
        return np.concatenate([part["id"].to_numpy() for part in rows])

    def read_blocks(self, blocks: list[int], storage: Storage) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return ids int64 [n] ascending and unit vectors float32 [n, d] of the queries with a vector, per block.

        Small blocks share row groups of a file, so blocks are read together, up to READ_ROWS queries at a time.
        """
        read = []
        for group in self.together(blocks, READ_ROWS):
            spans = _joined([part for block in group for part in self.blocks[block]])
            ids, vectors = read_block(self.queries, spans, storage)
            if len(group) == 1:
                read.append((ids, vectors))
                continue
            ends = np.cumsum([block_rows(self.blocks[block]) for block in group])
            for everyone in np.split(self._ids(spans, storage), ends[:-1]):
                mine = np.isin(ids, everyone)
                read.append((ids[mine], vectors[mine]))
        return read

    def kernel(self) -> type[CpuKernel]:
        if self.device == "cpu":
            return CpuKernel
        from attrib.index.gpu_kernel import TorchKernel  # here, because torch costs CPU workers half a gigabyte

        return TorchKernel

    def use_threads(self) -> None:
        faiss.omp_set_num_threads(self.settings.threads_per_task)
        pa.set_cpu_count(self.settings.threads_per_task)


def _joined(slices: list[Slice]) -> list[Slice]:
    """Join slices that follow each other in one table."""
    joined: list[Slice] = []
    for part in slices:
        if joined and (part.table, part.start) == (joined[-1].table, joined[-1].stop):
            joined[-1] = Slice(part.table, joined[-1].start, part.stop)
        else:
            joined.append(part)
    return joined


def exact_uri(output: str, shard: int) -> str:
    """Return the URI of what exact search finds in one shard for the queries that recall is measured on."""
    return join(output, "_partials", "exact", f"shard-{shard:05d}.parquet")
