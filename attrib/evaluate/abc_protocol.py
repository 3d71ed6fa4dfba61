"""AbC's protocol: "Evaluating Data Attribution for Text-to-Image Models", ICCV 2023, arXiv 2306.09345.

Each text-to-image model was customised on a few images, its exemplars. Each image that it generated is a query, and the
exemplars are its true sources. The distractors and the exemplars of the query's own model are ranked by cosine
similarity, after separate mappers for real and synthetic images (none for an untuned backbone). AP is the mean over all
exemplars of (number of exemplars up to this rank / rank); recall@k is the share of exemplars among the first k. Both
are averaged over queries, by test case and prompt type.

In a tie, distractors rank first (AbC's code leaves the order to argsort). The whole-pool variant adds the exemplars of
all other models of the test case as wrong candidates, even if two models of the test case list the same query.
"""

from itertools import product
from typing import NamedTuple

import numpy as np

from attrib.common.errors import AttribError
from attrib.common.storage import Storage
from attrib.evaluate.collection import Collection, check_comparable, unit_rows
from attrib.evaluate.distractors import Distractors, DistractorScan, scan_distractors
from attrib.evaluate.mappers import Mappers
from attrib.evaluate.scores import TOP_SOURCES, QueryScores, average_precision, num_at_or_above

RECALL_KS = (5, 10, 100)
WHOLE_POOL = "whole_pool_"


class CustomisedModel(NamedTuple):
    """exemplars: keys of sources; synth: keys of queries by prompt type."""

    name: str
    exemplars: list[str]
    synth: dict[str, list[str]]


Cases = dict[str, list[CustomisedModel]]


class _Batch(NamedTuple):
    """The queries of one model and prompt type. rows: their rows among all queries."""

    case: str
    prompts: str
    model: CustomisedModel
    rows: range


def read_test_case(
    uri: str, storage: Storage, exemplar_prefix: str = "", query_prefix: str = ""
) -> list[CustomisedModel]:
    """Read a test case as AbC released it. Raises AttribError if the file is missing or invalid."""
    if not storage.exists(uri):
        raise AttribError(f"the test case {uri} does not exist; correct abc.test_cases")
    try:
        entries = storage.read_json(uri)
    except ValueError as error:
        raise AttribError(f"the test case {uri} is not JSON: {error}") from error
    return parse_test_case(entries, uri, exemplar_prefix, query_prefix)


def parse_test_case(entries, origin: str, exemplar_prefix: str = "", query_prefix: str = "") -> list[CustomisedModel]:
    """Models of [{"exemplar": [paths], "synth": {prompt type: [paths]}, "class_id": name (optional)}, ...].

    The prefixes are removed from the paths. Raises AttribError that names the first invalid entry.
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
            raise AttribError(f"{place} has no exemplar, so its queries have no true source; remove the entry")
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


def score_abc(
    test_cases: Cases,
    sources: Collection,
    queries: Collection,
    distractors: Distractors,
    mappers: Mappers | None = None,
    whole_pool: bool = False,
) -> QueryScores:
    """Score the queries of all test cases, one row per query of a model; the bootstrap resamples customised models.

    Cells are (test case, prompt type). Values: ap, recall_at_5, recall_at_10, recall_at_100, and with whole_pool the
    same with the prefix whole_pool_. The distractors are read once. Memory: 20 bytes per query and dimension, 40 bytes
    per query and exemplar of the largest model, and 0.6 GB for the scan. Raises AttribError if an exemplar or query has
    no vector, or an exemplar is also a distractor.
    """
    batches, positions = _batches(test_cases, queries)
    pools = {case: _exemplars(case, models, sources, mappers) for case, models in test_cases.items()}
    distractor_keys = distractors.source_keys()
    for case, (place, _) in pools.items():
        shared = [key for key in place if key in distractor_keys]
        if shared:
            raise AttribError(
                f"{distractors.origin}: {shared[0]!r} is an exemplar of test case {case!r}; it would compete with "
                "itself, so remove it from the distractors"
            )
    query_rows = unit_rows(queries.vectors[positions], mappers and mappers.synth, "the queries")

    # Exemplars of each query's model, most similar first, padded to the largest model. order: their positions in
    # the model's list; num_others: how many exemplars of other models are at least as similar.
    shape = len(positions), max(len(model.exemplars) for models in test_cases.values() for model in models)
    similarity, order, num_others = np.full(shape, np.inf), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for case, _, model, rows in batches:
        place, vectors = pools[case]
        check_comparable(vectors, query_rows)
        own, asked = [place[key] for key in model.exemplars], query_rows[rows.start : rows.stop]
        found = asked @ vectors[own].T
        at = np.s_[rows.start : rows.stop, : len(own)]
        order[at] = np.argsort(-found, axis=1, kind="stable")
        similarity[at] = np.take_along_axis(found, order[at], axis=1)
        if whole_pool:
            others = np.sort(asked @ np.delete(vectors, own, axis=0).T, axis=1)
            num_others[at] = [num_at_or_above(*pair) for pair in zip(others, similarity[at])]
    scan = scan_distractors(query_rows, similarity, distractors, mappers and mappers.real)

    models = [batch.model for batch in batches for _ in batch.rows]
    sizes = np.array([len(model.exemplars) for model in models])
    values = []
    for row, size in enumerate(sizes):
        ranks = np.arange(1, size + 1) + scan.num_at_or_above[row, :size]
        values.append(_values(ranks))
        if whole_pool:
            wider = _values(ranks + num_others[row, :size])
            values[-1] |= {f"{WHOLE_POOL}{name}": value for name, value in wider.items()}
    own_keys = [model.exemplars for model in models]
    top_keys, top_similarity = _top(own_keys, similarity, order, scan, distractors)
    return QueryScores(
        queries=[queries.keys[position] for position in positions],
        cells=[(batch.case, batch.prompts) for batch in batches for _ in batch.rows],
        units=[model.name for model in models],
        values={name: np.array([row[name] for row in values]) for name in values[0]},
        true_keys=own_keys,
        top_keys=top_keys,
        top_similarity=top_similarity,
        # At most k exemplars can be among the first k.
        ceilings={
            f"{prefix}recall_at_{k}": np.minimum(k, sizes) / sizes
            for prefix, k in product(["", WHOLE_POOL] if whole_pool else [""], RECALL_KS)
        },
        cell_names=("test_case", "prompts"),
        shared_units=True,
    )


def _values(ranks: np.ndarray) -> dict[str, float]:
    return {"ap": average_precision(ranks)} | {f"recall_at_{k}": float(np.mean(ranks <= k)) for k in RECALL_KS}


def _exemplars(
    case: str, models: list[CustomisedModel], sources: Collection, mappers: Mappers | None
) -> tuple[dict[str, int], np.ndarray]:
    """All exemplars of a test case: {key: row}, and their unit vectors float64 [m, d]."""
    place = {key: i for i, key in enumerate(dict.fromkeys(key for model in models for key in model.exemplars))}
    row_of = {key: i for i, key in enumerate(sources.keys)}
    absent = [key for key in place if key not in row_of]
    if absent:
        raise AttribError(
            f"test case {case!r}: exemplar {absent[0]!r} ({len(absent)} of {len(place)}) has no vector among the "
            "sources; embed it, or set abc.exemplar_prefix to the part of the paths in front of the keys"
        )
    vectors = sources.vectors[[row_of[key] for key in place]]
    return place, unit_rows(vectors, mappers and mappers.real, f"the exemplars of {case}")


def _batches(test_cases: Cases, queries: Collection) -> tuple[list[_Batch], list[int]]:
    """All queries in batches, and for each query the row of its vector."""
    row_of = {key: i for i, key in enumerate(queries.keys)}
    batches, positions, absent = [], [], []
    for case, models in test_cases.items():
        for prompts in sorted({name for model in models for name in model.synth}):
            for model in models:
                keys = model.synth.get(prompts, [])
                absent += [(case, key) for key in keys if key not in row_of]
                if keys:
                    batches.append(_Batch(case, prompts, model, range(len(positions), len(positions) + len(keys))))
                positions += [row_of.get(key, -1) for key in keys]
    if absent:
        case, key = absent[0]
        raise AttribError(
            f"test case {case!r}: synthetic image {key!r} ({len(absent)} of {len(positions)}) has no vector among the "
            "queries; embed it, or set abc.query_prefix to the part of the paths in front of the keys"
        )
    if not positions:
        raise AttribError("the test cases name no synthetic image, so there is nothing to evaluate")
    return batches, positions


def _top(
    own_keys: list[list[str]], similarity: np.ndarray, order: np.ndarray, scan: DistractorScan, distractors: Distractors
) -> tuple[list, list]:
    """Keys and similarities of the first TOP_SOURCES of every query's pool."""
    named = np.unique(scan.top_rows[scan.top_rows >= 0])
    key_of = dict(zip(named.tolist(), distractors.keys_of(named) if len(named) else []))
    top_keys, top_similarity = [], []
    for i, own in enumerate(own_keys):
        others = zip(scan.top_similarity[i].tolist(), scan.top_rows[i].tolist())
        found = [(value, False, key_of[row]) for value, row in others if row >= 0]
        size = min(len(own), TOP_SOURCES)
        found += [(value, True, own[j]) for value, j in zip(similarity[i, :size].tolist(), order[i, :size].tolist())]
        found.sort(key=lambda entry: (-round(entry[0], 12), entry[1]))
        top_keys.append([key for *_, key in found[:TOP_SOURCES]])
        top_similarity.append([value for value, *_ in found[:TOP_SOURCES]])
    return top_keys, top_similarity
