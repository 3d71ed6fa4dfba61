"""The result rows of an attribution run: sources with shares per query, and one status row per query.

<output>/attributions/block-00000.parquet ...   one row per (query, rank)
<output>/outcomes/block-00000.parquet ...       one row per query, failed ones included
<output>/attributions.json                      written last

During the run, <output>/_partials/block-00000/ holds the candidates of each shard, the best of all shards, and the
metadata of their sources.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from attrib.common.errors import MismatchError
from attrib.common.storage import Storage, join
from attrib.data.manifest import Manifest, Slice
from attrib.embed.embeddings import Embeddings
from attrib.index.index import Index
from attrib.index.search import Candidates, ranks
from attrib.shares.settings import SharesSettings
from attrib.shares.shares import soft_shares

ATTRIBUTIONS_RECORD = "attributions.json"

ATTRIBUTION_FIELDS = [
    pa.field("query_id", pa.int64(), nullable=False),
    pa.field("rank", pa.int32(), nullable=False),  # from 1
    pa.field("source_id", pa.int64(), nullable=False),
    pa.field("similarity", pa.float32(), nullable=False),  # cosine
    pa.field("share", pa.float64(), nullable=False),  # the shares of a query sum to one
    pa.field("query_key", pa.string(), nullable=False),
    pa.field("query_uri", pa.string(), nullable=False),
    pa.field("source_key", pa.string(), nullable=False),
    pa.field("source_uri", pa.string(), nullable=False),
    pa.field("run_id", pa.string(), nullable=False),
    pa.field("model_digest", pa.string(), nullable=False),
    pa.field("index_digest", pa.string(), nullable=False),
]

QUERY_RESULT_FIELDS = [
    pa.field("query_id", pa.int64(), nullable=False),
    pa.field("query_key", pa.string(), nullable=False),
    pa.field("query_uri", pa.string(), nullable=False),
    pa.field("status", pa.string(), nullable=False),  # "attributed" or "failed"
    pa.field("stage", pa.string()),
    pa.field("reason", pa.string()),
    pa.field("num_sources", pa.int32(), nullable=False),  # with a share above zero
    pa.field("shares_truncated", pa.bool_(), nullable=False),  # the source of rank top_k still has a share above zero
    pa.field("top_source_id", pa.int64()),
    pa.field("top_similarity", pa.float32()),
    pa.field("top_share", pa.float64()),
    pa.field("run_id", pa.string(), nullable=False),
    # Verdict of jobs.identify (attrib/generators/identify/files.py); null if the run has no verdicts.
    pa.field("generator", pa.string()),  # the generator that the image is consistent with
    pa.field("generator_verdict", pa.string()),  # known, family, unknown or unassessable
    pa.field("generator_score", pa.float32()),
    pa.field("generator_margin", pa.float32()),
    pa.field("generator_p_value", pa.float64()),
    pa.field("generator_reason", pa.string()),
]
# Columns of the verdict files, in the order of the last QUERY_RESULT_FIELDS.
GENERATOR_COLUMNS = ("generator", "verdict", "score", "margin", "p_value", "reason")


@dataclass(frozen=True)
class RunStamp:
    """Values that all rows of a run have in common."""

    run_id: str
    model_digest: str
    index_digest: str


def read_shard_sources(index: Index, shard: int, ids: np.ndarray, storage: Storage) -> pa.Table:
    """Return id, key, uri and metadata of sources of one shard, by ascending id. ids: int64 [m], ascending, m >= 1."""
    field = pc.field("id")
    # Ids ascend in the file, so the range allows Arrow to skip row groups.
    chosen = (field >= int(ids[0])) & (field <= int(ids[-1])) & field.isin(pa.array(ids))
    uri = join(index.shard_uri(shard), "sources.parquet")
    return storage.dataset([uri], format="parquet").to_table(filter=chosen).sort_by("id").combine_chunks()


def read_sources(index: Index, ids: np.ndarray, storage: Storage) -> pa.Table:
    """Return id, key, uri and metadata of sources of any shard, by ascending id. ids: int64 [m]."""
    uris = [join(index.shard_uri(shard), "sources.parquet") for shard in range(len(index.shards))]
    found = storage.dataset(uris, format="parquet").to_table(filter=pc.field("id").isin(pa.array(np.unique(ids))))
    return found.sort_by("id").combine_chunks()


def block_queries(queries: Embeddings, manifest: Manifest, block: list[Slice], storage: Storage) -> pa.Table:
    """Return id, stage, reason, key, uri and metadata of all queries of a block, by ascending id.

    Raises MismatchError if embeddings and manifest list different images.
    """
    parts = []
    for piece in block:
        part = storage.read_table(queries.part_uri(piece.table), columns=["id", "stage", "reason"])
        rows = storage.read_table(manifest.partition_uri(piece.table)).sort_by("id")
        if not rows["id"].equals(part["id"]):
            raise MismatchError(
                f"{queries.part_uri(piece.table)} and {manifest.partition_uri(piece.table)} list different images; "
                "embed the manifest again"
            )
        keep = ["key", "uri", *manifest.metadata_columns]
        table = pa.table([*part.columns, *(rows[name] for name in keep)], names=["id", "stage", "reason", *keep])
        parts.append(table.slice(piece.start, piece.stop - piece.start))
    return pa.concat_tables(parts).sort_by("id").combine_chunks()


def attribution_rows(
    best: Candidates,
    queries: pa.Table,
    sources: pa.Table,
    top_k: int,
    settings: SharesSettings,
    stamp: RunStamp,
    verdicts: pa.Table | None = None,
) -> tuple[pa.Table, pa.Table]:
    """Return the attribution rows and the query result rows of one block.

    best: merged candidates; `query` is a position in queries. queries: result of `block_queries`. sources: result of
    `read_sources`, with at least every candidate. verdicts: `block_verdicts` of the same images, or None. Raises
    MismatchError if the verdicts belong to other images.
    """
    similarity = np.full((len(queries), top_k), -np.inf, np.float32)
    rank = ranks(best.query)
    similarity[best.query, rank] = best.score
    found = np.asarray(np.isfinite(similarity).any(axis=1))
    shares = np.zeros(similarity.shape)
    shares[found] = soft_shares(similarity[found], settings)

    at = pa.array(np.searchsorted(sources["id"].to_numpy(), best.id))
    names = [name for name in sources.schema.names if name not in ("id", "key", "uri")]
    stamps = [
        pa.array([value] * len(rank), pa.string()) for value in (stamp.run_id, stamp.model_digest, stamp.index_digest)
    ]
    attributions = pa.table(
        [
            queries["id"].take(pa.array(best.query)),
            pa.array((rank + 1).astype(np.int32)),
            pa.array(best.id),
            pa.array(best.score),
            pa.array(shares[best.query, rank]),
            queries["key"].take(pa.array(best.query)),
            queries["uri"].take(pa.array(best.query)),
            sources["key"].take(at),
            sources["uri"].take(at),
            *stamps,
            *(sources[name].take(at) for name in names),
        ],
        schema=pa.schema(
            ATTRIBUTION_FIELDS + [sources.schema.field(name).with_name(f"source_{name}") for name in names]
        ),
    )
    return attributions, _query_result_rows(best, rank, similarity, shares, found, queries, stamp, verdicts)


def _query_result_rows(
    best: Candidates,
    rank: np.ndarray,
    similarity: np.ndarray,
    shares: np.ndarray,
    found: np.ndarray,
    queries: pa.Table,
    stamp: RunStamp,
    verdicts: pa.Table | None,
) -> pa.Table:
    absent = pa.array(~found)
    # A query with a vector has no source if all the lists that it probed are empty.
    unmatched = pc.and_(absent, queries["stage"].is_null())
    top_source = np.zeros(len(queries), np.int64)
    top_source[best.query[rank == 0]] = best.id[rank == 0]
    names = [name for name in queries.schema.names if name not in ("id", "key", "uri", "stage", "reason")]
    kinds = [field.type for field in QUERY_RESULT_FIELDS[-len(GENERATOR_COLUMNS) :]]
    generators = [pa.nulls(len(queries), kind) for kind in kinds]
    if verdicts is not None:
        if not verdicts["id"].combine_chunks().equals(queries["id"].combine_chunks()):
            raise MismatchError(
                "the verdicts belong to other images than the queries; run jobs.identify on this manifest"
            )
        generators = [verdicts[name] for name in GENERATOR_COLUMNS]
    return pa.table(
        [
            queries["id"],
            queries["key"],
            queries["uri"],
            pa.array(np.where(found, "attributed", "failed")),
            pc.if_else(unmatched, "search", queries["stage"]),
            pc.if_else(unmatched, "no source in the lists that were probed; raise nprobe", queries["reason"]),
            pa.array((shares > 0).sum(axis=1).astype(np.int32)),
            pa.array(shares[:, -1] > 0),
            pc.if_else(absent, None, pa.array(top_source)),
            pc.if_else(absent, None, pa.array(np.where(found, similarity[:, 0], 0).astype(np.float32))),
            pc.if_else(absent, None, pa.array(shares[:, 0])),
            pa.array([stamp.run_id] * len(queries)),
            *generators,
            *(queries[name] for name in names),
        ],
        schema=pa.schema(
            QUERY_RESULT_FIELDS + [queries.schema.field(name).with_name(f"query_{name}") for name in names]
        ),
    )
