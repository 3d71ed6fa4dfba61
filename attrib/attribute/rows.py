"""The result rows of an attribution run: sources with shares per query, and one status row per query.

<output>/attributions/block-00000.parquet ...   one row per (query, rank)
<output>/outcomes/block-00000.parquet ...       one row per query, failed ones included
<output>/attributions.json                      written last

During the run, <output>/_partials/block-00000/ holds the candidates of each shard, the best of all shards, and the
metadata of their sources.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from attrib.common.errors import MismatchError
from attrib.common.storage import Storage
from attrib.data.collections import RESERVED_COLUMNS
from attrib.data.manifest import Manifest, Slice
from attrib.embed.embeddings import Embeddings
from attrib.index.index import Index
from attrib.index.search import Candidates, ranks
from attrib.shares.settings import SharesSettings
from attrib.shares.shares import soft_shares

RESULT_FOLDERS = ("attributions", "outcomes")
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


def read_sources(index: Index, ids: np.ndarray, storage: Storage, shards: Sequence[int] | None = None) -> pa.Table:
    """Return id, key, uri and metadata of sources, by ascending id. ids: int64 [m]. shards: None for all shards."""
    shards = range(len(index.shards)) if shards is None else shards
    uris = [index.sources_uri(shard, storage) for shard in shards]
    ids, field = np.unique(ids), pc.field("id")
    chosen = field.isin(pa.array(ids))
    if len(ids):  # ids ascend in a file, so the range allows Arrow to skip row groups
        chosen &= (field >= int(ids[0])) & (field <= int(ids[-1]))
    return storage.dataset(uris, format="parquet").to_table(filter=chosen).sort_by("id").combine_chunks()


def block_queries(queries: Embeddings, manifest: Manifest, block: list[Slice], storage: Storage) -> pa.Table:
    """Return id, stage, reason, key, uri and metadata of all queries of a block, by ascending id.

    Raises MismatchError if embeddings and manifest list different images.
    """
    parts, keep = [], ["key", "uri", *manifest.metadata_columns]
    for piece in block:
        part_uri, rows_uri = queries.checked_uri(piece.table, storage), manifest.checked_uri(piece.table, storage)
        part = storage.read_table(part_uri, columns=["id", "stage", "reason"])
        rows = storage.read_table(rows_uri).sort_by("id")
        if not rows["id"].equals(part["id"]):
            raise MismatchError(f"{part_uri} and {rows_uri} list different images; embed the manifest again")
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

    best: merged candidates; `query` is a position in queries. queries: of `block_queries`. sources: of `read_sources`,
    with at least every candidate. verdicts: `block_verdicts` of the same images. Raises MismatchError for other ones.
    """
    similarity = np.full((len(queries), top_k), -np.inf, np.float32)
    rank = ranks(best.query)
    similarity[best.query, rank] = best.score
    found = np.asarray(np.isfinite(similarity).any(axis=1))
    shares = np.zeros(similarity.shape)
    shares[found] = soft_shares(similarity[found], settings)

    at = pa.array(np.searchsorted(sources["id"].to_numpy(), best.id))
    names, extra = _extra_fields(sources, "source")
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
            *(pa.repeat(value, len(rank)) for value in astuple(stamp)),
            *(sources[name].take(at) for name in names),
        ],
        schema=pa.schema(ATTRIBUTION_FIELDS + extra),
    )

    # A query with a vector has no source if all the lists that it probed are empty.
    unmatched = pc.and_(pa.array(~found), queries["stage"].is_null())
    top_source = np.zeros(len(queries), np.int64)
    top_source[best.query[rank == 0]] = best.id[rank == 0]
    names, extra = _extra_fields(queries, "query")
    generators = [pa.nulls(len(queries), field.type) for field in QUERY_RESULT_FIELDS[-len(GENERATOR_COLUMNS) :]]
    if verdicts is not None:
        if not verdicts["id"].combine_chunks().equals(queries["id"].combine_chunks()):
            raise MismatchError(
                "the verdicts in `generators` belong to other images than the queries; run jobs.identify on "
                "their manifest"
            )
        generators = [verdicts[name] for name in GENERATOR_COLUMNS]
    results = pa.table(
        [
            queries["id"],
            queries["key"],
            queries["uri"],
            pa.array(np.where(found, "attributed", "failed")),
            pc.if_else(unmatched, "search", queries["stage"]),
            pc.if_else(unmatched, "no source in the lists that were probed; raise nprobe", queries["reason"]),
            pa.array((shares > 0).sum(axis=1).astype(np.int32)),
            pa.array(shares[:, -1] > 0),
            pa.array(top_source, mask=~found),
            pa.array(similarity[:, 0], mask=~found),
            pa.array(shares[:, 0], mask=~found),
            pa.repeat(stamp.run_id, len(queries)),
            *generators,
            *(queries[name] for name in names),
        ],
        schema=pa.schema(QUERY_RESULT_FIELDS + extra),
    )
    return attributions, results


def _extra_fields(table: pa.Table, prefix: str) -> tuple[list[str], list[pa.Field]]:
    """Return the names of the metadata columns, and their prefixed fields."""
    names = [name for name in table.schema.names if name not in RESERVED_COLUMNS]
    return names, [table.schema.field(name).with_name(f"{prefix}_{name}") for name in names]
