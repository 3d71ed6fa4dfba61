"""Rows of an attribution run: sources of each generated image with shares, and one outcome per generated image.

<output>/attributions/block-00000.parquet ...   one row per (query, rank)
<output>/outcomes/block-00000.parquet ...       one row per query, failed ones included
<output>/attributions.json                      written last

Until then <output>/_partials/block-00000/ holds what was found: candidates of each shard, the best of them, and the metadata of their sources.
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
    pa.field("share", pa.float64(), nullable=False),  # of the query; the shares of a query sum to one
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
    pa.field(
        "shares_truncated", pa.bool_(), nullable=False
    ),  # the last of the top k still had a share: more sources may
    pa.field("top_source_id", pa.int64()),
    pa.field("top_similarity", pa.float32()),
    pa.field("top_share", pa.float64()),
    pa.field("run_id", pa.string(), nullable=False),
    # What jobs.identify says of the image; null where it was not asked (attrib/generators/identify/files.py).
    pa.field("generator", pa.string()),  # that the image is consistent with
    pa.field("generator_verdict", pa.string()),  # known, family, unknown or unassessable
    pa.field("generator_score", pa.float32()),
    pa.field("generator_margin", pa.float32()),
    pa.field("generator_p_value", pa.float64()),
    pa.field("generator_reason", pa.string()),
]
# Columns of the verdicts, in the order of the last outcome columns.
GENERATOR_COLUMNS = ("generator", "verdict", "score", "margin", "p_value", "reason")


@dataclass(frozen=True)
class RunStamp:
    """What every row of a run carries."""

    run_id: str
    model_digest: str
    index_digest: str


def read_shard_sources(index: Index, shard: int, ids: np.ndarray, storage: Storage) -> pa.Table:
    """id, key, uri and metadata of some sources of one shard, by ascending id. ids: int64 [m], at least one, ascending."""
    field = pc.field("id")
    # The range lets whole row groups be skipped: their ids ascend.
    chosen = (field >= int(ids[0])) & (field <= int(ids[-1])) & field.isin(pa.array(ids))
    uri = join(index.shard_uri(shard), "sources.parquet")
    return storage.dataset([uri], format="parquet").to_table(filter=chosen).sort_by("id").combine_chunks()


def read_sources(index: Index, ids: np.ndarray, storage: Storage) -> pa.Table:
    """id, key, uri and metadata of some sources, by ascending id."""
    uris = [join(index.shard_uri(shard), "sources.parquet") for shard in range(len(index.shards))]
    found = storage.dataset(uris, format="parquet").to_table(filter=pc.field("id").isin(pa.array(np.unique(ids))))
    return found.sort_by("id").combine_chunks()


def block_queries(queries: Embeddings, manifest: Manifest, block: list[Slice], storage: Storage) -> pa.Table:
    """Outcome columns of the embed job and all manifest columns for a block's images, by ascending id."""
    parts = []
    for piece in block:
        part = storage.read_table(queries.part_uri(piece.table), columns=["id", "stage", "reason"])
        rows = storage.read_table(manifest.partition_uri(piece.table)).sort_by("id")
        if not rows["id"].equals(part["id"]):
            raise MismatchError(
                f"{queries.part_uri(piece.table)} and {manifest.partition_uri(piece.table)} list different images; embed the manifest again"
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
    """Attribution rows and outcome rows of one block.

    best: merged candidates, `query` a position in queries; queries: `block_queries`; sources: `read_sources` of (at least) every candidate;
    verdicts: `block_verdicts` of the same images, None where generators were not asked for. Raises MismatchError if they are of others.
    """
    similarity = np.full((len(queries), top_k), -np.inf, np.float32)
    rank = ranks(best.query)
    similarity[best.query, rank] = best.score
    found = np.isfinite(similarity).any(axis=1)
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
    return attributions, _outcome_rows(best, rank, similarity, shares, found, queries, stamp, verdicts)


def _outcome_rows(best, rank, similarity, shares, found, queries, stamp, verdicts) -> pa.Table:
    absent = pa.array(~found)
    # A query may have a vector and yet meet no source: every list that it probed was empty.
    unmatched = pc.and_(absent, queries["stage"].is_null())
    top_source = np.zeros(len(queries), np.int64)
    top_source[best.query[rank == 0]] = best.id[rank == 0]
    names = [name for name in queries.schema.names if name not in ("id", "key", "uri", "stage", "reason")]
    kinds = [field.type for field in QUERY_RESULT_FIELDS[-len(GENERATOR_COLUMNS) :]]
    generators = [pa.nulls(len(queries), kind) for kind in kinds]
    if verdicts is not None:
        if not verdicts["id"].combine_chunks().equals(queries["id"].combine_chunks()):
            raise MismatchError("the verdicts are of other images than the queries; run jobs.identify on this manifest")
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
