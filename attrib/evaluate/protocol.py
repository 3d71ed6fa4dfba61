"""How well vectors rank the true sources of generated images: by a truth table here, by AbC's test cases in
abc_protocol.py. What else is measured on the same pairs is in pair_measures.py.

A truth row asks for one group of sources (copies and crops of one image share a group) in one role, such as content
or style. Its pool is every source except those of the query's other truths, so that one vector per image can serve all
roles, as AbC (arXiv 2306.09345) leaves other exemplars out.
"""

from collections import defaultdict
from typing import NamedTuple

import numpy as np

from attrib.common.errors import AttribError
from attrib.common.storage import Storage
from attrib.data.collections import open_sidecar
from attrib.embed.embeddings import open_embeddings
from attrib.evaluate.abc_protocol import read_test_case, score_abc
from attrib.evaluate.collection import Collection, check_comparable, read_collection, unit_rows
from attrib.evaluate.distractors import listed_distractors, open_distractors
from attrib.evaluate.mappers import Mappers, load_mappers
from attrib.evaluate.scores import TIE, TOP_SOURCES, QueryScores, average_precision, check_same_rows, ranks_of_relevant
from attrib.evaluate.settings import AbcSettings, EvaluateSettings, MethodSettings, TruthSettings


class TruthRow(NamedTuple):
    """A query's key, and the group of sources that is true of it in a role."""

    query: str
    role: str
    group: str


def evaluate(settings: EvaluateSettings, storage: Storage) -> dict[str, QueryScores]:
    """{method: its scores}, by the protocol that the settings name. Raises AttribError if something that is asked for
    has no vector."""
    ask = _truth_scorer(settings.truth, storage) if settings.truth else _abc_scorer(settings.abc, storage)
    results = {method.name: ask(method) for method in settings.methods}
    check_same_rows(results)
    return results


def input_digests(settings: EvaluateSettings, storage: Storage) -> dict[str, dict[str, str]]:
    """{method: {"sources": digest, "queries": digest}} of the embed runs, which may be made anew at the same place."""
    return {
        method.name: {
            role: open_embeddings(uri, storage).digest
            for role, uri in (("sources", method.sources), ("queries", method.queries))
        }
        for method in settings.methods
    }


def read_truth(settings: TruthSettings, storage: Storage) -> list[TruthRow]:
    """The truth table, the prefix taken off its keys. Raises AttribError if a column is absent or there is no row."""
    table = open_sidecar(settings, storage).to_table()
    for column in (settings.role_column, settings.group_column):
        if column not in table.schema.names:
            raise AttribError(f"{settings.uri} has no column {column!r}; it has {', '.join(table.schema.names)}")
    if not len(table):
        raise AttribError(f"{settings.uri} has no rows, so there is nothing to evaluate")
    columns = (table[name].to_pylist() for name in (settings.key_column, settings.role_column, settings.group_column))
    return [TruthRow(str(query).removeprefix(settings.key_prefix), role, group) for query, role, group in zip(*columns)]


class Places(NamedTuple):
    """Where the names of a truth table stand. group_of: int64 [n], each source's group by number; code_of: {group: its
    number}; row_of: {query: its row}."""

    group_of: np.ndarray
    code_of: dict[str, int]
    row_of: dict[str, int]


def places_of(
    truth: list[TruthRow], sources: Collection, queries: Collection, source_group_column: str = "group"
) -> Places:
    """Raises AttribError if the group column is absent, or a query or group of the table has no vector."""
    names, group_of = np.unique([str(group) for group in sources.column(source_group_column)], return_inverse=True)
    code_of = {name: code for code, name in enumerate(names.tolist())}
    row_of = {key: i for i, key in enumerate(queries.keys)}
    for row in truth:
        if row.query not in row_of or row.group not in code_of:
            what = f"query {row.query!r}" if row.query not in row_of else f"source group {row.group!r}"
            raise AttribError(
                f"the truth table asks for query {row.query!r} and source group {row.group!r}, but {what} has no "
                "vector in these "
                "embeddings; embed it, or correct the table or its key_prefix"
            )
    return Places(group_of, code_of, row_of)


def score_truth(
    sources: Collection,
    queries: Collection,
    truth: list[TruthRow],
    mappers: Mappers | None = None,
    source_group_column: str = "group",
    query_method_column: str = "method",
) -> QueryScores:
    """One row per truth row, in cells of (role, method that generated the query); the resampled unit is the source
    group.

    Values: ap; recall_at_1 (1 if any relevant source is first); recall_at_10. Raises AttribError if a metadata column
    is absent, or a query or group of the table has no vector.
    """
    group_of, code_of, row_of = places_of(truth, sources, queries, source_group_column)
    methods = queries.column(query_method_column)
    wanted = defaultdict(set)
    for row in truth:
        wanted[row.query].add(code_of[row.group])
    source_rows = unit_rows(sources.vectors, mappers and mappers.real, "the sources")
    query_rows = unit_rows(queries.vectors, mappers and mappers.synth, "the queries")
    check_comparable(source_rows, query_rows)
    cells, values, true_keys, top_keys, top_similarity = [], [], [], [], []
    for query, role, group in truth:
        position, code = row_of[query], code_of[group]
        pool = np.flatnonzero(~np.isin(group_of, list(wanted[query] - {code})))
        relevant = group_of[pool] == code
        similarity = (source_rows @ query_rows[position])[pool]
        ranks = ranks_of_relevant(similarity, relevant)
        values.append((average_precision(ranks), float(ranks[0] == 1), np.mean(ranks <= 10)))
        first = _first(similarity, relevant, lambda i, pool=pool: sources.keys[pool[i]])
        cells.append((role, methods[position] or "(none)"))
        true_keys.append([sources.keys[i] for i in pool[relevant]])
        top_keys.append([sources.keys[i] for i in pool[first]])
        top_similarity.append(similarity[first].tolist())
    columns = np.array(values).T
    return QueryScores(
        queries=[row.query for row in truth],
        cells=cells,
        units=[row.group for row in truth],
        values=dict(zip(("ap", "recall_at_1", "recall_at_10"), columns)),
        true_keys=true_keys,
        top_keys=top_keys,
        top_similarity=top_similarity,
    )


def _first(similarity: np.ndarray, relevant: np.ndarray, key_of) -> list[int]:
    """The TOP_SOURCES best, by descending similarity; of ties the irrelevant first, then by key, whatever order the
    files had."""
    rank = min(TOP_SOURCES, len(similarity))
    candidates = np.flatnonzero(similarity >= np.partition(similarity, -rank)[-rank] - TIE)
    order = sorted(candidates.tolist(), key=lambda i: (-round(float(similarity[i]), 12), relevant[i], key_of(i)))
    return order[:TOP_SOURCES]


def _truth_scorer(settings: TruthSettings, storage: Storage):
    truth = read_truth(settings, storage)

    def score(method: MethodSettings) -> QueryScores:
        return score_truth(
            read_collection(method.sources, storage),
            read_collection(method.queries, storage),
            truth,
            load_mappers(method.mapper, storage) if method.mapper else None,
            settings.source_group_column,
            settings.query_method_column,
        )

    return score


def _abc_scorer(settings: AbcSettings, storage: Storage):
    test_cases = {
        name: read_test_case(uri, storage, settings.exemplar_prefix, settings.query_prefix)
        for name, uri in settings.test_cases.items()
    }

    def score(method: MethodSettings) -> QueryScores:
        sources, queries = read_collection(method.sources, storage), read_collection(method.queries, storage)
        mappers = load_mappers(method.mapper, storage) if method.mapper else None
        if settings.distractors:
            listed = listed_distractors(settings.distractors, settings.exemplar_prefix, sources, storage)
            return score_abc(test_cases, sources, queries, listed, mappers, settings.whole_pool)
        with open_distractors(method.distractors, storage) as distractors:
            return score_abc(test_cases, sources, queries, distractors, mappers, settings.whole_pool)

    return score
