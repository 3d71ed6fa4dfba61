"""A supersampled drawing surface in unit coordinates, and the palettes that drawings take their colours from."""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]

SUPERSAMPLING = 3  # drawn pixels per pixel of the finished image and axis: ImageDraw itself does not antialias
TAU = 2 * math.pi


@dataclass(frozen=True)
class Palette:
    """ground and ground_far: the two ends of a background; accents: for the motif; ink: darkest; light: lightest."""

    ground: Colour
    ground_far: Colour
    accents: tuple[Colour, ...]
    ink: Colour
    light: Colour


def oklch(lightness: float, chroma: float, hue_turns: float) -> Colour:
    """sRGB of an Oklch colour (B. Ottosson, 2020): lightness 0..1, chroma 0..0.3, hue in turns; clipped to the gamut."""
    a, b = chroma * math.cos(TAU * hue_turns), chroma * math.sin(TAU * hue_turns)
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )
    clipped = [min(max(value, 0.0), 1.0) for value in linear]
    return tuple(round(255 * (12.92 * v if v <= 0.0031308 else 1.055 * v ** (1 / 2.4) - 0.055)) for v in clipped)


def draw_palette(rng: np.random.Generator) -> Palette:
    """A light or dark ground and four accents whose hues are analogous, complementary or a triad."""
    hue = rng.random()
    steps = {"analogous": (0, 0.07, 0.14, -0.08), "complementary": (0, 0.5, 0.07, 0.45), "triad": (0, 0.33, 0.67, 0.08)}
    offsets = steps[str(rng.choice(list(steps)))]
    dark = rng.random() < 0.35
    chroma = rng.uniform(0.08, 0.19)
    accents = tuple(
        oklch(rng.uniform(0.5, 0.82), chroma * rng.uniform(0.8, 1.2), hue + offset + rng.normal(0, 0.015))
        for offset in offsets
    )
    ground_hue = hue + rng.choice([0.0, 0.5, 0.2]) + rng.normal(0, 0.03)
    lightness = rng.uniform(0.2, 0.36) if dark else rng.uniform(0.84, 0.95)
    far = lightness + rng.uniform(0.08, 0.2) * (1 if dark else -1)
    return Palette(
        ground=oklch(lightness, rng.uniform(0.02, 0.07), ground_hue),
        ground_far=oklch(far, rng.uniform(0.04, 0.1), ground_hue + rng.normal(0, 0.06)),
        accents=accents,
        ink=oklch(rng.uniform(0.16, 0.28), 0.05, hue + 0.5),
        light=oklch(rng.uniform(0.93, 0.98), 0.03, hue + 0.1),
    )


def vary_palette(palette: Palette, rng: np.random.Generator) -> Palette:
    """The same palette mixed anew: every colour moves a little and the accents change places."""

    def nudge(colour: Colour) -> Colour:
        return tuple(int(np.clip(channel + rng.normal(0, 9), 0, 255)) for channel in colour)

    order = rng.permutation(len(palette.accents))
    return Palette(
        nudge(palette.ground),
        nudge(palette.ground_far),
        tuple(nudge(palette.accents[i]) for i in order),
        nudge(palette.ink),
        nudge(palette.light),
    )


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """`share` of the second colour, the rest of the first."""
    return tuple(round(a + (b - a) * share) for a, b in zip(first, second))


class Canvas:
    """Draws in unit coordinates (x to the right, y downwards, both 0..1) with the colours of `palette` and the chance of `rng`."""

    def __init__(self, image_px: int, palette: Palette, rng: np.random.Generator):
        self.image_px = image_px
        self.side_px = image_px * SUPERSAMPLING
        self.palette = palette
        self.rng = rng
        self.image = Image.new("RGB", (self.side_px, self.side_px), palette.ground)
        self.draw = ImageDraw.Draw(self.image)

    def accent(self) -> Colour:
        return self.palette.accents[self.rng.integers(len(self.palette.accents))]

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def between(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def backdrop(self, near: Colour, far: Colour, angle_turns: float = 0.25) -> None:
        """A straight gradient over the whole canvas, from `near` to `far` in the direction of the angle."""
        ramp = np.linspace(-0.5, 0.5, 16)
        along = np.clip(
            0.5 + math.cos(TAU * angle_turns) * ramp[None, :] + math.sin(TAU * angle_turns) * ramp[:, None], 0, 1
        )
        colours = np.array(near) + along[..., None] * (np.array(far) - np.array(near))
        small = Image.fromarray(colours.round().astype(np.uint8))
        self.image.paste(small.resize(self.image.size, Image.Resampling.BILINEAR))

    def px(self, points: list[Point]) -> list[Point]:
        """Drawn pixels, for what ImageDraw offers beyond the methods below."""
        return [(x * self.side_px, y * self.side_px) for x, y in points]

    def polygon(self, points: list[Point], fill: Colour) -> None:
        self.draw.polygon(self.px(points), fill=fill)

    def line(self, points: list[Point], fill: Colour, width: float) -> None:
        """A stroke with round ends; width in canvas sides."""
        width_px = max(1, round(width * self.side_px))
        self.draw.line(self.px(points), fill=fill, width=width_px, joint="curve")
        for x, y in (points[0], points[-1]):
            self.disc(x, y, width / 2, fill)

    def disc(self, x: float, y: float, radius: float, fill: Colour) -> None:
        self.oval(x, y, radius, radius, fill)

    def oval(self, x: float, y: float, radius_x: float, radius_y: float, fill: Colour) -> None:
        self.draw.ellipse(self.px([(x - radius_x, y - radius_y), (x + radius_x, y + radius_y)]), fill=fill)

    def box(self, left: float, top: float, right: float, bottom: float, fill: Colour, corner: float = 0.0) -> None:
        corners = self.px([(left, top), (right, bottom)])
        self.draw.rounded_rectangle(corners, radius=corner * self.side_px, fill=fill)

    def ball(self, x: float, y: float, radius: float, fill: Colour) -> None:
        """A disc lit from the upper left."""
        for step in range(8):
            share = step / 7
            shift = -0.32 * radius * share
            tone = mix(mix(fill, self.palette.ink, 0.45), mix(fill, self.palette.light, 0.55), share)
            self.disc(x + shift, y + shift, radius * (1 - 0.82 * share), tone)

    def petal(self, x: float, y: float, angle_turns: float, length: float, width: float, fill: Colour) -> None:
        """A leaf shape from (x, y) in the direction of the angle."""
        along = np.linspace(0, 1, 14)
        half = width / 2 * np.sin(np.pi * along**0.8)
        points = np.concatenate([np.stack([along * length, half], 1), np.stack([along * length, -half], 1)[::-1]])
        cos, sin = math.cos(TAU * angle_turns), math.sin(TAU * angle_turns)
        turned = points @ np.array([[cos, sin], [-sin, cos]]) + (x, y)
        self.polygon([tuple(point) for point in turned.tolist()], fill)

    def finish(self) -> Image.Image:
        """The drawing at its final size, with soft light from one side and the grain of paper."""
        picture = np.asarray(self.image.resize((self.image_px, self.image_px), Image.Resampling.BOX), dtype=np.float32)
        axis = np.linspace(-1, 1, self.image_px, dtype=np.float32)
        angle = TAU * self.rng.random()
        light = 1 + 0.07 * (math.cos(angle) * axis[None, :] + math.sin(angle) * axis[:, None])
        light -= 0.06 * (axis[None, :] ** 2 + axis[:, None] ** 2)
        grain = self.rng.normal(0, self.rng.uniform(0.5, 3.0), picture.shape[:2])
        return Image.fromarray(np.clip(picture * light[..., None] + grain[..., None], 0, 255).astype(np.uint8))
