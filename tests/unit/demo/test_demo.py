"""The demo's corpus, generator and encoder: the same bytes from the same seed, and a truth that the pictures bear out."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from attrib.common.errors import AttribError
from attrib.demo import contrast, generator
from attrib.demo.corpus import COLLECTIONS, METADATA_COLUMNS, STUDIOS, draw_corpus
from attrib.demo.views import NUM_PARAMETERS, ViewRange, draw_parameters, render_views

NO_CHANGE = ViewRange(
    zoom=(1, 1), stretch=1, turn_turns=0, shift=0, bend=0, mirror_share=0, hue_turns=0, saturation=(1, 1), contrast=(1, 1), brightness=0,
    grey_share=0, blur_share=0,
)  # fmt: skip


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    draw_corpus(folder, 40, seed=3, image_px=48)
    return folder


def test_corpus_is_drawn_from_its_seed(corpus, tmp_path):
    draw_corpus(tmp_path / "fewer", 25, seed=3, image_px=48)
    draw_corpus(tmp_path / "other", 25, seed=4, image_px=48)
    fewer, whole = contents(tmp_path / "fewer"), contents(corpus)
    assert {name: data for name, data in fewer.items() if name != "metadata.csv"}.items() <= whole.items()
    assert not set(fewer.values()) & set(contents(tmp_path / "other").values())


def test_corpus_metadata_matches_the_files(corpus):
    table = rows(corpus / "metadata.csv")
    pictures = [name for name in contents(corpus) if name != "metadata.csv"]
    assert tuple(table[0]) == METADATA_COLUMNS
    assert sorted(row["key"] for row in table) == sorted(pictures)
    assert len(table) == len({(corpus / name).read_bytes() for name in pictures}) == 40
    assert {name.rsplit(".")[-1] for name in pictures} == {"jpg", "png"}
    for row in table:
        assert (
            row["key"].startswith(row["collection"] + "/")
            and row["collection"] in COLLECTIONS
            and row["owner"] in STUDIOS
        )
        with Image.open(corpus / row["key"]) as image:
            assert image.size == (48, 48) and image.mode == "RGB"


def test_corpus_refuses_a_folder_in_use(corpus):
    with pytest.raises(AttribError, match="already holds a corpus"):
        draw_corpus(corpus, 1, seed=0)


def test_view_without_change_is_the_image():
    images = torch.rand(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    parameters = draw_parameters(3, torch.Generator().manual_seed(1))
    assert parameters.shape == (3, NUM_PARAMETERS)
    torch.testing.assert_close(render_views(images, parameters, 24, NO_CHANGE), images, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def exemplars(corpus):
    """One of each of four collections, so that they differ in more than their palette."""
    first = {row["collection"]: corpus / row["key"] for row in rows(corpus / "metadata.csv")}
    return list(first.values())[:4]


def test_fit_lowers_the_loss_and_samples_resemble_their_own_exemplar(exemplars):
    images = torch.stack([generator._read(file) for file in exemplars])
    fitted = generator.fit(images, num_steps=50, seed=0, num_views=8, batch_size=16)
    assert np.mean(fitted.losses[-5:]) < 0.6 * fitted.losses[0]
    pictures = generator.sample(fitted, 3, seed=1).numpy()
    assert pictures.shape == (4, 3, 96, 96, 3) and pictures.dtype == np.uint8
    own = np.stack([contrast.colour_histogram(image.permute(1, 2, 0).mul(255).byte().numpy()) for image in images])
    made = np.stack([[contrast.colour_histogram(picture) for picture in row] for row in pictures])
    similarity = np.einsum("esd,kd->esk", made, own).mean(axis=1)
    others = (similarity.sum(axis=1) - np.diag(similarity)) / 3
    assert np.diag(similarity).mean() > others.mean() + 0.05
    distances = [
        np.abs(pictures[e, s] - images[e].permute(1, 2, 0).numpy() * 255).mean() for e in range(4) for s in range(3)
    ]
    assert min(distances) > 3, "a sample is a copy of its exemplar"


def test_fit_and_sample_writes_the_truth_and_repeats_itself(corpus, exemplars, tmp_path):
    made = [
        generator.fit_and_sample(exemplars[:2], tmp_path / name, 2, seed, corpus, num_steps=4)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    keys = [file.relative_to(corpus).as_posix() for file in exemplars[:2]]
    assert [source for _, source in made[0]] == [keys[0], keys[0], keys[1], keys[1]]
    first = contents(tmp_path / "a")
    assert set(first) == {query for query, _ in made[0]} | {"truth.csv"}
    assert [(row["query_key"], row["source_key"]) for row in rows(tmp_path / "a" / "truth.csv")] == made[0]
    assert first == contents(tmp_path / "b")
    assert first != contents(tmp_path / "c")


def test_fit_and_sample_refuses_unclear_sources(corpus, exemplars, tmp_path):
    with pytest.raises(AttribError, match="only once"):
        generator.fit_and_sample([exemplars[0]] * 2, tmp_path, 1, 0, corpus)
    with pytest.raises(AttribError, match="not below the corpus"):
        generator.fit_and_sample([exemplars[0]], tmp_path, 1, 0, tmp_path / "elsewhere")


def test_colour_histogram_against_counting():
    image = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    counts = np.zeros((4, 4, 4))
    for red, green, blue in image.reshape(-1, 3):
        counts[red // 64, green // 64, blue // 64] += 1
    expected = np.sqrt(counts.ravel() / 35)
    histogram = contrast.colour_histogram(image)
    assert histogram.dtype == np.float32 and histogram.shape == (64,)
    np.testing.assert_allclose(histogram, expected, atol=1e-6)
    assert np.linalg.norm(histogram) == pytest.approx(1, abs=1e-6)


def test_info_nce_against_its_definition():
    chance = torch.Generator().manual_seed(0)
    first, second = torch.randn(5, 8, generator=chance), torch.randn(5, 8, generator=chance)
    both = torch.cat([first, second]) / torch.cat([first, second]).norm(dim=1, keepdim=True)
    terms = []
    for i in range(10):
        weights = [torch.exp(both[i] @ both[k] / 0.2) for k in range(10)]
        terms.append(-torch.log(weights[(i + 5) % 10] / (sum(weights) - weights[i])))
    torch.testing.assert_close(contrast.info_nce(first, second, 0.2), torch.stack(terms).mean())


def test_training_starts_from_the_untrained_control(corpus, tmp_path):
    files = sorted(corpus.glob("*/*.*"))
    losses = contrast.train_contrast(files, tmp_path / "trained.safetensors", seed=0, num_epochs=4, batch_size=20)
    assert len(losses) == 4 and losses[-1] < losses[0]
    contrast.train_contrast(files, tmp_path / "again.safetensors", seed=0, num_epochs=4, batch_size=20)
    contrast.save_untrained(tmp_path / "untrained.safetensors", seed=0)
    states = {}
    for name in ("trained", "again", "untrained"):
        with safe_open(tmp_path / f"{name}.safetensors", framework="pt") as file:
            assert json.loads(file.metadata()["attrib.backbone"]) == {
                "name": contrast.BACKBONE,
                "data_config": contrast.DATA_CONFIG,
            }
            states[name] = {key: file.get_tensor(key) for key in file.keys()}
    assert states["trained"].keys() == states["untrained"].keys()
    assert all(torch.equal(states["trained"][key], states["again"][key]) for key in states["trained"])
    assert not all(torch.equal(states["trained"][key], states["untrained"][key]) for key in states["trained"])


def test_training_refuses_less_than_a_batch(corpus, tmp_path):
    with pytest.raises(AttribError, match="fewer than one batch"):
        contrast.train_contrast(sorted(corpus.glob("*/*.png"))[:3], tmp_path / "x.safetensors", seed=0)
