"""Images for the stages that decode: those of the collections, or drawn ones, and JPEGs of web size made of them."""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

from attrib.benchmark.settings import BenchmarkSettings, ImageBenchmarkSettings
from attrib.common.config import digest
from attrib.common.errors import AttribError
from attrib.demo.corpus import draw_corpus

READY = "ready"


def source_images(settings: BenchmarkSettings, folder: str) -> list[str]:
    """Paths of the collections' images by name; where there is no collection, of images drawn below `folder`. Raises AttribError if empty."""
    if not settings.collections:
        drawn = Path(folder) / f"drawn-{settings.num_drawn}-{settings.image_px}"
        if not (drawn / "metadata.csv").exists():
            draw_corpus(drawn, settings.num_drawn, seed=0, image_px=settings.image_px)
        return sorted(str(path) for path in drawn.rglob("*") if path.suffix in (".jpg", ".png"))
    found = []
    for collection in settings.collections:
        suffixes = tuple(collection.extensions)
        mine = sorted(str(path) for path in Path(collection.uri).rglob("*") if path.name.lower().endswith(suffixes))
        if not mine:
            raise AttribError(f"collection {collection.name!r}: no image below {collection.uri}")
        found += mine
    return found


def web_jpegs(images: list[str], settings: ImageBenchmarkSettings, folder: str, num_processes: int) -> str:
    """A folder of distinct JPEGs between min_megapixels and max_megapixels; each is a seeded crop of an image, enlarged or shrunk."""
    key = digest([[os.path.basename(path) for path in images], settings.model_dump(mode="json")])[:16]
    made = os.path.join(folder, f"jpegs-{key}")
    if os.path.exists(os.path.join(folder, f"{READY}-{key}")):
        return made
    os.makedirs(made, exist_ok=True)
    work = [(images[i % len(images)], i, settings.model_dump(), made) for i in range(settings.num_images)]
    with ProcessPoolExecutor(num_processes, get_context("spawn")) as pool:
        for _ in pool.map(_write_jpeg, work, chunksize=16):
            pass
    Path(folder, f"{READY}-{key}").touch()
    return made


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
    # Enlarging leaves nothing at the finest scale, where a photograph's file has most of its bytes.
    noise = generator.normal(0, 4, (size[1], size[0], 1)).astype(np.float32)
    pixels = np.clip(np.asarray(image, np.float32) + noise, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(os.path.join(folder, f"{seed:06d}.jpg"), quality=settings["quality"])
