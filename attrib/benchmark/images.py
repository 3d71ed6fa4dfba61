"""Decoding and encoding of JPEGs: this library, a Pillow loop, the network alone, and a PyTorch DataLoader script.

Keys of a job: folder (of JPEGs), num_images, backbone; for `decode_and_resize` full_size; for `encode` workers,
seconds and prepared; for the DataLoader script loaders. Laps are seconds per image.
"""

import io
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from attrib.benchmark.harness import Clock, cpu_seconds
from attrib.benchmark.settings import BenchmarkSettings, ImageBenchmarkSettings
from attrib.common.config import digest
from attrib.common.errors import AttribError
from attrib.common.settings import StorageSettings
from attrib.common.storage import Storage
from attrib.demo.pictures import draw_corpus
from attrib.embed.settings import EmbedSettings
from attrib.models.encoder import Network, load_encoder, load_network, preprocessing_of
from attrib.models.preprocessing import Preprocessing
from attrib.models.settings import BackboneSettings

READY_IMAGES = 64  # images that the timed loops repeat
WARM_UP_IMAGES = 8
LAP = "image"
MAX_MEGAPIXELS = 100.0
JPEG_MARGIN = EmbedSettings.model_fields["jpeg_margin"].default
STORAGE = Storage(StorageSettings())
BARRIER_SECONDS = 600.0  # until all processes must be ready; ends the others if one fails

_barrier = None


def image_paths(job: dict) -> list[Path]:
    return sorted(Path(job["folder"]).glob("*.jpg"))[: job["num_images"]]


def _network(job: dict) -> tuple[Network, Preprocessing]:
    """The network and its preprocessing, by which JPEGs are decoded in full size."""
    network = load_network(BackboneSettings.model_validate(job["backbone"]), STORAGE)
    return network, preprocessing_of(network, job["backbone"]["name"])


def _time_images(job: dict, clock: Clock, work: Callable[[bytes], object]) -> dict:
    images = [path.read_bytes() for path in image_paths(job)]
    for image in images[:WARM_UP_IMAGES]:
        work(image)
    with clock.lap(LAP, scale=1 / len(images)):
        for image in images:
            work(image)
    return {"num_images": len(images)}


def decode_and_resize(job: dict, clock: Clock) -> dict:
    """This library: decode and resize on one thread. full_size: without the JPEG scaling of the embed job."""
    preprocessing = replace(_network(job)[1], jpeg_margin=None if job.get("full_size") else JPEG_MARGIN)
    return _time_images(job, clock, lambda data: _decode(data, preprocessing))


def _decode(data: bytes, preprocessing: Preprocessing) -> torch.Tensor:
    return preprocessing.resize_and_crop(preprocessing.decode(data, max_megapixels=MAX_MEGAPIXELS))


def pillow(job: dict, clock: Clock) -> dict:
    """Pillow: decode in full size, then resize and crop by the same preprocessing."""
    transform = _pillow_transform(_network(job)[1])
    return _time_images(job, clock, lambda data: transform(Image.open(io.BytesIO(data)).convert("RGB")))


def _pillow_transform(preprocessing: Preprocessing, *more: v2.Transform) -> v2.Transform:
    interpolation = v2.InterpolationMode(preprocessing.interpolation)
    resize = v2.Resize(preprocessing.resize_px, interpolation=interpolation)
    return v2.Compose([resize, v2.CenterCrop(preprocessing.crop_px), v2.PILToTensor(), *more])


def encode(job: dict, clock: Clock) -> dict:
    """This library: read, decode, resize and encode, in `workers` one-thread processes at once, as the embed job.

    prepared: the network alone on prepared pixels, the upper limit of the rate.
    """
    context = get_context("spawn")
    barrier = context.Barrier(job["workers"], timeout=BARRIER_SECONDS)
    with ProcessPoolExecutor(job["workers"], context, _set_barrier, (barrier,)) as pool:
        rates, cpu_rates = zip(*pool.map(_encode, [job] * job["workers"]))
    clock.note(LAP, 1 / sum(rates), sum(cpu_rates) / sum(rates))
    return {"images_per_second": sum(rates)}


def _set_barrier(barrier) -> None:
    global _barrier
    _barrier = barrier


def _encode(job: dict) -> tuple[float, float]:
    """Images per second and CPU seconds per second of one process, timed once all processes are ready."""
    encoder = load_encoder(BackboneSettings.model_validate(job["backbone"]), STORAGE, jpeg_margin=JPEG_MARGIN)
    paths, size = image_paths(job)[:READY_IMAGES], encoder.batch_size
    batches = [paths[start : start + size] for start in range(0, len(paths), size)]

    def pixels(batch: list[Path]) -> np.ndarray:
        return np.stack([_decode(path.read_bytes(), encoder.preprocessing).numpy() for path in batch])

    prepared = list(map(pixels, batches)) if job.get("prepared") else None

    def work() -> None:
        for one in prepared or map(pixels, batches):
            encoder.encode(one)

    work()
    _barrier.wait()
    turns, started, cpu = 0, time.perf_counter(), cpu_seconds()
    while time.perf_counter() - started < job["seconds"]:
        work()
        turns += 1
    elapsed = time.perf_counter() - started
    return turns * len(paths) / elapsed, (cpu_seconds() - cpu) / elapsed


def _batch(transform: v2.Transform, paths: list[Path]) -> torch.Tensor:
    return torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])


@torch.inference_mode()
def data_loader(job: dict, clock: Clock) -> dict:
    """A plain PyTorch script: DataLoader with Pillow and a torchvision transform, network, vectors in a list."""
    network, preprocessing = _network(job)
    normalise = v2.Normalize(preprocessing.mean, preprocessing.std)
    transform = _pillow_transform(preprocessing, v2.ToDtype(torch.float32, scale=True), normalise)
    paths, model, vectors = image_paths(job), network.model.eval(), []
    size, loaders, collate = min(16, max(1, len(paths) // 4)), job["loaders"], partial(_batch, transform)
    loader = torch.utils.data.DataLoader(paths, batch_size=size, num_workers=loaders, collate_fn=collate)
    skipped = min(2 * max(1, loaders), len(loader) // 2)  # batches of the warm-up
    for number, batch in enumerate(loader, start=1):
        vectors.append(model(batch).numpy())
        if number == skipped:
            started, cpu = time.perf_counter(), cpu_seconds()
    elapsed, done = time.perf_counter() - started, sum(map(len, vectors[skipped:]))
    clock.note(LAP, elapsed / done, (cpu_seconds() - cpu) / done)
    return {"images_per_second": done / elapsed, "num_vectors": sum(map(len, vectors))}


def source_images(settings: BenchmarkSettings, folder: str) -> list[str]:
    """Paths of the images of the collections, or of images drawn below `folder`. Raises AttribError if empty."""
    searched = {collection.uri: tuple(collection.extensions) for collection in settings.collections}
    if not searched:
        drawn = Path(folder, f"drawn-{settings.num_drawn}-{settings.image_px}")
        if not (drawn / "metadata.csv").exists():
            draw_corpus(drawn, settings.num_drawn, seed=0, image_px=settings.image_px)
        searched = {str(drawn): (".jpg", ".png")}
    found: list[str] = []
    for uri, extensions in searched.items():
        mine = sorted(str(path) for path in Path(uri).rglob("*") if path.name.lower().endswith(extensions))
        if not mine:
            raise AttribError(f"no image below {uri}; correct `collections`")
        found += mine
    return found


def web_jpegs(images: list[str], settings: ImageBenchmarkSettings, folder: str, num_processes: int) -> str:
    """A folder of distinct JPEGs of min_megapixels to max_megapixels: images in random sizes, with noise."""
    key = digest([[os.path.basename(path) for path in images], settings.model_dump(mode="json")])[:16]
    made = Path(folder, f"jpegs-{key}")
    if not (made / "complete").exists():
        made.mkdir(parents=True, exist_ok=True)
        work = [(images[i % len(images)], i, settings, made) for i in range(settings.num_images)]
        with ProcessPoolExecutor(num_processes, get_context("spawn")) as pool:
            list(pool.map(_write_jpeg, work, chunksize=16))
        (made / "complete").touch()
    return str(made)


def _write_jpeg(work: tuple[str, int, ImageBenchmarkSettings, Path]) -> None:
    path, seed, settings, folder = work
    generator, image = np.random.default_rng(seed), Image.open(path).convert("RGB")
    pixels = 1e6 * generator.uniform(settings.min_megapixels, settings.max_megapixels)
    scale = (pixels / (image.width * image.height)) ** 0.5
    image = image.resize([max(1, round(scale * side)) for side in image.size], Image.Resampling.BICUBIC)
    # An enlarged image has no detail at the finest scale, which takes most bytes of a photograph; noise replaces it.
    noise = generator.normal(0, 4, (image.height, image.width, 1)).astype(np.float32)
    image = Image.fromarray(np.clip(np.asarray(image, np.float32) + noise, 0, 255).astype(np.uint8))
    image.save(folder / f"{seed:06d}.jpg", quality=settings.quality)
