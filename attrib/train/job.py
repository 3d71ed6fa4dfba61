"""The train job: features of images and views as Ray tasks, fitted projections, then training with Ray Train.

<output>/model.safetensors   the checkpoint that jobs.embed takes as backbone.weights
<output>/train.json          written last: settings, digests, the criterion by epoch, images without features
<output>/failures.parquet    the images without features: id, key, stage, reason
<output>/views.png           examples of the views
<output>/_features/          features of images and views, kept for the next run with the same settings
<output>/_ray_train/         Ray Train's checkpoints, one per epoch
"""

import logging
import time

import torch
from safetensors.torch import load, save

from attrib.common.errors import AttribError
from attrib.common.run_record import run_once
from attrib.common.storage import Storage, join
from attrib.data.manifest import Manifest, open_manifest, sampled_images
from attrib.models.encoder import Network, load_network, preprocessing_of
from attrib.models.model import TRAIN_RECORD, TRAINED_MODEL, AttributionModel, model_digest, save_model
from attrib.models.settings import BackboneSettings
from attrib.runtime.admission import admit
from attrib.runtime.machine import baseline_bytes
from attrib.runtime.session import connect, device_of, num_cluster_cpus
from attrib.runtime.trainer import TrainWorker, fit
from attrib.train.batches import InputBatches, Inputs, shares_of_views
from attrib.train.estimate import estimate_train
from attrib.train.feature_tasks import view_features, write_failures
from attrib.train.initialise import fitted_model, paired_inputs, read_pairs, training_inputs, with_control
from attrib.train.loop import TrainRun
from attrib.train.pixel_batches import PixelBatches
from attrib.train.settings import TrainSettings
from attrib.train.student import parallel, student_of, trained_groups
from attrib.train.view_features import sheet_of_views

logger = logging.getLogger(__name__)

RECORD, MODEL = TRAIN_RECORD, TRAINED_MODEL
START = "_start.safetensors"  # the model that training starts from
INPUTS = "_inputs.safetensors"  # the inputs of its heads
SHEET_IMAGES = 6


def run(settings: TrainSettings) -> dict:
    """Train a model, or make a control, and return the record. If a run was killed, the next continues its training."""
    baseline_bytes()
    storage = Storage(settings.storage)
    settings = with_control(settings)
    manifest = open_manifest(settings.manifest, storage)
    synthetic = open_manifest(settings.synthetic, storage) if settings.synthetic else None
    network = load_network(settings.backbone, storage)
    if network.has_head:
        raise AttribError(f"{settings.backbone.weights} has a head already; train from plain weights of the backbone")
    inputs = {"manifest": manifest.digest, "backbone": model_digest(settings.backbone.name, network.model)}
    if synthetic:
        inputs["synthetic"] = synthetic.digest

    def work() -> dict:
        connect(settings.ray, dashboard=True)
        estimate = estimate_train(settings, manifest, num_cluster_cpus(), storage)
        admit(estimate, settings, {"max_process_gib": "lower max_images or views_per_image"})
        started = time.monotonic()
        results = _train(settings, manifest, synthetic, network, storage)
        return results | {"seconds": round(time.monotonic() - started, 1)}

    return run_once(settings, RECORD, inputs, storage, work)


def _train(
    settings: TrainSettings, manifest: Manifest, synthetic: Manifest | None, network: Network, storage: Storage
) -> dict:
    folder, num_views = join(settings.output, "_features"), settings.num_views
    real = view_features(settings, manifest, join(folder, "real"), num_views, settings.max_images, storage)
    generated = None
    if synthetic:
        generated = view_features(settings, synthetic, join(folder, "synthetic"), 0, settings.max_images, storage)
    model = fitted_model(settings, network, real, generated)
    history: list[dict] = []
    shares = None
    if settings.head.net != "none":
        save_model(model, settings.backbone.name, join(settings.output, START), storage)
        if settings.control == "supervised":
            pairs = read_pairs(settings, manifest, synthetic, storage)
            inputs = paired_inputs(model, real, generated, pairs)
        else:
            images = sampled_images(manifest, SHEET_IMAGES, storage)
            preprocessing = preprocessing_of(Network(model, model.data_config), settings.backbone.name)
            if sheet := sheet_of_views(images, manifest, preprocessing, settings, storage):
                storage.write_bytes(join(settings.output, "views.png"), sheet)
            inputs = training_inputs(model, real) if num_views else None
        if inputs:
            storage.write_bytes(join(settings.output, INPUTS), save(vars(inputs)))
        state = fit(
            _worker,
            (settings, manifest),
            job="train",
            num_workers=settings.num_workers,
            device=device_of(settings.device, "train"),
            output=settings.output,
            storage=storage,
        )
        history = state["history"]
        student = student_of(model, settings)
        student.load_state_dict(state["best"], strict=False)
        if num_views:
            try:
                shares = shares_of_views(student, InputBatches(inputs, settings.optimiser, settings.seed, 0, 1))
            except AttribError as error:  # the trained model is complete without them
                logger.warning(f"the model is trained, but {RECORD} has no calibrator of shares: {error}")
    save_model(model, settings.backbone.name, join(settings.output, MODEL), storage)
    failures = real.failures + (generated.failures if generated else [])
    write_failures(settings.output, failures, storage)
    return {
        "num_images": int(real.is_original.sum()),
        "num_views": int((~real.is_original).sum()),
        "num_failed": len(failures),
        "dimension": model.head("real").dimension,
        "model_digest": model_digest(settings.backbone.name, model),
        "criterion": "mean reciprocal rank of the sources of views of held-out images",
        "history": history,
        "shares": shares,
    }


def _worker(worker: TrainWorker, settings: TrainSettings, manifest: Manifest) -> None:
    storage, device, num_workers = Storage(settings.storage), worker.device, worker.num_workers
    torch.manual_seed(settings.seed)
    start = BackboneSettings(name=settings.backbone.name, weights=join(settings.output, START))
    network = load_network(start, storage)
    model: AttributionModel = network.model.to(device)
    if settings.fine_tune:
        images = sampled_images(manifest, settings.max_images, storage)
        preprocessing = preprocessing_of(network, settings.backbone.name)
        batches = PixelBatches(images, manifest, preprocessing, settings, worker.rank, num_workers, device, storage)
    else:
        inputs = Inputs(**load(storage.read_bytes(join(settings.output, INPUTS))))
        batches = InputBatches(inputs, settings.optimiser, settings.seed, worker.rank, num_workers)
    student = student_of(model, settings).to(device)
    optimiser = torch.optim.AdamW(trained_groups(student, settings), weight_decay=settings.optimiser.weight_decay)
    wrapped = parallel(student, settings, device) if num_workers > 1 else student
    training = TrainRun(student, settings, optimiser, batches.num_steps, device, wrapped)
    worker.restore(training)
    training.train(batches, on_epoch=worker.report)
