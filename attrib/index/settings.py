"""Options of jobs.index."""

from typing import ClassVar, Literal

from pydantic import Field

from attrib.common.settings import Positive, RescanSettings, Uri

IndexKind = Literal["auto", "flat", "ivf_flat", "ivf_sq8", "ivf_pq"]


class IndexSettings(RescanSettings):
    """jobs.index: a sharded index over the embeddings of the sources."""

    made: ClassVar[tuple[str, ...]] = (r"shard-\d{5,}", r"template\.(faiss|json)")

    embeddings: Uri
    output: Uri
    kind: IndexKind = "auto"
    shard_rows: Positive = 1_000_000
    worker_memory_gib: float = Field(default=4.0, gt=0)  # of one shard, held or cached by a search worker
    device: Literal["auto", "cpu", "cuda"] = "auto"  # for training and for assigning vectors to lists
    num_lists: Positive | None = None  # None: from the number of vectors (attrib/index/planning.py)
    pq_bytes: Positive | None = None  # bytes per PQ code; None: one per 8 dimensions
    training_rows: Positive | None = None  # None: 64 vectors per list
    held_out_rows: Positive = 1_000
    recall_k: Positive = 10
    recall_target: float = Field(default=0.99, gt=0, le=1)
    rerank_factor: Positive = 8  # candidates per requested neighbour that get an exact score
    threads_per_task: Positive = 1
    seed: int = 0
