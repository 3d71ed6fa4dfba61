"""The evaluation job: generators are trained as Ray tasks, then each method is measured on each generator set.

<output>/evaluation.json, table.txt, evaluation.html   results per generator set and method, as table and page
<output>/generators/NAME.npy, NAME.json                images of the generators that the job trains; loss and size
<output>/photographs/                                  manifest of the photographs that they are trained on
<output>/discriminant/                                 the linear discriminant of log spectra, fitted on the pool
<output>/_parts/                                       finished measurements, which a restarted run does not repeat
"""

import dataclasses
import logging

import torch

from attrib.common.config import digest
from attrib.common.json_records import parse_record, with_checksum
from attrib.common.run_record import check_own, freed_if_refused, run_once
from attrib.common.storage import Storage, join
from attrib.data.job import list_collection
from attrib.generators.evaluation.controls import methods_from
from attrib.generators.evaluation.generator_sets import (
    GeneratorSet,
    as_samples,
    folder_set,
    make_set,
    pool_set,
    tuning_set,
    unseen,
)
from attrib.generators.evaluation.page import render_page
from attrib.generators.evaluation.protocol import Embedded, cluster_cut, evaluate_set
from attrib.generators.evaluation.settings import (
    TRAINED_SET,
    EvaluateGeneratorsSettings,
    GeneratorKind,
    TrainedSetSettings,
)
from attrib.generators.evaluation.summary import format_table, summarise
from attrib.generators.evaluation.trained_generators import train_generator
from attrib.generators.evaluation.verdict_rates import METHODS as VERDICT_METHODS
from attrib.generators.evaluation.verdict_rates import MIN_FAMILIES, verdict_rates
from attrib.generators.extractor.network import load_extractor
from attrib.generators.fingerprints.base import Method
from attrib.generators.signals.degradations import parse
from attrib.generators.synthesis.autoencoder import one_thread
from attrib.generators.synthesis.photographs import Photographs, read_photographs
from attrib.generators.synthesis.pool import open_pool
from attrib.runtime.session import connect, put
from attrib.runtime.tasks import run_all

logger = logging.getLogger(__name__)

RECORD, TABLE, PAGE = "evaluation.json", "table.txt", "evaluation.html"


def run(settings: EvaluateGeneratorsSettings) -> dict:
    """Evaluate all methods and return the record. Reuses finished parts, and always writes the page.

    Raises AttribError for an unknown degradation, missing inputs, or images that do not fit.
    """
    storage = Storage(settings.storage)
    check_own(settings, RECORD, storage)
    histories = [given.real_history for given in settings.folders.values() if given.real_history]
    for name in (*settings.degradations, settings.real_degradation, *histories):
        parse(name)
    pool = open_pool(settings.pool, storage)
    extractor = load_extractor(settings.extractor, storage) if settings.extractor else None
    connect(settings.ray)
    sets = [folder_set(name, given, settings.max_megapixels, storage) for name, given in settings.folders.items()]
    sets += [pool_set(name, given, pool, storage) for name, given in settings.pools.items()]
    inputs = {"pool": pool.digest, "extractor": extractor.digest if extractor else None}
    inputs |= {f"tier {generators.name}": generators.digest() for generators in sets}
    photographs = None
    if settings.trained:
        remedy = "take another trained.first_photograph, after the photographs of the pool"
        with freed_if_refused(join(settings.output, "photographs"), storage):
            photographs = _photographs(settings, storage)
            is_new = unseen(photographs.shown, pool, TRAINED_SET, remedy, storage)
        photographs = dataclasses.replace(photographs, shown=photographs.shown[is_new])
        inputs["photographs"] = photographs.digest()

    def all_sets() -> list[GeneratorSet]:
        """The given sets, and the generators that are trained here unless an earlier run has trained them."""
        if photographs is None:
            return sets
        folder = join(settings.output, "generators")
        return [_trained_set(settings.trained, photographs, folder, storage), *sets]

    def work() -> dict:
        methods = methods_from(settings.methods, pool, storage, extractor, join(settings.output, "discriminant"))
        measured = _measure(settings, methods, used := all_sets(), tuning_set(pool, storage), storage)
        summary = summarise(
            {generators.name: generators.description() | {"methods": measured[generators.name]} for generators in used},
            {method.name: method.looks_at_trace for method in methods},
            {method.name: method.registered_as for method in methods},
        )
        digests = {method.name: method.digest for method in methods}
        results = summary | {"measured": measured, "digests": digests, "table": format_table(summary)}
        storage.write_bytes(join(settings.output, TABLE), f"{results['table']}\n".encode())
        return results

    record = run_once(settings, RECORD, inputs, storage, work)
    # The page is written after the record, and again in every later run. So it also exists if a run was killed in
    # between, and it shows a changed title.
    stamp = {name: record[name] for name in ("settings", "inputs", "versions", "digests")}
    storage.write_bytes(join(settings.output, PAGE), render_page(record, all_sets(), settings.title, stamp).encode())
    return record


def _photographs(settings: EvaluateGeneratorsSettings, storage: Storage) -> Photographs:
    """Training photographs, and max_images other photographs as real images."""
    wanted = settings.trained
    return read_photographs(
        list_collection(wanted.photographs, join(settings.output, "photographs"), settings),
        px=wanted.photograph_px,
        num_shown=wanted.max_images,
        num_training=wanted.num_training_photographs,
        first_shown=wanted.first_photograph,
        max_megapixels=settings.max_megapixels,
        storage=storage,
    )


def _trained_set(wanted: TrainedSetSettings, photographs: Photographs, folder: str, storage: Storage) -> GeneratorSet:
    """Train the generators that are not trained yet, and return the set of all."""
    kind_and_seed = {f"{kind}-{seed}": (kind, seed) for kind in wanted.kinds for seed in wanted.seeds}
    files = {name: join(folder, f"{name}.npy") for name in kind_and_seed}
    pending = [name for name, uri in files.items() if not storage.exists(uri)]
    training = put(photographs.training)
    units = [(*kind_and_seed[name], training, wanted, join(folder, name), storage) for name in pending]
    num_done = len(kind_and_seed) - len(pending)
    run_all(_train_generator, units, "train generators", "generators", [1] * len(units), num_done)
    images = {name: as_samples(torch.from_numpy(storage.read_array(uri, sealed=True))) for name, uri in files.items()}
    top = (photographs.shown.shape[-1] - wanted.px) // 2
    real = as_samples(photographs.shown[:, :, top : top + wanted.px, top : top + wanted.px])
    return make_set(TRAINED_SET, wanted, images, real, families=[kind for kind, _ in kind_and_seed.values()])


def _train_generator(
    kind: GeneratorKind, seed: int, photographs: torch.Tensor, wanted: TrainedSetSettings, uri: str, storage: Storage
) -> None:
    described, samples = train_generator(kind, seed, photographs, wanted)
    storage.write_json(f"{uri}.json", described)
    storage.write_array(f"{uri}.npy", samples.numpy())  # last, as the mark of completion


def _measure(
    settings: EvaluateGeneratorsSettings,
    methods: list[Method],
    sets: list[GeneratorSet],
    tuning: GeneratorSet,
    storage: Storage,
) -> dict[str, dict[str, dict]]:
    """{set: {method: result of evaluate_set}}. Methods with the same digest have the same vectors and share a task."""
    groups: dict[str, list[Method]] = {}
    for method in methods:
        groups.setdefault(method.digest, []).append(method)
    folder = join(settings.output, "_parts")
    parts = {
        (own.name, key): join(folder, f"{own.name}-{digest([own.digest(), key])[:16]}.json")
        for own in sets
        for key in groups
    }
    pending = [(place, uri) for place, uri in parts.items() if not storage.exists(uri)]
    shared, shared_tuning = {own.name: put(own) for own in sets}, put(tuning)
    units = [(groups[key], shared[name], shared_tuning, settings, uri, storage) for (name, key), uri in pending]
    run_all(_measure_part, units, "evaluate", "parts", [1] * len(units), len(parts) - len(pending))
    found: dict[str, dict[str, dict]] = {own.name: {} for own in sets}
    for (name, _), uri in parts.items():
        found[name] |= parse_record(uri, storage.read_bytes(uri))["results"]
    return {name: {method.name: part[method.name] for method in methods} for name, part in found.items()}


def _measure_part(
    methods: list[Method],
    generators: GeneratorSet,
    tuning: GeneratorSet,
    settings: EvaluateGeneratorsSettings,
    uri: str,
    storage: Storage,
) -> None:
    with one_thread():
        embedded, cut = Embedded(methods[0], generators), cluster_cut(Embedded(methods[0], tuning))
        found = {method.name: evaluate_set(method, embedded, cut, settings) for method in methods}
        judged = [method for method in methods if method.name in VERDICT_METHODS and generators.settings.judged]
        if judged and len(set(generators.families)) >= MIN_FAMILIES:
            for name, rates in verdict_rates(judged, generators, tuning, settings.seed).items():
                found[name]["verdicts"] = rates
    storage.write_json(uri, with_checksum({"results": found}))
