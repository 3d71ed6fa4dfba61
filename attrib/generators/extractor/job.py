"""The fingerprint job: an extractor trained with Ray Train on a pool of synthetic generators.

<output>/extractor.safetensors   the network; see attrib.generators.extractor.network.load_extractor
<output>/extractor.json          written last: settings, digests, the validation accuracy by step
<output>/lda.safetensors, whitening.safetensors   of the colour spectrum on the same pool; see
                                 attrib.generators.fingerprints.spectrum.load_spectrum_method
<output>/_start.sealed           the network before training; the whitening of its two statistics is fitted
<output>/_ray_train/             Ray Train's checkpoints, one per validation
"""

import time

import torch
from safetensors.torch import load, save

from attrib.common.run_record import check_own, run_once
from attrib.common.storage import Storage, join
from attrib.generators.extractor.batches import (
    NUM_REFERENCES,
    VALIDATION,
    ExtractorBatches,
    PoolImages,
    Validation,
    check_pool,
    read_pool,
)
from attrib.generators.extractor.network import RECORD, FingerprintNetwork, extractor_digest, save_extractor
from attrib.generators.extractor.settings import FingerprintSettings
from attrib.generators.extractor.training import LEARNED_IMAGES, ExtractorRun, initial_network
from attrib.generators.fingerprints.spectrum import fitted_maps
from attrib.generators.settings import FINGERPRINT_VERSION, MethodsSettings
from attrib.generators.synthesis.pool import Pool, open_pool
from attrib.runtime.admission import admit
from attrib.runtime.estimate import Estimate
from attrib.runtime.machine import baseline_bytes, peak_bytes, reset_peak, resident_bytes
from attrib.runtime.session import connect, device_of
from attrib.runtime.trainer import KEPT_CHECKPOINTS, TrainWorker, fit

START = "_start.sealed"
STATES = 4  # in a checkpoint: weights, best weights, and the optimiser's two moments
PROBE_STEPS = 3  # the first is slower
REMEDIES = {
    "max_process_gib": "lower contrast.models_per_batch or network.width, or make a smaller pool",
    "max_output_gib": "lower network.num_learned or network.width",
    "max_hours": "lower optimiser.num_steps, contrast.models_per_batch or network.width",
    "max_cost": "lower optimiser.num_steps, contrast.models_per_batch or network.width",
}


def run(settings: FingerprintSettings) -> dict:
    """Train an extractor and return its record. A run that was killed continues from its last validation."""
    baseline_bytes()
    storage = Storage(settings.storage)
    check_own(settings, RECORD, storage)
    pool = open_pool(settings.pool, storage)
    check_pool(pool, settings)
    inputs = {"pool": pool.digest, "fingerprint_version": FINGERPRINT_VERSION}
    return run_once(settings, RECORD, inputs, storage, lambda: _train(settings, pool, storage))


def _train(settings: FingerprintSettings, pool: Pool, storage: Storage) -> dict:
    """The results of the job, for its record."""
    connect(settings.ray, dashboard=True)
    started = time.monotonic()
    images = read_pool(pool, settings, storage)
    admit(_estimate(settings, images), settings, REMEDIES)
    start = join(settings.output, START)
    if not storage.exists(start):
        storage.write_sealed_bytes(start, save(initial_network(images, settings).state_dict()))
    counts = {
        "num_training_models": len(images.training) - settings.photographs_as_class,
        "num_held_out_models": len(images.held_out),
        "num_images_per_model": images.num_images,
    }
    del images  # frees memory for workers on this machine, which read them again
    state = fit(
        _worker,
        (settings,),
        job="fingerprint",
        num_workers=settings.num_workers,
        device=device_of(settings.device, "fingerprint"),
        output=settings.output,
        storage=storage,
    )
    network = FingerprintNetwork(settings.network)
    network.load_state_dict(state["best"])
    save_extractor(network, settings.output, storage)
    methods = MethodsSettings()
    fitted_maps(pool, methods.colour_spectrum, methods.colour_discriminant, storage, settings.output)
    return counts | {
        "digest": extractor_digest(network),
        "num_parameters": sum(parameter.numel() for parameter in network.parameters()),
        "criterion": f"identification among models of an upsampler that is not trained on, from {NUM_REFERENCES} "
        "references, mean of original and JPEG 85",
        "history": state["history"],
        "seconds": round(time.monotonic() - started, 1),
    }


def _estimate(settings: FingerprintSettings, images: PoolImages) -> Estimate:
    """Estimate from a few steps of a temporary network. The first whitening takes seconds and is not counted."""
    network = FingerprintNetwork(settings.network)
    training = ExtractorRun(network, len(images.training), settings, torch.device("cpu"))
    batches = ExtractorBatches(images, settings, 0, 1)
    reset_peak()
    before, seconds = resident_bytes(), []
    for step in range(PROBE_STEPS):
        started = time.perf_counter()
        training.train_step(batches.make(step))
        seconds.append(time.perf_counter() - started)
    images_bytes = sum(shown.nbytes for shown in (*images.training, *images.held_out, images.photographs))
    optimiser, contrast = settings.optimiser, settings.contrast
    # A validation embeds the held-out images, and the images on which the whitening of the learned part is fitted.
    num_embedded = len(VALIDATION) * (
        len(images.held_out) * len(images.held_out[0]) + len(images.training) * min(LEARNED_IMAGES, images.num_images)
    )
    # A forward pass takes about a third of a step on as many patches.
    validation_steps = num_embedded / (contrast.models_per_batch * contrast.images_per_model) / 3
    num_validations = 2 + optimiser.num_steps // optimiser.validation_steps
    state_bytes = sum(value.nbytes for value in network.state_dict().values())
    process_bytes = baseline_bytes() + images_bytes + max(0, peak_bytes() - before)
    return Estimate(
        num_workers=settings.num_workers,
        worker_bytes=process_bytes + STATES * state_bytes,
        driver_bytes=process_bytes,
        output_bytes=(KEPT_CHECKPOINTS * STATES + 2) * state_bytes,
        seconds=min(seconds) * (optimiser.num_steps / settings.num_workers + validation_steps * num_validations),
        note="at the speed of this machine's CPU",
    )


def _worker(worker: TrainWorker, settings: FingerprintSettings) -> None:
    storage = Storage(settings.storage)
    images = read_pool(open_pool(settings.pool, storage), settings, storage)
    network = FingerprintNetwork(settings.network)
    network.load_state_dict(load(bytes(storage.read_sealed_bytes(join(settings.output, START)))))
    training = ExtractorRun(network, len(images.training), settings, worker.device)
    worker.restore(training)
    validation = Validation(images.held_out, settings.network.patch_px)
    batches = ExtractorBatches(images, settings, worker.rank, worker.num_workers)
    training.train(batches, validation, on_validation=worker.report)
