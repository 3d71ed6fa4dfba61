"""The demo: draw sources, fit generators to some of them, train with jobs.train, attribute, compare with the truth.

<output>/sources/     drawn images and their metadata.csv
<output>/generated/   samples of the generators and truth.csv
<output>/weights/     untrained.safetensors, the small network with random weights
<output>/model/       what jobs.train writes
<output>/run/         what jobs.pipeline writes
"""

import json
import logging
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_model

from attrib.attribute.report import open_run
from attrib.common.storage import Storage, fresh_folder
from attrib.data import job as manifest_job
from attrib.demo.generator import fit_and_sample, read_image
from attrib.demo.pictures import draw_corpus
from attrib.demo.settings import DemoSettings
from attrib.index.normalize import unit_rows
from attrib.models.encoder import load_encoder, load_network
from attrib.models.model import CHECKPOINT_KEY
from attrib.models.settings import BackboneSettings
from attrib.pipeline import job as pipeline_job
from attrib.pipeline.settings import PipelineSettings
from attrib.train import job as train_job
from attrib.train.settings import TrainSettings

logger = logging.getLogger(__name__)

BACKBONE = "test_resnet"
INPUT_PX = 64
PART = {"blocks": ["layout_2", "layout_3", "moments", "pooled"], "dimension": 128}
TRAINING: dict = {  # a head on statistics of the random network takes seconds; end to end would take many minutes
    "features": {"moment_levels": [0, 1, 2, 3, 4], "layout_levels": [2, 3], "layout_grid": 6, "whole_image": True},
    "head": {"num_directions": 256, "parts": {"all": PART}},
    "views": {"mix": {"texture": 0, "bands": 0}, "hue_probability": 0.8, "flip_probability": 0.1},
    "views_per_image": 6,
    "alignment": {"temperature": 0.05, "style_weight": 0.0},  # the samples copy no style from another source
    "disentanglement": {"kind": "none"},
    "optimiser": {"learning_rate": 1e-3, "patience_epochs": 6},
}
FOLDERS = ("sources", "generated", "weights", "model", "run")  # of the output, made anew by each run
RECALL_AT = (1, 10)
NUM_RESAMPLES = 2000  # of the exemplars, for the intervals
CLEAR_SIMILARITY = 0.6  # few best matches of the generated images reach it


def run(settings: DemoSettings) -> str:
    """Run the demo from the start and return what to print at its end.

    Raises AttribError if the output folder holds something else.
    """
    folder = Path(fresh_folder(settings.output, "jobs.demo", FOLDERS))
    sources, generated = folder / "sources", folder / "generated"
    weights, model = folder / "weights" / "untrained.safetensors", folder / "model"
    owners, truths = str(sources / "metadata.csv"), str(generated / "truth.csv")
    common = {"storage": settings.storage, "ray": settings.ray}
    flow = PipelineSettings(
        sources={"name": "drawn", "uri": str(sources), "metadata": {"uri": owners}},
        generated={"name": "generated", "uri": str(generated), "metadata": {"uri": truths, "key_column": "query_key"}},
        output=str(folder / "run"),
        backbone={"name": BACKBONE, "weights": str(model / train_job.MODEL)},
        report={"title": "Demo: drawn sources, generated images", "clear_similarity": CLEAR_SIMILARITY},
        **common,
    )
    manifest = flow.stages()["sources/manifest"]
    training = TrainSettings(
        manifest=manifest.output,
        output=str(model),
        backbone={"name": BACKBONE, "weights": str(weights)},
        seed=settings.seed,
        **TRAINING | {"optimiser": TRAINING["optimiser"] | {"num_epochs": settings.num_epochs}},
        **common,
    )
    storage = Storage(settings.storage)
    logger.info(f"demo: draw {settings.num_sources:,} sources")
    keys = draw_corpus(sources, settings.num_sources, settings.seed)
    logger.info(f"demo: fit a generator to each of {settings.num_exemplars} exemplars and sample it")
    chosen = np.random.default_rng(settings.seed).choice(keys, settings.num_exemplars, replace=False)
    truth = fit_and_sample(sources, chosen.tolist(), generated, settings.samples_per_exemplar, settings.seed)
    logger.info(f"demo: train {BACKBONE} with jobs.train on the sources alone")
    save_untrained(weights, settings.seed, storage)
    manifest_job.run(manifest)
    train_job.run(training)
    logger.info("demo: run the flow")
    summary = pipeline_job.run(flow)
    logger.info("demo: score the controls")
    ranks = {"this run (Parquet)": _ranks_of_run(flow.stages()["attributions"].output, truth, storage)}
    controls = {"the same network, untrained": weights, "the same, whitened, no training": model / train_job.START}
    images = [read_image(file) for file in [*(sources / key for key in keys), *(generated / key for key, _ in truth)]]
    ranks |= _ranks_of_controls(images, [keys.index(source) for _, source in truth], controls, storage)
    lines = [
        f"\nrecall of the true source of {len(truth)} generated images among {len(keys):,}, with 95 % intervals "
        "over the exemplars:",
        f"{'':34}" + "".join(f"{f'@{k}':>24}" for k in RECALL_AT),
    ]
    for name, found in ranks.items():
        lines.append(f"{name:34}" + "".join(f"{recall(found <= k, settings):>24}" for k in RECALL_AT))
    lines.append(f"{'chance':34}" + "".join(f"{k / len(keys):24.3f}" for k in RECALL_AT))
    return "\n".join([*lines, "", *(f"{name + ':':26}{value}" for name, value in summary.items())])


def save_untrained(path: Path, seed: int, storage: Storage) -> None:
    """Write BACKBONE with random weights, for images of INPUT_PX: the start of the training, and a control."""
    model = load_network(BackboneSettings(name=BACKBONE, weights="random", seed=seed), storage).model
    data_config = {"input_size": [3, INPUT_PX, INPUT_PX], "interpolation": "bicubic", "mean": [0.5] * 3}
    data_config |= {"std": [0.25] * 3, "crop_pct": 1.0, "crop_mode": "center"}
    path.parent.mkdir(exist_ok=True)
    declared = json.dumps({"name": BACKBONE, "data_config": data_config})
    save_model(model, str(path), metadata={CHECKPOINT_KEY: declared})


def colour_histogram(image: np.ndarray, bins: int = 4) -> np.ndarray:
    """Return the square roots float32 [bins ** 3] of the joint histogram of the channels of uint8 [3, h, w] RGB.

    A dot product of two is their Bhattacharyya coefficient.
    """
    counts, _ = np.histogramdd(image.reshape(3, -1).T, bins, [(0, 256)] * 3)
    return np.sqrt(counts.ravel() / counts.sum()).astype(np.float32)


def _ranks_of_run(attributions: str, truth: list[tuple[str, str]], storage: Storage) -> np.ndarray:
    """Return float [m]: rank of the true source in the rows of the run; infinite where it is not among them."""
    rows = open_run(attributions, storage).rows.to_table(columns=["query_key", "source_key", "rank"])
    found = {(row["query_key"], row["source_key"]): row["rank"] for row in rows.to_pylist()}
    return np.array([found.get(pair, np.inf) for pair in truth])


def _ranks_of_controls(
    images: list[torch.Tensor], true: list[int], networks: dict[str, Path], storage: Storage
) -> dict[str, np.ndarray]:
    """Return by control int [m]: rank of the true source in exact search.

    images: uint8 [3, h, w], of the sources, then of m queries; true: [m], their sources; networks: weights by name.
    """
    vectors = {"colour histogram": np.stack([colour_histogram(image.numpy()) for image in images])}
    for name, weights in networks.items():
        encoder = load_encoder(BackboneSettings(name=BACKBONE, weights=str(weights)), storage)
        pixels = [encoder.preprocessing.resize_and_crop(image).numpy() for image in images]
        vectors[name] = encoder.encode(np.stack(pixels))
    ranks = {}
    for name, found in vectors.items():
        sources, queries = np.split(unit_rows(found), [-len(true)])
        similarity = queries @ sources.T
        ranks[name] = 1 + (similarity > similarity[np.arange(len(true)), true][:, None]).sum(axis=1)
    return ranks


def recall(is_found: np.ndarray, settings: DemoSettings) -> str:
    """Return the share with its 95 % bootstrap interval over exemplars. is_found: bool [m], by exemplar."""
    by_exemplar = is_found.reshape(settings.num_exemplars, -1).mean(axis=1)
    drawn = np.random.default_rng(0).integers(len(by_exemplar), size=(NUM_RESAMPLES, len(by_exemplar)))
    low, high = np.percentile(by_exemplar[drawn].mean(axis=1), [2.5, 97.5])
    return f"{by_exemplar.mean():.3f} [{low:.3f}, {high:.3f}]"
