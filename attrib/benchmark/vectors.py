"""Benchmark vectors: embeddings of mosaics of crops of real images.

The vector of a crop is the mean of the last feature map of an augmented image under a window, projected by PCA. A
benchmark vector is the mean of the vectors of four crops, weighted by area (a mosaic). A million such vectors vary
continuously, as in a real collection; a million crops of a few thousand images would form tight clusters, which any
search finds. Queries are mosaics of one further, more strongly distorted version of each image.

<folder>/vectors.npy  float16 [n, d]; the first rows are a sample of all
<folder>/queries.npy  float16 [m, d]
<folder>/made.json    written last
"""

import json
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional

from attrib.benchmark.settings import VectorBenchmarkSettings
from attrib.common.config import digest
from attrib.common.settings import StorageSettings
from attrib.common.storage import Storage
from attrib.data.decoding import decode_image
from attrib.models.encoder import keep_freed_memory, load_network, preprocessing_of
from attrib.models.settings import BackboneSettings

MIN_WINDOW = 3  # cells of the map
CROPS_PER_IMAGE = 128
CROPS_PER_MOSAIC = 4
PCA_IMAGES = 256
PCA_WINDOWS = 32  # of each
WHITENING_ROWS, WHITENING_SHRINKAGE = 100_000, 0.01  # rows of the fit; share of the largest variance
BLOCK_ROWS = 65_536  # float32 at a time
RECORD = "made.json"


def make_vectors(
    images: list[str], backbone: dict, wanted: VectorBenchmarkSettings, inputs: str, num_processes: int
) -> str:
    """Return the folder of the vectors, below `inputs`. One-thread processes make them unless they exist.

    images: paths; backbone: the fields of BackboneSettings.
    """
    names = [os.path.basename(path) for path in images]
    recipe = wanted.model_dump(include={"dimension", "map_px", "versions_per_image"})
    recipe |= {
        "images": names,
        "backbone": backbone,
        "num_vectors": wanted.sizes[-1],
        "num_queries": wanted.batches[-1],
    }
    recipe |= {"crops_per_image": CROPS_PER_IMAGE, "crops_per_mosaic": CROPS_PER_MOSAIC}
    folder = os.path.join(inputs, f"vectors-{digest(recipe)[:16]}")
    if os.path.exists(os.path.join(folder, RECORD)):
        return folder
    fitted = images[:: max(1, len(images) // PCA_IMAGES)][:PCA_IMAGES]
    with ProcessPoolExecutor(num_processes, get_context("spawn"), _start, (backbone, wanted.map_px)) as pool:
        sample = np.concatenate(list(pool.map(_sample, fitted, range(len(fitted)))))
        mean, projection = _principal(sample, wanted.dimension)
        work = [(path, i, wanted.versions_per_image, mean, projection) for i, path in enumerate(images)]
        crops, held_out_crops = (np.concatenate(found) for found in zip(*pool.map(_image_crops, work, chunksize=4)))
    vectors = np.empty((wanted.sizes[-1], wanted.dimension), np.float16)
    queries = np.empty((wanted.batches[-1], wanted.dimension), np.float16)
    fill_with_mosaics(vectors, crops, seed=0)
    fill_with_mosaics(queries, held_out_crops, seed=1)
    whiten(vectors, queries)
    return _save(folder, vectors, queries)


def make_gaussian(wanted: VectorBenchmarkSettings, inputs: str) -> str:
    """Return the folder of Gaussian noise, made unless it exists: the worst case for a search by lists."""
    shapes = (wanted.gaussian_size, wanted.dimension), (wanted.batches[-1], wanted.dimension)
    folder = os.path.join(inputs, f"gaussian-{wanted.gaussian_size}-{wanted.batches[-1]}-{wanted.dimension}")
    if os.path.exists(os.path.join(folder, RECORD)):
        return folder
    generator = np.random.default_rng(0)
    return _save(folder, *(_unit(generator.standard_normal(s, np.float32)).astype(np.float16) for s in shapes))


def _save(folder: str, vectors: np.ndarray, queries: np.ndarray) -> str:
    os.makedirs(folder, exist_ok=True)
    np.save(os.path.join(folder, "vectors.npy"), vectors)
    np.save(os.path.join(folder, "queries.npy"), queries)
    with open(os.path.join(folder, RECORD), "w", encoding="utf-8") as file:
        json.dump({"num_vectors": len(vectors), "num_queries": len(queries)}, file)
    return folder


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def fill_with_mosaics(vectors: np.ndarray, crops: np.ndarray, seed: int) -> None:
    """Fill float16 [n, d] with mosaics of crops, float32 [m, d], L2-normalised; areas are uniform on the simplex."""
    generator = np.random.default_rng(seed)
    for start in range(0, len(vectors), BLOCK_ROWS):
        count = min(BLOCK_ROWS, len(vectors) - start)
        areas = generator.dirichlet(np.ones(CROPS_PER_MOSAIC), count).astype(np.float32)
        chosen = generator.integers(0, len(crops), (count, CROPS_PER_MOSAIC))
        mosaics = sum(areas[:, i, None] * crops[chosen[:, i]] for i in range(CROPS_PER_MOSAIC))
        vectors[start : start + count] = _unit(mosaics)


def whiten(vectors: np.ndarray, queries: np.ndarray) -> None:
    """Whiten the vectors float16 [n, d] and the queries in place, as the shipped model does.

    Without whitening, most of the variance lies in a few directions, and a search of few lists finds all neighbours.
    """
    sample = vectors[:: max(1, len(vectors) // WHITENING_ROWS)].astype(np.float64)
    mean = sample.mean(axis=0)
    variances, directions = np.linalg.eigh(np.cov(sample - mean, rowvar=False))
    projection = directions / np.sqrt(variances + WHITENING_SHRINKAGE * variances[-1])
    for rows in (vectors, queries):
        for start in range(0, len(rows), BLOCK_ROWS):
            block = (rows[start : start + BLOCK_ROWS].astype(np.float32) - mean) @ projection
            rows[start : start + len(block)] = _unit(block)


def _principal(sample: np.ndarray, dimension: int) -> tuple[np.ndarray, np.ndarray]:
    """PCA of L2-normalised rows float32 [n, c]: mean float32 [c] and projection float32 [c, dimension]."""
    mean = sample.mean(axis=0)
    _, directions = np.linalg.eigh(np.cov(sample - mean, rowvar=False))
    projection = directions[:, ::-1][:, :dimension].astype(np.float32)
    if projection.shape[1] < dimension:
        raise ValueError(f"the network has {projection.shape[1]} channels, fewer than vectors.dimension = {dimension}")
    return mean, projection


_network: torch.nn.Module
_preprocessing = None
_map_px = 0


def _start(backbone: dict, map_px: int) -> None:
    """Load the network, once per process."""
    global _network, _preprocessing, _map_px
    torch.set_num_threads(1)
    keep_freed_memory()
    settings = BackboneSettings.model_validate(backbone)
    network = load_network(settings, Storage(StorageSettings()))
    _network = network.model.eval().to(memory_format=torch.channels_last)
    _preprocessing, _map_px = preprocessing_of(network, settings.name), map_px


def _sample(path: str, seed: int) -> np.ndarray:
    generator = np.random.default_rng([seed, 0])
    feature_map = _map(_read(path), generator, distorted=False)
    return _unit(_means(feature_map, _windows(PCA_WINDOWS, len(feature_map), generator, off_grid=False)))


def _image_crops(work: tuple) -> tuple[np.ndarray, np.ndarray]:
    """Crops of the versions of an image, and held-out crops for queries: float32 [CROPS_PER_IMAGE, d] each."""
    path, seed, num_versions, mean, projection = work
    pixels = _read(path)

    def version(key: list[int], count: int, held_out: bool) -> np.ndarray:
        generator = np.random.default_rng([seed, *key])
        feature_map = _map(pixels, generator, distorted=held_out)
        windows = _windows(count, len(feature_map), generator, off_grid=held_out)
        # Rows are L2-normalised before the mean is subtracted, as in the sample on which PCA was fitted.
        lengths = np.linalg.norm(_means(feature_map, windows), axis=1, keepdims=True)
        return _unit(_means(feature_map @ projection, windows) / lengths - mean @ projection)

    counts = np.diff(np.arange(num_versions + 1) * CROPS_PER_IMAGE // num_versions).tolist()
    crops = [version([1, i], count, False) for i, count in enumerate(counts)]
    return np.concatenate(crops), version([2], CROPS_PER_IMAGE, True)


def _read(path: str) -> torch.Tensor:
    with open(path, "rb") as file:
        return decode_image(file.read(), max_megapixels=100.0).pixels


@torch.inference_mode()
def _map(pixels: torch.Tensor, generator: np.random.Generator, distorted: bool) -> np.ndarray:
    """float32 [h, w, c] of one augmented version."""
    height, width = pixels.shape[1:]
    share = generator.uniform(0.6, 1.0) ** 0.5
    crop_height, crop_width = max(1, int(share * height)), max(1, int(share * width))
    top, left = generator.integers(0, height - crop_height + 1), generator.integers(0, width - crop_width + 1)
    image = functional.resized_crop(pixels, int(top), int(left), crop_height, crop_width, [_map_px] * 2, antialias=True)
    if generator.random() < 0.5:
        image = functional.horizontal_flip(image)
    strength = 0.4 if distorted else 0.2
    image = functional.adjust_brightness(image, generator.uniform(1 - strength, 1 + strength))
    image = functional.adjust_saturation(image, generator.uniform(1 - strength, 1 + strength))
    if distorted:
        image = functional.jpeg(image, int(generator.integers(30, 70)))
    batch = _preprocessing.normalise(image[None], "cpu", torch.float32).contiguous(memory_format=torch.channels_last)
    return _network.forward_features(batch)[0].permute(1, 2, 0).contiguous().numpy()


def _windows(count: int, cells: int, generator: np.random.Generator, off_grid: bool) -> np.ndarray:
    """float64 [count, 4]: top, left, bottom, right in cells. Without off_grid: integers, none repeated if possible."""
    least = min(MIN_WINDOW, cells)
    if off_grid:
        size = generator.uniform(least, cells, (count, 2))
        start = generator.uniform(0, cells - size)
        return np.concatenate([start, start + size], axis=1)
    spans = np.array([(start, start + size) for size in range(least, cells + 1) for start in range(cells - size + 1)])
    chosen = generator.choice(len(spans) ** 2, count, replace=count > len(spans) ** 2)
    rows, columns = spans[chosen // len(spans)], spans[chosen % len(spans)]
    return np.stack([rows[:, 0], columns[:, 0], rows[:, 1], columns[:, 1]], axis=1).astype(np.float64)


def _means(feature_map: np.ndarray, windows: np.ndarray) -> np.ndarray:
    """Means float32 [n, c] of float32 [h, w, c] under windows, from the integral image with bilinear interpolation."""
    integral = torch.zeros(1, feature_map.shape[2], feature_map.shape[0] + 1, feature_map.shape[1] + 1)
    integral[0, :, 1:, 1:] = torch.from_numpy(feature_map.cumsum(0, dtype=np.float64).cumsum(1)).permute(2, 0, 1)
    corners = torch.from_numpy(windows[:, [[0, 1], [0, 3], [2, 1], [2, 3]]])  # [n, 4, (y, x)]
    scale = torch.tensor([integral.shape[2] - 1, integral.shape[3] - 1])
    grid = (2 * corners / scale - 1).flip(-1)[None].float()
    at = F.grid_sample(integral, grid, mode="bilinear", align_corners=True)[0]  # [c, n, 4]
    sums = at[:, :, 3] - at[:, :, 1] - at[:, :, 2] + at[:, :, 0]
    area = torch.from_numpy((windows[:, 2] - windows[:, 0]) * (windows[:, 3] - windows[:, 1])).float()
    return (sums / area).T.numpy()
