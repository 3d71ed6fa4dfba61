"""The extractor: the fit of its whitening, its vectors and its file."""

import itertools

import numpy as np
import pytest
import torch
from support.pool import smooth_images, traced

from attrib.common.errors import AttribError
from attrib.generators.extractor.batches import PoolImages
from attrib.generators.extractor.network import (
    PARTS,
    RECORD,
    STATISTICS,
    WEIGHTS,
    Extractor,
    ExtractorPart,
    FingerprintNetwork,
    balanced,
    extractor_digest,
    load_extractor,
    save_extractor,
    untrained,
)
from attrib.generators.extractor.settings import FingerprintSettings, NetworkSettings
from attrib.generators.extractor.training import SHRINKAGE, initial_network, whiten, whitening_patches
from attrib.generators.fingerprints.base import Method, with_scoring
from attrib.generators.fingerprints.scoring import adapted_by_part
from attrib.generators.signals.degradations import NONE, Degradation, degrade
from attrib.generators.signals.samples import Sample
from attrib.generators.signals.spectrum import colour_spectrum, patches, polyphase_means, residual

SETTINGS = NetworkSettings(patch_px=16, min_side_px=12, max_patches=4, window_px=4, num_learned=24, width=8)
COLUMNS = {
    "colour-spectrum": slice(0, 144),
    "polyphase": slice(144, 336),
    "learned": slice(336, 360),
}  # 2 x 6 x 4 x 3 and 3 x 8 x 8 numbers, and 24


def random_network(seed: int = 0) -> FingerprintNetwork:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FingerprintNetwork(SETTINGS)


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return Extractor(random_network())


@pytest.fixture(scope="module")
def images() -> list[torch.Tensor]:
    """The last two are smaller than a patch of 16 px."""
    return [smooth_images(1, 48, seed)[0][:, : 16 + 7 * seed, : 48 - 6 * seed] for seed in range(5)] + [
        smooth_images(1, 48, seed)[0][:, :side, :40] for seed, side in ((5, 12), (6, 15))
    ]


def raw(network: FingerprintNetwork, cut: torch.Tensor) -> torch.Tensor:
    """All parts before whitening."""
    residuals = residual(cut.float() / 255)
    statistics = [colour_spectrum(residuals, 4).flatten(1), polyphase_means(residuals).flatten(1)]
    return torch.cat([*statistics, network.learned(cut)], dim=1)


def scaled(rows: torch.Tensor) -> torch.Tensor:
    """Parts of lengths 1, 1 and 0.5, then the whole of length 1."""
    lengths = {"colour-spectrum": 1, "polyphase": 1, "learned": 0.5}
    parts = [lengths[name] * rows[:, own] / rows[:, own].norm(dim=1, keepdim=True) for name, own in COLUMNS.items()]
    return torch.cat(parts, dim=1) / 2.25**0.5


def test_a_vector_is_its_whitened_parts_scaled_to_their_lengths():
    network, generator = random_network(), torch.Generator().manual_seed(1)
    cut = patches(smooth_images(1, 48, 0)[0], 16, 9)
    expected = raw(network, cut)
    for name, own in COLUMNS.items():
        size = own.stop - own.start
        mean, projection = torch.randn(size, generator=generator), torch.randn(size, size, generator=generator)
        network.whiten(name, mean, projection)
        expected[:, own] = (expected[:, own] - mean) @ projection
    torch.testing.assert_close(network(cut), scaled(expected), atol=1e-5, rtol=1e-4)
    assert SETTINGS.part_sizes == (144, 192, 24) and list(COLUMNS) == list(PARTS) and len(cut) == 9


def test_a_part_of_zeros_stays_zero():
    rows = torch.zeros(2, 6)
    rows[0, 3:] = torch.tensor([3.0, 4.0, 7.0])
    found = balanced(dict(zip(PARTS, rows.split((3, 2, 1), dim=1))))
    torch.testing.assert_close(found[0] * 1.25**0.5, torch.tensor([0, 0, 0, 0.6, 0.8, 0.5]))
    assert not found[1].any()


def test_all_parameters_have_gradients_and_a_flat_patch_has_finite_ones():
    network = random_network()
    flat = torch.full((1, 3, 16, 16), 128, dtype=torch.uint8)
    network.learned(torch.cat([smooth_images(3, 16, 0), flat]))[:, 0].sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name


def test_the_learned_part_depends_on_the_phase_of_a_pattern():
    """The pattern has a period of 8 px. A shift by 8 px changes nothing, one by 4 px does, and not only at borders."""
    network = random_network()
    board = torch.full((3, 96, 96), 100, dtype=torch.uint8)
    board[:, ::8, ::8] = 120
    cut = torch.stack([board[:, at : at + 80, at : at + 80] for at in (0, 8, 4)])
    first, same, moved = network.learned(cut)
    assert torch.equal(first, same)
    with torch.no_grad():
        network.head.weight[:, 2 * 4 * SETTINGS.width :] = 0  # keeps the means and deviations of whole maps
    without, _, moved_without = network.learned(cut)
    by_border = (without - moved_without).norm()
    assert (first - moved).norm() > 4 * by_border > 0, (first - moved, by_border)


@pytest.mark.parametrize("seen", [slice(0, 3), slice(3, 6)], ids=["content", "residual"])
def test_content_or_residual_alone_tells_patches_apart(seen):
    network = random_network()
    kernels = network.maps[0].weight
    with torch.no_grad():
        only = torch.zeros_like(kernels)
        only[:, seen] = kernels[:, seen]
        kernels.copy_(only)
        first, second = network.learned(smooth_images(2, 16, 0))
    assert (first - second).abs().max() > 0.05


def test_parts_are_whitened_by_the_mean_of_both_covariances():
    photographs = smooth_images(30, 40, 0)
    models = [traced(photographs, seed, strength=0.02) for seed in range(4)]
    settings = FingerprintSettings(pool="p", output="o", network=SETTINGS.model_dump())
    images = PoolImages(models, [], photographs)
    network = initial_network(images, settings)
    assert not network.mean[COLUMNS["learned"]].any(), "the learned part is whitened during training"
    whiten(network, "learned", whitening_patches(images, SETTINGS, 30))
    within, centres = {}, {}
    for kind, classes, num_patches in (("models", models, 1), ("photographs", [photographs], 4)):
        groups = []
        for degradation in (NONE, Degradation("jpeg", 85)):
            for shown in classes:
                cut = torch.cat([patches(degrade(image, degradation), 16, num_patches) for image in shown])
                groups.append(raw(network, cut).detach().double())
        means = torch.stack([rows.mean(dim=0) for rows in groups])
        scatter = sum((rows - mean).T @ (rows - mean) for rows, mean in zip(groups, means))
        within[kind] = scatter / (sum(map(len, groups)) - len(groups))
        centres[kind] = means.mean(dim=0)
    directions = network.directions.double()
    for part in COLUMNS.values():
        mixed = sum(covariance[part, part] / covariance[part, part].trace() for covariance in within.values())
        shrunk = (1 - SHRINKAGE) * mixed + SHRINKAGE * mixed.diagonal().mean() * torch.eye(len(mixed))
        own = directions[part, part].clone()
        torch.testing.assert_close(own.T @ shrunk @ own, torch.eye(len(own)).double(), atol=1e-3, rtol=0)
        directions[part, part] = 0
    assert not directions.any(), "parts are whitened apart"
    expected = (centres["models"] + centres["photographs"]) / 2
    torch.testing.assert_close(network.mean.double(), expected, atol=1e-5, rtol=1e-5)


def test_an_image_is_the_mean_of_its_patches_by_part(extractor, images):
    found = extractor.embed_images(images)
    assert found.shape == (7, 360) and found.dtype == np.float32
    counts = set()
    for row, image in zip(found, images):
        cut = patches(image, min(16, image.shape[1]), 4)
        with torch.no_grad():
            each = extractor.network(cut)
        np.testing.assert_allclose(row, scaled(each.mean(dim=0)[None])[0], atol=1e-5)
        counts.add(len(cut))
    assert len(counts) > 1


def test_a_vector_does_not_depend_on_the_other_images(extractor, images):
    together = extractor.embed([Sample(image, "PNG", 1) for image in images])
    alone = [extractor.embed([Sample(image, "JPEG", 2)])[0] for image in images[::-1]]
    assert np.array_equal(together, np.stack(alone[::-1]))


def test_a_small_image_is_refused(extractor, images):
    with pytest.raises(AttribError, match=r"40x11 pixels is too small for extractor, which needs 12"):
        extractor.embed([Sample(images[0], "PNG", 1), Sample(torch.zeros(3, 11, 40, dtype=torch.uint8), "PNG", 1)])
    assert extractor.embed([]).shape == (0, 360)


def test_parts_are_columns_of_the_whole(extractor, images):
    whole, start = extractor.embed_images(images), untrained(extractor).embed_images(images)
    samples = [Sample(image, "PNG", 1) for image in images]
    parts = [ExtractorPart(extractor, name) for name in PARTS]
    for part, own in zip(parts, COLUMNS.values()):
        expected = whole[:, own] / np.linalg.norm(whole[:, own], axis=1, keepdims=True)
        np.testing.assert_allclose(part.embed(samples), expected, atol=1e-5)
        assert part.looks_at_trace and part.registered_as is None
    statistics = whole[:, : COLUMNS["learned"].start]
    np.testing.assert_allclose(start, statistics / np.linalg.norm(statistics, axis=1, keepdims=True), atol=1e-5)
    assert untrained(extractor).parts == STATISTICS
    assert [part.name for part in parts] == ["part-colour-spectrum", "part-polyphase", "part-learned"]
    assert [part.needs_colour for part in parts] == [True, False, False]
    assert len({extractor.digest, untrained(extractor).digest, *(part.digest for part in parts)}) == 5


@pytest.mark.parametrize(
    ("parts", "one_sided"), [(PARTS, [False, True, False]), (STATISTICS, [False, True]), (("polyphase",), [False])]
)
def test_polyphase_is_one_sided_beside_other_parts(extractor, parts, one_sided):
    generator = torch.Generator().manual_seed(0)
    sizes = dict(zip(PARTS, SETTINGS.part_sizes))

    def vectors(*shape: int) -> dict[str, torch.Tensor]:
        return {name: torch.randn(*shape, sizes[name], generator=generator) for name in parts}

    centres, noise, queries = vectors(3), vectors(3, 10), vectors(40)
    references = [balanced({name: centres[name][own] + noise[name][own] for name in parts}).numpy() for own in range(3)]
    queries = balanced({name: rows + centres[name][torch.arange(40) % 3] for name, rows in queries.items()}).numpy()
    found = Extractor(extractor.network, parts=parts).scores(references, queries)
    for flags in itertools.product([False, True], repeat=len(parts)):
        expected = adapted_by_part([sizes[name] for name in parts], flags)(references)(queries)
        assert np.allclose(found, expected, atol=1e-5) == (list(flags) == one_sided), flags


def test_a_saved_extractor_is_loaded_with_equal_vectors(extractor, images, local, tmp_path):
    folder = str(tmp_path / "made")
    with pytest.raises(AttribError, match=r"run jobs\.fingerprint to its end first"):
        load_extractor(folder, local)
    save_extractor(extractor.network, folder, local)
    local.write_json(f"{folder}/{RECORD}", {"digest": extractor.digest})
    loaded = load_extractor(folder, local)
    assert loaded.digest == extractor.digest and (loaded.name, loaded.min_side_px) == ("extractor", 12)
    assert np.array_equal(loaded.embed_images(images), extractor.embed_images(images))
    save_extractor(random_network(seed=1), folder, local)
    with pytest.raises(AttribError, match=r"differs from the file described in extractor\.json"):
        load_extractor(folder, local)
    local.write_bytes(f"{folder}/{WEIGHTS}", b"nonsense")
    with pytest.raises(AttribError, match="this version cannot read the extractor"):
        load_extractor(folder, local)


def test_the_digest_depends_on_weights_and_settings():
    network = random_network()
    fewer = FingerprintNetwork(SETTINGS.model_copy(update={"max_patches": 2}))
    fewer.load_state_dict(network.state_dict())
    assert extractor_digest(random_network()) == extractor_digest(network)
    assert len({extractor_digest(n) for n in (network, fewer, random_network(seed=1))}) == 3


def test_the_digest_depends_on_the_fingerprint_version(monkeypatch):
    before = extractor_digest(random_network())
    monkeypatch.setattr("attrib.generators.extractor.network.FINGERPRINT_VERSION", -1)
    assert extractor_digest(random_network()) != before


def test_sizes_that_do_not_fit_are_refused():
    for min_side_px, window_px in ((16, 18), (20, 8)):
        with pytest.raises(
            ValueError, match=f"min_side_px {min_side_px} is not between window_px {window_px} and patch_px 16"
        ):
            NetworkSettings(patch_px=16, min_side_px=min_side_px, window_px=window_px)


def test_a_learned_part_of_one_number_is_refused():
    with pytest.raises(ValueError, match=r"num_learned\n.*greater than or equal to 2"):
        NetworkSettings(num_learned=1)


def test_the_untrained_network_tells_filters_apart(one_thread):
    """Whitening on some filters identifies others better than the raw vector does with the same scoring.

    A filter leaves no polyphase pattern, and the learned part is not trained, so most of each vector is noise.
    """
    photographs = smooth_images(36, 32, 0)
    settings = FingerprintSettings(pool="p", output="o", network=SETTINGS.model_dump(), seed=3)
    held_out = [traced(photographs, 90 + seed, strength=0.02) for seed in range(8)]
    images = PoolImages([traced(photographs, seed, strength=0.02) for seed in range(16)], held_out, photographs)
    whitened, plain = Extractor(initial_network(images, settings)), Extractor(random_network())
    for scoring, bound, plain_bound in (("adapted", 0.9, 0.8), ("cosine", 0.75, 0.2)):
        found, of_plain = (identified(with_scoring(method, scoring), held_out) for method in (whitened, plain))
        assert found > bound and of_plain < plain_bound, (scoring, found, of_plain)


def identified(extractor: Method, models: list[torch.Tensor], num_references: int = 10) -> float:
    vectors = [extractor.embed([Sample(image, "PNG", 1) for image in images]) for images in models]
    scores = extractor.scores(
        [rows[:num_references] for rows in vectors], np.concatenate([rows[num_references:] for rows in vectors])
    )
    truth = np.repeat(range(len(models)), [len(rows) - num_references for rows in vectors])
    return float((scores.argmax(axis=1) == truth).mean())
