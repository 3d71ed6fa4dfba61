"""Benchmark vectors: embeddings of mosaics of crops of real images.

The vector of a crop is the mean of the last feature map of an augmented image under a window, projected by PCA. A
benchmark vector is the mean of the vectors of four crops, weighted by area (a mosaic). A million such vectors vary
continuously, as in a real collection; a million crops of a few thousand images would form tight clusters, which any
search finds. Queries are mosaics of one further, more strongly distorted version of each image.

<folder>/vectors.npy  float16 [n, d]; the first rows are a sample of all
<folder>/queries.npy  float16 [m, d]
<folder>/complete     written last
"""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torchvision.transforms import v2

from attrib.benchmark.settings import VectorBenchmarkSettings
from attrib.common.config import digest
from attrib.common.errors import AttribError
from attrib.common.settings import StorageSettings
from attrib.common.storage import Storage
from attrib.data.decoding import decode_image
from attrib.index.normalize import unit_rows
from attrib.models.encoder import keep_freed_memory, load_network, preprocessing_of
from attrib.models.preprocessing import Preprocessing
from attrib.models.settings import BackboneSettings

MIN_WINDOW = 3  # cells of the map
CROPS_PER_IMAGE = 128
CROPS_PER_MOSAIC = 4
PCA_IMAGES = 256
PCA_WINDOWS = 32  # of each
WHITENING_ROWS, WHITENING_SHRINKAGE = 100_000, 0.01  # rows of the fit; share of the largest variance
BLOCK_ROWS = 65_536  # float32 at a time
MAX_MEGAPIXELS = 100.0
MARKER = "complete"


def make_vectors(
    images: list[str], backbone: BackboneSettings, wanted: VectorBenchmarkSettings, inputs: str, num_processes: int
) -> str:
    """Return the folder of the vectors, below `inputs`. One-thread processes make them unless they exist.

    images: paths. Raises AttribError if the network has too few channels.
    """
    num_vectors, num_queries = wanted.sizes[-1], wanted.batches[-1]
    names = [os.path.basename(path) for path in images]
    options = [wanted.dimension, wanted.map_px, wanted.versions_per_image, CROPS_PER_IMAGE, CROPS_PER_MOSAIC]
    recipe = [names, backbone.model_dump(mode="json"), num_vectors, num_queries, options]
    folder = os.path.join(inputs, f"vectors-{digest(recipe)[:16]}")
    if os.path.exists(os.path.join(folder, MARKER)):
        return folder
    fitted = images[:: max(1, len(images) // PCA_IMAGES)][:PCA_IMAGES]
    with ProcessPoolExecutor(num_processes, get_context("spawn"), _start, (backbone, wanted.map_px)) as pool:
        sample = np.concatenate(list(pool.map(_sample, fitted, range(len(fitted)))))
        if sample.shape[1] < wanted.dimension:
            raise AttribError(
                f"vectors.dimension = {wanted.dimension} exceeds {sample.shape[1]} channels of the network"
            )
        mean, (_, directions) = sample.mean(axis=0), np.linalg.eigh(np.cov(sample, rowvar=False))
        projection = directions[:, ::-1][:, : wanted.dimension].astype(np.float32)  # PCA
        work = [(path, i, wanted.versions_per_image, mean, projection) for i, path in enumerate(images)]
        crops, held_out_crops = (np.concatenate(found) for found in zip(*pool.map(_image_crops, work, chunksize=4)))
    vectors = mosaics(crops, num_vectors, seed=0)
    queries = mosaics(held_out_crops, num_queries, seed=1)
    whiten(vectors, queries)
    return _save(folder, vectors, queries)


def make_gaussian(wanted: VectorBenchmarkSettings, inputs: str) -> str:
    """Return the folder of Gaussian noise, made unless it exists: the worst case for a search by lists."""
    shapes = (wanted.gaussian_size, wanted.dimension), (wanted.batches[-1], wanted.dimension)
    folder = os.path.join(inputs, f"gaussian-{wanted.gaussian_size}-{wanted.batches[-1]}-{wanted.dimension}")
    if os.path.exists(os.path.join(folder, MARKER)):
        return folder
    generator = np.random.default_rng(0)
    return _save(folder, *(unit_rows(generator.standard_normal(s, np.float32)).astype(np.float16) for s in shapes))


def _save(folder: str, vectors: np.ndarray, queries: np.ndarray) -> str:
    os.makedirs(folder, exist_ok=True)
    np.save(os.path.join(folder, "vectors.npy"), vectors)
    np.save(os.path.join(folder, "queries.npy"), queries)
    Path(folder, MARKER).touch()
    return folder


def mosaics(crops: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Mosaics float16 [count, d] of crops, float32 [m, d], L2-normalised; areas are uniform on the simplex."""
    generator, vectors = np.random.default_rng(seed), np.empty((count, crops.shape[1]), np.float16)
    for block in np.split(vectors, range(BLOCK_ROWS, count, BLOCK_ROWS)):
        areas = generator.dirichlet(np.ones(CROPS_PER_MOSAIC), len(block)).astype(np.float32)
        chosen = generator.integers(0, len(crops), areas.shape)
        block[:] = unit_rows(sum(area[:, None] * crops[crop] for area, crop in zip(areas.T, chosen.T)))
    return vectors


def whiten(vectors: np.ndarray, queries: np.ndarray) -> None:
    """Whiten the vectors float16 [n, d] and the queries in place, as the shipped model does.

    Without whitening, most of the variance lies in a few directions, and a search of few lists finds all neighbours.
    """
    sample = vectors[:: max(1, len(vectors) // WHITENING_ROWS)].astype(np.float64)
    mean = sample.mean(axis=0)
    variances, directions = np.linalg.eigh(np.cov(sample, rowvar=False))
    projection = directions / np.sqrt(variances + WHITENING_SHRINKAGE * variances[-1])
    for rows in (vectors, queries):
        for block in np.split(rows, range(BLOCK_ROWS, len(rows), BLOCK_ROWS)):
            block[:] = unit_rows((block.astype(np.float32) - mean) @ projection)


_network: torch.nn.Module
_preprocessing: Preprocessing
_augmentations: tuple[v2.Transform, v2.Transform]  # of crops and of held-out crops


def _start(backbone: BackboneSettings, map_px: int) -> None:
    """Load the network, once per process."""
    global _network, _preprocessing, _augmentations
    torch.set_num_threads(1)
    keep_freed_memory()
    network = load_network(backbone, Storage(StorageSettings()))
    _network = network.model.eval().to(memory_format=torch.channels_last)
    _preprocessing = preprocessing_of(network, backbone.name)
    _augmentations = _augmentation(map_px, 0.2), _augmentation(map_px, 0.4, v2.JPEG((30, 70)))


def _augmentation(map_px: int, strength: float, *more: v2.Transform) -> v2.Transform:
    crop, jitter = v2.RandomResizedCrop(map_px, scale=(0.6, 1.0)), v2.ColorJitter(strength, saturation=strength)
    return v2.Compose([crop, v2.RandomHorizontalFlip(), jitter, *more])


def _sample(path: str, seed: int) -> np.ndarray:
    return _crops(_read(path), np.random.default_rng([seed, 0]), PCA_WINDOWS, held_out=False)


def _image_crops(work: tuple) -> list[np.ndarray]:
    """Crops of the versions of an image, and held-out crops for queries: float32 [CROPS_PER_IMAGE, d] each."""
    path, seed, num_versions, mean, projection = work
    pixels, generator = _read(path), np.random.default_rng([seed, 1])
    counts = np.diff(np.arange(num_versions + 1) * CROPS_PER_IMAGE // num_versions).tolist()
    crops = np.concatenate([_crops(pixels, generator, count, held_out=False) for count in counts])
    held_out = _crops(pixels, generator, CROPS_PER_IMAGE, held_out=True)
    return [unit_rows((rows - mean) @ projection) for rows in (crops, held_out)]


def _read(path: str) -> torch.Tensor:
    return decode_image(Path(path).read_bytes(), max_megapixels=MAX_MEGAPIXELS).pixels


@torch.inference_mode()
def _crops(pixels: torch.Tensor, generator: np.random.Generator, count: int, held_out: bool) -> np.ndarray:
    """float32 [count, c], L2-normalised: crops of one augmented version of uint8 [3, h, w]."""
    torch.manual_seed(int(generator.integers(2**31)))  # of the transforms
    image = _augmentations[held_out](pixels)
    batch = _preprocessing.normalise(image[None], "cpu", torch.float32).contiguous(memory_format=torch.channels_last)
    feature_map = _network.forward_features(batch)[0].permute(1, 2, 0).numpy()
    return unit_rows(_means(feature_map, _windows(count, len(feature_map), generator)))


def _windows(count: int, cells: int, generator: np.random.Generator) -> np.ndarray:
    """float64 [count, 4]: top, left, bottom, right in cells of a square map."""
    size = generator.uniform(min(MIN_WINDOW, cells), cells, (count, 2))
    start = generator.uniform(0, cells - size)
    return np.concatenate([start, start + size], axis=1)


def _means(feature_map: np.ndarray, windows: np.ndarray) -> np.ndarray:
    """Means float32 [n, c] of float32 [h, w, c] under windows; a cell counts by its overlap with the window."""
    overlaps = []
    for axis in (0, 1):
        cells = np.arange(feature_map.shape[axis])
        start, stop = windows[:, axis, None], windows[:, axis + 2, None]
        overlaps.append(np.clip(np.minimum(cells + 1, stop) - np.maximum(cells, start), 0, 1))
    weights = (overlaps[0][:, :, None] * overlaps[1][:, None, :]).reshape(len(windows), -1).astype(np.float32)
    weights /= weights.sum(axis=1, keepdims=True)
    return weights @ feature_map.reshape(-1, feature_map.shape[2])
