"""Run a training function on the workers of Ray Train. It continues after the loss of a worker or of the driver.

<output>/_ray_train/run/   Ray Train's folder: the last checkpoints, each one state.pt
"""

import io
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import ray.train
import torch
from ray import cloudpickle
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from attrib.common.logs import set_up_worker
from attrib.common.scratch import scratch_folder
from attrib.common.seal import opened, sealed
from attrib.common.storage import Storage, is_remote, join, naming
from attrib.runtime.tasks import plain_errors

logger = logging.getLogger(__name__)

FOLDER, STATE = "_ray_train", "state.pt"
MAX_FAILURES = 3  # of workers, in one run
KEPT_CHECKPOINTS = 2


class Run(Protocol):
    """A training run whose state travels in checkpoints. history: one dict of metrics per report."""

    history: list[dict]

    def progress(self) -> str: ...

    def state(self) -> dict: ...

    def restore(self, state: dict) -> None: ...


@dataclass(frozen=True)
class TrainWorker:
    """One of the workers of a training run, as the training function sees it."""

    rank: int
    num_workers: int
    device: torch.device

    def restore(self, run: Run) -> None:
        """Continue from the last checkpoint, if there is one."""
        if checkpoint := ray.train.get_checkpoint():
            run.restore(_load_state(checkpoint))

    def report(self, run: Run) -> None:
        """Report the last row of the history; all workers must call it. Rank 0 saves its state, since all are equal."""
        if self.rank > 0:
            ray.train.report(run.history[-1])
            return
        logger.info(run.progress())
        with scratch_folder() as folder:
            # Not to the file itself: torch makes an error of the disk a RuntimeError without its reason.
            torch.save(run.state(), buffer := io.BytesIO())
            with naming(path := os.path.join(folder, STATE)), open(path, "wb") as file:
                file.write(sealed(buffer.getbuffer()))
            ray.train.report(run.history[-1], checkpoint=Checkpoint.from_directory(folder))


def fit(
    function: Callable, arguments: tuple, *, job: str, num_workers: int, device: str, output: str, storage: Storage
) -> dict:
    """Call function(worker, *arguments) on every worker and return the state of the last checkpoint.

    function: calls worker.restore(run) before it trains and worker.report(run) while it trains.
    device: "cpu" or "cuda", as `device_of` returns it.
    A run that was killed continues from its last checkpoint. Errors that the user can fix are raised as themselves.
    """
    if device == "cpu":
        logger.info(f"{job}: {num_workers} CPU worker(s), NO GPU")
    filesystem, path = storage.resolve(join(output, FOLDER))
    trainer = TorchTrainer(
        _run_worker,
        # As bytes: Ray Train's controller would otherwise import the modules of the function, too, which takes seconds.
        train_loop_config={"train": cloudpickle.dumps(lambda worker: function(worker, *arguments))},
        torch_config=TorchConfig(backend="nccl" if device == "cuda" else "gloo"),
        scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=device == "cuda"),
        # The same name and folder continue a run whose driver died.
        run_config=RunConfig(
            name="run",
            storage_path=path,
            storage_filesystem=filesystem if is_remote(output) else None,
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
            checkpoint_config=CheckpointConfig(num_to_keep=KEPT_CHECKPOINTS),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    with naming(join(output, FOLDER)), plain_errors():
        result = trainer.fit()
    return _load_state(result.checkpoint)


def _run_worker(config: dict) -> None:
    set_up_worker()
    # Ray Train logs every report of every worker at INFO, in part under the root logger.
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    context = ray.train.get_context()
    worker = TrainWorker(context.get_world_rank(), context.get_world_size(), get_device())
    if worker.device.type == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // worker.num_workers))
    cloudpickle.loads(config["train"])(worker)


def _load_state(checkpoint: Checkpoint) -> dict:
    """The state of a checkpoint. Raises AttribError if it was damaged."""
    with checkpoint.as_directory() as folder, open(os.path.join(folder, STATE), "rb") as file:
        content = opened(file.read(), join(checkpoint.path, STATE), f"its folder {FOLDER}")
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
