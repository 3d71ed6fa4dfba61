"""The page of an attribution run: similarities, sources, shares by metadata, generators and failures.

A run may hold 100 million rows, so Arrow's streaming engine aggregates them. Memory grows with the number of distinct
sources and metadata values (one row of sums each) and of queries (12 bytes each).
"""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow.acero import AggregateNodeOptions, Declaration, FilterNodeOptions, ProjectNodeOptions, ScanNodeOptions
from pyarrow.dataset import Dataset

from attrib.attribute.blocks import block_name
from attrib.attribute.rows import ATTRIBUTIONS_RECORD, QUERY_RESULT_FIELDS, RESULT_FOLDERS, read_sources
from attrib.attribute.settings import ReportSettings
from attrib.common.errors import AttribError
from attrib.common.outputs import check_output_file
from attrib.common.storage import Storage, join
from attrib.common.verified import verify
from attrib.data.parquet_files import has_text, shown_rows
from attrib.embed.embeddings import EMBEDDINGS_RECORD, FAILURES, open_embeddings
from attrib.generators.identify.files import RECORD as IDENTIFY_RECORD
from attrib.generators.identify.files import open_identified
from attrib.index.index import INDEX_RECORD, Index, open_index
from attrib.pages.charts import forest_figure, histogram_figure, svg
from attrib.pages.render import MARK, render
from attrib.pages.thumbnails import read_thumbnails

SOURCES_PER_QUERY = 5  # in the gallery
MAX_ROLL_UP_VALUES = 50  # of a column with more, only the first TOP_ROLL_UP_VALUES are listed
TOP_ROLL_UP_VALUES = 20
MAX_FAILURE_REASONS = 20
MAX_FAILURES_LISTED = 50
MAX_BARS = 40  # of a histogram
SIMILARITY_STEPS = (0.01, 0.02, 0.05, 0.1)
SHARE_DECIMALS = 6  # threads add in any order; smaller differences count as equal, so a second page is the same
SHOWN_EXEMPLARS = 6  # of a candidate generator
SHOWN_SETS = 20

HAS_SHARE = pc.field("share") > 0


@dataclass(frozen=True)
class Run:
    """A finished attribution run."""

    record: dict[str, Any]
    index: Index
    rows: Dataset
    outcomes: Dataset


def open_run(uri: str, storage: Storage) -> Run:
    """Read a finished run. Raises AttribError if the run or its index is missing, or the index was rebuilt."""
    record = storage.require(join(uri, ATTRIBUTIONS_RECORD), "jobs.attribute")
    rows, outcomes = (
        storage.dataset(
            [
                verify(join(uri, folder, block_name(block)), sha256, "jobs.attribute", storage)
                for block, sha256 in enumerate(record.get("sha256", {}).get(folder, [None] * record["num_blocks"]))
            ],
            format="parquet",
        )
        for folder in RESULT_FOLDERS
    )
    index = open_index(record["settings"]["index"], storage)
    if index.digest != record["index_digest"]:
        raise AttribError(
            f"{index.uri} was rebuilt after {uri} was made with it; run jobs.attribute again with another output folder"
        )
    return Run(record, index, rows, outcomes)


def write_report(settings: ReportSettings) -> dict[str, Any]:
    """Write the page to settings.output and return its headline figures.

    Raises AttribError if the run or its index is missing, or the sources lack a column of settings.roll_up.
    """
    storage = Storage(settings.storage)
    check_output_file(settings.output, MARK, storage)
    run = open_run(settings.attributions, storage)
    roll_up_columns = _roll_up_columns(settings, run)
    columns = ["query_id", "top_similarity", "num_sources"]
    found = run.outcomes.to_table(columns=columns, filter=pc.field("status") == "attributed")
    ids, similarity, num_sources = (found[name].to_numpy() for name in columns)
    sums = source_sums(run.rows, settings.clear_similarity)
    sources = _top_sources(sums, run.index, settings.num_sources, storage)
    gallery = _gallery(run, ids[np.lexsort((ids, -similarity))], settings.num_gallery)

    generators = _generator_section(run.record, storage)
    shown_queries = [q["id"] for q in gallery] + (generators["exemplar_ids"] if generators else [])
    query_images = read_thumbnails(run.record["settings"]["queries"], shown_queries, settings.thumbnail_px, storage)
    index_settings = storage.require(join(run.index.uri, INDEX_RECORD), "jobs.index")["settings"]
    unread = _unread_sources(run.index, index_settings["embeddings"], storage)
    shown_sources = {s["id"] for s in sources} | {s["source_id"] for q in gallery for s in q["sources"]}
    source_images = read_thumbnails(index_settings["embeddings"], shown_sources, settings.thumbnail_px, storage)

    summary = {name: run.record[name] for name in ("run_id", "num_queries", "num_attributed", "num_failed")} | {
        "num_clear": int(np.count_nonzero(similarity >= settings.clear_similarity)),
        "median_top_similarity": float(np.median(similarity)) if len(similarity) else None,
        "num_sources_named": len(sums),
        "num_unread_sources": unread["count"] if unread else 0,
        "num_missing_images": sum(i.data_uri is None for i in (*query_images.values(), *source_images.values())),
    }
    page = render(
        "attribute/report.html.jinja",
        title=settings.title,
        settings=settings,
        record=run.record,
        index=run.index,
        index_settings=index_settings,
        summary=summary,
        unread=unread,
        num_truncated=run.outcomes.count_rows(filter=pc.field("shares_truncated")),
        histograms=_histograms(similarity, num_sources, settings.clear_similarity),
        sources=sources,
        roll_ups=[roll_up(run.rows, name, settings.clear_similarity) for name in roll_up_columns],
        gallery=gallery,
        query_images=query_images,
        source_images=source_images,
        failures=_failures(run.outcomes) if run.record["num_failed"] else None,
        generators=generators,
    ).encode()
    storage.write_bytes(settings.output, page)
    return summary | {"output": settings.output, "num_bytes": len(page)}


def source_sums(rows: Dataset, clear_similarity: float) -> pa.Table:
    """Return one row per source with a share: its id as `key`, and sums over the queries in which it has a share.

    share and clear_share (of at least clear_similarity): float64, in queries; num_queries, num_first (rank 1) and
    num_clear: int64; best_similarity: cosine.
    """
    is_clear = pc.field("similarity") >= clear_similarity
    columns = {
        "num_first": (pc.field("rank") == 1).cast(pa.int64()),
        "num_clear": is_clear.cast(pa.int64()),
        "best_similarity": pc.field("similarity"),
    }
    sums = [(name, "hash_max" if name == "best_similarity" else "hash_sum", None, name) for name in columns]
    count: tuple[Any, ...] = ([], "hash_count_all", None, "num_queries")
    return _shares_by(pc.field("source_id"), rows, clear_similarity, columns, [*sums, count])


def roll_up(rows: Dataset, name: str, clear_similarity: float) -> dict[str, Any]:
    """Return the shares summed by the values of a metadata column of the sources, largest first; null is a value.

    {name, num_values, values: [{key, share, clear_share}]}; a long list is cut to TOP_ROLL_UP_VALUES.
    """
    table = _shares_by(pc.field(f"source_{name}").cast(pa.string()), rows, clear_similarity, {}, [])
    num_shown = len(table) if len(table) <= MAX_ROLL_UP_VALUES else TOP_ROLL_UP_VALUES
    return {"name": name, "num_values": len(table), "values": _largest(table, num_shown).to_pylist()}


def _shares_by(
    key: pc.Expression, rows: Dataset, clear_similarity: float, columns: dict[str, Any], aggregates: list[Any]
) -> pa.Table:
    """Return share and clear_share, and further aggregates of columns, summed by `key` over the rows with a share."""
    share = pc.field("share")
    clear_share = pc.if_else(pc.field("similarity") >= clear_similarity, share, 0.0)
    shares = {"share": share, "clear_share": clear_share}
    sums = [(name, "hash_sum", None, name) for name in shares]
    table = _aggregate(rows, HAS_SHARE, {"key": key, **shares, **columns}, ["key"], [*sums, *aggregates])
    for name in shares:
        table = table.set_column(table.schema.get_field_index(name), name, pc.round(table[name], SHARE_DECIMALS))
    return table


def gallery_positions(num_queries: int, num_gallery: int) -> np.ndarray:
    """Return int64 [min(num_gallery, num_queries)]: evenly spaced positions from 0 to num_queries - 1."""
    return np.unique(np.rint(np.linspace(0, num_queries - 1, min(num_gallery, num_queries))).astype(np.int64))


def _aggregate(
    scan: Dataset, where: pc.Expression, columns: dict[str, Any], keys: list[str], aggregates: list[Any]
) -> pa.Table:
    return Declaration.from_sequence(
        [
            Declaration("scan", ScanNodeOptions(scan, columns=columns, filter=where)),
            # The scan's own filter only skips row groups without a match.
            Declaration("filter", FilterNodeOptions(where)),
            Declaration("project", ProjectNodeOptions(list(columns.values()), list(columns))),
            Declaration("aggregate", AggregateNodeOptions(aggregates, keys=keys)),
        ]
    ).to_table()


def _largest(table: pa.Table, count: int) -> pa.Table:
    order = [("share", "descending"), ("key", "ascending")]
    return table.take(pc.select_k_unstable(table, min(count, len(table)), order)) if len(table) else table


def _roll_up_columns(settings: ReportSettings, run: Run) -> list[str]:
    kinds = {name: run.rows.schema.field(f"source_{name}").type for name in run.index.metadata_columns}
    available = [name for name, kind in kinds.items() if has_text(kind)]
    unknown = [name for name in settings.roll_up if name not in available]
    if unknown:
        raise AttribError(
            f"roll_up: the sources have no column {unknown[0]!r} of single values; choose from "
            f" {', '.join(available) or 'no metadata'}"
        )
    return list(dict.fromkeys(settings.roll_up)) or available


def _top_sources(sums: pa.Table, index: Index, num_sources: int, storage: Storage) -> list[dict[str, Any]]:
    top = _largest(sums, num_sources)
    known = {row["id"]: row for row in shown_rows(read_sources(index, top["key"].to_numpy(), storage))}
    shown = [(sums, known[sums["key"]]) for sums in top.to_pylist()]
    fixed = {"id", "key", "uri"}
    return [sums | {"id": row["id"], "key": row["key"], "metadata": _metadata(row, fixed)} for sums, row in shown]


def _metadata(row: dict[str, Any], fixed: set[str], prefix: str = "") -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in row.items() if name not in fixed and value is not None}


def _gallery(run: Run, ids: np.ndarray, num_gallery: int) -> list[dict[str, Any]]:
    """Queries evenly spaced in the order of top similarity, each with its most similar sources."""
    chosen = ids[gallery_positions(len(ids), num_gallery)]
    is_chosen = pc.field("query_id").isin(pa.array(chosen))
    fixed = {field.name for field in QUERY_RESULT_FIELDS}
    cards = {}
    for row in shown_rows(run.outcomes.to_table(filter=is_chosen)):
        shown = {"id": row["query_id"], "key": row["query_key"], "metadata": _metadata(row, fixed, "query_")}
        cards[row["query_id"]] = row | shown | {"sources": []}
    columns = ["query_id", "rank", "source_id", "source_key", "similarity", "share"]
    first = run.rows.to_table(columns=columns, filter=is_chosen & HAS_SHARE & (pc.field("rank") <= SOURCES_PER_QUERY))
    for row in first.sort_by("rank").to_pylist():
        cards[row["query_id"]]["sources"].append(row)
    return [cards[query_id] for query_id in chosen.tolist()]


def _histograms(similarity: np.ndarray, num_sources: np.ndarray, clear_similarity: float) -> list[tuple[str, str]]:
    """Title and SVG of each; empty without attributed queries."""
    if not len(similarity):
        return []
    bars = similarity_histogram(similarity, clear_similarity)
    top = histogram_figure(*bars, "cosine similarity", marker=clear_similarity)
    count = histogram_figure(*count_histogram(num_sources), "sources with a share")
    return [
        ("Similarity of each query’s most similar source", svg(top, "Histogram of top similarity")),
        ("Sources with a share, per query", svg(count, "Histogram of the number of sources with a share per query")),
    ]


def similarity_histogram(similarity: np.ndarray, clear_similarity: float) -> tuple[np.ndarray, np.ndarray]:
    """Return edges [n + 1] and counts [n] of float [m > 0], for [low, high). One of the edges is clear_similarity."""
    distance = similarity.astype(np.float64) - clear_similarity
    extent = max(distance.max(), 0.0) - min(distance.min(), 0.0)
    step = next((s for s in SIMILARITY_STEPS if extent / s <= MAX_BARS), SIMILARITY_STEPS[-1])
    place = np.floor(distance / step).astype(np.int64)
    first, last = min(int(place.min()), -1), max(int(place.max()), 0)
    edges = clear_similarity + step * np.arange(first, last + 2)
    return edges, np.bincount(place - first, minlength=len(edges) - 1)


def count_histogram(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return edges [n + 1] and counts [n] of positive integers [m > 0]."""
    step = -(-int(values.max()) // MAX_BARS)
    counts = np.bincount((values - 1) // step)
    return 0.5 + step * np.arange(len(counts) + 1), counts


def _failures(outcomes: Dataset) -> dict[str, Any]:
    failed = pc.field("status") == "failed"
    columns = {"stage": pc.field("stage"), "reason": pc.field("reason")}
    counts = _aggregate(outcomes, failed, columns, ["stage", "reason"], [([], "hash_count_all", None, "count")])
    listed = outcomes.head(MAX_FAILURES_LISTED, columns=["query_key", "stage", "reason"], filter=failed)
    order = [("count", "descending"), ("stage", "ascending"), ("reason", "ascending")]
    first = counts.sort_by(order).slice(0, MAX_FAILURE_REASONS)
    return {"counts": first.to_pylist(), "num_reasons": len(counts), "listed": listed.to_pylist()}


def _unread_sources(index: Index, embeddings: str, storage: Storage) -> dict[str, Any] | None:
    """Return how many listed sources are not in the index, of how many, and the table of them; None if there are none,
    or if the embeddings are gone. Raises AttribError if their record is damaged.
    """
    with suppress(OSError):
        if not storage.exists(join(embeddings, EMBEDDINGS_RECORD)):
            return None
        num_listed = sum(open_embeddings(embeddings, storage).num_rows)
        if count := max(0, num_listed - index.num_vectors):
            return {"count": count, "num_listed": num_listed, "table": join(embeddings, FAILURES)}
    return None


def _generator_section(record: dict[str, Any], storage: Storage) -> dict[str, Any] | None:
    """Return what the page shows of the summary of jobs.identify in the run's record; None without one.

    Records of earlier versions have no recognised rates, no list of sets, no notes of changes and no count of distinct
    images. The settings and leave-one-out rates are those of the identify run, and absent if it is gone or
    of another run.
    """
    found: dict[str, Any] | None = record.get("generators")
    if found is None:
        return None
    candidates = [
        {"num_distinct": None} | c | {"exemplars": c["exemplars"][:SHOWN_EXEMPLARS]} for c in found["candidates"]
    ]
    sets = found["sets"] and found["sets"] | {"listed": found["sets"].get("listed", [])[:SHOWN_SETS]}
    changes = found.get("changes") or []
    own, uri = None, record["settings"].get("generators")
    with suppress(OSError):
        if uri and storage.exists(join(uri, IDENTIFY_RECORD)):
            identified = open_identified(uri, storage)
            is_same = identified.record.get("digest") == record["inputs"].get("generators")
            own = identified.record if is_same else None
    return found | {
        "rates": own["settings"]["verdicts"] if own else None,
        "left_out_rates": own.get("left_out_rates", {}) if own else {},
        "recognised": found.get("recognised") or {},
        "candidates": candidates,
        "exemplar_ids": [row["id"] for candidate in candidates for row in candidate["exemplars"]],
        "sets": sets,
        "changes_by_name": {row["name"]: row for row in changes},
        "vanished": [row["name"] for row in changes if row.get("note") == "vanished"],
        "share_chart": _share_chart(found["shares"]) if found["shares"] else None,
    }


def _share_chart(shares: list[dict[str, Any]]) -> str:
    rows = {row["name"]: (100 * row["share"], 100 * row["low"], 100 * row["high"]) for row in shares}
    drawn = forest_figure(rows, "corrected share of images in %, with 95 % interval", form="{:.1f}")
    return svg(drawn, "Estimated share of each generator with its 95 % interval")
