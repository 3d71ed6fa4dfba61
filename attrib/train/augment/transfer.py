"""A image in the colours, the texture or the sharpness of another: pure functions, no trained network.

All take float32 [3, h, w] RGB in 0..1 on the CPU (content and donor may differ in size) and return the content's shape,
clipped to 0..1. They imitate what generators do to a source without being one: each is a classical method, cheap enough
to run while a network trains, and defined for every input, including constant, grey and 1 x 1 images. Times are those
of one CPU core for 224 x 224 pixels.
"""

import math

import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional

# In colour directions in which the content varies less than this (2.5 of 255 grey levels), the variation is mostly
# noise and JPEG artefacts of a nearly grey image, which a colourful donor would amplify to spots.
MIN_COLOUR_STD = 0.01
# Patches of the content that are compared in one go: 6 MB of distances to 1,500 candidates, which stay in the cache.
MATCHED_AT_ONCE = 1024
MIN_WINDOW = 1e-3  # a patch counts a little even at its rim, so that no pixel is without any
NUM_BANDS = 4  # octaves; what is coarser than 16 pixels is composition, which belongs to the content
MIN_BAND_STD = 1e-3  # a quarter of a grey level: a band without signal
# What a band is scaled by: below the first, the content's detail is gone; above the second, its noise takes over.
BAND_GAIN = (0.2, 4.0)


def colour_map(content: torch.Tensor, donor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The affine map x -> matrix @ x + offset that gives the content's colours the donor's mean and covariance.

    Of all linear maps that do so, the one that moves colours least: the Monge-Kantorovich solution for Gaussians (Pitie
    & Kokaram, "The linear Monge-Kantorovitch linear colour mapping for example-based colour transfer", CVMP 2007).
    Exact where the content's colours vary by at least MIN_COLOUR_STD in every direction of colour space, as those of
    five in six photos do; along other directions the result varies less than the donor does.

    Returns matrix: float64 [3, 3], symmetric and positive semi-definite; offset: float64 [3, 1].
    """
    from_colours, to_colours = content.flatten(1).double(), donor.flatten(1).double()
    covariance = torch.cov(from_colours, correction=0)
    root = _power(covariance, 0.5, MIN_COLOUR_STD**2)
    inverse_root = _power(covariance, -0.5, MIN_COLOUR_STD**2)
    matrix = inverse_root @ _power(root @ torch.cov(to_colours, correction=0) @ root, 0.5) @ inverse_root
    return matrix, to_colours.mean(1, keepdim=True) - matrix @ from_colours.mean(1, keepdim=True)


def _power(symmetric: torch.Tensor, exponent: float, min_eigenvalue: float = 0.0) -> torch.Tensor:
    """Of a positive semi-definite matrix, its eigenvalues first raised to at least min_eigenvalue."""
    eigenvalues, vectors = torch.linalg.eigh(symmetric)
    return (vectors * eigenvalues.clamp(min=min_eigenvalue) ** exponent) @ vectors.T


def colour_transfer(content: torch.Tensor, donor: torch.Tensor, strength: float = 1.0) -> torch.Tensor:
    """The content in the donor's colours.

    strength: 0 leaves it as it is, 1 gives it the donor's mean and covariance before clipping (see colour_map). 1 ms.

    One map for the whole image: it shifts the palette and never gives two things of one colour different ones. It
    knows nothing of the range, so what a contrasty donor pushes beyond black or white is clipped.
    """
    matrix, offset = colour_map(content, donor)
    matrix = strength * matrix + (1 - strength) * torch.eye(3, dtype=matrix.dtype)
    mapped = torch.addmm((strength * offset).float(), matrix.float(), content.flatten(1))
    return mapped.view_as(content).clamp_(0, 1)


def texture_transfer(
    content: torch.Tensor,
    donor: torch.Tensor,
    generator: torch.Generator,
    patch_px: int,
    stride_px: int,
    num_candidates: int = 1500,
    mean_weight: float = 1.0,
    strength: float = 1.0,
) -> torch.Tensor:
    """The content rebuilt from square patches of the donor.

    Efros & Freeman, "Image quilting for texture synthesis and transfer", SIGGRAPH 2001, sec. 3: at every stride_px the
    patch of the donor is placed whose luminance has the least squared difference from the content's there (after
    colour_transfer, so that dark matches dark). Simpler than theirs in two ways: every patch is chosen by itself in one
    pass, and overlaps are averaged under a Hann window instead of cut along a seam. That loses some of the donor's
    sharpness, and makes one matrix product of what is a scan.

    patch_px: side of a patch, reduced to the smallest side of either image where that is less.
    stride_px: between patches of the content, reduced to patch_px where it is more.
    num_candidates: patches drawn from all positions in the donor; where there are fewer, all, and nothing is drawn.
    mean_weight: of a patch's mean luminance against its pattern; 1 is the plain sum of squared differences.
    strength: 1 shows the patches alone; below it they are blended with the content in the donor's colours.

    50 to 110 ms with 1,500 candidates and a stride of a third of the patch; about as num_candidates / stride_px**2.
    Detail finer than half a patch is lost; a donor that is mostly flat (a sky, a wall) leaves little but the layout;
    and where the content is flat, one patch comes again and again, in a visible grid.
    """
    patch_px = min(patch_px, *content.shape[1:], *donor.shape[1:])
    stride_px = min(stride_px, patch_px)
    recoloured = colour_transfer(content, donor)
    candidates = _draw_patches(donor, patch_px, num_candidates, generator)
    margin = patch_px - 1  # every pixel of the content lies under as many patches as one in the middle
    padded = F.pad(recoloured[None], [margin] * 4, mode="reflect")
    chosen = _nearest(
        F.unfold(functional.rgb_to_grayscale(padded), patch_px, stride=stride_px)[0].T,
        functional.rgb_to_grayscale(candidates).flatten(1),
        patch_px * mean_weight,  # a difference of means stands for one at each of patch_px**2 pixels
    )
    window = _hann_window(patch_px)
    patches = (candidates * window).flatten(1)[chosen].T[None]
    quilt = F.fold(patches, padded.shape[2:], patch_px, stride=stride_px)[0]
    windows = window.flatten()[None, :, None].expand(-1, -1, len(chosen))
    weights = F.fold(windows, padded.shape[2:], patch_px, stride=stride_px)[0]
    height, width = content.shape[1:]
    inside = (..., slice(margin, margin + height), slice(margin, margin + width))
    return torch.lerp(recoloured, quilt[inside] / weights[inside], strength).clamp_(0, 1)


def _draw_patches(image: torch.Tensor, patch_px: int, num_patches: int, generator: torch.Generator) -> torch.Tensor:
    """float32 [n, 3, patch_px, patch_px], n at most num_patches."""
    windows = image.unfold(1, patch_px, 1).unfold(2, patch_px, 1)  # a view [3, rows, columns, patch_px, patch_px]
    rows, columns = windows.shape[1:3]
    if rows * columns <= num_patches:
        at = torch.arange(rows * columns)
    else:
        at = torch.randint(rows * columns, (num_patches,), generator=generator)
    return windows[:, at // columns, at % columns].transpose(0, 1).contiguous()


def _nearest(wanted: torch.Tensor, candidates: torch.Tensor, mean_weight: float) -> torch.Tensor:
    """Luminances float32 [n, p] and [m, p] -> int64 [n]: for each patch the candidate that is nearest.

    Distance: squared, of the patterns without their means, plus mean_weight**2 times that of the means.
    """
    features = _mean_apart(candidates, mean_weight)
    squares = features.square().sum(1)
    parts = _mean_apart(wanted, mean_weight).split(MATCHED_AT_ONCE)
    return torch.cat([torch.addmm(squares, part, features.T, alpha=-2).argmin(1) for part in parts])


def _mean_apart(patches: torch.Tensor, mean_weight: float) -> torch.Tensor:
    means = patches.mean(1, keepdim=True)
    return torch.cat([patches - means, mean_weight * means], 1)


def _hann_window(patch_px: int) -> torch.Tensor:
    """float32 [patch_px, patch_px], highest in the middle."""
    profile = torch.hann_window(patch_px + 2, periodic=False)[1:-1]
    return torch.outer(profile, profile) + MIN_WINDOW


def band_transfer(content: torch.Tensor, donor: torch.Tensor, strength: float = 1.0) -> torch.Tensor:
    """The content with the donor's colours, sharpness and grain: each octave of detail gets the donor's deviation.

    After Heeger & Bergen, "Pyramid-based texture analysis/synthesis", SIGGRAPH 1995, who match whole histograms of
    oriented bands, starting from noise. Here only the standard deviations of the bands of a Laplacian pyramid (Burt &
    Adelson 1983) are matched, per channel, starting from the content: detail is amplified or softened where it is,
    within BAND_GAIN, and no structure of the donor appears. NUM_BANDS octaves, fewer in images too small for them.

    strength: 0 leaves the content as it is. 6 ms.
    """
    num_bands = min(NUM_BANDS, *(int(math.log2(min(image.shape[1:]))) for image in (content, donor)))
    details, result = _laplacian_pyramid(colour_transfer(content, donor, strength), num_bands)
    donor_details, _ = _laplacian_pyramid(donor, num_bands)
    for detail, donor_detail in zip(reversed(details), reversed(donor_details)):
        gain = (_band_std(donor_detail) / _band_std(detail).clamp(min=MIN_BAND_STD)).clamp(*BAND_GAIN)
        result = _resize(result, detail.shape[1:]) + detail * (1 + strength * (gain - 1))
    return result.clamp(0, 1)


def _laplacian_pyramid(image: torch.Tensor, num_bands: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The bands, finest first, each half the size of the one before, and what is left; their sum is the image."""
    bands = []
    for _ in range(num_bands):
        coarser = _resize(image, [side // 2 for side in image.shape[1:]])
        bands.append(image - _resize(coarser, image.shape[1:]))
        image = coarser
    return bands, image


def _resize(image: torch.Tensor, size: list[int] | torch.Size) -> torch.Tensor:
    return F.interpolate(image[None], size=tuple(size), mode="bilinear", antialias=True)[0]


def _band_std(band: torch.Tensor) -> torch.Tensor:
    return band.std((1, 2), keepdim=True, correction=0)
