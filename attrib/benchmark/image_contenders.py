"""Decoding and encoding images: the library, Pillow, TorchCodec alone, the bare network, and a DataLoader script.

A job's keys: folder (of JPEGs), num_images, backbone; of the encoders workers and seconds, of the script loaders and loader_batch_size.
Laps are seconds per image.
"""

import io
import os
import time
from dataclasses import replace
from multiprocessing import get_context

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from attrib.benchmark.contender import Clock, cpu_seconds, set_threads
from attrib.common.settings import StorageSettings
from attrib.common.storage import Storage
from attrib.data.decoding import decode_jpeg
from attrib.embed.settings import EmbedSettings
from attrib.models.encoder import load_encoder, load_network, preprocessing_of
from attrib.models.preprocessing import Preprocessing
from attrib.models.settings import BackboneSettings

READY_IMAGES = 64  # that the bare network sees over and over
WARM_UP_IMAGES = 8
LAP = "image"
MAX_MEGAPIXELS = 100.0


def image_paths(job: dict) -> list[str]:
    return [os.path.join(job["folder"], name) for name in sorted(os.listdir(job["folder"]))[: job["num_images"]]]


def _read(job: dict) -> list[bytes]:
    found = []
    for path in image_paths(job):
        with open(path, "rb") as file:
            found.append(file.read())
    return found


def _preprocessing(job: dict) -> Preprocessing:
    """As the embed job has it by default; with full_size, JPEGs are not scaled while they are decoded."""
    settings = BackboneSettings.model_validate(job["backbone"])
    found = preprocessing_of(load_network(settings, Storage(StorageSettings())), settings.name)
    margin = None if job.get("full_size") else EmbedSettings.model_fields["jpeg_margin"].default
    return replace(found, jpeg_margin=margin)


def _time_images(images: list, clock: Clock, work) -> dict:
    for image in images[:WARM_UP_IMAGES]:
        work(image)
    with clock.lap(LAP, scale=1 / len(images)):
        for image in images:
            work(image)
    return {"num_images": len(images)}


def decode_and_resize(job: dict, clock: Clock) -> dict:
    preprocessing = _preprocessing(job)

    def work(data: bytes) -> None:
        preprocessing.resize_and_crop(preprocessing.decode(data, max_megapixels=MAX_MEGAPIXELS))

    return _time_images(_read(job), clock, work)


def pillow(job: dict, clock: Clock) -> dict:
    """The whole image decoded, then resized and cropped as the preprocessing says."""
    preprocessing = _preprocessing(job)
    crop_px, filter = preprocessing.crop_px, Image.Resampling[preprocessing.interpolation.upper()]

    def work(data: bytes) -> None:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        factor = preprocessing.resize_px / min(image.size)
        image = image.resize((round(factor * image.width), round(factor * image.height)), filter)
        left, top = (image.width - crop_px) // 2, (image.height - crop_px) // 2
        np.array(image.crop((left, top, left + crop_px, top + crop_px)))

    return _time_images(_read(job), clock, work)


def torchcodec(job: dict, clock: Clock) -> dict:
    """Decoding in full size and nothing more. Raises RuntimeError where TorchCodec cannot be loaded."""
    if decode_jpeg is None:
        raise RuntimeError("TorchCodec cannot be loaded here")
    return _time_images(_read(job), clock, lambda data: decode_jpeg(data, mode="RGB"))


def bare_encoder(job: dict, clock: Clock) -> dict:
    """The network alone on tensors that are ready, in `workers` processes at once: the ceiling of an embed job."""
    return _at_once(_encode_ready, job, clock)


def decode_at_once(job: dict, clock: Clock) -> dict:
    """Reading, decoding and resizing alone, in `workers` processes at once."""
    return _at_once(_decode_all, job, clock)


def _at_once(work, job: dict, clock: Clock) -> dict:
    """Seconds per image of `work` in as many one-thread processes at the same time."""
    context = get_context("spawn")
    barrier, rates = context.Barrier(job["workers"]), context.Queue()
    processes = [context.Process(target=work, args=(job, barrier, rates)) for _ in range(job["workers"])]
    for process in processes:
        process.start()
    found = []
    while len(found) < len(processes):
        if any(process.exitcode for process in processes):
            raise RuntimeError(f"a process of {work.__name__} ended before it was done")
        while not rates.empty():
            found.append(rates.get())
        time.sleep(0.05)
    for process in processes:
        process.join()
    rate, cpu_rate = sum(rate for rate, _ in found), sum(cpu for _, cpu in found)
    clock.note(LAP, 1 / rate, cpu_rate / rate)
    return {"images_per_second": rate}


def _encode_ready(job: dict, barrier, rates) -> None:
    set_threads(1)
    encoder = load_encoder(BackboneSettings.model_validate(job["backbone"]), Storage(StorageSettings()))
    crop_px = encoder.preprocessing.crop_px
    pixels = np.random.default_rng(0).integers(0, 256, (READY_IMAGES, 3, crop_px, crop_px), dtype=np.uint8)
    encoder.encode(pixels[: encoder.batch_size])
    _repeat(lambda: encoder.encode(pixels), len(pixels), job["seconds"], barrier, rates)


def _decode_all(job: dict, barrier, rates) -> None:
    set_threads(1)
    preprocessing, paths = _preprocessing(job), image_paths(job)[:READY_IMAGES]

    def work() -> None:
        for path in paths:
            with open(path, "rb") as file:
                preprocessing.resize_and_crop(preprocessing.decode(file.read(), max_megapixels=MAX_MEGAPIXELS))

    work()
    _repeat(work, len(paths), job["seconds"], barrier, rates)


def _repeat(work, count: int, seconds: float, barrier, rates) -> None:
    barrier.wait()
    turns, started, cpu = 0, time.perf_counter(), cpu_seconds()
    while time.perf_counter() - started < seconds:
        work()
        turns += 1
    elapsed = time.perf_counter() - started
    rates.put((turns * count / elapsed, (cpu_seconds() - cpu) / elapsed))


class Files(torch.utils.data.Dataset):
    def __init__(self, paths: list[str], transform):
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, position: int) -> torch.Tensor:
        return self.transform(Image.open(self.paths[position]).convert("RGB"))


@torch.inference_mode()
def data_loader(job: dict, clock: Clock) -> dict:
    """A script of the usual kind: Dataset with Pillow, torchvision's transform, DataLoader, network, vectors in a list."""
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
    # The first batches load and warm up, as the first chunks of the job do.
    skipped = job["loader_batch_size"] * max(1, job["loaders"]) * 2
    loader = torch.utils.data.DataLoader(
        Files(paths, transform), batch_size=job["loader_batch_size"], num_workers=job["loaders"]
    )
    done, started, cpu = 0, None, 0.0
    for batch in loader:
        vectors.append(model(batch).numpy())
        done += len(batch)
        if started is None and done >= min(skipped, len(paths) // 2):
            done, started, cpu = 0, time.perf_counter(), cpu_seconds()
    elapsed = time.perf_counter() - started
    clock.note(LAP, elapsed / done, (cpu_seconds() - cpu) / done)
    return {"images_per_second": done / elapsed, "num_vectors": sum(map(len, vectors))}
