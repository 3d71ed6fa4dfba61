"""A sharded index on disk: one coarse quantizer for all shards, vectors sorted by list, and a record.

    <output>/template.faiss            coarse quantizer and codec: a trained, empty FAISS index (not for kind flat)
    <output>/shard-00000/vectors.npy   float16 [n, d] as embedded, by list, then by id (kind flat: by id)
    <output>/shard-00000/inverse_norms.npy  float32 [n]
    <output>/shard-00000/ids.npy       int64 [n]
    <output>/shard-00000/offsets.npy   int64 [num_lists + 1], the start of each list (absent for kind flat)
    <output>/shard-00000/codes.npy     uint8 [n, code_bytes] (compressed kinds only)
    <output>/shard-00000/sources.parquet  id, key, uri and metadata of the images, by ascending id
    <output>/shard-00000/shard.json    counts and checksums; written last, it publishes the shard
    <output>/index.json                encoder, metric, shards, nprobe and measured recall; written last of all

Files are memory-mapped and a search reads them sequentially, so a shard may be larger than the memory of a worker.
"""

from dataclasses import dataclass
from typing import Any

import faiss

from attrib.common.errors import AttribError, MismatchError
from attrib.common.json_records import taking_values
from attrib.common.storage import Storage, join
from attrib.common.verified import verify
from attrib.embed.embeddings import Embeddings
from attrib.index.planning import IndexPlan
from attrib.index.quantizer import read_quantizer
from attrib.index.shard import shard_name

INDEX_RECORD = "index.json"
QUANTIZER_FILE = "template.faiss"


@dataclass(frozen=True)
class Index:
    """A finished index; `open_index` reads it."""

    uri: str
    digest: str
    encoder: dict[str, Any]
    plan: IndexPlan
    quantizer_sha256: str | None
    shards: list[dict[str, Any]]
    nprobe: int
    rerank_factor: int
    recall: dict[str, Any]
    metadata_columns: list[str]
    vectors_fit: bool  # whether the vectors of a shard fit worker_memory_gib
    rates: dict[str, Any]  # SearchRates.to_dict() of the machine that built the index

    @property
    def num_lists(self) -> int:
        return self.plan.num_lists

    def shard_uri(self, shard: int) -> str:
        return join(self.uri, shard_name(shard))

    def sources_uri(self, shard: int, storage: Storage) -> str:
        """URI of the sources of a shard. Raises AttribError if it is not the file that jobs.index wrote."""
        sha256 = self.shards[shard].get("sources_sha256")
        return verify(join(self.shard_uri(shard), "sources.parquet"), sha256, "jobs.index", storage)

    def read_quantizer(self, storage: Storage) -> faiss.IndexIVF | None:
        """Read the coarse quantizer; None for kind flat. Raises AttribError if its checksum differs from the record."""
        uri = join(self.uri, QUANTIZER_FILE)
        return read_quantizer(uri, storage, self.quantizer_sha256) if self.num_lists else None

    @property
    def num_vectors(self) -> int:
        return sum(shard["num_vectors"] for shard in self.shards)


def open_index(uri: str, storage: Storage) -> Index:
    """Read a finished index. Raises AttribError if there is none, or if an earlier version built it."""
    place = join(uri, INDEX_RECORD)
    record = storage.require(place, "jobs.index")
    if "rates" not in record:
        raise AttribError(f"{uri} was built by an earlier version of attrib; delete it and run jobs.index again")
    same = ("digest", "encoder", "shards", "nprobe", "recall", "metadata_columns", "vectors_fit", "rates")
    with taking_values(place):
        return Index(
            uri=uri,
            plan=IndexPlan(**record["plan"]),
            quantizer_sha256=record["template_sha256"],
            rerank_factor=record["settings"]["rerank_factor"],
            **{name: record[name] for name in same},
        )


def check_same_encoder(index: Index, queries: Embeddings) -> None:
    """Raise MismatchError unless index and queries were embedded with the same weights and preprocessing."""
    for key, expected in index.encoder.items():
        found = queries.encoder.get(key)
        if found != expected:
            raise MismatchError(
                f"the queries in {queries.uri} were embedded with {key} {found!r}, the index {index.uri} with "
                f"{expected!r}; embed both with the same backbone and weights"
            )
