"""Make training views: altered copies of source images that stand in for generated images.

With views, training needs no (source, generated image) pairs. A view keeps the content of an image. It may take colours
or texture from a second image, the style donor, and is cropped, mirrored, recoloured and degraded.

The standard augmentations are torchvision's functionals. Its transform classes draw from the global generator, whose
state depends on workers and batches; here every draw uses the generator of the view. Render views in processes with one
torch thread each: threads within a view cost more than they save.
"""

import hashlib
import io
import math
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode, functional
from torchvision.utils import make_grid

from attrib.common.errors import AttribError
from attrib.train.augment.settings import DONOR_KINDS, KINDS, Kind, ViewSettings
from attrib.train.augment.transfer import band_transfer, colour_transfer, texture_transfer

STRIDES_PER_PATCH = 3  # patches overlap by two thirds; with less, their grid is visible
MIN_STRIDE_PX = 2  # with 1, the smallest patches would take most of the time
BLUR_REACH = 3  # standard deviations; the rest of a Gaussian is 0.3 %
VIEWS_PER_KIND = 2  # of a sheet
LABEL_PX = 20
GAP_PX = 2


def view_seed(seed: int, image_id: int, view_index: int) -> int:
    """Return a seed in [0, 2**63) from BLAKE2b, which does not depend on machine, order or number of workers."""
    digest = hashlib.blake2b(f"{seed} {image_id} {view_index}".encode(), digest_size=8).digest()
    # A torch CPU generator uses the low 32 bits only. So a few of millions of views share draws, for different images.
    return int.from_bytes(digest, "big") >> 1


def view_generator(seed: int, image_id: int, view_index: int) -> torch.Generator:
    """Return the generator of all draws of one view: its kind, its donor and those of render_view."""
    return torch.Generator().manual_seed(view_seed(seed, image_id, view_index))


def draw_kind(settings: ViewSettings, generator: torch.Generator) -> Kind:
    weights = torch.tensor([getattr(settings.mix, kind) for kind in KINDS], dtype=torch.float64)
    return KINDS[int(torch.multinomial(weights, 1, generator=generator))]


def render_view(
    content: Tensor, donor: Tensor | None, kind: Kind, settings: ViewSettings, view_px: int, generator: torch.Generator
) -> Tensor:
    """Return one view of the content, uint8 [3, view_px, view_px], rendered on the CPU.

    content, donor: uint8 [3, h, w], RGB, of any sizes; kind "solo" ignores the donor. The view depends on the arguments
    and the state of the CPU generator only. About 60 ms for kind texture at 224 px, 3 to 10 ms for the others.
    Raises AttribError for an unknown kind or a missing donor.
    """
    if kind not in KINDS:
        raise AttribError(f"kind {kind!r} of a view is unknown; use one of {', '.join(KINDS)}")
    if kind in DONOR_KINDS and donor is None:
        raise AttribError(f"a view of kind {kind!r} needs a style donor; give a second image or use kind 'solo'")
    renderer = _Renderer(settings, view_px, generator)
    view = renderer.crop(content, settings.crop_area_share, settings.crop_aspect, settings.flip_probability)
    if kind == "solo":
        view = renderer.recolour(view)
    else:
        # Proportions belong to a style, so the donor keeps its own.
        style = renderer.crop(donor, settings.donor_crop_area_share, (1.0, 1.0), settings.donor_flip_probability)
        view = renderer.stylise(view, style, kind)
    return renderer.degrade(view)


class _Renderer:
    """The steps of one view, with the draws of its generator."""

    def __init__(self, settings: ViewSettings, view_px: int, generator: torch.Generator):
        self.settings, self.view_px, self.generator = settings, view_px, generator

    def uniform(self, limits: tuple[float, float]) -> float:
        low, high = limits
        return low + (high - low) * torch.rand((), generator=self.generator).item()

    def integer(self, limits: tuple[int, int]) -> int:
        """Return a random integer, both limits included."""
        return int(torch.randint(limits[0], limits[1] + 1, (), generator=self.generator))

    def happens(self, probability: float) -> bool:
        return torch.rand((), generator=self.generator).item() < probability

    def resize(self, view: Tensor, size_px: int) -> Tensor:
        return functional.resize(view, [size_px, size_px], antialias=True)

    def crop(self, pixels: Tensor, area_share, aspect, flip_probability: float) -> Tensor:
        """Return a random part, float32 [3, view_px, view_px], of uint8 [3, h, w]; area uniform, aspect log-uniform.

        A part that does not fit is shrunk, so panoramas keep the aspect; torchvision's RandomResizedCrop draws again
        and finally takes the centre.
        """
        height, width = pixels.shape[1:]
        area = self.uniform(area_share) * height * width
        ratio = math.exp(self.uniform((math.log(aspect[0]), math.log(aspect[1]))))
        crop_width, crop_height = math.sqrt(area * ratio), math.sqrt(area / ratio)
        fit = min(1.0, width / crop_width, height / crop_height)
        crop_width, crop_height = max(1, round(crop_width * fit)), max(1, round(crop_height * fit))
        top, left = self.integer((0, height - crop_height)), self.integer((0, width - crop_width))
        size = [self.view_px, self.view_px]
        part = functional.resized_crop(
            pixels, top, left, crop_height, crop_width, size, InterpolationMode.BICUBIC, antialias=True
        )
        if self.happens(flip_probability):
            part = functional.horizontal_flip(part)
        return functional.to_dtype(part, torch.float32, scale=True)

    def stylise(self, shown: Tensor, style: Tensor, kind: Kind) -> Tensor:
        settings = self.settings
        if kind == "colour":
            return colour_transfer(shown, style, self.uniform(settings.colour_strength))
        if kind == "bands":
            return band_transfer(shown, style, self.uniform(settings.bands_strength))
        style_px = max(1, round(self.uniform(settings.donor_scale) * self.view_px))
        patch_px = self.integer(settings.patch_px)
        view = texture_transfer(
            shown,
            self.resize(style, style_px),
            self.generator,
            patch_px=patch_px,
            stride_px=max(MIN_STRIDE_PX, patch_px // STRIDES_PER_PATCH),
            num_candidates=settings.num_donor_patches,
            mean_weight=self.uniform(settings.texture_mean_weight),
            strength=self.uniform(settings.texture_strength),
        )
        if self.happens(settings.keep_colour_probability):
            view = colour_transfer(view, shown, self.uniform(settings.keep_colour_share))
        return view

    def recolour(self, view: Tensor) -> Tensor:
        view = functional.adjust_brightness(view, self.uniform(self.settings.brightness))
        view = functional.adjust_contrast(view, self.uniform(self.settings.contrast))
        view = functional.adjust_saturation(view, self.uniform(self.settings.saturation))
        if self.happens(self.settings.hue_probability):
            view = functional.adjust_hue(view, self.uniform(self.settings.hue_turns))
        return view

    def degrade(self, view: Tensor) -> Tensor:
        """Return uint8 [3, n, n] of float32 [3, n, n] in 0..1."""
        settings = self.settings
        if self.happens(settings.blur_probability):
            sigma_px = self.uniform(settings.blur_sigma_px)
            # torchvision pads by reflection, by less than the size of the image.
            reach_px = min(math.ceil(BLUR_REACH * sigma_px), self.view_px - 1)
            view = functional.gaussian_blur(view, [2 * reach_px + 1] * 2, [sigma_px] * 2)
        if self.happens(settings.resize_probability):
            small_px = max(1, round(self.uniform(settings.resize_share) * self.view_px))
            view = self.resize(self.resize(view, small_px), self.view_px)
        if self.happens(settings.noise_probability):
            # Not functional.gaussian_noise, which draws from the global generator.
            noise = torch.randn(view.shape, generator=self.generator)
            view = (view + self.uniform(settings.noise_std_share) * noise).clamp(0, 1)
        view = functional.to_dtype(view, torch.uint8, scale=True)
        if self.happens(settings.jpeg_probability):
            view = functional.jpeg(view, self.integer(settings.jpeg_quality))
        return view


def view_sheet(images: Sequence[Tensor], settings: ViewSettings, view_px: int, seed: int = 0) -> bytes:
    """Return a PNG to check settings by eye: per image the original, its donor, and views of every kind in the mix.

    images: uint8 [3, h, w] of any sizes, one or more, shown squeezed to a square. The donor is the next image.
    """
    kinds = [kind for kind in KINDS if getattr(settings.mix, kind) > 0 for _ in range(VIEWS_PER_KIND)]
    labels = ["original", "donor", *kinds]
    cells = []
    for row, (content, donor) in enumerate(zip(images, [*images[1:], images[0]])):
        cells += [functional.resize(image, [view_px, view_px], antialias=True) for image in (content, donor)]
        for index, kind in enumerate(kinds):
            cells.append(render_view(content, donor, kind, settings, view_px, view_generator(seed, row, index)))
    grid = make_grid(cells, len(labels), padding=GAP_PX, pad_value=255)[:, GAP_PX:, GAP_PX:-GAP_PX]
    sheet = Image.new("RGB", (grid.shape[2], LABEL_PX + grid.shape[1]), "white")
    sheet.paste(functional.to_pil_image(grid), (0, LABEL_PX))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=LABEL_PX - 6)
    for column, label in enumerate(labels):
        draw.text((column * (view_px + GAP_PX) + GAP_PX, GAP_PX), label, fill="black", font=font)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()
