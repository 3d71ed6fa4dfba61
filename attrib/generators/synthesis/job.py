"""The synthesis job: a pool of small generators, trained in many small Ray tasks.

Each model is committed on its own, so a killed run continues with the missing ones. Several workers share one GPU,
because models of a few thousand weights cannot use a whole one: the time goes into kernel launches.
"""

import logging
import statistics
import time

from attrib.common.run_record import check_own, freed_if_refused, run_once
from attrib.common.storage import Storage, bytes_sha256, join
from attrib.data.job import list_collection
from attrib.generators.synthesis.architectures import sample_specs
from attrib.generators.synthesis.autoencoder import render, train_autoencoder
from attrib.generators.synthesis.measures import measure_pool, real_profiles
from attrib.generators.synthesis.photographs import Photographs, read_photographs
from attrib.generators.synthesis.pool import (
    PHOTOGRAPHS,
    RECORD,
    PlannedModel,
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
from attrib.runtime.tasks import run_all

logger = logging.getLogger(__name__)

MANIFESTS = "_manifests"
PROBED_MODELS, PROBE_STEPS = 4, 5
REMEDIES = {
    "max_process_gib": "lower px, num_photographs or num_training_photographs",
    "max_output_gib": "lower num_models, num_photographs or px",
    "max_hours": "lower num_models, training.max_steps or width, or take more workers",
    "max_cost": "lower num_models, training.max_steps or width",
}


def run(settings: SynthesizeSettings) -> dict:
    """Make the pool and return its record. Raises AttribError if there are too few photographs or architectures."""
    baseline_bytes()
    storage = Storage(settings.storage)
    check_own(settings, RECORD, storage)
    planned = plan(settings)
    connect(settings.ray)
    with freed_if_refused(join(settings.output, MANIFESTS), storage):
        photographs = read_photographs(
            list_collection(settings.photographs, join(settings.output, MANIFESTS, "photographs"), settings),
            px=settings.px,
            num_shown=settings.num_photographs,
            num_training=settings.num_training_photographs,
            first_shown=settings.first_photograph,
            max_megapixels=settings.max_megapixels,
            storage=storage,
        )
    inputs = {"photographs": photographs.digest()}
    return run_once(settings, RECORD, inputs, storage, lambda: _make_pool(settings, planned, photographs, storage))


def _make_pool(
    settings: SynthesizeSettings, planned: list[PlannedModel], photographs: Photographs, storage: Storage
) -> dict:
    """The results of the job, for its record."""
    device, manifests = device_of(settings.device, "synthesize"), join(settings.output, MANIFESTS)
    photographs_digest = photographs.digest()
    admit(_estimate(settings, planned, photographs, device), settings, REMEDIES)
    real, given = {}, settings.real_generators
    if given:
        listed = list_collection(given.collection, join(manifests, "real_generators"), settings)
        real = real_profiles(listed, given.left_out, settings.max_megapixels, storage)
    storage.write_array(join(settings.output, PHOTOGRAPHS), photographs.shown.numpy())
    models = _train(settings, planned, photographs, device, storage)
    digest = pool_digest(models, photographs_digest)
    pool = Pool(settings.output, models, settings.px, len(photographs.shown), digest)
    return {
        "models": [model.model_dump(mode="json") for model in models],
        "digest": digest,
        "photographs_sha256": bytes_sha256(photographs.shown.numpy().tobytes()),
        "median_loss": statistics.median(model.loss for model in models),
        "share_at_target": sum(model.loss <= settings.training.target_mse for model in models) / len(models),
        "measures": measure_pool(pool, real, storage),
    }


def plan(settings: SynthesizeSettings) -> list[PlannedModel]:
    """All models of the pool, in its order."""
    # Models of pools with different seeds have different seeds, too.
    seeds = [1000 * settings.seed + i for i in range(settings.seeds_per_architecture)]
    num_specs = settings.num_models // len(seeds)
    options = {"settings": settings.grid, "width": settings.width, "first": settings.first_architecture}
    specs = sample_specs(num_specs, settings.seed, **options)
    return [PlannedModel(model_id=f"{spec.name}-{seed}", spec=spec, seed=seed) for seed in seeds for spec in specs]


def _estimate(
    settings: SynthesizeSettings, planned: list[PlannedModel], photographs: Photographs, device: str
) -> Estimate:
    """Upper bound, measured with a few steps of some models; most models reach target_mse before max_steps."""
    probed = settings.training.model_copy(update={"max_steps": PROBE_STEPS, "check_steps": PROBE_STEPS})
    num_probed = min(PROBED_MODELS, len(planned))
    reset_peak()
    before, started = resident_bytes(), time.perf_counter()
    for model in planned[:: len(planned) // num_probed][:num_probed]:
        train_autoencoder(model.spec, model.seed, photographs.training, photographs.shown, probed)
    step_seconds = (time.perf_counter() - started) / (num_probed * PROBE_STEPS)
    images_bytes = photographs.shown.nbytes + photographs.training.nbytes
    worker_bytes = baseline_bytes() + images_bytes + max(0, peak_bytes() - before)
    num_workers = max(1, int(num_cluster_gpus() / settings.gpu_share) if device == "cuda" else num_cluster_cpus())
    return Estimate(
        num_workers=num_workers,
        worker_bytes=worker_bytes,
        driver_bytes=worker_bytes + images_bytes,
        output_bytes=len(planned) * photographs.shown.nbytes,
        seconds=step_seconds * settings.training.max_steps * len(planned) / num_workers,
        note="upper limit, at the speed of this machine's CPU",
    )


def _train(
    settings: SynthesizeSettings, planned: list[PlannedModel], photographs: Photographs, device: str, storage: Storage
) -> list[PoolModel]:
    """Train every planned model that no earlier run committed. Returns all of them."""
    committed = set(storage.names(join(settings.output, "models")))
    made = {
        model.model_id: read_card(settings.output, model.model_id, storage)
        for model in planned
        if f"{model.model_id}.safetensors" in committed
    }
    pending = [model for model in planned if model.model_id not in made]
    shared = put(photographs)
    units = [
        (settings, pending[start : start + settings.models_per_task], shared, device, storage)
        for start in range(0, len(pending), settings.models_per_task)
    ]
    num_gpus = settings.gpu_share if device == "cuda" else 0
    counts = [len(models) for _, models, *_ in units]
    trained = run_all(_train_models, units, "synthesize", "models", counts, len(made), num_gpus=num_gpus)
    made |= {model.model_id: model for models in trained for model in models}
    return [made[model.model_id] for model in planned]


def _train_models(
    settings: SynthesizeSettings, planned: list[PlannedModel], photographs: Photographs, device: str, storage: Storage
) -> list[PoolModel]:
    made = []
    for model in planned:
        if storage.exists(model_uri(settings.output, model.model_id)):  # from an attempt of this task that died
            made.append(read_card(settings.output, model.model_id, storage))
            continue
        shown, training = photographs.shown, photographs.training
        trained = train_autoencoder(model.spec, model.seed, training, shown, settings.training, device)
        made.append(write_model(settings.output, model, trained, render(trained.model, shown), storage))
    return made
