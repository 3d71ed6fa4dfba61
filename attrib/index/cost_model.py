"""How a batch is searched: exactly, or list by list, over vectors or over codes; chosen by a cost model of the scan.

The model counts what `attrib/index/search.py` does (vectors converted, products, scores compared, lists visited) and takes the seconds for each from
SearchRates, which the index job measures on a worker and stores with the index. So the same batch against the same index is always searched in
the same way, whichever machine asks.
"""

from dataclasses import asdict, dataclass
from typing import Literal

import faiss
import numpy as np

from attrib.index.cpu_kernel import CpuKernel
from attrib.index.index import Index
from attrib.index.normalize import to_float32
from attrib.index.search import search_shard
from attrib.index.shard import Shard
from attrib.runtime.machine import fastest

Engine = Literal["exact", "lists", "codes"]

MEASURED_LIST_ROWS, MEASURED_BLOCK_ROWS = 256, 4096  # vectors in a usual list, and in a block of an exact search
MEASURED_QUERIES, MEASURED_MANY_QUERIES = 64, 1024  # queries that meet at a list, and in an exact search
MEASURED_SHORT_ROWS, MEASURED_SHORT_QUERIES = (
    16,
    4,
)  # of a list where its visit, and not its products, is what takes time
WIDTH = 10
MIN_SECONDS = 0.1  # of each timed operation: every later batch is planned by these rates


@dataclass(frozen=True)
class SearchRates:
    """What the parts of a scan take on one worker, in seconds.

    per_list: each visited list, before any work on its vectors; per_value: each stored number made float32; per_list_product: each multiplication of a
    query's number with a vector's, in the small products of a list, comparison included; per_block_product: the same in an exact search.
    """

    per_list: float
    per_value: float
    per_list_product: float
    per_block_product: float

    def to_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class SearchPlan:
    """engine, nprobe (0: all vectors), the seconds expected of one worker, and why."""

    engine: Engine
    nprobe: int
    seconds: float
    reason: str


def measure_rates(dimension: int) -> SearchRates:
    """Rates of this process with the threads it has, in about a second."""
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((MEASURED_BLOCK_ROWS, dimension)).astype(np.float16)
    queries = generator.standard_normal((MEASURED_MANY_QUERIES, dimension)).astype(np.float32)
    block = to_float32(vectors)

    def product_seconds(num_queries: int, num_vectors: int) -> float:
        kernel = CpuKernel(queries, WIDTH, 0.0)
        rows = np.arange(num_queries)
        return fastest(lambda: kernel.reaching(rows, block[:num_vectors]), MIN_SECONDS) / (
            num_queries * num_vectors * dimension
        )

    return SearchRates(
        per_list=_list_seconds(vectors, queries),
        per_value=fastest(lambda: to_float32(vectors[:MEASURED_LIST_ROWS]), MIN_SECONDS)
        / (MEASURED_LIST_ROWS * dimension),
        per_list_product=product_seconds(MEASURED_QUERIES, MEASURED_LIST_ROWS),
        per_block_product=product_seconds(MEASURED_MANY_QUERIES, MEASURED_BLOCK_ROWS),
    )


def _list_seconds(vectors: np.ndarray, queries: np.ndarray) -> float:
    """Of a visit to a short list for a few queries, with all that a search does around its products."""
    num_vectors, dimension = vectors.shape
    starts = np.arange(0, num_vectors + 1, MEASURED_SHORT_ROWS)
    quantizer = faiss.IndexIVFFlat(faiss.IndexFlatL2(dimension), dimension, len(starts) - 1, faiss.METRIC_L2)
    ids, norms = np.arange(num_vectors), np.ones(num_vectors, np.float32)
    shard = Shard(ids=ids, vectors=vectors, inverse_norms=norms, offsets=starts, quantizer=quantizer)
    units = queries[: MEASURED_SHORT_QUERIES * (len(starts) - 1)]
    lists = np.arange(len(units))[:, None] % (len(starts) - 1)
    return fastest(lambda: search_shard(shard, units, WIDTH, WIDTH, 1, False, lists=lists), MIN_SECONDS) / (
        len(starts) - 1
    )


def exact_seconds(rates: SearchRates, num_vectors: int, num_queries: int, dimension: int) -> float:
    return num_vectors * dimension * (rates.per_value + num_queries * rates.per_block_product)


def lists_seconds(
    rates: SearchRates, index: Index, num_queries: int, nprobe: int, probed_share: float, dimension: int
) -> float:
    """probed_share: of all vectors, what lies in the lists that one query probes."""
    num_lists = index.num_lists
    # A list is visited once a shard if any query probes it.
    visited = num_lists * (1 - (1 - nprobe / num_lists) ** num_queries)
    coarse = num_queries * num_lists * dimension * rates.per_block_product
    seen = index.num_vectors * dimension * min(1.0, visited / num_lists) * rates.per_value
    products = num_queries * probed_share * index.num_vectors * dimension * rates.per_list_product
    return coarse + len(index.shards) * visited * rates.per_list + seen + products


def plan_search(index: Index, num_queries: int, wanted: str = "auto", nprobe: int | None = None) -> SearchPlan:
    """The engine of a batch. wanted: "auto", or an engine; nprobe: None for the one that met the recall target when the index was built."""
    rates, dimension = SearchRates(**index.rates), index.encoder["dimension"]
    exact = exact_seconds(rates, index.num_vectors, num_queries, dimension)
    if index.kind == "flat":
        return SearchPlan("exact", 0, exact, "the index has no lists")
    probes = min(nprobe or index.nprobe, index.num_lists)
    share = probes / index.num_lists
    if probes == index.nprobe:
        share = index.recall["probed_share"]
    lists = lists_seconds(rates, index, num_queries, probes, share, dimension)
    approximate: Engine = "codes" if index.is_compressed else "lists"
    if wanted == "exact":
        return SearchPlan("exact", 0, exact, "chosen in the config")
    if wanted != "auto":
        return SearchPlan(wanted, probes, lists, "chosen in the config")
    if nprobe is None and exact <= lists:
        return SearchPlan("exact", 0, exact, f"expected {exact:.1f} s of work, list by list {lists:.1f} s")
    if index.is_compressed and index.vectors_fit:
        approximate = "lists"
    of = "vectors" if approximate == "lists" else "codes, whose vectors would come from the disk"
    return SearchPlan(approximate, probes, lists, f"expected {lists:.1f} s of work over {of}; exact {exact:.1f} s")
