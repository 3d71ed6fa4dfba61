"""Corpus, generators and controls of the demo: same bytes from the same seed, and a truth that the images support."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

from attrib.common.errors import AttribError
from attrib.common.settings import StorageSettings
from attrib.common.storage import Storage
from attrib.demo import generator, job
from attrib.demo.pictures import COLLECTIONS, METADATA_COLUMNS, STUDIOS, draw_corpus
from attrib.demo.settings import DemoSettings
from attrib.models.encoder import load_encoder
from attrib.models.settings import BackboneSettings


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


NUM_IMAGES, IMAGE_PX = 60, 40


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    keys = draw_corpus(folder, NUM_IMAGES, seed=3, image_px=IMAGE_PX)
    assert sorted(keys) == [name for name in contents(folder) if name != "metadata.csv"]
    return folder


def test_corpus_is_drawn_from_its_seed(corpus, tmp_path):
    draw_corpus(tmp_path / "fewer", 12, seed=3, image_px=IMAGE_PX)
    draw_corpus(tmp_path / "other", 12, seed=4, image_px=IMAGE_PX)
    fewer, whole = contents(tmp_path / "fewer"), contents(corpus)
    assert {name: data for name, data in fewer.items() if name != "metadata.csv"}.items() <= whole.items()
    assert not set(fewer.values()) & set(contents(tmp_path / "other").values())


def test_corpus_metadata_matches_the_files(corpus):
    table = rows(corpus / "metadata.csv")
    images = [name for name in contents(corpus) if name != "metadata.csv"]
    assert tuple(table[0]) == METADATA_COLUMNS
    assert sorted(row["key"] for row in table) == sorted(images)
    assert len(table) == len({(corpus / name).read_bytes() for name in images}) == NUM_IMAGES
    assert {name.rsplit(".")[-1] for name in images} == {"jpg", "png"}
    for row in table:
        assert row["key"].startswith(row["collection"] + "/") and row["collection"] in COLLECTIONS
        assert row["owner"] in STUDIOS
        with Image.open(corpus / row["key"]) as image:
            assert image.size == (IMAGE_PX, IMAGE_PX) and image.mode == "RGB"


def test_images_of_one_collection_differ_in_more_than_grain(corpus):
    drawn = {}
    for row in rows(corpus / "metadata.csv"):
        drawn.setdefault(row["collection"], []).append(generator.read_image(corpus / row["key"]).numpy().astype(float))
    assert drawn.keys() == COLLECTIONS.keys()
    for images in drawn.values():
        differences = [np.abs(a - b).mean() for i, a in enumerate(images) for b in images[:i]]
        assert min(differences) > 8  # of 255; the grain of two images differs by at most 4


def test_corpus_refuses_a_folder_in_use(corpus):
    with pytest.raises(AttribError, match="already holds a corpus"):
        draw_corpus(corpus, 1, seed=0)


@pytest.fixture(scope="module")
def exemplars(corpus):
    """Keys of one image of each of four collections, so that they differ in more than their palette."""
    first = {row["collection"]: row["key"] for row in rows(corpus / "metadata.csv")}
    return list(first.values())[:4]


def test_generator_reproduces_its_exemplar_and_its_samples_are_variations_of_it(corpus, exemplars):
    pixels = torch.stack([generator.read_image(corpus / key) for key in exemplars])
    images = pixels / 255
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        fitted = generator.Generator(images)
        samples = torch.stack([torch.stack([fitted.sample(i) for _ in range(3)]) for i in range(4)]).mul(255).byte()
    for i, image in enumerate(images):
        error = (fitted.render(i, torch.ones(generator.NUM_FREQUENCIES)) - image).abs().mean()
        assert error < 0.25 * (image - image.mean(dim=(1, 2), keepdim=True)).abs().mean()
    assert samples.shape == (4, 3, 3, IMAGE_PX, IMAGE_PX)
    own = np.stack([job.colour_histogram(image.numpy()) for image in pixels])
    made = np.stack([[job.colour_histogram(sample.numpy()) for sample in row] for row in samples])
    similarity = np.einsum("esd,kd->esk", made, own).mean(axis=1)
    others = (similarity.sum(axis=1) - np.diag(similarity)) / 3
    assert np.diag(similarity).mean() > others.mean() + 0.05
    distances = (samples.float() - pixels[:, None]).abs().mean(dim=(2, 3, 4))
    assert distances.min() > 3, "a sample is a copy of its exemplar"


def test_fit_and_sample_writes_the_truth_and_repeats_itself(corpus, exemplars, tmp_path):
    keys, before = exemplars[:2], torch.random.get_rng_state()
    made = [
        generator.fit_and_sample(corpus, keys, tmp_path / name, 2, seed)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [source for _, source in made[0]] == [keys[0], keys[0], keys[1], keys[1]]
    first = contents(tmp_path / "a")
    assert set(first) == {query for query, _ in made[0]} | {"truth.csv"}
    assert [(row["query_key"], row["source_key"]) for row in rows(tmp_path / "a" / "truth.csv")] == made[0]
    assert first == contents(tmp_path / "b")
    assert first != contents(tmp_path / "c")


def test_fit_and_sample_refuses_unclear_sources(corpus, exemplars, tmp_path):
    for keys in ([exemplars[0]] * 2, []):
        with pytest.raises(AttribError, match="at least one exemplar, and each only once"):
            generator.fit_and_sample(corpus, keys, tmp_path, 1, 0)


def test_colour_histogram_against_counting():
    image = np.random.default_rng(0).integers(0, 256, (3, 7, 5), dtype=np.uint8)
    counts = np.zeros((4, 4, 4))
    for red, green, blue in image.reshape(3, -1).T:
        counts[red // 64, green // 64, blue // 64] += 1
    histogram = job.colour_histogram(image)
    assert histogram.dtype == np.float32 and histogram.shape == (64,)
    np.testing.assert_allclose(histogram, np.sqrt(counts.ravel() / 35), atol=1e-6)
    assert np.linalg.norm(histogram) == pytest.approx(1, abs=1e-6)


def test_untrained_network_is_that_of_its_seed_for_small_images(tmp_path):
    storage = Storage(StorageSettings())
    files = [tmp_path / name / "untrained.safetensors" for name in ("a", "b", "c")]
    for file, seed in zip(files, (0, 0, 1)):
        job.save_untrained(file, seed, storage)
    first, again, other = (file.read_bytes() for file in files)
    assert first == again and first != other
    encoder = load_encoder(BackboneSettings(name=job.BACKBONE, weights=str(files[0])), storage)
    assert encoder.preprocessing.crop_px == job.INPUT_PX


def test_recall_is_averaged_and_resampled_by_exemplar():
    settings = DemoSettings(num_exemplars=4, samples_per_exemplar=2)
    assert job.recall(np.ones(8, dtype=bool), settings) == "1.000 [1.000, 1.000]"
    # All samples of an exemplar are found or none: each resample of the four has k of 4 with k binomial(4, 1 / 2),
    # whose 2.5 % quantile is 0 (probability 1 / 16) and whose 97.5 % quantile is 4.
    assert job.recall(np.repeat([True, False, True, False], 2), settings) == "0.500 [0.000, 1.000]"
    # Halves of every exemplar: no exemplar differs from another, so the interval has no width.
    assert job.recall(np.tile([True, False], 4), settings) == "0.500 [0.500, 0.500]"
