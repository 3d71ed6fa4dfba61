"""Training a head: inputs of its own, and the plain loop that the job's steps are compared with.

A job's keys: settings (TrainSettings), sizes (TrainBenchmarkSettings), folder (the job's output), criterion.
"""

import os
import statistics
import time

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from attrib.benchmark.contender import Clock, cpu_seconds
from attrib.benchmark.settings import BenchmarkSettings, TrainBenchmarkSettings
from attrib.common.settings import StorageSettings
from attrib.common.storage import Storage
from attrib.models.encoder import load_network
from attrib.models.model import build_model, save_model
from attrib.models.settings import BackboneSettings, HeadSettings, PartSettings
from attrib.train.batches import InputBatches, Inputs
from attrib.train.objective import Objective
from attrib.train.schedule import rate
from attrib.train.settings import OptimiserSettings, TrainSettings
from attrib.train.student import student_of, trained_groups

LAP = "step"
START, INPUTS = "_start.safetensors", "_inputs.safetensors"  # as jobs.train names them


def train_settings(settings: BenchmarkSettings, folder: str) -> TrainSettings:
    """A linear head on the network's own output, for as many epochs as asked."""
    return TrainSettings(
        manifest=os.path.join(folder, "manifest"),
        output=folder,
        backbone=settings.backbone,
        head=HeadSettings(
            projection="identity", parts={"all": PartSettings(blocks=("pooled",), dimension=settings.train.dimension)}
        ),
        optimiser=OptimiserSettings(
            num_epochs=settings.train.num_epochs,
            batch_size=settings.train.batch_size,
            patience_epochs=settings.train.num_epochs,
        ),
        num_workers=1,
        device="cpu",
    )


def prepare(job: dict, clock: Clock) -> dict:
    """The model that both start from, and random inputs: images, and views that lie near two of them each."""
    settings, sizes = TrainSettings.model_validate(job["settings"]), TrainBenchmarkSettings.model_validate(job["sizes"])
    os.makedirs(job["folder"], exist_ok=True)
    network = load_network(settings.backbone, Storage(StorageSettings()))
    torch.manual_seed(settings.seed)
    model = build_model(network.model, network.data_config, settings.features, settings.head, {})
    save_model(model, settings.backbone.name, os.path.join(job["folder"], START), Storage(StorageSettings()))
    num_inputs = sum(part.num_inputs for part in model.head("real").parts.values())
    generator = np.random.default_rng(0)
    anchors = generator.standard_normal((sizes.num_images, num_inputs), np.float32)
    sources = generator.integers(0, sizes.num_images, (sizes.num_views, 2))
    noise = generator.standard_normal((sizes.num_views, num_inputs), np.float32)
    views = anchors[sources[:, 0]] + anchors[sources[:, 1]] + noise
    # Ids spread over int64, since held-out images are chosen by them.
    ids = np.sort(generator.integers(0, 2**62, sizes.num_images))
    inputs = Inputs(
        torch.from_numpy(anchors).half(),
        torch.from_numpy(ids),
        torch.from_numpy(views).half(),
        torch.from_numpy(ids[sources]),
    )
    save_file(vars(inputs), os.path.join(job["folder"], INPUTS))
    return {"num_inputs": num_inputs}


def open_inputs(folder: str, settings: TrainSettings) -> InputBatches:
    return InputBatches(Inputs(**load_file(os.path.join(folder, INPUTS))), settings.optimiser, settings.seed, 0, 1)


def plain_loop(job: dict, clock: Clock) -> dict:
    """Seconds per step of the median epoch; no Ray, no checkpoints, and the criterion after each epoch only if asked."""
    settings = TrainSettings.model_validate(job["settings"])
    start = BackboneSettings(name=settings.backbone.name, weights=os.path.join(job["folder"], START))
    model = load_network(start, Storage(StorageSettings())).model
    batches = open_inputs(job["folder"], settings)
    student = student_of(model, settings)
    objective = Objective(student, settings.alignment, settings.disentanglement)
    optimiser = torch.optim.AdamW(trained_groups(student, settings), weight_decay=settings.optimiser.weight_decay)
    total = settings.optimiser.num_epochs * batches.num_steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: rate(step, total, settings.optimiser.warmup_share)
    )
    criterion, epochs = job["criterion"], []
    for epoch in range(settings.optimiser.num_epochs):
        started, cpu = time.perf_counter(), cpu_seconds()
        for batch in batches.epoch(epoch):
            optimiser.zero_grad(set_to_none=True)
            loss = objective(student, student, batch)
            loss.backward()
            optimiser.step()
            schedule.step()
        if criterion:
            batches.criterion(student)
        epochs.append((time.perf_counter() - started, cpu_seconds() - cpu))
    steady = epochs[1:] or epochs  # the first one warms up
    seconds, cpu = (statistics.median(epoch[i] for epoch in steady) / batches.num_steps for i in (0, 1))
    clock.note(LAP, seconds, cpu)
    return {"num_steps": batches.num_steps, "loss": float(loss.detach())}
