"""Views: augmented images that imitate generated ones, for training without pairs of generated images and sources.

A view keeps the content of an image, may take colours or texture from a second image, the style donor, and is cropped,
mirrored, recoloured and degraded.

torchvision's functionals do the standard parts. Its transform classes draw from the global generator, whose state
depends on workers and batches; here every draw uses the generator of the view. Render views in processes with one
torch thread each: threads within a view cost more than they save.
"""

import hashlib
import io
import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.v2 import InterpolationMode, functional

from attrib.common.errors import AttribError
from attrib.train.augment.settings import DONOR_KINDS, KINDS, Kind, ViewSettings
from attrib.train.augment.transfer import band_transfer, colour_transfer, texture_transfer

STRIDES_PER_PATCH = 3  # patches overlap by two thirds; with less, their grid is visible
MIN_STRIDE_PX = 2  # with 1, the smallest patches would take most of the time
BLUR_REACH = 3  # standard deviations; the rest of a Gaussian is 0.3 %
LABEL_PX = 20
GAP_PX = 2


def view_seed(seed: int, image_id: int, view_index: int) -> int:
    """Return a seed in [0, 2**63) from BLAKE2b, which does not depend on machine, order or number of workers."""
    digest = hashlib.blake2b(f"{seed} {image_id} {view_index}".encode(), digest_size=8).digest()
    # A torch CPU generator uses the low 32 bits only. Of millions of views a few share draws, for different images.
    return int.from_bytes(digest, "big") >> 1


def view_generator(seed: int, image_id: int, view_index: int) -> torch.Generator:
    """Return the generator of all draws of one view: its kind, its donor and those of render_view."""
    return torch.Generator().manual_seed(view_seed(seed, image_id, view_index))


def draw_kind(settings: ViewSettings, generator: torch.Generator) -> Kind:
    weights = torch.tensor([getattr(settings.mix, kind) for kind in KINDS], dtype=torch.float64)
    return KINDS[int(torch.multinomial(weights, 1, generator=generator))]


def render_view(
    content: torch.Tensor,
    donor: torch.Tensor | None,
    kind: Kind,
    settings: ViewSettings,
    view_px: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """Return one view of the content, uint8 [3, view_px, view_px], rendered on the CPU.

    content, donor: uint8 [3, h, w], RGB, of any sizes; kind "solo" ignores the donor. The view depends on the arguments
    and the state of the CPU generator only. About 60 ms for kind texture at 224 px, 3 to 10 ms for the others.
    Raises AttribError for an unknown kind or a missing donor.
    """
    if kind not in KINDS:
        raise AttribError(f"kind {kind!r} of a view is unknown; use one of {', '.join(KINDS)}")
    if kind in DONOR_KINDS and donor is None:
        raise AttribError(f"a view of kind {kind!r} needs a style donor; give a second image or use kind 'solo'")
    shown = _crop(
        content, settings.crop_area_share, settings.crop_aspect, settings.flip_probability, view_px, generator
    )
    if kind == "solo":
        view = _recolour(shown, settings, generator)
    else:
        # Proportions belong to a style, so the donor keeps its own.
        style = _crop(
            donor, settings.donor_crop_area_share, (1.0, 1.0), settings.donor_flip_probability, view_px, generator
        )
        view = _stylise(shown, style, kind, settings, generator)
    return _degrade(view, settings, generator)


def _uniform(limits: tuple[float, float], generator: torch.Generator) -> float:
    low, high = limits
    return low + (high - low) * torch.rand((), generator=generator).item()


def _integer(limits: tuple[int, int], generator: torch.Generator) -> int:
    """Return a random integer, both limits included."""
    return int(torch.randint(limits[0], limits[1] + 1, (), generator=generator))


def _happens(probability: float, generator: torch.Generator) -> bool:
    return torch.rand((), generator=generator).item() < probability


def _crop(
    pixels: torch.Tensor,
    area_share: tuple[float, float],
    aspect: tuple[float, float],
    flip_probability: float,
    size_px: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """Return a random part, float32 [3, size_px, size_px], of uint8 [3, h, w]; area uniform, aspect log-uniform.

    A part that does not fit is shrunk, so panoramas keep the aspect; torchvision's RandomResizedCrop draws again and
    finally takes the centre.
    """
    height, width = pixels.shape[1:]
    area = _uniform(area_share, generator) * height * width
    ratio = math.exp(_uniform((math.log(aspect[0]), math.log(aspect[1])), generator))
    crop_width, crop_height = math.sqrt(area * ratio), math.sqrt(area / ratio)
    fit = min(1.0, width / crop_width, height / crop_height)
    crop_width, crop_height = max(1, round(crop_width * fit)), max(1, round(crop_height * fit))
    top, left = _integer((0, height - crop_height), generator), _integer((0, width - crop_width), generator)
    part = functional.resized_crop(
        pixels, top, left, crop_height, crop_width, [size_px, size_px], InterpolationMode.BICUBIC, antialias=True
    )
    if _happens(flip_probability, generator):
        part = functional.horizontal_flip(part)
    return functional.to_dtype(part, torch.float32, scale=True)


def _stylise(
    shown: torch.Tensor, style: torch.Tensor, kind: Kind, settings: ViewSettings, generator: torch.Generator
) -> torch.Tensor:
    if kind == "colour":
        return colour_transfer(shown, style, _uniform(settings.colour_strength, generator))
    if kind == "bands":
        return band_transfer(shown, style, _uniform(settings.bands_strength, generator))
    style_px = max(1, round(_uniform(settings.donor_scale, generator) * style.shape[1]))
    patch_px = _integer(settings.patch_px, generator)
    view = texture_transfer(
        shown,
        functional.resize(style, [style_px, style_px], antialias=True),
        generator,
        patch_px=patch_px,
        stride_px=max(MIN_STRIDE_PX, patch_px // STRIDES_PER_PATCH),
        num_candidates=settings.num_donor_patches,
        mean_weight=_uniform(settings.texture_mean_weight, generator),
        strength=_uniform(settings.texture_strength, generator),
    )
    if _happens(settings.keep_colour_probability, generator):
        view = colour_transfer(view, shown, _uniform(settings.keep_colour_share, generator))
    return view


def _recolour(view: torch.Tensor, settings: ViewSettings, generator: torch.Generator) -> torch.Tensor:
    view = functional.adjust_brightness(view, _uniform(settings.brightness, generator))
    view = functional.adjust_contrast(view, _uniform(settings.contrast, generator))
    view = functional.adjust_saturation(view, _uniform(settings.saturation, generator))
    if _happens(settings.hue_probability, generator):
        view = functional.adjust_hue(view, _uniform(settings.hue_turns, generator))
    return view


def _degrade(view: torch.Tensor, settings: ViewSettings, generator: torch.Generator) -> torch.Tensor:
    """Return uint8 [3, n, n] of float32 [3, n, n] in 0..1."""
    size_px = view.shape[1]
    if _happens(settings.blur_probability, generator):
        sigma_px = _uniform(settings.blur_sigma_px, generator)
        # torchvision pads by reflection, by less than the size of the image.
        reach_px = min(math.ceil(BLUR_REACH * sigma_px), size_px - 1)
        view = functional.gaussian_blur(view, [2 * reach_px + 1] * 2, [sigma_px] * 2)
    if _happens(settings.resize_probability, generator):
        small_px = max(1, round(_uniform(settings.resize_share, generator) * size_px))
        small = functional.resize(view, [small_px, small_px], antialias=True)
        view = functional.resize(small, [size_px, size_px], antialias=True)
    if _happens(settings.noise_probability, generator):
        # Not functional.gaussian_noise, which draws from the global generator.
        noise = torch.randn(view.shape, generator=generator)
        view = (view + _uniform(settings.noise_std_share, generator) * noise).clamp(0, 1)
    view = functional.to_dtype(view, torch.uint8, scale=True)
    if _happens(settings.jpeg_probability, generator):
        view = functional.jpeg(view, _integer(settings.jpeg_quality, generator))
    return view


def view_sheet(
    contents: Sequence[torch.Tensor],
    donors: Sequence[torch.Tensor],
    settings: ViewSettings,
    view_px: int,
    views_per_kind: int = 2,
    seed: int = 0,
) -> bytes:
    """Return a PNG to check settings by eye: per content the original, its donor, and views of every kind in the mix.

    contents, donors: uint8 [3, h, w] of any sizes, shown squeezed to a square. Raises AttribError if their numbers
    differ.
    """
    if not contents or len(contents) != len(donors):
        raise AttribError(f"{len(contents)} contents and {len(donors)} donors; a sheet needs one donor per content")
    kinds = [kind for kind in KINDS if getattr(settings.mix, kind) > 0 for _ in range(views_per_kind)]
    labels = ["original", "donor", *kinds]
    pitch = view_px + GAP_PX
    sheet = Image.new("RGB", (len(labels) * pitch - GAP_PX, LABEL_PX + len(contents) * pitch), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=LABEL_PX - 6)
    for column, label in enumerate(labels):
        draw.text((column * pitch + GAP_PX, GAP_PX), label, fill="black", font=font)
    for row, (content, donor) in enumerate(zip(contents, donors)):
        cells = [functional.resize(image, [view_px, view_px], antialias=True) for image in (content, donor)]
        cells += [
            render_view(content, donor, kind, settings, view_px, view_generator(seed, row, index))
            for index, kind in enumerate(kinds)
        ]
        for column, cell in enumerate(cells):
            pixels = np.ascontiguousarray(cell.permute(1, 2, 0).numpy())
            sheet.paste(Image.fromarray(pixels), (column * pitch, LABEL_PX + row * pitch))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()
