"""The demo: draw sources, fit generators to some of them, train a small network, attribute the generated images, compare with the truth."""

import logging
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from attrib.common.storage import Storage, fresh_folder
from attrib.data.decoding import decode_image
from attrib.demo.contrast import BACKBONE, colour_histogram, save_untrained, train_contrast
from attrib.demo.corpus import draw_corpus
from attrib.demo.generator import fit_and_sample
from attrib.demo.settings import DemoSettings
from attrib.index.normalize import unit_rows
from attrib.models.encoder import load_encoder
from attrib.models.settings import BackboneSettings
from attrib.pipeline import job as pipeline_job
from attrib.pipeline.settings import PipelineSettings

logger = logging.getLogger(__name__)

RECALL_AT = (1, 10)
MAX_MEGAPIXELS = 10.0
CLEAR_SIMILARITY = 0.93  # of this small network, which finds all drawn pictures rather alike


def run(settings: DemoSettings) -> str:
    """Run the demo afresh and return what to print at its end. Raises AttribError if the output folder holds something else."""
    folder = Path(fresh_folder(settings.output, "jobs.demo"))
    sources, generated, weights = folder / "sources", folder / "generated", folder / "weights"
    weights.mkdir()
    with _Step(f"draw {settings.num_sources:,} sources"):
        draw_corpus(sources, settings.num_sources, settings.seed)
    files = sorted(path for path in sources.rglob("*") if path.suffix in (".png", ".jpg"))
    chosen = np.random.default_rng(settings.seed).choice(len(files), settings.num_exemplars, replace=False)
    with _Step(f"fit a generator to each of {settings.num_exemplars} exemplars and sample it"):
        truth = fit_and_sample(
            [files[i] for i in sorted(chosen)], generated, settings.samples_per_exemplar, settings.seed, sources
        )
    with _Step(f"train {BACKBONE} by contrast on the sources alone"):
        train_contrast(files, weights / "trained.safetensors", settings.seed, settings.num_epochs)
        save_untrained(weights / "untrained.safetensors", settings.seed)
    flow = PipelineSettings(
        sources={"name": "drawn", "uri": str(sources), "metadata": {"uri": str(sources / "metadata.csv")}},
        generated={
            "name": "generated",
            "uri": str(generated),
            "metadata": {"uri": str(generated / "truth.csv"), "key_column": "query_key"},
        },
        output=str(folder / "run"),
        backbone={"name": BACKBONE, "weights": str(weights / "trained.safetensors")},
        storage=settings.storage,
        ray=settings.ray,
        report={"title": "Demo: drawn sources, generated images", "clear_similarity": CLEAR_SIMILARITY},
    )
    with _Step("run the flow"):
        summary = pipeline_job.run(flow)
    with _Step("score the controls"):
        recalls = _recalls(flow, files, sources, generated, weights, truth)
    lines = [
        f"\nrecall of the true source of {len(truth)} generated images among {len(files):,}:",
        f"{'':34}" + "".join(f"{f'@{k}':>8}" for k in RECALL_AT),
    ]
    lines += [f"{name:34}" + "".join(f"{value:8.3f}" for value in values) for name, values in recalls.items()]
    return "\n".join([*lines, "", *(f"{name + ':':26}{value}" for name, value in summary.items())])


class _Step:
    """Says what begins and how long it took."""

    def __init__(self, what: str):
        self.what = what

    def __enter__(self):
        logger.info(f"demo: {self.what} ...")
        self.started = time.monotonic()

    def __exit__(self, *_):
        logger.info(f"demo: {self.what}: {time.monotonic() - self.started:.0f} s")


def _recalls(
    flow: PipelineSettings,
    files: list[Path],
    sources: Path,
    generated: Path,
    weights: Path,
    truth: list[tuple[str, str]],
) -> dict[str, list[float]]:
    """Recall at RECALL_AT by what ranked the sources: the run's own Parquet, and controls by brute force."""
    keys = [path.relative_to(sources).as_posix() for path in files]
    source_pixels = [decode_image(path.read_bytes(), max_megapixels=MAX_MEGAPIXELS).pixels for path in files]
    query_pixels = [
        decode_image((generated / key).read_bytes(), max_megapixels=MAX_MEGAPIXELS).pixels for key, _ in truth
    ]
    true = np.array([keys.index(source) for _, source in truth])

    untrained = load_encoder(
        BackboneSettings(name=BACKBONE, weights=str(weights / "untrained.safetensors")), Storage(flow.storage)
    )
    resize = untrained.preprocessing.resize_and_crop

    def embed(pixels):
        return untrained.encode(np.stack([resize(image).numpy() for image in pixels]))

    def histogram(pixels):
        return np.stack([colour_histogram(image.permute(1, 2, 0).numpy()) for image in pixels])

    return {
        "this run (Parquet)": _recall_of_run(flow, truth),
        "colour histogram": _recall(histogram(source_pixels), histogram(query_pixels), true),
        "the same network, untrained": _recall(embed(source_pixels), embed(query_pixels), true),
        "chance": [k / len(files) for k in RECALL_AT],
    }


def _recall(sources: np.ndarray, queries: np.ndarray, true: np.ndarray) -> list[float]:
    """sources: float [n, d]; queries: float [m, d]; true: int [m], the position of each query's source."""
    similarity = unit_rows(queries) @ unit_rows(sources).T
    rank = 1 + (similarity > similarity[np.arange(len(true)), true][:, None]).sum(axis=1)
    return [float(np.mean(rank <= k)) for k in RECALL_AT]


def _recall_of_run(flow: PipelineSettings, truth: list[tuple[str, str]]) -> list[float]:
    storage = Storage(flow.storage)
    folder = Path(flow.output) / "attributions" / "attributions"
    columns = ["query_key", "source_key", "rank"]
    rows = pa.concat_tables(
        [storage.read_table(str(folder / name), columns=columns) for name in storage.names(str(folder), ".parquet")]
    )
    expected = dict(truth)
    found = [row["rank"] for row in rows.to_pylist() if expected[row["query_key"]] == row["source_key"]]
    return [sum(rank <= k for rank in found) / len(truth) for k in RECALL_AT]
