"""How well a run's vectors rank the true sources, by role of the source and method of the generator.

A truth row asks for one group of sources (copies and crops of one picture share a group) in one role, such as content or style. Its pool is
every source except those of the query's other truths, so that one vector per image can serve all roles, as AbC (arXiv 2306.09345) leaves
other exemplars out.
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from attrib.corpus import open_sidecar
from attrib.errors import AttribError
from attrib.manifest import open_manifest
from attrib.settings import EvaluateSettings
from attrib.storage import Storage
from attrib.vectors import open_embeddings, read_vectors

MACRO_MIN_ROWS = 30  # smaller cells are printed, but would add more noise than knowledge to the macro mean
BOOTSTRAP_DRAWS = 2000


@dataclass(frozen=True)
class Collection:
    """Vectors with what the manifest says: keys [n], unit vectors float64 [n, d], metadata columns by name [n]."""

    keys: list[str]
    vectors: np.ndarray
    metadata: dict[str, list]


@dataclass(frozen=True)
class Cell:
    """Truth rows of one (role, method): groups [n], average precision, recall at 1 and at 10, float64 [n] each."""

    groups: list[str]
    average_precision: np.ndarray
    recall_at_1: np.ndarray
    recall_at_10: np.ndarray


def read_collection(uri: str, storage: Storage) -> Collection:
    embeddings = open_embeddings(uri, storage)
    manifest = open_manifest(embeddings.manifest_uri, storage)
    columns = ["key", *manifest.metadata_columns]
    rows, vectors = [], []
    for partition in range(len(embeddings.num_rows)):
        ids, found = read_vectors(embeddings, partition, storage)
        table = storage.read_table(manifest.partition_uri(partition), columns=["id", *columns]).sort_by("id")
        at = np.searchsorted(table["id"].to_numpy(), ids)
        if len(at) and not np.array_equal(table["id"].to_numpy()[np.minimum(at, len(table) - 1)], ids):
            raise AttribError(f"{manifest.uri} was made anew since {uri} was embedded; embed it again")
        rows.append(table.take(pa.array(at)))
        vectors.append(found)
    table = pa.concat_tables(rows)
    # Copies of one picture must tie exactly; float32 products differ in the last bit with a row's place in the matrix.
    unit = np.concatenate(vectors).astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    return Collection(
        table["key"].to_pylist(),
        unit,
        {name: table[name].to_pylist() for name in columns[1:]},
    )


def evaluate(settings: EvaluateSettings, storage: Storage) -> dict[tuple[str, str], Cell]:
    """{(role, method): Cell}. Raises AttribError if a query or group of the truth table has no vector."""
    sources, queries = read_collection(settings.sources, storage), read_collection(settings.queries, storage)
    for collection, column in ((sources, settings.group_column), (queries, settings.method_column)):
        if column not in collection.metadata:
            raise AttribError(
                f"the collection has no metadata column {column!r}; it has {', '.join(collection.metadata) or 'none'}"
            )
    truth_table = open_sidecar(settings.truth, storage).to_table()
    for column in (settings.truth_role_column, settings.truth_group_column):
        if column not in truth_table.schema.names:
            names = ", ".join(truth_table.schema.names)
            raise AttribError(f"{settings.truth.uri} has no column {column!r}; it has {names}")
    if not len(truth_table):
        raise AttribError(f"{settings.truth.uri} has no rows, so there is nothing to evaluate")
    truth = truth_table.to_pylist()
    prefix = settings.truth.key_prefix
    row_of = {key: i for i, key in enumerate(queries.keys)}
    groups = np.array(sources.metadata[settings.group_column])
    wanted = defaultdict(set)
    for row in truth:
        wanted[row[settings.truth.key_column]].add(row[settings.truth_group_column])
    collected = defaultdict(list)
    for row in truth:
        query, group = row[settings.truth.key_column], row[settings.truth_group_column]
        if query.removeprefix(prefix) not in row_of or group not in groups:
            raise AttribError(
                f"{settings.truth.uri}: query {query!r} or source group {group!r} has no vector in these embeddings"
            )
        position = row_of[query.removeprefix(prefix)]
        pool = ~np.isin(groups, list(wanted[query] - {group}))
        relevant = (groups == group)[pool]
        similarity = (sources.vectors @ queries.vectors[position])[pool]
        ranks = ranks_of_relevant(similarity, relevant)
        method = queries.metadata[settings.method_column][position] or "(none)"
        collected[row[settings.truth_role_column], method].append((group, ranks))
    return {name: _cell(rows) for name, rows in sorted(collected.items())}


def ranks_of_relevant(similarity: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """Ranks int64 [m], ascending from 1, of the relevant among all; ties rank the irrelevant first, so that a tie never helps."""
    order = np.lexsort((relevant, -similarity))
    return np.flatnonzero(relevant[order]) + 1


def average_precision(ranks: np.ndarray) -> float:
    """Mean over the relevant of (relevant at or above it) / rank."""
    return float(np.mean(np.arange(1, len(ranks) + 1) / ranks))


def _cell(rows: list[tuple[str, np.ndarray]]) -> Cell:
    return Cell(
        [group for group, _ in rows],
        np.array([average_precision(ranks) for _, ranks in rows]),
        np.array([float(ranks[0] == 1) for _, ranks in rows]),
        np.array([np.mean(ranks <= 10) for _, ranks in rows]),
    )


def macro_map(cells: dict[tuple[str, str], Cell], seed: int = 0) -> tuple[float, float, float]:
    """Mean over cells of MACRO_MIN_ROWS rows or more of their mAP, and its 95 % interval by resampling source groups within each cell."""
    large = [cell for cell in cells.values() if len(cell.groups) >= MACRO_MIN_ROWS]
    if not large:
        return float("nan"), float("nan"), float("nan")
    generator = np.random.default_rng(seed)
    draws = np.zeros(BOOTSTRAP_DRAWS)
    for cell in large:
        names, group = np.unique(cell.groups, return_inverse=True)
        total, count = np.bincount(group, weights=cell.average_precision), np.bincount(group)
        drawn = generator.integers(0, len(names), size=(BOOTSTRAP_DRAWS, len(names)))
        draws += total[drawn].sum(axis=1) / count[drawn].sum(axis=1) / len(large)
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(np.mean([cell.average_precision.mean() for cell in large])), float(low), float(high)


def summarise(cells: dict[tuple[str, str], Cell]) -> dict:
    """Plain numbers for JSON: per cell and the macro mean."""
    mean, low, high = macro_map(cells)
    rows = [
        {
            "role": role,
            "method": method,
            "num_rows": len(cell.groups),
            "num_groups": len(set(cell.groups)),
            "map": float(cell.average_precision.mean()),
            "recall_at_1": float(cell.recall_at_1.mean()),
            "recall_at_10": float(cell.recall_at_10.mean()),
        }
        for (role, method), cell in cells.items()
    ]
    # JSON has no NaN: null where no cell is large enough.
    macro = (
        {"macro_map": mean, "macro_map_interval_95": [low, high]}
        if mean == mean
        else {"macro_map": None, "macro_map_interval_95": None}
    )
    return {"cells": rows, **macro, "macro_min_rows": MACRO_MIN_ROWS}


def format_table(summary: dict) -> str:
    lines = [f"{'role':8} {'method':48} {'rows':>5} {'groups':>6} {'mAP':>6} {'r@1':>6} {'r@10':>6}"]
    for row in summary["cells"]:
        counts = f"{row['num_rows']:5} {row['num_groups']:6}"
        lines.append(
            f"{row['role']:8} {row['method']:48} {counts} {row['map']:6.3f} {row['recall_at_1']:6.3f} {row['recall_at_10']:6.3f}"
        )
    if summary["macro_map"] is None:
        lines.append(f"no macro mAP: no cell has {summary['macro_min_rows']} or more rows")
        return "\n".join(lines)
    low, high = summary["macro_map_interval_95"]
    lines.append(
        f"macro mAP {summary['macro_map']:.4f}, 95 % interval {low:.4f} to {high:.4f} (cells of {summary['macro_min_rows']} or more rows)"
    )
    return "\n".join(lines)
