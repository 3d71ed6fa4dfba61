"""Score how well vectors rank the true sources of generated images, by a truth table or by AbC's test cases.

A row of the truth table names a query, a role such as content or style, and the group of its true sources in this role
(copies and crops of one image). Each row is one ranking. Its pool contains all sources except those that are true for
the query in its other rows, so one vector per image can serve all roles. AbC (arXiv 2306.09345) likewise excludes the
exemplars of other models.
"""

from collections import defaultdict
from typing import NamedTuple

import numpy as np

from attrib.common.errors import AttribError
from attrib.common.storage import Storage
from attrib.data.sidecar import open_sidecar
from attrib.embed.embeddings import open_embeddings
from attrib.evaluate.abc_protocol import read_test_case, score_abc
from attrib.evaluate.collection import Collection, check_comparable, read_collection, unit_rows
from attrib.evaluate.distractors import listed_distractors, open_distractors
from attrib.evaluate.mappers import Mappers, load_mappers
from attrib.evaluate.scores import TIE, TOP_SOURCES, QueryScores, average_precision, check_same_rows, ranks_of_relevant
from attrib.evaluate.settings import EvaluateSettings, MethodSettings, TruthSettings


class TruthRow(NamedTuple):
    """The source group that is true for a query in a role. query: its key."""

    query: str
    role: str
    group: str


def evaluate(settings: EvaluateSettings, storage: Storage) -> dict[str, QueryScores]:
    """Score every method by the protocol of the settings. Raises AttribError if a source or query has no vector."""
    table, abc = settings.truth, settings.abc
    truth = read_truth(table, storage) if table else []
    test_cases = {
        name: read_test_case(uri, storage, abc.exemplar_prefix, abc.query_prefix)
        for name, uri in (abc.test_cases if abc else {}).items()
    }

    def score(method: MethodSettings) -> QueryScores:
        sources, queries, mappers = read_method(method, storage)
        if table:
            columns = table.source_group_column, table.query_method_column
            return score_truth(sources, queries, truth, mappers, *columns)
        if abc.distractors:
            listed = listed_distractors(abc.distractors, abc.exemplar_prefix, sources, storage)
            return score_abc(test_cases, sources, queries, listed, mappers, abc.whole_pool)
        with open_distractors(method.distractors, storage) as distractors:
            return score_abc(test_cases, sources, queries, distractors, mappers, abc.whole_pool)

    results = {method.name: score(method) for method in settings.methods}
    check_same_rows(results)
    return results


def read_method(method: MethodSettings, storage: Storage) -> tuple[Collection, Collection, Mappers | None]:
    """The sources, queries and mappers of a method."""
    return (
        read_collection(method.sources, storage),
        read_collection(method.queries, storage),
        load_mappers(method.mapper, storage),
    )


def input_digests(settings: EvaluateSettings, storage: Storage) -> dict[str, dict[str, str]]:
    """{method: {"sources": digest, "queries": digest}} of its embed runs, which may be overwritten by later runs."""
    return {
        method.name: {role: open_embeddings(getattr(method, role), storage).digest for role in ("sources", "queries")}
        for method in settings.methods
    }


def read_truth(settings: TruthSettings, storage: Storage) -> list[TruthRow]:
    """Read the truth table, without the prefix of its keys. Raises AttribError if a column or all rows are missing."""
    table = open_sidecar(settings, storage).to_table()
    for column in (settings.role_column, settings.group_column):
        if column not in table.schema.names:
            raise AttribError(f"{settings.uri} has no column {column!r}; it has {', '.join(table.schema.names)}")
    if not len(table):
        raise AttribError(f"{settings.uri} has no rows, so there is nothing to evaluate")
    columns = (table[name].to_pylist() for name in (settings.key_column, settings.role_column, settings.group_column))
    return [TruthRow(str(query).removeprefix(settings.key_prefix), role, group) for query, role, group in zip(*columns)]


class Places(NamedTuple):
    """group_of: int64 [n], the number of each source's group; code_of: {group: number}; row_of: {query: row}."""

    group_of: np.ndarray
    code_of: dict[str, int]
    row_of: dict[str, int]


def places_of(
    truth: list[TruthRow], sources: Collection, queries: Collection, source_group_column: str = "group"
) -> Places:
    """Locate the names of a truth table. Raises AttribError if the group column, a query or a group is missing."""
    names, group_of = np.unique([str(group) for group in sources.column(source_group_column)], return_inverse=True)
    code_of = {name: code for code, name in enumerate(names.tolist())}
    row_of = {key: i for i, key in enumerate(queries.keys)}
    for row in truth:
        if row.query not in row_of or row.group not in code_of:
            what = f"query {row.query!r}" if row.query not in row_of else f"source group {row.group!r}"
            raise AttribError(
                f"the truth table asks for query {row.query!r} and source group {row.group!r}, but {what} has no "
                "vector in these embeddings; embed it, or correct the table or its key_prefix"
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
    """Score each truth row; the bootstrap resamples source groups.

    Cells are (role, method that generated the query). Values: ap; recall_at_1, 1 if a true source is first; and
    recall_at_10. Raises AttribError if a metadata column, a query or a group of the table is missing.
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
    return QueryScores(
        queries=[row.query for row in truth],
        cells=cells,
        units=[row.group for row in truth],
        values=dict(zip(("ap", "recall_at_1", "recall_at_10"), np.array(values).T)),
        true_keys=true_keys,
        top_keys=top_keys,
        top_similarity=top_similarity,
    )


def _first(similarity: np.ndarray, relevant: np.ndarray, key_of) -> list[int]:
    """Positions of the TOP_SOURCES most similar. In a tie, the irrelevant come first; then the key decides."""
    rank = min(TOP_SOURCES, len(similarity))
    candidates = np.flatnonzero(similarity >= np.partition(similarity, -rank)[-rank] - TIE)
    order = sorted(candidates.tolist(), key=lambda i: (-round(float(similarity[i]), 12), relevant[i], key_of(i)))
    return order[:TOP_SOURCES]
