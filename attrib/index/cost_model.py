"""Cost model of a search: choose exact search or IVF search, over vectors or over codes.

The model counts the operations of `attrib/index/search.py`. Their seconds are SearchRates, which the index job measures
on a worker and stores with the index. The same batch and index therefore give the same plan on every machine.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import faiss
import numpy as np

from attrib.index.cpu_kernel import CpuKernel
from attrib.index.index import Index
from attrib.index.normalize import to_float32
from attrib.index.search import search_shard
from attrib.index.shard import Shard
from attrib.runtime.machine import fastest

Engine = Literal["exact", "lists", "codes"]

# Queries and vectors of the measured products: of a typical list, of a block of an exact search, and of a list so short
# that the visit takes longer than its products.
LIST_QUERIES, LIST_ROWS = 64, 256
BLOCK_QUERIES, BLOCK_ROWS = 1024, 4096
SHORT_QUERIES, SHORT_ROWS = 4, 16
WIDTH = 10
MIN_SECONDS = 0.1  # of each measurement; all later batches are planned with these rates


@dataclass(frozen=True)
class SearchRates:
    """Seconds per operation of a scan on one worker."""

    per_list: float  # visit of a list, without the work on its vectors
    per_value: float  # conversion of a stored value to float32
    per_list_product: float  # two values in the matrix product of a list, with the comparison of scores
    per_block_product: float  # the same in an exact search

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class SearchPlan:
    """How a batch is searched, and the reason."""

    engine: Engine
    nprobe: int  # 0: all vectors
    seconds: float  # predicted, of one worker
    reason: str


def measure_rates(dimension: int) -> SearchRates:
    """Measure the rates of this process with its current number of threads; takes about a second."""
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((BLOCK_ROWS, dimension)).astype(np.float16)
    queries = generator.standard_normal((BLOCK_QUERIES, dimension)).astype(np.float32)
    block = to_float32(vectors)

    def product_seconds(num_queries: int, num_vectors: int) -> float:
        kernel, rows = CpuKernel(queries, WIDTH, 0.0), np.arange(num_queries)
        seconds = fastest(lambda: kernel.reaching(rows, block[:num_vectors]), MIN_SECONDS)
        return seconds / (num_queries * num_vectors * dimension)

    return SearchRates(
        per_list=_list_seconds(vectors, queries),
        per_value=fastest(lambda: to_float32(vectors[:LIST_ROWS]), MIN_SECONDS) / (LIST_ROWS * dimension),
        per_list_product=product_seconds(LIST_QUERIES, LIST_ROWS),
        per_block_product=product_seconds(BLOCK_QUERIES, BLOCK_ROWS),
    )


def _list_seconds(vectors: np.ndarray, queries: np.ndarray) -> float:
    """Return the seconds per visit of a short list by a few queries, measured with a complete search."""
    num_vectors, dimension = vectors.shape
    starts = np.arange(0, num_vectors + 1, SHORT_ROWS)
    num_lists = len(starts) - 1
    quantizer = faiss.IndexIVFFlat(faiss.IndexFlatL2(dimension), dimension, num_lists, faiss.METRIC_L2)
    ids, norms = np.arange(num_vectors), np.ones(num_vectors, np.float32)
    shard = Shard(ids=ids, vectors=vectors, inverse_norms=norms, offsets=starts, quantizer=quantizer)
    few = queries[: SHORT_QUERIES * num_lists]
    lists = np.arange(len(few))[:, None] % num_lists
    return fastest(lambda: search_shard(shard, few, WIDTH, WIDTH, 1, False, lists=lists), MIN_SECONDS) / num_lists


def exact_seconds(rates: SearchRates, num_vectors: int, num_queries: int, dimension: int) -> float:
    """Predict the seconds of an exact search on one worker."""
    return num_vectors * dimension * (rates.per_value + num_queries * rates.per_block_product)


def lists_seconds(
    rates: SearchRates, index: Index, num_queries: int, nprobe: int, probed_share: float, dimension: int
) -> float:
    """Predict the seconds of an IVF search on one worker. probed_share: share of all vectors that one query sees."""
    num_lists = index.num_lists
    # A list is visited once per shard if at least one query probes it.
    visited = num_lists * (1 - (1 - nprobe / num_lists) ** num_queries)
    coarse = num_queries * num_lists * dimension * rates.per_block_product
    seen = index.num_vectors * dimension * min(1.0, visited / num_lists) * rates.per_value
    products = num_queries * probed_share * index.num_vectors * dimension * rates.per_list_product
    return coarse + len(index.shards) * visited * rates.per_list + seen + products


def plan_search(
    index: Index, num_queries: int, wanted: Engine | Literal["auto"] = "auto", nprobe: int | None = None
) -> SearchPlan:
    """Return the plan of a batch. wanted: "auto" or an engine. nprobe: None uses that of the index."""
    rates, dimension = SearchRates(**index.rates), index.encoder["dimension"]
    exact = exact_seconds(rates, index.num_vectors, num_queries, dimension)
    if index.plan.kind == "flat":
        return SearchPlan("exact", 0, exact, "the index has no lists")
    probes = min(nprobe or index.nprobe, index.num_lists)
    share = index.recall["probed_share"] if probes == index.nprobe else probes / index.num_lists
    lists = lists_seconds(rates, index, num_queries, probes, share, dimension)
    if wanted == "exact":
        return SearchPlan("exact", 0, exact, "chosen in the config")
    if wanted != "auto":
        return SearchPlan(wanted, probes, lists, "chosen in the config")
    if nprobe is None and exact <= lists:
        return SearchPlan("exact", 0, exact, f"expected {exact:.1f} s of work, list by list {lists:.1f} s")
    engine: Engine = "lists"
    of = "vectors"
    if index.plan.is_compressed and not index.vectors_fit:
        engine, of = "codes", "codes, because the vectors exceed the memory of a worker"
    return SearchPlan(engine, probes, lists, f"expected {lists:.1f} s of work over {of}; exact {exact:.1f} s")
