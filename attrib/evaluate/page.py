"""Files of a comparison of methods: evaluation.json, table.txt, queries.parquet and one self-contained page."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from attrib.common.storage import Storage, join
from attrib.evaluate.distractors import PREFIX
from attrib.evaluate.scores import QueryScores, format_table, summarise, value_name
from attrib.evaluate.settings import EvaluateSettings
from attrib.pages.charts import forest_figure, svg
from attrib.pages.render import render
from attrib.pages.thumbnails import Thumbnail, read_thumbnails

NO_IMAGE = Thumbnail(None, "not available")


@dataclass(frozen=True)
class ImageFolders:
    """Embed runs whose images the page shows. sources: {prefix of source keys: the run that has these sources}."""

    queries: str
    sources: dict[str, str]
    thumbnail_px: int = 112


def image_folders(settings: EvaluateSettings) -> ImageFolders:
    """The embed runs of the reference method; all methods are evaluated on the same images."""
    method = next(m for m in settings.methods if m.name == settings.reference_name)
    sources = {"": method.sources}
    if method.distractors and not method.distractors.endswith(".npy"):
        sources[PREFIX] = method.distractors
    return ImageFolders(method.queries, sources, settings.thumbnail_px)


def write_comparison(
    results: dict[str, QueryScores],
    output: str,
    storage: Storage,
    *,
    reference: str | None = None,
    title: str = "Methods compared",
    record: dict | None = None,
    images: ImageFolders | None = None,
    num_shown: int = 12,
    figures: dict[str, str] | None = None,
    measures: dict | None = None,
) -> dict:
    """Write the four files into the folder `output` and return the summary of evaluation.json.

    reference: the method that others are compared with, by default the first. record: settings and versions to keep.
    figures: {caption: SVG}; the first line of a caption is the heading, each other line a paragraph. measures: further
    numbers for evaluation.json. Raises AttribError if the methods were not scored on the same queries.
    """
    summary = summarise(results, reference)
    record = record or {}
    shown = most_different(results, num_shown)
    reference_scores = results[summary["reference"]]
    query_images, source_images = _read_images(shown, reference_scores, results, images, storage)
    in_macro = {cell["in_macro"] for cell in summary["cells"]}
    page = render(
        "evaluate/comparison.html.jinja",
        title=title,
        summary=summary,
        record=record,
        forest=_forest(summary),
        figures=figures or {},
        shown=shown,
        results=results,
        reference=reference_scores,
        query_images=query_images,
        source_images=source_images,
        thumbnail_px=images.thumbnail_px if images else 0,
        group="model" if summary["cell_names"][0] == "test_case" else "source group",
        has_macro=True in in_macro,
        has_small=False in in_macro,
        value_name=value_name,
    )
    storage.write_bytes(join(output, "comparison.html"), page.encode())
    storage.write_table(join(output, "queries.parquet"), query_table(results))
    storage.write_bytes(join(output, "table.txt"), f"{format_table(summary)}\n".encode())
    storage.write_json(join(output, "evaluation.json"), summary | (measures or {}) | record)
    return summary


def query_table(results: dict[str, QueryScores]) -> pa.Table:
    """One row per method and ranking: query, cell, resampled unit, all values, true and first sources."""
    strings = pa.list_(pa.string())
    tables = []
    for name, scores in results.items():
        first, second = zip(*scores.cells)
        columns = {
            "evaluated_method": [name] * len(scores.queries),
            "query": scores.queries,
            scores.cell_names[0]: first,
            scores.cell_names[1]: second,
            "unit": scores.units,
            **{value: pa.array(numbers, pa.float64()) for value, numbers in scores.values.items()},
            "true_keys": pa.array(scores.true_keys, strings),
            "top_keys": pa.array(scores.top_keys, strings),
            "top_similarity": pa.array(scores.top_similarity, pa.list_(pa.float32())),
        }
        tables.append(pa.table(columns))
    return pa.concat_tables(tables)


def most_different(results: dict[str, QueryScores], count: int) -> list[int]:
    """Rows with the largest range of AP over methods, largest first, at most one per query and per resampled unit."""
    ranges = np.ptp([scores.values["ap"] for scores in results.values()], axis=0)
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


def _forest(summary: dict) -> str | None:
    """Macro mAP with intervals as SVG; None if no cell is large enough."""
    macros = {name: method["macro"] for name, method in summary["methods"].items()}
    if not all(macros.values()):
        return None
    rows = {name: tuple(macro["ap"][key] for key in ("mean", "low", "high")) for name, macro in macros.items()}
    drawn = forest_figure(rows, "macro mAP", reference=rows[summary["reference"]][0])
    return svg(drawn, "Macro mAP of each method with its 95 % interval")


def _read_images(
    shown: list[int],
    reference: QueryScores,
    results: dict[str, QueryScores],
    images: ImageFolders | None,
    storage: Storage,
) -> tuple[dict, dict]:
    """Thumbnails by key for the shown rows: of queries; of the first true source and each method's first source."""
    queries = {reference.queries[row] for row in shown}
    sources = {reference.true_keys[row][0] for row in shown}
    sources |= {scores.top_keys[row][0] for row in shown for scores in results.values()}
    found = dict.fromkeys(sources, NO_IMAGE)
    if images is None:
        return dict.fromkeys(queries, NO_IMAGE), found
    options = images.thumbnail_px, storage, "key", NO_IMAGE.reason
    left = set(sources)
    for prefix, uri in sorted(images.sources.items(), key=lambda item: -len(item[0])):
        mine = {key.removeprefix(prefix): key for key in left if key.startswith(prefix)}
        left -= set(mine.values())
        found |= {mine[key]: thumbnail for key, thumbnail in read_thumbnails(uri, mine, *options).items()}
    return read_thumbnails(images.queries, queries, *options), found
