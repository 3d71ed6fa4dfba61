"""Transfers of colour, texture and sharpness, compared with their definitions."""

import math

import pytest
import torch

from attrib.train.augment.transfer import (
    MIN_COLOUR_STD,
    MIN_WINDOW,
    band_transfer,
    colour_map,
    colour_transfer,
    texture_transfer,
)

LUMINANCE = torch.tensor([0.2989, 0.587, 0.114], dtype=torch.float64)  # torchvision's

pytestmark = pytest.mark.usefixtures("one_thread")


def random_image(seed: int, height: int, width: int, contrast: float = 1.0) -> torch.Tensor:
    """Return float32 [3, height, width] in 0..1 with correlated channels and a mean colour per seed."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.rand(3, 3, generator=generator) + 1.5 * torch.eye(3)
    pixels = (mix / mix.sum(1, keepdim=True)) @ torch.rand(3, height * width, generator=generator)
    return (0.35 + 0.3 * torch.rand(3, 1, generator=generator) + contrast * (pixels - 0.5)).view(3, height, width)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def transfers():
    return {
        "colour": colour_transfer,
        "texture": lambda content, donor: texture_transfer(content, donor, seeded(), patch_px=5, stride_px=2),
        "bands": band_transfer,
    }


@pytest.mark.parametrize("seed", range(5))
def test_colour_map_gives_the_mean_and_covariance_of_the_donor(seed):
    content, donor = random_image(seed, 40, 30), random_image(seed + 100, 20, 50)
    matrix, offset = colour_map(content, donor)
    mapped, wanted = matrix @ content.flatten(1).double() + offset, donor.flatten(1).double()
    torch.testing.assert_close(mapped.mean(1), wanted.mean(1), rtol=0, atol=1e-10)
    torch.testing.assert_close(torch.cov(mapped, correction=0), torch.cov(wanted, correction=0), rtol=0, atol=1e-10)
    assert torch.linalg.eigvalsh(torch.cov(content.flatten(1).double())).min() > MIN_COLOUR_STD**2
    # Of the maps that match the covariance, optimal transport is the symmetric positive one.
    torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=1e-10)
    assert torch.linalg.eigvalsh(matrix).min() > 0


def test_strength_blends_the_colour_map():
    content, donor = random_image(1, 40, 30, contrast=0.3), random_image(2, 20, 50, contrast=0.3)
    matrix, offset = colour_map(content, donor)
    mapped = (matrix @ content.flatten(1).double() + offset).view(3, 40, 30).float()
    assert 0 < mapped.min() and mapped.max() < 1  # nothing is clipped
    for strength in (0.0, 0.4, 1.0):
        expected = content + strength * (mapped - content)
        torch.testing.assert_close(colour_transfer(content, donor, strength), expected, rtol=0, atol=1e-5)


def test_noise_of_nearly_grey_content_stays_small():
    grey = torch.rand(1, 60, 60, generator=seeded()).expand(3, -1, -1)
    noisy = (0.2 + 0.6 * grey + 0.003 * torch.randn(3, 60, 60, generator=seeded(1))).clamp(0, 1)
    colourful = torch.rand(3, 60, 60, generator=seeded(2))
    matrix, _ = colour_map(noisy, colourful)
    assert torch.linalg.eigvalsh(matrix).max() < 1.01 * 0.29 / 0.01  # the donor's deviation over the floor
    assert (matrix @ noisy.flatten(1).double()).std(1).max() < 0.31


def naive_texture(content, donor, patch_px, stride_px, mean_weight, strength) -> torch.Tensor:
    """Compare every patch of the content with every patch of the donor in loops."""
    height, width = content.shape[1:]
    recoloured = colour_transfer(content, donor).double()
    donor = donor.double()
    margin = patch_px - 1

    def mirrored(at: int, size: int) -> int:
        at = abs(at)
        return at if at < size else 2 * (size - 1) - at

    rows = [mirrored(y - margin, height) for y in range(height + 2 * margin)]
    columns = [mirrored(x - margin, width) for x in range(width + 2 * margin)]
    padded = recoloured[:, rows][:, :, columns]

    def luminance(image, top, left):
        return torch.einsum("c,chw->hw", LUMINANCE, image[:, top : top + patch_px, left : left + patch_px])

    def distance(a, b):
        pattern = ((a - a.mean()) - (b - b.mean())).square().sum()
        return (pattern + patch_px**2 * mean_weight**2 * (a.mean() - b.mean()).square()).item()

    donor_at = [
        (t, left) for t in range(donor.shape[1] - patch_px + 1) for left in range(donor.shape[2] - patch_px + 1)
    ]
    donor_luminances = [luminance(donor, *at) for at in donor_at]
    ramp = [math.sin(math.pi * (i + 1) / (patch_px + 1)) ** 2 for i in range(patch_px)]
    total, weights = torch.zeros_like(padded), torch.zeros_like(padded[0])
    for top in range(0, padded.shape[1] - patch_px + 1, stride_px):
        for left in range(0, padded.shape[2] - patch_px + 1, stride_px):
            wanted = luminance(padded, top, left)
            distances = [distance(wanted, candidate) for candidate in donor_luminances]
            y, x = donor_at[distances.index(min(distances))]
            for i in range(patch_px):
                for j in range(patch_px):
                    weight = ramp[i] * ramp[j] + MIN_WINDOW
                    total[:, top + i, left + j] += weight * donor[:, y + i, x + j]
                    weights[top + i, left + j] += weight
    quilt = (total / weights)[:, margin : margin + height, margin : margin + width]
    return (strength * quilt + (1 - strength) * recoloured).float()


@pytest.mark.parametrize(
    ("patch_px", "stride_px", "mean_weight", "strength"), [(4, 2, 1.0, 1.0), (5, 3, 0.3, 0.7), (3, 3, 2.0, 1.0)]
)
def test_texture_transfer_equals_a_loop(patch_px, stride_px, mean_weight, strength):
    content, donor = random_image(3, 9, 12, contrast=0.4), random_image(4, 8, 7, contrast=0.4)
    rendered = texture_transfer(
        content, donor, seeded(), patch_px, stride_px, mean_weight=mean_weight, strength=strength
    )
    expected = naive_texture(content, donor, patch_px, stride_px, mean_weight, strength)
    torch.testing.assert_close(rendered, expected, rtol=0, atol=1e-5)


def test_texture_transfer_of_the_content_itself_returns_it():
    content = random_image(5, 24, 24, contrast=0.4)
    rendered = texture_transfer(content, content, seeded(), patch_px=4, stride_px=1)
    inside = slice(4, -4)  # outside, patches contain the mirrored margin, which the donor lacks
    torch.testing.assert_close(rendered[:, inside, inside], content[:, inside, inside], rtol=0, atol=1e-4)
    assert (rendered - content).abs().mean() < 0.15 * content.std()


def test_texture_consists_of_donor_patches_only():
    """A donor of two colours gives mixtures of them for any content."""
    donor = torch.zeros(3, 30, 30)
    donor[0, :, 15:] = 1
    rendered = texture_transfer(random_image(6, 30, 40), donor, seeded(), patch_px=6, stride_px=2)
    assert rendered[0].std() > 0.1
    assert rendered[1:].abs().max() < 1e-6


def test_candidates_are_drawn_by_the_generator_only():
    content, donor = random_image(7, 30, 30), random_image(8, 60, 60)

    def rendered(seed, num_candidates):
        return texture_transfer(content, donor, seeded(seed), 5, 2, num_candidates=num_candidates)

    torch.manual_seed(1)
    first, state = rendered(3, 50), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(first, rendered(3, 50)) and not torch.equal(first, rendered(4, 50))
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())
    everything = 56 * 56
    assert torch.equal(rendered(3, everything), rendered(4, everything))


def octaves(seed: int, deviations: tuple[float, ...]) -> torch.Tensor:
    """Return float32 [3, 64, 64]: noise of 1, 2, 4 ... pixels with the given standard deviations, around grey."""
    image = torch.full((1, 3, 64, 64), 0.5)
    for octave, deviation in enumerate(deviations):
        noise = torch.randn(1, 3, 64 >> octave, 64 >> octave, generator=seeded(seed))
        image = image + deviation * torch.nn.functional.interpolate(noise, size=(64, 64), mode="bicubic")
    return image[0].clamp(0, 1)


def band_deviations(image: torch.Tensor, num_bands: int) -> list[torch.Tensor]:
    """Return the deviation of the difference to half the size, for every octave."""
    found = []
    for _ in range(num_bands):
        half = torch.nn.functional.interpolate(image[None], scale_factor=0.5, mode="bilinear", antialias=True)
        back = torch.nn.functional.interpolate(half, size=image.shape[1:], mode="bilinear")
        found.append((image[None] - back).std((0, 2, 3), correction=0))
        image = half[0]
    return found


def test_bands_get_the_deviations_of_the_donor():
    """Up to the overlap of neighbouring bands of a Laplacian pyramid."""
    rough, smooth = octaves(9, (0.05, 0.05, 0.05, 0.05)), octaves(10, (0.02, 0.03, 0.05, 0.07))
    for content, donor in ((rough, smooth), (smooth, rough)):
        before, found, wanted = (
            torch.stack(band_deviations(image, 3))
            for image in (colour_transfer(content, donor), band_transfer(content, donor), donor)
        )
        assert ((before / wanted).log().abs()[0] > math.log(1.5)).all()  # the finest band differed much
        assert ((found / wanted).log().abs() < math.log(1.3)).all()


def test_bands_of_strength_zero_have_no_effect():
    content = random_image(11, 37, 50, contrast=0.4)
    torch.testing.assert_close(band_transfer(content, random_image(12, 20, 20), 0.0), content, rtol=0, atol=1e-5)


DEGENERATE = {
    "constant": torch.full((3, 20, 20), 0.3),
    "black": torch.zeros(3, 20, 20),
    "white": torch.ones(3, 20, 20),
    "grey": torch.rand(1, 20, 20, generator=seeded()).expand(3, -1, -1),
    "one channel": torch.cat([torch.rand(1, 20, 20, generator=seeded(1)), torch.zeros(2, 20, 20)]),
    "one pixel": torch.tensor([0.1, 0.5, 0.9]).view(3, 1, 1),
    "one row": torch.rand(3, 1, 20, generator=seeded(2)),
    "tiny": torch.rand(3, 3, 4, generator=seeded(3)),
    "ordinary": random_image(13, 30, 25),
}


@pytest.mark.parametrize("name", ["colour", "texture", "bands"])
@pytest.mark.parametrize("content", DEGENERATE)
@pytest.mark.parametrize("donor", DEGENERATE)
def test_any_content_and_donor_give_an_image(name, content, donor):
    content, donor = DEGENERATE[content], DEGENERATE[donor]
    before = content.clone(), donor.clone()
    rendered = transfers()[name](content, donor)
    assert rendered.shape == content.shape and rendered.dtype == torch.float32
    assert 0 <= rendered.min() and rendered.max() <= 1  # false for NaN
    assert torch.equal(content, before[0]) and torch.equal(donor, before[1])


def test_constant_donor_gives_its_colour():
    donor = torch.tensor([0.2, 0.4, 0.6]).view(3, 1, 1).expand(3, 20, 20)
    for name, transfer in transfers().items():
        rendered = transfer(random_image(14, 30, 25), donor)
        torch.testing.assert_close(rendered, donor[:, :1, :1].expand(3, 30, 25), rtol=0, atol=1e-5, msg=name)
