"""Variants of the method scored on the same queries, whatever they learn from: the sources' vectors and the queries',
fold by fold.

What learns from queries or pairs never sees those it is scored on. Folds are sets of source groups; the model of a fold
is fitted without any query that has a truth in it, and each truth row is scored by the model of its group's fold.
(Folds of whole queries that share no source do not exist where a few styles made most of the queries.)
"""

from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np
import torch

from attrib.common.storage import Storage
from attrib.data.ids import image_ids, sampling_rank
from attrib.evaluate.ablation.settings import AblateSettings, VariantSettings
from attrib.evaluate.collection import Collection
from attrib.evaluate.protocol import TruthRow, score_truth
from attrib.evaluate.scores import QueryScores
from attrib.models.encoder import load_network
from attrib.models.heads import join_parts
from attrib.models.model import AttributionModel
from attrib.models.settings import Domain
from attrib.train.augment.settings import KINDS
from attrib.train.batches import InputBatches
from attrib.train.initialise import fitted_model, head_inputs, paired_inputs, training_inputs
from attrib.train.loop import TrainRun
from attrib.train.settings import TrainSettings
from attrib.train.student import student_of, trained_groups
from attrib.train.view_features import ViewFeatures


@dataclass(frozen=True)
class AblationFeatures:
    """Features of sources (with views) and of queries, with the keys and metadata of their rows without views: {id:
    (key, metadata)}."""

    sources: ViewFeatures
    queries: ViewFeatures
    source_keys: Collection  # vectors: int64 [n, 1], ids
    query_keys: Collection


@dataclass(frozen=True)
class Outcome:
    """Scores of a variant, its vectors (those of the first fold, where there are folds), and the criterion of its
    training by epoch."""

    scores: QueryScores
    sources: np.ndarray
    queries: np.ndarray
    history: list[dict]

    @property
    def macro_map(self) -> float:
        rows, values = self.scores.rows_of_cells(), self.scores.values["ap"]
        return float(np.mean([values[rows[cell]].mean() for cell in self.scores.macro_cells()]))


def fold_of(group: str, num_folds: int, seed: int) -> int:
    """A random fold by the group's name alone."""
    return int(sampling_rank(image_ids(f"fold {seed}", [group]))[0] % np.uint64(num_folds))


def score_variant(
    settings: AblateSettings,
    variant: VariantSettings,
    training: TrainSettings,
    features: AblationFeatures,
    truth: list[TruthRow],
    storage: Storage,
) -> Outcome:
    """Fit, train where there is something to train, and score."""
    torch.set_num_threads(1)
    if variant.learns_from in ("nothing", "views"):
        used = features.sources
        if variant.kinds:
            wanted = [KINDS.index(kind) for kind in variant.kinds]
            used = used.take(used.is_original | np.isin(used.kind, wanted))
        model, history = _made(training, used, None, None, storage)
        sources, queries = _vectors(model, features)
        return Outcome(_score(settings, features, sources, queries, truth), sources, queries, history)
    scored, first = [], None
    for fold in range(settings.num_folds):
        mine = [fold_of(row.group, settings.num_folds, settings.seed) == fold for row in truth]
        banned = {row.query for row, is_mine in zip(truth, mine) if is_mine}
        ids = {key: int(i) for key, i in zip(features.query_keys.keys, features.query_keys.vectors[:, 0])}
        allowed = {ids[key] for key in ids if key not in banned}
        pairs = (
            _pairs(features, truth, ids, allowed, settings.truth.source_group_column)
            if variant.learns_from == "pairs"
            else None
        )
        kept = np.isin(features.queries.content, list(allowed))
        model, history = _made(training, features.sources, features.queries.take(kept), pairs, storage)
        sources, queries = _vectors(model, features)
        first = first or (sources, queries, history)
        scored.append((mine, _score(settings, features, sources, queries, truth)))
    return Outcome(_merged(scored), *first)


def _made(
    training: TrainSettings,
    sources: ViewFeatures,
    queries: ViewFeatures | None,
    pairs: dict[int, list[int]] | None,
    storage: Storage,
) -> tuple[AttributionModel, list[dict]]:
    """The model of a variant, trained if it has a net, and the history of its criterion."""
    network = load_network(training.backbone, storage)
    model = fitted_model(training, network, sources, queries)
    if training.head.net == "none":
        return model, []
    inputs = paired_inputs(model, sources, queries, pairs) if pairs is not None else training_inputs(model, sources)
    batches = InputBatches(inputs, training.optimiser, training.seed, rank=0, num_workers=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        student = student_of(model, training)
        optimiser = torch.optim.AdamW(trained_groups(student, training), weight_decay=training.optimiser.weight_decay)
        run = TrainRun(student, training, optimiser, batches.num_steps, torch.device("cpu"))
        run.train(batches, on_epoch=lambda _: None)
    return model, run.history


def _vectors(model: AttributionModel, features: AblationFeatures) -> tuple[np.ndarray, np.ndarray]:
    """float32 [n, d] of the sources and [m, d] of the queries, in the order of their keys."""
    return (
        _embed(model, "real", features.sources, features.source_keys.vectors[:, 0]),
        _embed(model, "synthetic", features.queries, features.query_keys.vectors[:, 0]),
    )


@torch.no_grad()
def _embed(model: AttributionModel, domain: Domain, found: ViewFeatures, ids: np.ndarray) -> np.ndarray:
    originals = np.flatnonzero(found.is_original)
    place = {int(image_id): row for image_id, row in zip(found.content[originals], originals)}
    head = model.head(domain)
    inputs = head_inputs(head, found.features, np.array([place[int(i)] for i in ids]))
    return join_parts(head.part_outputs(inputs.float())).numpy()


def _pairs(
    features: AblationFeatures, truth: list[TruthRow], ids: dict[str, int], allowed: set[int], group_column: str
) -> dict[int, list[int]]:
    """{id of a query: ids of its sources}, one image for each true group: its copies would be one another's
    negatives."""
    image_of_group: dict[str, int] = {}
    groups = [str(group) for group in features.source_keys.column(group_column)]
    for group, image_id in zip(groups, features.source_keys.vectors[:, 0]):
        image_of_group.setdefault(group, int(image_id))
    pairs = defaultdict(list)
    for row in truth:
        if ids[row.query] in allowed:
            pairs[ids[row.query]].append(image_of_group[row.group])
    return dict(pairs)


def _score(
    settings: AblateSettings,
    features: AblationFeatures,
    sources: np.ndarray,
    queries: np.ndarray,
    truth: list[TruthRow],
) -> QueryScores:
    return score_truth(
        replace(features.source_keys, vectors=sources),
        replace(features.query_keys, vectors=queries),
        truth,
        source_group_column=settings.truth.source_group_column,
        query_method_column=settings.truth.query_method_column,
    )


def _merged(scored: list[tuple[list[bool], QueryScores]]) -> QueryScores:
    """Each truth row as the model of its fold has it."""
    whole = scored[0][1]
    values = {name: column.copy() for name, column in whole.values.items()}
    top_keys, top_similarity = list(whole.top_keys), list(whole.top_similarity)
    for mine, scores in scored:
        for row in np.flatnonzero(mine):
            top_keys[row], top_similarity[row] = scores.top_keys[row], scores.top_similarity[row]
            for name in values:
                values[name][row] = scores.values[name][row]
    return replace(whole, values=values, top_keys=top_keys, top_similarity=top_similarity)


def chosen_by_folds(candidates: dict[str, QueryScores], num_folds: int, seed: int) -> tuple[QueryScores, list[str]]:
    """What choosing among variants is worth: for each fold the variant of the best macro mAP on the other folds, scored
    on this one.

    Returns the scores and the choices, fold by fold.
    """
    any_scores = next(iter(candidates.values()))
    folds = np.array([fold_of(unit, num_folds, seed) for unit in any_scores.units])
    rows_of, macro = any_scores.rows_of_cells(), any_scores.macro_cells()
    scored, chosen = [], []
    for fold in range(num_folds):
        others = {cell: rows_of[cell][folds[rows_of[cell]] != fold] for cell in macro}

        def elsewhere(name: str, others=others) -> float:
            values = candidates[name].values["ap"]
            return float(np.mean([values[rows].mean() for rows in others.values() if len(rows)]))

        chosen.append(max(candidates, key=elsewhere))
        scored.append((list(folds == fold), candidates[chosen[-1]]))
    return _merged(scored), chosen
