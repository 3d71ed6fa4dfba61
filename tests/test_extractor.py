"""The extractor: its start from a whitening, its vectors, its file."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_pool import smooth_images, traced

from attrib.errors import AttribError
from attrib.generators.degradations import NONE, Degradation, degrade
from attrib.generators.extractor import (
    RECORD,
    WEIGHTS,
    Extractor,
    FingerprintNetwork,
    extractor_digest,
    load_extractor,
    save_extractor,
)
from attrib.generators.extractor_batches import PoolImages, Validation
from attrib.generators.extractor_settings import FingerprintSettings, NetworkSettings
from attrib.generators.extractor_training import SHRINKAGE, started_network
from attrib.generators.samples import Sample
from attrib.generators.spectrum import colour_spectrum, patches, residual

SETTINGS = NetworkSettings(patch_px=16, min_side_px=12, max_patches=4, window_px=4, hidden=16, width=8)


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


def whitened(network: FingerprintNetwork, cut: torch.Tensor) -> torch.Tensor:
    spectra = colour_spectrum(residual(cut.float() / 255), 4).flatten(1)
    return (spectra - network.mean) @ network.directions


def test_the_start_is_the_whitened_spectrum():
    network, generator = random_network(), torch.Generator().manual_seed(1)
    mean = torch.randn(SETTINGS.dimension, generator=generator)
    network.start_from(mean, torch.randn(SETTINGS.dimension, SETTINGS.dimension, generator=generator))
    cut = patches(smooth_images(1, 48, 0)[0], 16, 9)
    torch.testing.assert_close(network(cut), F.normalize(whitened(network, cut), dim=1), atol=1e-5, rtol=1e-4)
    assert torch.equal(network.mean, mean) and len(cut) == 9


def test_every_part_of_the_network_learns_and_a_flat_patch_is_no_trap():
    network = random_network()
    with torch.no_grad():  # the correction starts at zero, behind which nothing has a gradient
        network.correction[-1].weight.normal_()
    flat = torch.full((1, 3, 16, 16), 128, dtype=torch.uint8)
    network(torch.cat([smooth_images(3, 16, 0), flat]))[:, 0].sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name


def test_what_is_learned_sees_the_content_and_no_single_pixels():
    network = random_network()
    with torch.no_grad():
        network.correction[-1].weight.normal_(generator=torch.Generator().manual_seed(0))
    pixels = smooth_images(2, 16, 0).clamp(4, 250)
    board = (torch.arange(16)[:, None] + torch.arange(16)) % 2 * 8 - 4  # cancels in every 2x2 mean
    corrections = []
    network.correction.register_forward_hook(lambda _, given, found: corrections.append(found))
    for shown in (pixels, (pixels.int() + board).to(torch.uint8), pixels.flip(0)):
        network(shown)
    torch.testing.assert_close(corrections[1], corrections[0], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(corrections[2], corrections[0].flip(0))
    assert (corrections[0][0] - corrections[0][1]).abs().max() > 0.01


def test_the_start_whitens_what_varies_within_models_under_each_degradation():
    photographs = smooth_images(30, 24, 0)
    models = [traced(photographs, seed, strength=0.02) for seed in range(4)]
    settings = FingerprintSettings(pool="p", output="o", network=SETTINGS.model_dump())
    network = started_network(PoolImages(models, []), settings)
    groups = []
    for degradation in (NONE, Degradation("jpeg", 85)):
        for images in models:
            cut = torch.cat([patches(degrade(image, degradation), 16, 1) for image in images])
            groups.append(colour_spectrum(residual(cut.float() / 255), 4).flatten(1).double())
    means = torch.stack([rows.mean(dim=0) for rows in groups])
    within = sum((rows - mean).T @ (rows - mean) for rows, mean in zip(groups, means)) / (8 * 29)
    shrunk = (1 - SHRINKAGE) * within + SHRINKAGE * within.diagonal().mean() * torch.eye(len(within))
    directions = network.directions.double()
    torch.testing.assert_close(directions.T @ shrunk @ directions, torch.eye(144).double(), atol=1e-3, rtol=0)
    torch.testing.assert_close(network.mean.double(), means.mean(dim=0), atol=1e-5, rtol=1e-5)


def test_an_image_is_the_direction_of_the_mean_of_its_patches(extractor, images):
    found = extractor.embed_images(images)
    assert found.shape == (7, 144) and found.dtype == np.float32
    counts = set()
    for row, image in zip(found, images):
        cut = patches(image, min(16, image.shape[1]), 4)
        with torch.no_grad():
            each = extractor.network(cut)
        np.testing.assert_allclose(row, F.normalize(each.mean(dim=0), dim=0), atol=1e-5)
        counts.add(len(cut))
    assert len(counts) > 1


def test_an_image_does_not_depend_on_its_neighbours(extractor, images):
    together = extractor.embed([Sample(image, "PNG", 1) for image in images])
    alone = [extractor.embed([Sample(image, "JPEG", 2)])[0] for image in images[::-1]]
    assert np.array_equal(together, np.stack(alone[::-1]))


def test_a_small_image_is_refused(extractor, images):
    with pytest.raises(AttribError, match=r"40x11 pixels is too small for extractor, which needs 12"):
        extractor.embed([Sample(images[0], "PNG", 1), Sample(torch.zeros(3, 11, 40, dtype=torch.uint8), "PNG", 1)])
    assert extractor.embed([]).shape == (0, 144)


def test_a_file_gives_the_same_extractor(extractor, images, local, tmp_path):
    folder = str(tmp_path / "made")
    with pytest.raises(AttribError, match=r"run jobs\.fingerprint to its end first"):
        load_extractor(folder, local)
    save_extractor(extractor.network, folder, local)
    local.write_json(f"{folder}/{RECORD}", {"digest": extractor.digest})
    loaded = load_extractor(folder, local)
    assert loaded.digest == extractor.digest and (loaded.name, loaded.min_side_px) == ("extractor", 12)
    assert np.array_equal(loaded.embed_images(images), extractor.embed_images(images))
    save_extractor(random_network(seed=1), folder, local)
    with pytest.raises(AttribError, match=r"not the file that extractor\.json beside it describes"):
        load_extractor(folder, local)
    local.write_bytes(f"{folder}/{WEIGHTS}", b"nonsense")
    with pytest.raises(AttribError, match="no extractor that this version understands"):
        load_extractor(folder, local)


def test_the_digest_is_of_weights_and_settings():
    network = random_network()
    fewer = FingerprintNetwork(SETTINGS.model_copy(update={"max_patches": 2}))
    fewer.load_state_dict(network.state_dict())
    assert extractor_digest(random_network()) == extractor_digest(network)
    assert len({extractor_digest(n) for n in (network, fewer, random_network(seed=1))}) == 3


def test_settings_that_cannot_be_are_refused():
    for min_side_px, window_px in ((16, 18), (20, 8)):
        with pytest.raises(
            ValueError, match=f"min_side_px {min_side_px} lies outside window_px {window_px} to patch_px 16"
        ):
            NetworkSettings(patch_px=16, min_side_px=min_side_px, window_px=window_px)


def test_the_start_tells_filters_apart(one_thread):
    """The whitening of drawn traces identifies traces that it was not fitted on, better than the spectrum as it is."""
    photographs = smooth_images(24, 32, 0)
    settings = FingerprintSettings(pool="p", output="o", network=SETTINGS.model_dump(), seed=3)
    held_out = [traced(photographs, 90 + seed, strength=0.02) for seed in range(8)]
    images = PoolImages([traced(photographs, seed, strength=0.02) for seed in range(16)], held_out)
    found = Validation(held_out, 16)(Extractor(started_network(images, settings)))
    plain = Validation(held_out, 16)(Extractor(random_network()))
    assert found["none"] > 0.9 and plain["none"] < 0.7
