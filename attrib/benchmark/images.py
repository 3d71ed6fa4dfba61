"""Decoding and encoding of JPEGs: this library, a Pillow loop, the network alone, and a PyTorch DataLoader script.

Keys of a job: folder (of JPEGs), num_images, backbone; for encoders workers and seconds; for the script loaders and
loader_batch_size. Laps are seconds per image.
"""

import io
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from attrib.benchmark.harness import Clock, cpu_seconds, set_threads
from attrib.benchmark.settings import BenchmarkSettings, ImageBenchmarkSettings
from attrib.common.config import digest
from attrib.common.errors import AttribError
from attrib.common.settings import StorageSettings
from attrib.common.storage import Storage
from attrib.demo.pictures import draw_corpus
from attrib.embed.settings import EmbedSettings
from attrib.models.encoder import load_encoder, load_network, preprocessing_of
from attrib.models.preprocessing import Preprocessing
from attrib.models.settings import BackboneSettings

READY_IMAGES = 64  # images that the timed loops repeat
WARM_UP_IMAGES = 8
LAP = "image"
MAX_MEGAPIXELS = 100.0
BARRIER_SECONDS = 600.0  # until all processes must be ready; ends the others if one fails

_barrier = None


def image_paths(job: dict) -> list[str]:
    return [os.path.join(job["folder"], name) for name in sorted(os.listdir(job["folder"]))[: job["num_images"]]]


def _preprocessing(job: dict) -> Preprocessing:
    """With the default JPEG scaling of the embed job; full_size: JPEGs are decoded in full size."""
    settings = BackboneSettings.model_validate(job["backbone"])
    found = preprocessing_of(load_network(settings, Storage(StorageSettings())), settings.name)
    margin = None if job.get("full_size") else EmbedSettings.model_fields["jpeg_margin"].default
    return replace(found, jpeg_margin=margin)


def _time_images(job: dict, clock: Clock, work) -> dict:
    images = [Path(path).read_bytes() for path in image_paths(job)]
    for image in images[:WARM_UP_IMAGES]:
        work(image)
    with clock.lap(LAP, scale=1 / len(images)):
        for image in images:
            work(image)
    return {"num_images": len(images)}


def decode_and_resize(job: dict, clock: Clock) -> dict:
    """This library: decode and resize on one thread."""
    preprocessing = _preprocessing(job)

    def work(data: bytes) -> None:
        preprocessing.resize_and_crop(preprocessing.decode(data, max_megapixels=MAX_MEGAPIXELS))

    return _time_images(job, clock, work)


def pillow(job: dict, clock: Clock) -> dict:
    """Pillow: decode in full size, then resize and crop by the same preprocessing."""
    preprocessing = _preprocessing(job)
    crop_px, filter = preprocessing.crop_px, Image.Resampling[preprocessing.interpolation.upper()]

    def work(data: bytes) -> None:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        factor = preprocessing.resize_px / min(image.size)
        image = image.resize((round(factor * image.width), round(factor * image.height)), filter)
        left, top = (image.width - crop_px) // 2, (image.height - crop_px) // 2
        np.array(image.crop((left, top, left + crop_px, top + crop_px)))

    return _time_images(job, clock, work)


def encode_files(job: dict, clock: Clock) -> dict:
    """This library: read, decode, resize and encode, in `workers` one-thread processes, as the embed job."""
    return _at_once(_encode_files, job, clock)


def bare_encoder(job: dict, clock: Clock) -> dict:
    """The network alone on prepared pixels, in `workers` one-thread processes at once: the upper limit of the rate."""
    return _at_once(_encode_ready, job, clock)


def _at_once(work, job: dict, clock: Clock) -> dict:
    """Seconds per image of `work` in `workers` one-thread processes at the same time."""
    context = get_context("spawn")
    barrier = context.Barrier(job["workers"], timeout=BARRIER_SECONDS)
    with ProcessPoolExecutor(job["workers"], context, _set_barrier, (barrier,)) as pool:
        rates, cpu_rates = zip(*pool.map(work, [job] * job["workers"]))
    clock.note(LAP, 1 / sum(rates), sum(cpu_rates) / sum(rates))
    return {"images_per_second": sum(rates)}


def _set_barrier(barrier) -> None:
    global _barrier
    _barrier = barrier
    set_threads(1)


def _encode_files(job: dict) -> tuple[float, float]:
    margin = EmbedSettings.model_fields["jpeg_margin"].default
    settings = BackboneSettings.model_validate(job["backbone"])
    encoder = load_encoder(settings, Storage(StorageSettings()), jpeg_margin=margin)
    preprocessing, paths = encoder.preprocessing, image_paths(job)[:READY_IMAGES]

    def work() -> None:
        for start in range(0, len(paths), encoder.batch_size):
            images = (
                preprocessing.decode(Path(path).read_bytes(), max_megapixels=MAX_MEGAPIXELS)
                for path in paths[start : start + encoder.batch_size]
            )
            encoder.encode(np.stack([preprocessing.resize_and_crop(image).numpy() for image in images]))

    return _rates(work, len(paths), job["seconds"])


def _encode_ready(job: dict) -> tuple[float, float]:
    encoder = load_encoder(BackboneSettings.model_validate(job["backbone"]), Storage(StorageSettings()))
    crop_px = encoder.preprocessing.crop_px
    pixels = np.random.default_rng(0).integers(0, 256, (READY_IMAGES, 3, crop_px, crop_px), dtype=np.uint8)
    return _rates(lambda: encoder.encode(pixels), len(pixels), job["seconds"])


def _rates(work, count: int, seconds: float) -> tuple[float, float]:
    """Images per second and CPU seconds per second of `work` on `count` images, once all processes are ready."""
    work()
    _barrier.wait()
    turns, started, cpu = 0, time.perf_counter(), cpu_seconds()
    while time.perf_counter() - started < seconds:
        work()
        turns += 1
    elapsed = time.perf_counter() - started
    return turns * count / elapsed, (cpu_seconds() - cpu) / elapsed


class Files(torch.utils.data.Dataset):
    def __init__(self, paths: list[str], transform):
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, position: int) -> torch.Tensor:
        return self.transform(Image.open(self.paths[position]).convert("RGB"))


@torch.inference_mode()
def data_loader(job: dict, clock: Clock) -> dict:
    """A plain PyTorch script: Dataset with Pillow, torchvision transform, DataLoader, network, vectors in a list."""
    settings = BackboneSettings.model_validate(job["backbone"])
    network = load_network(settings, Storage(StorageSettings()))
    preprocessing = preprocessing_of(network, settings.name)
    transform = v2.Compose(
        [
            v2.Resize(preprocessing.resize_px, interpolation=v2.InterpolationMode(preprocessing.interpolation)),
            v2.CenterCrop(preprocessing.crop_px),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(preprocessing.mean, preprocessing.std),
        ]
    )
    paths, model, vectors = image_paths(job), network.model.eval(), []
    size, loaders = job["loader_batch_size"], job["loaders"]
    skipped = size * max(1, loaders) * 2  # images of the warm-up
    loader = torch.utils.data.DataLoader(Files(paths, transform), batch_size=size, num_workers=loaders)
    done, started, cpu = 0, None, 0.0
    for batch in loader:
        vectors.append(model(batch).numpy())
        done += len(batch)
        if started is None and done >= min(skipped, len(paths) // 2):
            done, started, cpu = 0, time.perf_counter(), cpu_seconds()
    elapsed = time.perf_counter() - started
    clock.note(LAP, elapsed / done, (cpu_seconds() - cpu) / done)
    return {"images_per_second": done / elapsed, "num_vectors": sum(map(len, vectors))}


def source_images(settings: BenchmarkSettings, folder: str) -> list[str]:
    """Paths of the images of the collections, or of images drawn below `folder`. Raises AttribError if empty."""
    if not settings.collections:
        drawn = Path(folder) / f"drawn-{settings.num_drawn}-{settings.image_px}"
        if not (drawn / "metadata.csv").exists():
            draw_corpus(drawn, settings.num_drawn, seed=0, image_px=settings.image_px)
        return sorted(str(path) for path in drawn.rglob("*") if path.suffix in (".jpg", ".png"))
    found = []
    for collection in settings.collections:
        paths, suffixes = Path(collection.uri).rglob("*"), tuple(collection.extensions)
        mine = sorted(str(path) for path in paths if path.name.lower().endswith(suffixes))
        if not mine:
            raise AttribError(f"collection {collection.name!r}: no image below {collection.uri}")
        found += mine
    return found


def web_jpegs(images: list[str], settings: ImageBenchmarkSettings, folder: str, num_processes: int) -> str:
    """A folder of distinct JPEGs of min_megapixels to max_megapixels; each is a resized random crop of an image."""
    key = digest([[os.path.basename(path) for path in images], settings.model_dump(mode="json")])[:16]
    made, ready = Path(folder, f"jpegs-{key}"), Path(folder, f"ready-{key}")
    if not ready.exists():
        made.mkdir(parents=True, exist_ok=True)
        work = [(images[i % len(images)], i, settings.model_dump(), str(made)) for i in range(settings.num_images)]
        with ProcessPoolExecutor(num_processes, get_context("spawn")) as pool:
            list(pool.map(_write_jpeg, work, chunksize=16))
        ready.touch()
    return str(made)


def _write_jpeg(work: tuple) -> None:
    path, seed, settings, folder = work
    generator = np.random.default_rng(seed)
    image = Image.open(path).convert("RGB")
    width, height = image.size
    share = generator.uniform(0.7, 1.0)
    crop_width, crop_height = max(1, int(share * width)), max(1, int(share * height))
    left, top = (int(generator.integers(0, most + 1)) for most in (width - crop_width, height - crop_height))
    pixels = 1e6 * generator.uniform(settings["min_megapixels"], settings["max_megapixels"])
    factor = (pixels / (crop_width * crop_height)) ** 0.5
    size = (max(1, round(factor * crop_width)), max(1, round(factor * crop_height)))
    image = image.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + crop_width, top + crop_height))
    # An enlarged image has no detail at the finest scale, which takes most bytes of a photograph; noise replaces it.
    noise = generator.normal(0, 4, (size[1], size[0], 1)).astype(np.float32)
    pixels = np.clip(np.asarray(image, np.float32) + noise, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(os.path.join(folder, f"{seed:06d}.jpg"), quality=settings["quality"])
