"""What a comparison of methods leaves behind: evaluation.json, table.txt, queries.parquet and one self-contained page."""

import json
import re
from dataclasses import dataclass
from functools import partial
from importlib import resources

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from attrib.common.errors import AttribError
from attrib.common.storage import Storage, join
from attrib.data.manifest import open_manifest
from attrib.embed.embeddings import open_embeddings
from attrib.evaluate.distractors import PREFIX
from attrib.evaluate.scores import QueryScores, format_table, summarise, value_name
from attrib.evaluate.settings import EvaluateSettings
from attrib.pages.thumbnails import Thumbnail, read_thumbnails

MAX_TEXT_CHARS = 160  # of a key or a name; the page stays small whatever files are called
NO_PICTURE = Thumbnail(None, "no picture at hand")
TICK_STEPS = (0.01, 0.02, 0.05, 0.1, 0.2)
MAX_TICKS = 8
PLOT_LEFT, PLOT_RIGHT, PLOT_ROW = 210, 640, 30  # of the SVG, in its own units


@dataclass(frozen=True)
class Pictures:
    """Where pictures come from: an embed run of the queries; for sources {what keys start with: an embed run of what follows}."""

    queries: str
    sources: dict[str, str]
    thumbnail_px: int = 112


def pictures_of(settings: EvaluateSettings) -> Pictures:
    """The pictures of the reference method's collections: all methods are about the same images."""
    method = next(m for m in settings.methods if m.name == settings.reference_name)
    sources = {"": method.sources}
    if method.distractors and not method.distractors.endswith(".npy"):
        sources[PREFIX] = method.distractors
    return Pictures(method.queries, sources, settings.thumbnail_px)


def write_comparison(
    results: dict[str, QueryScores],
    output: str,
    storage: Storage,
    *,
    reference: str | None = None,
    title: str = "Methods compared",
    record: dict | None = None,
    pictures: Pictures | None = None,
    num_shown: int = 12,
    figures: dict[str, str] | None = None,
    measures: dict | None = None,
) -> dict:
    """Write the four files into the folder `output` and return the summary of evaluation.json.

    reference: the method that differences are taken from, the first by default; record: settings and versions to keep beside the numbers;
    pictures: None for a page without; figures: {caption: inline SVG}, a caption's first line the heading, each further line a paragraph
    on how to read it, the SVG trusted (attrib.pages.charts escapes what it draws); measures: other numbers for evaluation.json, by name. Raises
    AttribError if methods were not scored on the same queries.
    """
    summary = summarise(results, reference)
    record = record or {}
    shown = _shown_queries(results, num_shown)
    found = _read_pictures(shown, pictures, storage)
    page = _render(
        title=title,
        summary=summary,
        record=record,
        forest=forest_plot(summary),
        figures=[_figure(caption, svg) for caption, svg in (figures or {}).items()],
        shown=shown,
        query_pictures=found[0],
        source_pictures=found[1],
        thumbnail_px=pictures.thumbnail_px if pictures else 0,
        num_queries=len(set(results[summary["reference"]].queries)),
        num_rows=len(results[summary["reference"]].queries),
    )
    storage.write_bytes(join(output, "comparison.html"), page.encode())
    storage.write_table(join(output, "queries.parquet"), query_table(results))
    storage.write_bytes(join(output, "table.txt"), f"{format_table(summary)}\n".encode())
    storage.write_json(join(output, "evaluation.json"), summary | (measures or {}) | record)
    return summary


def query_table(results: dict[str, QueryScores]) -> pa.Table:
    """One row per method and query: method, query, the two names of the cell, unit, every value, and the first sources."""
    strings = pa.list_(pa.string())
    tables = []
    for name, scores in results.items():
        first, second = zip(*scores.cells)
        columns = {
            "evaluated_method": pa.array([name] * len(scores.queries)),
            "query": pa.array(scores.queries),
            scores.cell_names[0]: pa.array(first),
            scores.cell_names[1]: pa.array(second),
            "unit": pa.array(scores.units),
            **{value: pa.array(numbers, pa.float64()) for value, numbers in scores.values.items()},
            "true_keys": pa.array(scores.true_keys, strings),
            "top_keys": pa.array(scores.top_keys, strings),
            "top_similarity": pa.array(scores.top_similarity, pa.list_(pa.float32())),
        }
        tables.append(pa.table(columns))
    return pa.concat_tables(tables)


def most_different(results: dict[str, QueryScores], count: int) -> list[int]:
    """Rows with the largest range of AP over methods, largest first; at most one per query and per unit, since those of a unit fail alike."""
    aps = np.array([scores.values["ap"] for scores in results.values()])
    ranges = np.ptp(aps, axis=0)
    scores = next(iter(results.values()))
    chosen: list[int] = []
    seen: set = set()
    for row in np.argsort(-ranges, kind="stable").tolist():
        about = {("query", scores.queries[row]), ("unit", scores.cells[row][0], scores.units[row])}
        if len(chosen) == count or ranges[row] == 0:
            break
        if not about & seen:
            chosen.append(row)
            seen |= about
    return chosen


def forest_plot(summary: dict) -> dict | None:
    """Where the macro means and their intervals stand in the SVG: {height, ticks: [(x, label)], rows: [...], reference_x}. None without."""
    macros = {name: method["macro"] and method["macro"]["ap"] for name, method in summary["methods"].items()}
    if not all(macros.values()):
        return None
    low, high = min(m["low"] for m in macros.values()), max(m["high"] for m in macros.values())
    step = next((s for s in TICK_STEPS if (high - low) / s <= MAX_TICKS), TICK_STEPS[-1])
    first, last = int(np.floor(low / step)), int(np.ceil(high / step))
    first, last = (first - 1, last + 1) if first == last else (first, last)

    def place(value: float) -> float:
        return PLOT_LEFT + (PLOT_RIGHT - PLOT_LEFT) * (value / step - first) / (last - first)

    rows = [
        {"name": name, "y": PLOT_ROW * (i + 0.5)} | m | {f"{end}_x": place(m[end]) for end in m}
        for i, (name, m) in enumerate(macros.items())
    ]
    return {
        "height": PLOT_ROW * len(rows),
        "ticks": [(place(step * tick), f"{step * tick:.2f}") for tick in range(first, last + 1)],
        "rows": rows,
        "reference_x": place(macros[summary["reference"]]["mean"]),
    }


def _figure(caption: str, svg: str) -> dict:
    heading, *lines = caption.split("\n")
    width = re.search(r'viewBox="0 0 (\d+)', svg)
    return {"heading": heading, "lines": lines, "svg": svg, "width_px": int(width[1]) if width else 860}


def _shown_queries(results: dict[str, QueryScores], count: int) -> list[dict]:
    any_scores = next(iter(results.values()))
    return [
        {
            "query": any_scores.queries[row],
            "cell": any_scores.cells[row],
            "true_keys": any_scores.true_keys[row],
            "methods": [
                {
                    "name": name,
                    "ap": float(scores.values["ap"][row]),
                    "top_key": scores.top_keys[row][0],
                    "top_similarity": scores.top_similarity[row][0],
                    "is_true": scores.top_keys[row][0] in scores.true_keys[row],
                }
                for name, scores in results.items()
            ],
        }
        for row in most_different(results, count)
    ]


def _read_pictures(shown: list[dict], pictures: Pictures | None, storage: Storage) -> tuple[dict, dict]:
    """Thumbnails by key: of the shown queries, and of their first true source and what each method put first."""
    queries = {card["query"] for card in shown}
    sources = {card["true_keys"][0] for card in shown} | {m["top_key"] for card in shown for m in card["methods"]}
    if pictures is None:
        return dict.fromkeys(queries, NO_PICTURE), dict.fromkeys(sources, NO_PICTURE)
    found = dict.fromkeys(sources, NO_PICTURE)
    left = set(sources)
    for prefix, uri in sorted(pictures.sources.items(), key=lambda item: -len(item[0])):
        mine = {key.removeprefix(prefix): key for key in left if key.startswith(prefix)}
        left -= set(mine.values())
        thumbnails = _thumbnails_by_key(set(mine), uri, pictures.thumbnail_px, storage)
        found |= {mine[key]: thumbnail for key, thumbnail in thumbnails.items()}
    return _thumbnails_by_key(queries, pictures.queries, pictures.thumbnail_px, storage), found


def _thumbnails_by_key(keys: set[str], uri: str, thumbnail_px: int, storage: Storage) -> dict[str, Thumbnail]:
    if not keys:
        return {}
    try:
        manifest = open_manifest(open_embeddings(uri, storage).manifest_uri, storage)
        uris = [manifest.partition_uri(partition) for partition, num_rows in enumerate(manifest.num_rows) if num_rows]
        images = storage.dataset(uris, format="parquet")
        rows = images.to_table(columns=["id", "key"], filter=pc.field("key").isin(pa.array(sorted(keys)))).to_pylist()
    except (AttribError, OSError):
        return dict.fromkeys(keys, Thumbnail(None, "the manifest is gone"))
    thumbnails = read_thumbnails(uri, [row["id"] for row in rows], thumbnail_px, storage)
    return dict.fromkeys(keys, NO_PICTURE) | {row["key"]: thumbnails[row["id"]] for row in rows}


def _render(**context) -> str:
    # Keys come from strangers' files: all is escaped, and the template marks nothing as safe but figures, which we drew.
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    pretty = partial(json.dumps, indent=1, ensure_ascii=False)
    environment.filters |= {"text": _text, "value_name": value_name, "pretty": pretty, "score": _score}
    template = resources.files("attrib.evaluate").joinpath("comparison.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        plot={"left": PLOT_LEFT, "right": PLOT_RIGHT, "row": PLOT_ROW}, **context
    )


def _text(value) -> str:
    text = str(value).replace("_", " ") if value == "test_case" else str(value)
    return text if len(text) <= MAX_TEXT_CHARS else text[: MAX_TEXT_CHARS - 1] + "…"


def _score(value: float, sign: bool = False) -> str:
    return (f"{value:+.3f}" if sign else f"{value:.3f}").replace("-", "\N{MINUS SIGN}")
