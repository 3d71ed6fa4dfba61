"""The synthesis job: a pool of small generators as many small Ray tasks.

A model commits by itself, so a killed run goes on with the first that is missing. On a GPU several workers share the device: a model of a few
thousand weights is bound by the launches of its kernels, not by the GPU.
"""

import logging
import statistics
import time
from dataclasses import dataclass

from attrib.common.progress import Progress
from attrib.common.run_record import begin, finish
from attrib.common.storage import Storage, join
from attrib.data.job import list_collection
from attrib.generators.synthesis.architectures import DecoderSpec, sample_specs
from attrib.generators.synthesis.autoencoder import (
    render,
    train_autoencoder,
)
from attrib.generators.synthesis.measures import measure_pool, real_profiles
from attrib.generators.synthesis.photographs import Photographs, read_photographs
from attrib.generators.synthesis.pool import (
    PHOTOGRAPHS,
    RECORD,
    Pool,
    PoolModel,
    model_uri,
    pool_digest,
    read_card,
    write_model,
)
from attrib.generators.synthesis.settings import SynthesizeSettings
from attrib.runtime.admission import admit
from attrib.runtime.estimate import Estimate
from attrib.runtime.machine import baseline_bytes, peak_bytes, reset_peak, resident_bytes
from attrib.runtime.session import connect, device_of, num_cluster_cpus, num_cluster_gpus, put
from attrib.runtime.tasks import run_units

logger = logging.getLogger(__name__)

PROBED_MODELS, PROBE_STEPS = 4, 5
REMEDIES = {
    "max_process_gib": "lower px, num_photographs or num_training_photographs",
    "max_output_gib": "lower num_models, num_photographs or px",
    "max_hours": "lower num_models, training.max_steps or width, or take more workers",
    "max_cost": "lower num_models, training.max_steps or width",
}


@dataclass(frozen=True)
class Planned:
    """A model to make."""

    model_id: str
    spec: DecoderSpec
    seed: int


def run(settings: SynthesizeSettings) -> dict:
    """Make the pool and return its record. Raises AttribError if the photographs are too few or the grid too small."""
    baseline_bytes()
    storage = Storage(settings.storage)
    planned = plan(settings)
    connect(settings.ray)
    device = device_of(settings.device, "synthesize")
    photographs = _photographs(settings, storage)
    inputs = {"photographs": photographs.digest()}
    finished = begin(settings, RECORD, inputs, storage)
    if finished:
        logger.info(f"synthesize: finished at {finished['written_at']}")
        return finished
    admit(_estimate(settings, planned, photographs, device), settings, REMEDIES)
    real = _real_profiles(settings, storage)
    storage.write_array(join(settings.output, PHOTOGRAPHS), photographs.shown.numpy())
    models = _make(settings, planned, photographs, device, storage)
    pool = Pool(
        settings.output, models, settings.px, len(photographs.shown), pool_digest(models, inputs["photographs"])
    )
    results = {
        "models": [model.model_dump(mode="json") for model in models],
        "digest": pool.digest,
        "median_loss": statistics.median(model.loss for model in models),
        "share_at_target": sum(model.loss <= settings.training.target_mse for model in models) / len(models),
        "measures": measure_pool(pool, real, storage),
    }
    return finish(settings, RECORD, inputs, results, storage)


def _estimate(settings: SynthesizeSettings, planned: list[Planned], photographs: Photographs, device: str) -> Estimate:
    """From a few steps of some models, taken here; few models need all of max_steps, so it is an upper bound."""
    probed = settings.training.model_copy(update={"max_steps": PROBE_STEPS, "check_steps": PROBE_STEPS})
    num_probed = min(PROBED_MODELS, len(planned))
    reset_peak()
    before, started = resident_bytes(), time.perf_counter()
    for model in planned[:: len(planned) // num_probed][:num_probed]:
        train_autoencoder(model.spec, model.seed, photographs.training, photographs.shown, probed)
    step_seconds = (time.perf_counter() - started) / (num_probed * PROBE_STEPS)
    images_bytes = photographs.shown.nbytes + photographs.training.nbytes
    num_workers = int(num_cluster_gpus() / settings.gpu_share) if device == "cuda" else num_cluster_cpus()
    return Estimate(
        num_workers=max(1, num_workers),
        worker_bytes=baseline_bytes() + images_bytes + max(0, peak_bytes() - before),
        driver_bytes=baseline_bytes() + 2 * images_bytes + max(0, peak_bytes() - before),
        output_bytes=len(planned) * photographs.shown.nbytes,
        seconds=step_seconds * settings.training.max_steps * len(planned) / max(1, num_workers),
        note="at most, at the pace of this machine's CPU",
    )


def plan(settings: SynthesizeSettings) -> list[Planned]:
    """All models of the pool, in its order; ids are distinct and fit for file names."""
    seeds = [
        1000 * settings.seed + i for i in range(settings.seeds_per_architecture)
    ]  # pools of other seeds share none
    specs = sample_specs(
        settings.num_models // len(seeds),
        settings.seed,
        settings=settings.grid,
        width=settings.width,
        first=settings.first_architecture,
    )
    return [Planned(f"{spec.name}-{seed}", spec, seed) for seed in seeds for spec in specs]


def _photographs(settings: SynthesizeSettings, storage: Storage) -> Photographs:
    listed = list_collection(settings.photographs, join(settings.output, "_manifests", "photographs"), settings)
    return read_photographs(
        listed,
        px=settings.px,
        num_shown=settings.num_photographs,
        num_training=settings.num_training_photographs,
        first_shown=settings.first_photograph,
        max_megapixels=settings.max_megapixels,
        storage=storage,
    )


def _real_profiles(settings: SynthesizeSettings, storage: Storage) -> dict:
    if settings.real_generators is None:
        return {}
    output = join(settings.output, "_manifests", "real_generators")
    listed = list_collection(settings.real_generators.collection, output, settings)
    return real_profiles(listed, settings.real_generators.left_out, settings.max_megapixels, storage)


def _make(
    settings: SynthesizeSettings, planned: list[Planned], photographs: Photographs, device: str, storage: Storage
) -> list[PoolModel]:
    """Every planned model, those of an earlier run as they were committed."""
    committed = set(storage.names(join(settings.output, "models")))
    made = {
        model.model_id: read_card(settings.output, model.model_id, storage)
        for model in planned
        if model_uri("", model.model_id).rsplit("/", 1)[1] in committed
    }
    pending = [model for model in planned if model.model_id not in made]
    shared = put(photographs)
    common = {"num_cpus": 1, "num_gpus": settings.gpu_share if device == "cuda" else 0}
    units = [
        (settings, pending[start : start + settings.models_per_task], shared, device, storage)
        for start in range(0, len(pending), settings.models_per_task)
    ]
    progress = Progress("synthesize", len(planned), "models", already_done=len(made))
    for _, models in run_units(_train_models, units, **common):
        made |= {model.model_id: model for model in models}
        progress.update(len(models))
    progress.close()
    return [made[model.model_id] for model in planned]


def _train_models(
    settings: SynthesizeSettings, planned: list[Planned], photographs: Photographs, device: str, storage: Storage
) -> list[PoolModel]:
    made = []
    for model in planned:
        if storage.exists(model_uri(settings.output, model.model_id)):  # by this task, before it lost its worker
            made.append(read_card(settings.output, model.model_id, storage))
            continue
        trained = train_autoencoder(
            model.spec, model.seed, photographs.training, photographs.shown, settings.training, device
        )
        samples = render(trained.model, photographs.shown)
        made.append(
            write_model(
                settings.output, model.model_id, model.spec, model.seed, trained.model, trained.loss, trained.num_steps, samples, storage
            )
        )  # fmt: skip
    return made
