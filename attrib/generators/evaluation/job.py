"""The evaluation of fingerprint methods: real generators trained as Ray tasks, then every method on every tier as a task.

<output>/evaluation.json, table.txt, evaluation.html   figures per method and tier, their table and their page
<output>/generators/NAME.npy, NAME.json                images of the generators trained here, and how they were trained
<output>/photographs/                                  manifest of the photographs that they were trained on
<output>/discriminant/                                 the linear discriminant of log spectra, fitted on the pool
<output>/_parts/                                       what is measured: a killed run continues
"""

import dataclasses
import logging

import torch

from attrib.common.config import digest
from attrib.common.progress import Progress
from attrib.common.run_record import begin, finish
from attrib.common.storage import Storage, join
from attrib.data.job import list_collection
from attrib.generators.evaluation.controls import methods_from
from attrib.generators.evaluation.generator_sets import (
    Tier,
    as_samples,
    folder_tier,
    formats,
    make_tier,
    pool_tier,
    tuning_tier,
    unseen,
)
from attrib.generators.evaluation.page import render_page
from attrib.generators.evaluation.protocol import Embedded, cluster_cut, evaluate_tier
from attrib.generators.evaluation.settings import TRAINED_TIER, EvaluateGeneratorsSettings, FolderTierSettings
from attrib.generators.evaluation.summary import format_table, summarise
from attrib.generators.evaluation.trained_generators import TrainedGenerator, generator_name, train_generator
from attrib.generators.evaluation.verdict_rates import METHODS as VERDICT_METHODS
from attrib.generators.evaluation.verdict_rates import MIN_FAMILIES, verdict_rates
from attrib.generators.extractor.network import load_extractor
from attrib.generators.fingerprints.base import Method
from attrib.generators.signals.degradations import parse
from attrib.generators.synthesis.autoencoder import one_thread
from attrib.generators.synthesis.photographs import Photographs, read_photographs
from attrib.generators.synthesis.pool import Pool, open_pool
from attrib.runtime.session import connect, put
from attrib.runtime.tasks import run_units

logger = logging.getLogger(__name__)

RECORD, TABLE, PAGE = "evaluation.json", "table.txt", "evaluation.html"


def run(settings: EvaluateGeneratorsSettings) -> dict:
    """Evaluate and return the record, with the table under "table". What is finished is found, not done again; the page is always written."""
    storage = Storage(settings.storage)
    histories = [tier.real_history for tier in settings.folders.values() if tier.real_history]
    for name in (*settings.degradations, settings.real_degradation, *histories):
        parse(name)
    pool = open_pool(settings.pool, storage)
    extractor = load_extractor(settings.extractor, storage) if settings.extractor else None
    connect(settings.ray)
    inputs = {"pool": pool.digest, "extractor": extractor.digest if extractor else None}
    given = _given_tiers(settings, pool, storage)
    inputs |= {f"tier {tier.name}": tier.digest() for tier in given}
    photographs = _photographs(settings, storage) if settings.trained else None
    if photographs:
        remedy = "take another trained.first_photograph, behind the ranks that the pool shows"
        is_new = unseen(photographs.shown, pool, TRAINED_TIER, remedy, storage)
        photographs = dataclasses.replace(photographs, shown=photographs.shown[is_new])
        inputs["photographs"] = photographs.digest()
    record = begin(settings, RECORD, inputs, storage)
    tiers = ([_trained_tier(settings, photographs, storage)] if photographs else []) + given
    if record:
        logger.info(f"evaluate_generators: finished at {record['written_at']}")
    else:
        methods = methods_from(settings.methods, pool, storage, extractor, join(settings.output, "discriminant"))
        results = _results(settings, methods, tiers, tuning_tier(pool, storage), storage)
        storage.write_bytes(join(settings.output, TABLE), f"{results['table']}\n".encode())
        record = finish(settings, RECORD, inputs, results, storage)
    # After the record, and again when it is found: a run killed between the two has its page, and so has a changed title.
    stamp = {name: record[name] for name in ("settings", "inputs", "versions", "digests")}
    storage.write_bytes(join(settings.output, PAGE), render_page(record, tiers, settings.title, stamp).encode())
    return record


def _results(
    settings: EvaluateGeneratorsSettings, methods: list[Method], tiers: list[Tier], tuning: Tier, storage: Storage
) -> dict:
    measured = _measure(settings, methods, tiers, tuning, storage)
    summary = summarise(
        {tier.name: _described(tier) | {"methods": measured[tier.name]} for tier in tiers},
        {method.name: method.looks_at_trace for method in methods},
        {method.name: method.registered_as for method in methods},
    )
    digests = {method.name: method.digest for method in methods}
    return summary | {"measured": measured, "digests": digests, "table": format_table(summary)}


def _given_tiers(settings: EvaluateGeneratorsSettings, pool: Pool, storage: Storage) -> list[Tier]:
    """In the order of the page: the published generators, then the unseen part of the grid."""
    folders = [folder_tier(name, tier, settings.max_megapixels, storage) for name, tier in settings.folders.items()]
    return folders + [pool_tier(name, tier, pool, storage) for name, tier in settings.pools.items()]


def _photographs(settings: EvaluateGeneratorsSettings, storage: Storage) -> Photographs:
    """Those trained on, and as many others behind them as a generator has images, which stand for what is real."""
    wanted = settings.trained
    listed = list_collection(wanted.photographs, join(settings.output, "photographs"), settings)
    return read_photographs(
        listed,
        px=wanted.photograph_px,
        num_shown=wanted.max_images,
        num_training=wanted.num_training_photographs,
        first_shown=wanted.first_photograph,
        max_megapixels=settings.max_megapixels,
        storage=storage,
    )


def _trained_tier(settings: EvaluateGeneratorsSettings, photographs: Photographs, storage: Storage) -> Tier:
    wanted = settings.trained
    folder = join(settings.output, "generators")
    asked = [(kind, seed) for kind in wanted.kinds for seed in wanted.seeds]
    names = {generator_name(kind, seed): (kind, seed) for kind, seed in asked}
    pending = [asked for name, asked in names.items() if not storage.exists(join(folder, f"{name}.npy"))]
    progress = Progress("train generators", len(names), "generators", already_done=len(names) - len(pending))
    training = put(photographs.training)
    for _, made in run_units(train_generator, [(kind, seed, training, wanted) for kind, seed in pending]):
        _write_generator(made, folder, storage)
        progress.update(1)
    progress.close()
    images = {name: as_samples(torch.from_numpy(storage.read_array(join(folder, f"{name}.npy")))) for name in names}
    real = as_samples(_middle(photographs.shown, wanted.px))
    return make_tier(TRAINED_TIER, wanted, images, real, families=[kind for kind, _ in asked])


def _write_generator(made: TrainedGenerator, folder: str, storage: Storage) -> None:
    described = {name: getattr(made, name) for name in ("kind", "seed", "num_steps", "num_parameters", "loss")}
    storage.write_json(join(folder, f"{made.name}.json"), described)
    storage.write_array(join(folder, f"{made.name}.npy"), made.samples.numpy())  # last: it stands for both


def _middle(pictures: torch.Tensor, px: int) -> torch.Tensor:
    top = (pictures.shape[-1] - px) // 2
    return pictures[:, :, top : top + px, top : top + px].contiguous()


def _measure(
    settings: EvaluateGeneratorsSettings, methods: list[Method], tiers: list[Tier], tuning: Tier, storage: Storage
) -> dict[str, dict[str, dict]]:
    """{tier: {method: what evaluate_tier found}}. Methods of one digest embed alike and share a task."""
    groups: dict[str, list[Method]] = {}
    for method in methods:
        groups.setdefault(method.digest, []).append(method)
    parts = {
        (tier.name, key): join(settings.output, "_parts", f"{tier.name}-{digest([tier.digest(), key])[:16]}.json")
        for tier in tiers
        for key in groups
    }
    pending = [(place, uri) for place, uri in parts.items() if not storage.exists(uri)]
    shared, shared_tuning = {tier.name: put(tier) for tier in tiers}, put(tuning)
    units = [(groups[key], shared[name], shared_tuning, settings, uri, storage) for (name, key), uri in pending]
    progress = Progress("evaluate", len(parts), "parts", already_done=len(parts) - len(pending))
    for _ in run_units(_measure_part, units):
        progress.update(1)
    progress.close()
    found: dict[str, dict[str, dict]] = {tier.name: {} for tier in tiers}
    for (name, _), uri in parts.items():
        found[name] |= storage.read_json(uri)
    return {name: {method.name: part[method.name] for method in methods} for name, part in found.items()}


def _measure_part(
    methods: list[Method], tier: Tier, tuning: Tier, settings: EvaluateGeneratorsSettings, uri: str, storage: Storage
) -> None:
    with one_thread():
        embedded, cut = Embedded(methods[0], tier), cluster_cut(Embedded(methods[0], tuning))
        found = {method.name: evaluate_tier(method, embedded, cut, settings) for method in methods}
        judged = [method for method in methods if method.name in VERDICT_METHODS and tier.settings.judged]
        if judged and len(set(tier.families)) >= MIN_FAMILIES:
            for name, rates in verdict_rates(judged, tier, tuning, settings.seed).items():
                found[name]["verdicts"] = rates
    storage.write_json(uri, found)


def _described(tier: Tier) -> dict:
    return {
        "generators": list(tier.names),
        "families": list(tier.families),
        "judged": tier.settings.judged,
        "note": tier.settings.note,
        "same_content": tier.same_content,
        "num_images": len(tier.samples),
        "num_real": len(tier.real),
        "formats": formats(tier),
        "real_history": tier.settings.real_history if isinstance(tier.settings, FolderTierSettings) else None,
    }
