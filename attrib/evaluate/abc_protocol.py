"""AbC's protocol: "Evaluating Data Attribution for Text-to-Image Models", ICCV 2023, arXiv 2306.09345.

A text-to-image model was customised on one or several exemplars; what it made since is a query, and its exemplars are
the truth. Every query ranks a pool of all distractors and its own model's exemplars. Real and synthetic images pass
through separate mappers (none for an untuned backbone); cosine similarity. AP is the mean over all exemplars of
(exemplars so far / rank), recall@k the share of exemplars in the first k; plain means over queries, by test case and
prompt type.

Ties rank the irrelevant first (AbC's code leaves them to argsort). The whole-pool variant adds all other models'
exemplars of the test case to the pool, where they count as wrong even for a query that two models of the case list.
"""

from dataclasses import dataclass
from itertools import islice

import numpy as np

from attrib.common.errors import AttribError
from attrib.common.storage import Storage
from attrib.evaluate.collection import Collection, check_comparable, unit_rows
from attrib.evaluate.distractors import Distractors, DistractorScan, scan_distractors
from attrib.evaluate.mappers import Mappers
from attrib.evaluate.scores import TOP_SOURCES, QueryScores, average_precision, num_at_or_above

RECALL_KS = (5, 10, 100)
WHOLE_POOL = "whole_pool_"


@dataclass(frozen=True)
class CustomisedModel:
    """exemplars: keys of sources; synth: keys of queries by prompt type."""

    name: str
    exemplars: list[str]
    synth: dict[str, list[str]]


@dataclass(frozen=True)
class _Batch:
    """The queries of one model and prompt type: rows [start, stop) of all queries."""

    case: str
    prompts: str
    model: int
    start: int
    stop: int


def read_test_case(
    uri: str, storage: Storage, exemplar_prefix: str = "", query_prefix: str = ""
) -> list[CustomisedModel]:
    if not storage.exists(uri):
        raise AttribError(f"the test case {uri} does not exist")
    try:
        entries = storage.read_json(uri)
    except ValueError as error:
        raise AttribError(f"the test case {uri} is not JSON: {error}") from error
    return parse_test_case(entries, uri, exemplar_prefix, query_prefix)


def parse_test_case(entries, origin: str, exemplar_prefix: str = "", query_prefix: str = "") -> list[CustomisedModel]:
    """The models of a released JSON: [{"exemplar": [paths], "synth": {prompt type: [paths]}, "class_id": a name, if
    any}].

    Prefixes are taken off the paths. Raises AttribError that names the entry if it is of another form.
    """
    if not isinstance(entries, list) or not entries:
        raise AttribError(f"{origin}: a test case is a list with an entry for each customised model")
    models = []
    for i, entry in enumerate(entries):
        place = f"{origin}: entry {i}"
        if not isinstance(entry, dict) or not isinstance(entry.get("synth"), dict):
            raise AttribError(f'{place} is not of the form {{"exemplar": [paths], "synth": {{prompt type: [paths]}}}}')
        exemplars = _paths(entry.get("exemplar"), f"{place}, exemplar", exemplar_prefix)
        if not exemplars:
            raise AttribError(f"{place} has no exemplar, so nothing could be found; take the entry out")
        synth = {
            name: _paths(paths, f"{place}, synth {name!r}", query_prefix) for name, paths in entry["synth"].items()
        }
        models.append(CustomisedModel(str(entry.get("class_id") or f"model {i}"), exemplars, synth))
    return models


def _paths(value, place: str, prefix: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(path, str) for path in value):
        raise AttribError(f"{place} is not a list of paths")
    paths = [path.removeprefix(prefix) for path in value]
    if len(set(paths)) < len(paths):
        twice = next(path for i, path in enumerate(paths) if path in paths[:i])
        raise AttribError(f"{place} lists {twice!r} twice; list every image once")
    return paths


def recall_ceiling(num_exemplars: int, k: int) -> float:
    """The most that recall@k can be: k places have room for k exemplars."""
    return min(k, num_exemplars) / num_exemplars


def ceilings(models: list[CustomisedModel], ks: tuple[int, ...] = RECALL_KS) -> dict[str, dict[int, float]]:
    """{prompt type: {k: ceiling of recall@k}}, means over queries."""
    found: dict[str, dict[int, float]] = {}
    for prompts in sorted({name for model in models for name in model.synth}):
        weights = [len(model.synth.get(prompts, [])) for model in models]
        if sum(weights):
            found[prompts] = {
                k: float(np.average([recall_ceiling(len(m.exemplars), k) for m in models], weights=weights)) for k in ks
            }
    return found


def score_abc(
    test_cases: dict[str, list[CustomisedModel]],
    sources: Collection,
    queries: Collection,
    distractors: Distractors,
    mappers: Mappers | None = None,
    whole_pool: bool = False,
) -> QueryScores:
    """One row per query of a model, in cells of (test case, prompt type); the resampled unit is the customised model.

    Values: ap, recall_at_5, recall_at_10, recall_at_100; with whole_pool each once more under whole_pool_. All test
    cases share one reading of the distractors. Memory: sources as they are, 20 bytes per query and dimension, 40 bytes
    per query and exemplar of the largest model, and 0.6 GB for the scan. Raises AttribError if an exemplar or query has
    no vector, or an exemplar is among the distractors' keys.
    """
    batches, positions = _batches(test_cases, queries)
    pools = {name: _Pool(name, models, sources, mappers) for name, models in test_cases.items()}
    _check_apart(pools, distractors)
    query_rows = unit_rows(queries.vectors[positions], mappers and mappers.synth, "the queries")
    for pool in pools.values():
        check_comparable(pool.vectors, query_rows)
    ranked = _rank_exemplars(batches, pools, query_rows, whole_pool)
    scan = scan_distractors(query_rows, ranked.similarity, distractors, mappers and mappers.real)
    values: dict[str, list[float]] = {}
    limits: dict[str, list[float]] = {}
    for batch in batches:
        num_own = len(pools[batch.case].own[batch.model])
        for row in range(batch.start, batch.stop):
            ranks = np.arange(1, num_own + 1) + scan.num_at_or_above[row, :num_own]
            _add_values("", ranks, values, limits)
            if whole_pool:
                _add_values(WHOLE_POOL, ranks + ranked.num_others[row, :num_own], values, limits)
    sizes = [batch.stop - batch.start for batch in batches]
    # Rows of one model share one list.
    own_keys = _repeated([[pools[b.case].keys[j] for j in pools[b.case].own[b.model]] for b in batches], sizes)
    top_keys, top_similarity = _top(own_keys, ranked, scan, distractors)
    return QueryScores(
        queries=[queries.keys[position] for position in positions],
        cells=_repeated([(batch.case, batch.prompts) for batch in batches], sizes),
        units=_repeated([test_cases[batch.case][batch.model].name for batch in batches], sizes),
        values={name: np.array(found) for name, found in values.items()},
        true_keys=own_keys,
        top_keys=top_keys,
        top_similarity=top_similarity,
        ceilings={name: np.array(found) for name, found in limits.items()},
        cell_names=("test_case", "prompts"),
        shared_units=True,
    )


def _add_values(prefix: str, ranks: np.ndarray, values: dict, limits: dict) -> None:
    values.setdefault(f"{prefix}ap", []).append(average_precision(ranks))
    for k in RECALL_KS:
        values.setdefault(f"{prefix}recall_at_{k}", []).append(float(np.mean(ranks <= k)))
        limits.setdefault(f"{prefix}recall_at_{k}", []).append(recall_ceiling(len(ranks), k))


def _repeated(items: list, sizes: list[int]) -> list:
    return [item for item, size in zip(items, sizes) for _ in range(size)]


class _Pool:
    """The exemplars of a test case: keys and unit vectors float64 [m, d], and per model the rows of its own."""

    def __init__(self, name: str, models: list[CustomisedModel], sources: Collection, mappers: Mappers | None):
        self.keys = list(dict.fromkeys(key for model in models for key in model.exemplars))
        row_of = {key: i for i, key in enumerate(sources.keys)}
        absent = [key for key in self.keys if key not in row_of]
        if absent:
            raise AttribError(
                f"test case {name!r}: exemplar {absent[0]!r} ({len(absent)} of {len(self.keys)}) has no vector among "
                "the sources; embed "
                "it, or name in abc.exemplar_prefix what paths have in front of keys"
            )
        vectors = sources.vectors[[row_of[key] for key in self.keys]]
        self.vectors = unit_rows(vectors, mappers and mappers.real, f"the exemplars of {name}")
        place = {key: i for i, key in enumerate(self.keys)}
        self.own = [np.array([place[key] for key in model.exemplars]) for model in models]


@dataclass(frozen=True)
class _Ranked:
    """Every query's own exemplars, most similar first, padded to the largest model: [q, most] each.

    similarity: float64, padded with +inf; order: int64, which of the model's exemplars it is; num_others: int64, how
    many exemplars of other models reach it, 0 without whole_pool.
    """

    similarity: np.ndarray
    order: np.ndarray
    num_others: np.ndarray


def _rank_exemplars(
    batches: list[_Batch], pools: dict[str, _Pool], query_rows: np.ndarray, whole_pool: bool
) -> _Ranked:
    shape = len(query_rows), max(len(own) for pool in pools.values() for own in pool.own)
    ranked = _Ranked(np.full(shape, np.inf), np.zeros(shape, np.int64), np.zeros(shape, np.int64))
    for batch in batches:
        pool, rows = pools[batch.case], slice(batch.start, batch.stop)
        own = pool.own[batch.model]
        found = query_rows[rows] @ pool.vectors[own].T
        order = np.argsort(-found, axis=1, kind="stable")
        ranked.order[rows, : len(own)] = order
        ranked.similarity[rows, : len(own)] = np.take_along_axis(found, order, axis=1)
        if whole_pool:
            others = np.sort(query_rows[rows] @ np.delete(pool.vectors, own, axis=0).T, axis=1)
            for row, ascending in zip(range(batch.start, batch.stop), others):
                thresholds = ranked.similarity[row, : len(own)]
                ranked.num_others[row, : len(own)] = num_at_or_above(ascending, thresholds)
    return ranked


def _batches(test_cases: dict[str, list[CustomisedModel]], queries: Collection) -> tuple[list[_Batch], list[int]]:
    """Queries, and for each of their rows the place of the query's vector."""
    row_of = {key: i for i, key in enumerate(queries.keys)}
    batches, positions, absent = [], [], []
    for case, models in test_cases.items():
        for prompts in sorted({name for model in models for name in model.synth}):
            for i, model in enumerate(models):
                keys = model.synth.get(prompts, [])
                absent += [(case, key) for key in keys if key not in row_of]
                batches.append(_Batch(case, prompts, i, len(positions), len(positions) + len(keys)))
                positions += [row_of.get(key, -1) for key in keys]
    if absent:
        case, key = absent[0]
        raise AttribError(
            f"test case {case!r}: synthetic image {key!r} ({len(absent)} of {len(positions)}) has no vector among "
            "the queries; embed it, "
            "or name in abc.query_prefix what paths have in front of keys"
        )
    if not positions:
        raise AttribError("the test cases name no synthetic image, so there is nothing to evaluate")
    return batches, positions


def _check_apart(pools: dict[str, _Pool], distractors: Distractors) -> None:
    keys = distractors.known_keys()
    for name, pool in pools.items():
        for key in pool.keys:
            if key in keys:
                raise AttribError(
                    f"{distractors.origin}: {key!r} is an exemplar of test case {name!r}; it would compete with "
                    "itself, so take it from "
                    "the distractors"
                )


def _top(
    own_keys: list[list[str]], ranked: _Ranked, scan: DistractorScan, distractors: Distractors
) -> tuple[list, list]:
    """Keys and similarities of the first TOP_SOURCES of every query's pool."""
    named = np.unique(scan.top_rows[scan.top_rows >= 0])
    key_of = dict(zip(named.tolist(), distractors.keys_of(named) if len(named) else []))
    top_keys, top_similarity = [], []
    for i, own in enumerate(own_keys):
        others = zip(scan.top_similarity[i].tolist(), scan.top_rows[i].tolist())
        found = [(s, False, key_of[row]) for s, row in others if row >= 0]
        own_first = zip(ranked.similarity[i].tolist(), ranked.order[i].tolist())
        found += [(s, True, own[j]) for s, j in islice(own_first, min(len(own), TOP_SOURCES))]
        found.sort(key=lambda entry: (-round(entry[0], 12), entry[1]))
        top_keys.append([key for *_, key in found[:TOP_SOURCES]])
        top_similarity.append([similarity for similarity, *_ in found[:TOP_SOURCES]])
    return top_keys, top_similarity
