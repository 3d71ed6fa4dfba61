"""Samples against files written by Pillow, and scores of fingerprint methods against loops by definition."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from support.images import picture

from attrib.common.errors import AttribError, ImageError
from attrib.generators.fingerprints.base import SCORINGS, Method, Rescored, check_sides, with_scoring
from attrib.generators.fingerprints.scoring import (
    ADAPTED_SHRINKAGE,
    LEAST_RELIABILITY,
    adapted_by_part,
    adapted_cosine,
    max_cosine,
    mean_cosine,
    nearest_neighbours,
    unit_or_zero,
)
from attrib.generators.signals.degradations import GRID, Degradation, degrade
from attrib.generators.signals.samples import Sample, drawn_sample, read_sample, recoded

pytestmark = pytest.mark.usefixtures("one_thread")


def pixels(seed: int, width: int = 48, height: int = 40) -> torch.Tensor:
    return torch.from_numpy(np.array(picture(seed, width, height))).permute(2, 0, 1)


def rows(seed: int, count: int, dimension: int = 6) -> np.ndarray:
    return unit_or_zero(np.random.default_rng(seed).standard_normal((count, dimension))).astype(np.float32)


GALLERY = [rows(1, 3), rows(2, 5), rows(3, 1)]
QUERIES = rows(4, 20)


@pytest.mark.parametrize("codec", ["PNG", "JPEG", "WEBP"])
def test_a_sample_has_the_pixels_format_and_size_of_its_file(codec):
    file = io.BytesIO()
    picture(0).save(file, codec)
    sample = read_sample(file.getvalue(), max_megapixels=1)
    assert (sample.codec, sample.num_bytes, sample.side_px) == (codec, len(file.getvalue()), 48)
    file.seek(0)
    assert np.array_equal(sample.image.permute(1, 2, 0).numpy(), np.array(Image.open(file).convert("RGB")))
    with pytest.raises(ImageError, match="exceed the limit"):
        read_sample(file.getvalue(), max_megapixels=0.001)


@pytest.mark.parametrize("degradation", GRID, ids=lambda degradation: degradation.name)
def test_a_recoded_sample_has_the_format_and_size_of_the_stored_file(degradation):
    given = Sample(pixels(0), "GIF", 17)
    found = recoded(given, degradation)
    assert torch.equal(found.image, degrade(given.image, degradation))
    file = io.BytesIO()
    if degradation.kind in ("jpeg", "webp"):
        Image.fromarray(given.image.permute(1, 2, 0).numpy()).save(
            file, degradation.kind, quality=int(degradation.strength)
        )
    else:
        Image.fromarray(found.image.permute(1, 2, 0).numpy()).save(file, "PNG", compress_level=1)
    served = read_sample(file.getvalue(), max_megapixels=1)
    assert (found.codec, found.num_bytes) == (served.codec, served.num_bytes)
    assert torch.equal(found.image, served.image)


def test_recoded_files_have_the_same_format():
    image = pixels(1)
    one, other = Sample(image, "JPEG", 900), drawn_sample(image)
    for degradation in (Degradation("none"), Degradation("jpeg", 85)):
        found = [recoded(sample, degradation) for sample in (one, other)]
        assert found[0].codec == found[1].codec and found[0].num_bytes == found[1].num_bytes


def test_mean_cosine():
    found = mean_cosine(GALLERY)(QUERIES)
    for i, query in enumerate(QUERIES):
        for g, group in enumerate(GALLERY):
            mean = sum(group.astype(np.float64)) / len(group)
            expected = sum(query * mean) / np.sqrt(sum(mean**2)) / np.sqrt(sum(query.astype(np.float64) ** 2))
            assert found[i, g] == pytest.approx(expected, abs=1e-6)
    assert found.dtype == np.float32


def test_max_cosine():
    found = max_cosine(GALLERY)(QUERIES)
    expected = [[max(float(sum(query * row)) for row in group) for group in GALLERY] for query in QUERIES]
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("num_neighbours", [1, 4, 9, 100])
def test_nearest_neighbours(num_neighbours):
    found = nearest_neighbours(num_neighbours)(GALLERY)(QUERIES)
    for i, query in enumerate(QUERIES):
        near = sorted(((float(query @ row), g) for g, group in enumerate(GALLERY) for row in group), reverse=True)
        near = near[:num_neighbours]
        expected = [sum((1 + cosine) / 2 for cosine, g in near if g == wanted) / len(near) for wanted in range(3)]
        np.testing.assert_allclose(found[i], expected, atol=1e-6)
    if num_neighbours == 1:
        assert np.array_equal(found.argmax(axis=1), max_cosine(GALLERY)(QUERIES).argmax(axis=1))


def test_ties_of_neighbours_go_to_the_earlier():
    twice = np.array([[1, 0], [1, 0]], np.float32)
    assert nearest_neighbours(1)([twice[:1], twice[1:]])(twice[:1]).tolist() == [[1, 0]]


@pytest.mark.parametrize("dimension", [6, 20])  # fewer than references, and more
def test_adapted_cosine_is_a_cosine_in_the_references_own_space(dimension):
    gallery, queries = [rows(i, count, dimension) for i, count in ((1, 3), (2, 5), (3, 4))], rows(4, 20, dimension)
    means = [sum(group.astype(np.float64)) / len(group) for group in gallery]
    origin = sum(means) / 4
    within = sum(np.outer(r - mean, r - mean) for group, mean in zip(gallery, means) for r in group.astype(float)) / 9
    shrunk = (1 - ADAPTED_SHRINKAGE) * within + ADAPTED_SHRINKAGE * np.trace(within) / dimension * np.eye(dimension)
    values, vectors = np.linalg.eigh(shrunk)
    root = vectors / np.sqrt(values) @ vectors.T  # another root of the inverse: cosines do not see which

    def adapted(row):
        moved = root @ (row - origin)
        return moved / np.sqrt(sum(moved**2))

    found = adapted_cosine(gallery)(queries)
    for i, query in enumerate(queries):
        for g, group in enumerate(gallery):
            centre = sum(adapted(row) for row in group)
            assert found[i, g] == pytest.approx(adapted(query) @ centre / np.sqrt(sum(centre**2)), abs=1e-5)
    assert found.dtype == np.float32


def test_adapted_cosine_without_variance_within_generators():
    for gallery in ([GALLERY[2]], [GALLERY[0][:1].repeat(3, axis=0), GALLERY[1][:1]]):  # no two references differ
        origin = sum(group[0].astype(np.float64) for group in gallery) / (len(gallery) + 1)
        centres = [unit_or_zero(group[:1] - origin) for group in gallery]
        expected = unit_or_zero(QUERIES - origin) @ np.concatenate(centres).T
        np.testing.assert_allclose(adapted_cosine(gallery)(QUERIES), expected, atol=1e-5)


def test_common_components_of_all_generators_do_not_count():
    """All references share a direction. Without it, images of neither generator score low for both."""
    shared = np.array([3, 0, 0, 0, 0, 0])
    make = lambda own, seed: unit_or_zero(shared + own + 0.1 * rows(seed, 10)).astype(np.float32)  # noqa: E731
    a, b, other = make(np.eye(6)[1], 5), make(np.eye(6)[2], 6), make(np.eye(6)[3], 7)
    plain, adapted = (scoring([a, b]) for scoring in (mean_cosine, adapted_cosine))
    assert plain(other).min() > 0.8
    assert adapted(other).max() < 0.65 and adapted(a).max(axis=1).min() > 0.8


def test_parts_are_weighted_by_reliability():
    gallery = [rows(seed, 4) + 2 * np.eye(6, dtype=np.float32)[seed] for seed in range(3)]
    gallery[0] = gallery[0][:3]
    counted, shares = [], []
    for columns in (slice(0, 4), slice(4, 6)):
        parts = [group[:, columns].astype(np.float64) for group in gallery]
        means = [sum(part) / len(part) for part in parts]
        between = sum(sum((mean - sum(means) / 3) ** 2) for mean in means) / 2
        within = sum(sum((row - mean) ** 2) for part, mean in zip(parts, means) for row in part) / (2 + 3 + 3)
        share = 1 - within * (1 / 3 + 1 / 4 + 1 / 4) / 3 / between
        shares.append(max(LEAST_RELIABILITY, share))
        counted += [shares[-1]] * (columns.stop - columns.start)
    weighed = lambda found: unit_or_zero(found * np.sqrt(counted))  # noqa: E731
    expected = adapted_cosine([weighed(group) for group in gallery])(weighed(QUERIES))
    found = adapted_by_part((4, 2), (False, False))(gallery)(QUERIES)
    np.testing.assert_allclose(found, expected * np.sqrt(sum(shares) / 2), atol=1e-5)
    assert 1 > counted[0] > counted[-1] + 0.1  # the trace lies in the first four columns


def test_parts_weigh_the_same_without_reliability():
    for gallery in (GALLERY[:1], [group[:1] for group in GALLERY]):
        found = adapted_by_part((4, 2), (False, False))(gallery)(QUERIES)
        np.testing.assert_allclose(found, adapted_cosine(gallery)(QUERIES), atol=1e-5)
    blank = [group * np.array([1, 1, 1, 1, 0, 0], np.float32) for group in GALLERY]
    assert np.isfinite(adapted_by_part((4, 2), (False, True))(blank)(QUERIES)).all()


def test_a_one_sided_part_never_lowers_a_score():
    """Both parts tell the generators apart, and the second part of some queries has the opposite sign."""
    gallery = [(np.eye(6)[[g] * 4] + np.eye(6)[[4 + g] * 4] + 0.1 * rows(g, 4)).astype(np.float32) for g in range(2)]
    turned = gallery[0] * np.array([1, 1, 1, 1, -1, -1], np.float32)
    two_sided, one_sided = (adapted_by_part((4, 2), (False, only_for))(gallery) for only_for in (False, True))
    np.testing.assert_allclose(one_sided(gallery[0])[:, 0], two_sided(gallery[0])[:, 0], atol=1e-6)
    assert (one_sided(gallery[0])[:, 1] > two_sided(gallery[0])[:, 1]).all()
    assert (one_sided(turned)[:, 0] > two_sided(turned)[:, 0]).all()
    of_other = two_sided(turned)[:, 1] - two_sided(turned)[:, 0], one_sided(turned)[:, 1] - one_sided(turned)[:, 0]
    assert (of_other[1] < of_other[0]).all()


@pytest.mark.parametrize("scoring", SCORINGS.values(), ids=SCORINGS)
def test_a_generator_without_references_is_refused(scoring):
    with pytest.raises(AttribError, match="generator 1 has no references"):
        scoring([GALLERY[0], GALLERY[1][:0]])
    with pytest.raises(AttribError, match="there are no generators"):
        scoring([])


def test_a_zero_vector_scores_zero():
    found = unit_or_zero(np.array([[0.0, 0.0], [3.0, 4.0]]))
    assert found.tolist() == [[0, 0], [0.6, 0.8]]
    assert mean_cosine([found[1:]])(found)[0, 0] == 0


class Means(Method):
    """The mean colour of an image."""

    name, digest, min_side_px, looks_at_trace = "means", "d", 32, False

    def embed(self, samples):
        check_sides(samples, self)
        return unit_or_zero(np.array([sample.image.float().mean(dim=(1, 2)).numpy() for sample in samples]))


def test_images_that_are_too_small_are_named_with_what_is_needed():
    assert Means().embed([drawn_sample(pixels(0, 32, 32))]).shape == (1, 3)
    with pytest.raises(AttribError, match="31x40 pixels is too small for means, which needs 32"):
        Means().embed([drawn_sample(pixels(0)), drawn_sample(pixels(0, 31, 40))])


def test_a_rescored_method_embeds_as_the_one_it_is_made_of():
    method = Means()
    rescored = Rescored(method, "nearest")
    samples = [drawn_sample(pixels(seed)) for seed in range(6)]
    vectors = rescored.embed(samples)
    assert np.array_equal(vectors, method.embed(samples))
    assert (rescored.name, rescored.digest, rescored.min_side_px) == ("means-nearest", method.digest, 32)
    assert not rescored.looks_at_trace
    references = [vectors[:2], vectors[2:4]]
    assert np.array_equal(rescored.scores(references, vectors), max_cosine(references)(vectors))
    assert np.array_equal(method.scores(references, vectors), mean_cosine(references)(vectors))


def test_a_row_of_the_table_names_the_method_that_a_registry_takes():
    method = Means()
    assert with_scoring(method, "cosine") is method and method.registered_as is None  # it looks at no trace
    method.looks_at_trace = True
    assert method.registered_as == "name: means, scoring: cosine"
    row = with_scoring(method, "nearest")
    assert (row.name, row.registered_as) == ("means-nearest", "name: means, scoring: nearest")
