"""Transfer the colours, the texture or the sharpness of a donor image to a content image, without a trained network.

All take float32 [3, h, w] RGB in 0..1 on the CPU, content and donor of any sizes, and return the content's shape,
clipped to 0..1. They are classical methods that imitate generators. They are fast enough to run during training and
defined for every input, including constant, grey and 1 x 1 images. Times are for one CPU core and 224 x 224 pixels.
"""

import math

import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional

# Colour directions in which the content varies less (2.5 of 255 grey levels) are mostly noise and JPEG artefacts of a
# nearly grey image. A colourful donor would amplify them to spots.
MIN_COLOUR_STD = 0.01
MATCHED_AT_ONCE = 1024  # patches: 6 MB of distances to 1,500 candidates fit the cache
MIN_WINDOW = 1e-3  # weight at the rim of a patch, so that every pixel has some weight
NUM_BANDS = 4  # octaves; structure coarser than 16 pixels is composition, which belongs to the content
MIN_BAND_STD = 1e-3  # a quarter of a grey level: a band without signal
BAND_GAIN = (0.2, 4.0)  # limits: less would erase the content's detail, more would amplify its noise


def colour_map(content: torch.Tensor, donor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the affine map x -> matrix @ x + offset that gives the content's colours the donor's mean and covariance.

    It is the map that moves colours least, the Monge-Kantorovich solution for Gaussians (Pitie & Kokaram, "The linear
    Monge-Kantorovitch linear colour mapping for example-based colour transfer", CVMP 2007). It is exact if the content
    varies by at least MIN_COLOUR_STD in every direction of colour space, as five in six photos do; in other directions
    the result varies less than the donor.

    Returns matrix: float64 [3, 3], symmetric and positive semi-definite; offset: float64 [3, 1].
    """
    from_colours, to_colours = content.flatten(1).double(), donor.flatten(1).double()
    covariance = torch.cov(from_colours, correction=0)
    root = _power(covariance, 0.5, MIN_COLOUR_STD**2)
    inverse_root = _power(covariance, -0.5, MIN_COLOUR_STD**2)
    matrix = inverse_root @ _power(root @ torch.cov(to_colours, correction=0) @ root, 0.5) @ inverse_root
    return matrix, to_colours.mean(1, keepdim=True) - matrix @ from_colours.mean(1, keepdim=True)


def _power(symmetric: torch.Tensor, exponent: float, min_eigenvalue: float = 0.0) -> torch.Tensor:
    """Return a power of a positive semi-definite matrix, its eigenvalues clamped to at least min_eigenvalue."""
    eigenvalues, vectors = torch.linalg.eigh(symmetric)
    return (vectors * eigenvalues.clamp(min=min_eigenvalue) ** exponent) @ vectors.T


def colour_transfer(content: torch.Tensor, donor: torch.Tensor, strength: float = 1.0) -> torch.Tensor:
    """Return the content in the donor's colours, clipped to the range. 1 ms.

    strength: from 0, unchanged, to 1, the donor's mean and covariance (see colour_map). One map for the whole image
    shifts the palette, so objects of one colour keep one colour.
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
    """Return the content rebuilt from square patches of the donor.

    Efros & Freeman, "Image quilting for texture synthesis and transfer", SIGGRAPH 2001, sec. 3: every stride_px, place
    the donor patch whose luminance has the least squared difference from the content after colour_transfer. Simplified:
    patches are chosen independently, and overlaps are averaged under a Hann window instead of cut along a seam. This
    loses some sharpness, but the search is one matrix product.

    patch_px: side of a patch, at most the shortest side of both images. stride_px: between patches, at most patch_px.
    num_candidates: patches drawn from the donor; all of them, without drawing, if it has fewer.
    mean_weight: of a patch's mean luminance against its pattern; 1 is the plain sum of squared differences.
    strength: 1 shows the patches only; lower values blend them with the content in the donor's colours.

    50 to 110 ms with 1,500 candidates and a stride of a third of the patch; proportional to num_candidates /
    stride_px**2. Detail finer than half a patch is lost; a mostly flat donor (a sky, a wall) leaves little but the
    layout; flat areas of the content show one patch repeated in a visible grid.
    """
    patch_px = min(patch_px, *content.shape[1:], *donor.shape[1:])
    stride_px = min(stride_px, patch_px)
    recoloured = colour_transfer(content, donor)
    candidates = _draw_patches(donor, patch_px, num_candidates, generator)
    margin = patch_px - 1  # so that as many patches cover the edge as the middle
    padded = F.pad(recoloured[None], [margin] * 4, mode="reflect")
    chosen = _nearest(
        F.unfold(functional.rgb_to_grayscale(padded), patch_px, stride=stride_px)[0].T,
        functional.rgb_to_grayscale(candidates).flatten(1),
        patch_px * mean_weight,  # a difference of means counts at each of patch_px**2 pixels
    )
    profile = torch.hann_window(patch_px + 2, periodic=False)[1:-1]
    window = torch.outer(profile, profile) + MIN_WINDOW
    patches = (candidates * window).flatten(1)[chosen].T[None]
    quilt = F.fold(patches, padded.shape[2:], patch_px, stride=stride_px)[0]
    windows = window.flatten()[None, :, None].expand(-1, -1, len(chosen))
    weights = F.fold(windows, padded.shape[2:], patch_px, stride=stride_px)[0]
    average = functional.center_crop(quilt / weights, list(content.shape[1:]))
    return torch.lerp(recoloured, average, strength).clamp_(0, 1)


def _draw_patches(image: torch.Tensor, patch_px: int, num_patches: int, generator: torch.Generator) -> torch.Tensor:
    """Return float32 [n, 3, patch_px, patch_px], n at most num_patches."""
    windows = image.unfold(1, patch_px, 1).unfold(2, patch_px, 1)  # a view [3, rows, columns, patch_px, patch_px]
    rows, columns = windows.shape[1:3]
    if rows * columns <= num_patches:
        at = torch.arange(rows * columns)
    else:
        at = torch.randint(rows * columns, (num_patches,), generator=generator)
    return windows[:, at // columns, at % columns].transpose(0, 1).contiguous()


def _nearest(wanted: torch.Tensor, candidates: torch.Tensor, mean_weight: float) -> torch.Tensor:
    """Return the nearest candidate of each patch, int64 [n], from luminances float32 [n, p] and [m, p].

    Squared distance of the patterns without their means, plus mean_weight**2 times that of the means.
    """
    means = [patches.mean(1, keepdim=True) for patches in (wanted, candidates)]
    wanted, features = (
        torch.cat([patches - mean, mean_weight * mean], 1) for patches, mean in zip((wanted, candidates), means)
    )
    squares = features.square().sum(1)
    parts = wanted.split(MATCHED_AT_ONCE)
    return torch.cat([torch.addmm(squares, part, features.T, alpha=-2).argmin(1) for part in parts])


def band_transfer(content: torch.Tensor, donor: torch.Tensor, strength: float = 1.0) -> torch.Tensor:
    """Return the content with the donor's colours, sharpness and grain. 6 ms.

    After Heeger & Bergen, "Pyramid-based texture analysis/synthesis", SIGGRAPH 1995, who match histograms of oriented
    bands, starting from noise. Here the content's bands of a Laplacian pyramid (Burt & Adelson 1983) get the donor's
    standard deviation per channel, within BAND_GAIN, so no structure of the donor appears. NUM_BANDS octaves, fewer in
    small images. strength: 0 leaves the content unchanged.
    """
    num_bands = min(NUM_BANDS, *(int(math.log2(min(image.shape[1:]))) for image in (content, donor)))
    details, result = _laplacian_pyramid(colour_transfer(content, donor, strength), num_bands)
    donor_details, _ = _laplacian_pyramid(donor, num_bands)
    for detail, donor_detail in zip(reversed(details), reversed(donor_details)):
        wanted, own = (band.std((1, 2), keepdim=True, correction=0) for band in (donor_detail, detail))
        gain = (wanted / own.clamp(min=MIN_BAND_STD)).clamp(*BAND_GAIN)
        result = _resize(result, detail.shape[1:]) + detail * (1 + strength * (gain - 1))
    return result.clamp(0, 1)


def _laplacian_pyramid(image: torch.Tensor, num_bands: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return the bands, finest first, each half the size of the one before, and the coarse rest."""
    bands = []
    for _ in range(num_bands):
        coarser = _resize(image, [side // 2 for side in image.shape[1:]])
        bands.append(image - _resize(coarser, image.shape[1:]))
        image = coarser
    return bands, image


def _resize(image: torch.Tensor, size: list[int] | torch.Size) -> torch.Tensor:
    return F.interpolate(image[None], size=tuple(size), mode="bilinear", antialias=True)[0]
