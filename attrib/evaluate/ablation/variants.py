"""Train and score variants of the method on the same queries.

Variants that learn from queries or pairs are fitted fold by fold. Folds are sets of source groups. The model of a fold
is fitted without the queries that have a true source in it, and scores the truth rows of its groups. (Queries
themselves cannot be split into folds without common sources if most of them have one of a few styles.)
"""

from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import product

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
from attrib.train.augment.settings import KINDS
from attrib.train.batches import InputBatches
from attrib.train.initialise import fitted_model, head_inputs, paired_inputs, training_inputs
from attrib.train.loop import TrainRun
from attrib.train.settings import TrainSettings
from attrib.train.student import student_of, trained_groups
from attrib.train.view_features import ViewFeatures


@dataclass(frozen=True)
class AblationFeatures:
    """Features of the sources, with views, and of the queries; keys, metadata and ids of the images."""

    sources: ViewFeatures
    queries: ViewFeatures
    source_keys: Collection  # vectors: int64 [n, 1], ids
    query_keys: Collection


@dataclass(frozen=True)
class VariantResult:
    """Scores and float32 vectors of a variant, and its training criterion by epoch.

    sources [n, d], queries [m, d] and history: of the first fold, if there are folds.
    """

    scores: QueryScores
    sources: np.ndarray
    queries: np.ndarray
    history: list[dict]

    @property
    def macro_map(self) -> float:
        rows, values = self.scores.rows_of_cells(), self.scores.values["ap"]
        return float(np.mean([values[rows[cell]].mean() for cell in self.scores.macro_cells()]))


def fold_of(group: str, num_folds: int, seed: int) -> int:
    """The random fold of a group, which depends on its name only."""
    return int(sampling_rank(image_ids(f"fold {seed}", [group]))[0] % np.uint64(num_folds))


def score_variant(
    settings: AblateSettings,
    variant: VariantSettings,
    training: TrainSettings,
    features: AblationFeatures,
    truth: list[TruthRow],
    storage: Storage,
) -> VariantResult:
    """Fit a variant, train it if it has a net, and score it."""
    torch.set_num_threads(1)

    keys = features.source_keys, features.query_keys

    def fitted(
        sources: ViewFeatures, queries: ViewFeatures | None = None, pairs: dict[int, list[int]] | None = None
    ) -> VariantResult:
        model, history = _trained(training, sources, queries, pairs, storage)
        embedded = (
            _vectors(model.head("real"), features.sources, features.source_keys),
            _vectors(model.head("synthetic"), features.queries, features.query_keys),
        )
        scores = score(settings, *(replace(images, vectors=rows) for images, rows in zip(keys, embedded)), truth)
        return VariantResult(scores, *embedded, history)

    if variant.learns_from in ("nothing", "views"):
        used = features.sources
        if variant.kinds:
            wanted = [KINDS.index(kind) for kind in variant.kinds]
            used = used.take(used.is_original | np.isin(used.kind, wanted))
        return fitted(used)
    id_of = dict(zip(features.query_keys.keys, features.query_keys.vectors[:, 0].tolist()))
    folds = np.array([fold_of(row.group, settings.num_folds, settings.seed) for row in truth])
    results = []
    for fold in range(settings.num_folds):
        excluded = {row.query for row, its_fold in zip(truth, folds) if its_fold == fold}
        allowed = {key: image_id for key, image_id in id_of.items() if key not in excluded}
        pairs = None
        if variant.learns_from == "pairs":
            pairs = _pairs(features.source_keys, truth, allowed, settings.truth.source_group_column)
        kept = np.isin(features.queries.content, list(allowed.values()))
        results.append(fitted(features.sources, features.queries.take(kept), pairs))
    return replace(results[0], scores=_merged(folds, [result.scores for result in results]))


def _trained(
    training: TrainSettings,
    sources: ViewFeatures,
    queries: ViewFeatures | None,
    pairs: dict[int, list[int]] | None,
    storage: Storage,
) -> tuple[AttributionModel, list[dict]]:
    """The model of a variant, trained if it has a net, and its criterion by epoch."""
    model = fitted_model(training, load_network(training.backbone, storage), sources, queries)
    if training.head.net == "none":
        return model, []
    inputs = training_inputs(model, sources) if pairs is None else paired_inputs(model, sources, queries, pairs)
    batches = InputBatches(inputs, training.optimiser, training.seed, rank=0, num_workers=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        student = student_of(model, training)
        optimiser = torch.optim.AdamW(trained_groups(student, training), weight_decay=training.optimiser.weight_decay)
        run = TrainRun(student, training, optimiser, batches.num_steps, torch.device("cpu"))
        run.train(batches, on_epoch=lambda _: None)
    return model, run.history


@torch.no_grad()
def _vectors(head, found: ViewFeatures, images: Collection) -> np.ndarray:
    """float32 [n, d] of images without views, in the order of their keys."""
    originals = np.flatnonzero(found.is_original)
    row_of = dict(zip(found.content[originals].tolist(), originals))
    inputs = head_inputs(head, found.features, np.array([row_of[i] for i in images.vectors[:, 0].tolist()]))
    return join_parts(head.part_outputs(inputs.float())).numpy()


def _pairs(
    sources: Collection, truth: list[TruthRow], allowed: dict[str, int], group_column: str
) -> dict[int, list[int]]:
    """{id of a query: ids of its sources}, one image per true group, because copies would be negatives of each other.

    allowed: ids by key of the queries to use.
    """
    image_of: dict[str, int] = {}
    for group, image_id in zip(sources.column(group_column), sources.vectors[:, 0].tolist()):
        image_of.setdefault(str(group), image_id)
    pairs = defaultdict(list)
    for row in truth:
        if row.query in allowed:
            pairs[allowed[row.query]].append(image_of[row.group])
    return dict(pairs)


def score(settings: AblateSettings, sources: Collection, queries: Collection, truth: list[TruthRow]) -> QueryScores:
    columns = settings.truth.source_group_column, settings.truth.query_method_column
    return score_truth(sources, queries, truth, None, *columns)


def _merged(folds: np.ndarray, scored: list[QueryScores]) -> QueryScores:
    """Scores of each truth row by the model of its fold. folds: int64 [n] of rows; scored: of all rows, by fold."""
    values = {name: column.copy() for name, column in scored[0].values.items()}
    for name, (fold, scores) in product(values, enumerate(scored)):
        values[name][folds == fold] = scores.values[name][folds == fold]
    top_keys, top_similarity = (
        [getattr(scored[fold], name)[row] for row, fold in enumerate(folds)] for name in ("top_keys", "top_similarity")
    )
    return replace(scored[0], values=values, top_keys=top_keys, top_similarity=top_similarity)


def chosen_by_folds(candidates: dict[str, QueryScores], num_folds: int, seed: int) -> tuple[QueryScores, list[str]]:
    """Estimate the score of choosing the best variant: each fold is scored by the best variant of the other folds.

    Returns the scores and the choices by fold. The best has the highest macro mAP.
    """
    any_scores = next(iter(candidates.values()))
    folds = np.array([fold_of(unit, num_folds, seed) for unit in any_scores.units])
    rows_of, macro = any_scores.rows_of_cells(), any_scores.macro_cells()
    chosen = []
    for fold in range(num_folds):
        others = [rows_of[cell][folds[rows_of[cell]] != fold] for cell in macro]
        means = {
            name: np.mean([scores.values["ap"][rows].mean() for rows in others if len(rows)])
            for name, scores in candidates.items()
        }
        chosen.append(max(means, key=means.get))
    return _merged(folds, [candidates[name] for name in chosen]), chosen
