"""Drawn source images with owners and licences: no download, no real artist, and the same files from the same seed.

Each image depends on (seed, its number) alone, so the first n images of a larger corpus are those of a smaller one.
"""

import colorsys
import csv
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from attrib.common.errors import AttribError

STUDIOS = (
    "Atelier Nord", "Blue Kiln", "Casa Lumbre", "Driftwood & Daughters", "Eleven Looms", "Fennel Press",
    "Glasshaus", "Hinoki Works", "Inkwell Row", "Juniper Yard", "Kestrel Prints", "Low Tide Studio",
)  # fmt: skip
LICENCES = ("CC-BY-4.0", "CC-BY-NC-4.0", "stock-standard", "all-rights-reserved")
PALETTES_PER_STUDIO = 3
METADATA_COLUMNS = ("key", "owner", "licence", "collection")
SUPERSAMPLING = 3  # ImageDraw does not antialias
TAU = 2 * math.pi
_IMAGE, _STUDIO = 0, 1  # first word of the seeds, so that images and studios have separate random streams

Colour = tuple[int, int, int]


def mix(first: Colour, second: Colour, share: float) -> Colour:
    return tuple(round(a + (b - a) * share) for a, b in zip(first, second))


def draw_palette(rng: np.random.Generator) -> np.ndarray:
    """uint8 [8, 3] RGB: two ends of a light or dark ground, darkest, lightest, four accents of related hues."""
    hue, dark = rng.random(), rng.random() < 0.35
    steps = [(0, 0.07, 0.14, 0.92), (0, 0.5, 0.07, 0.45), (0, 0.33, 0.67, 0.08)][rng.integers(3)]
    ground = hue + rng.choice([0.0, 0.2, 0.5])
    value = rng.uniform(0.15, 0.35) if dark else rng.uniform(0.85, 0.95)
    colours = [(ground, rng.uniform(0.1, 0.35), value), (ground + rng.normal(0, 0.06), 0.4, abs(value - 0.2))]
    colours += [(hue + 0.5, 0.4, rng.uniform(0.1, 0.25)), (hue + 0.1, 0.08, 0.97)]
    colours += [(hue + step + rng.normal(0, 0.015), rng.uniform(0.45, 0.9), rng.uniform(0.5, 0.95)) for step in steps]
    return np.array([[255 * v for v in colorsys.hsv_to_rgb(h % 1, s, v)] for h, s, v in colours], dtype=np.uint8)


def rotation(turns: float) -> np.ndarray:
    cos, sin = math.cos(TAU * turns), math.sin(TAU * turns)
    return np.array([[cos, sin], [-sin, cos]])


class Canvas:
    """Draws in unit coordinates (x to the right, y downwards) with random numbers and a palette of its own."""

    def __init__(self, image_px: int, palette: np.ndarray, rng: np.random.Generator):
        """palette: uint8 [8, 3] of draw_palette; its colours move a little, and its accents change places."""
        self.image_px, self.side_px, self.rng = image_px, image_px * SUPERSAMPLING, rng
        colours = np.clip(palette + rng.normal(0, 9, palette.shape), 0, 255).astype(int)
        self.ground, self.far, self.ink, self.light = (tuple(colour) for colour in colours[:4].tolist())
        self.accents = [tuple(colour) for colour in rng.permutation(colours[4:]).tolist()]
        angle, axis = TAU * rng.random(), np.linspace(-0.5, 0.5, self.side_px)
        share = np.clip(0.5 + math.cos(angle) * axis[None, :] + math.sin(angle) * axis[:, None], 0, 1)[..., None]
        backdrop = np.array(self.ground) * (1 - share) + np.array(self.far) * share
        self.image = Image.fromarray(backdrop.astype(np.uint8))
        self.draw = ImageDraw.Draw(self.image)

    def accent(self, towards: Colour | None = None, share: float = 0.0) -> Colour:
        chosen = self.accents[self.rng.integers(len(self.accents))]
        return mix(chosen, towards, share) if towards else chosen

    def between(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def count(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high + 1))

    def polygon(self, points: list | np.ndarray, fill: Colour) -> None:
        self.draw.polygon([(x * self.side_px, y * self.side_px) for x, y in points], fill=fill)

    def line(self, points: list | np.ndarray, fill: Colour, width: float) -> None:
        """A stroke with round ends; width in canvas sides."""
        pixels = [(x * self.side_px, y * self.side_px) for x, y in points]
        self.draw.line(pixels, fill=fill, width=max(1, round(width * self.side_px)), joint="curve")
        for x, y in (points[0], points[-1]):
            self.disc(x, y, width / 2, fill)

    def oval(self, x: float, y: float, half_width: float, half_height: float, fill: Colour) -> None:
        box = [x - half_width, y - half_height, x + half_width, y + half_height]
        self.draw.ellipse([value * self.side_px for value in box], fill=fill)

    def disc(self, x: float, y: float, radius: float, fill: Colour) -> None:
        self.oval(x, y, radius, radius, fill)

    def petal(self, x: float, y: float, turns: float, length: float, width: float, fill: Colour) -> None:
        """A leaf shape from (x, y) in the direction of the angle."""
        along = np.linspace(0, 1, 12)
        half = width / 2 * np.sin(np.pi * along**0.8)
        outline = np.concatenate([np.stack([along * length, half], 1), np.stack([along * length, -half], 1)[::-1]])
        self.polygon(outline @ rotation(turns) + (x, y), fill)

    def finish(self) -> Image.Image:
        """The drawing at its final size, with a little grain."""
        pixels = np.asarray(self.image.resize((self.image_px, self.image_px), Image.Resampling.BOX), dtype=np.float32)
        grain = self.rng.normal(0, self.between(0.5, 3.0), pixels.shape[:2])
        return Image.fromarray(np.clip(pixels + grain[..., None], 0, 255).astype(np.uint8))


def hills(c: Canvas) -> None:
    radius = c.between(0.06, 0.16)
    c.disc(c.between(0.15, 0.85), c.between(0.15, 0.4), radius, c.accent(c.light, 0.4))
    near, far, num_ridges, roughness = c.accent(c.ink, 0.4), c.accent(c.far, 0.5), c.count(3, 5), c.count(2, 7)
    x = np.linspace(0, 1, 60)
    for depth in np.linspace(0, 1, num_ridges):
        waves = [np.sin(TAU * (c.between(0.4, 0.9) * k * x + c.between(0, 1))) / k for k in range(1, roughness + 1)]
        y = 0.45 + 0.4 * depth - c.between(0.05, 0.12) * np.sum(waves, 0)
        tone = mix(far, near, depth)
        c.polygon([(0, 1), *zip(x, y), (1, 1)], tone)
        for i in c.rng.integers(60, size=c.count(0, 9)):
            tall = c.between(0.05, 0.14)
            c.polygon([(x[i] - tall / 3, y[i] + 0.02), (x[i], y[i] - tall), (x[i] + tall / 3, y[i] + 0.02)], near)


def flowers(c: Canvas) -> None:
    num_flowers, stem = c.count(1, 4), c.accent(c.ink, 0.4)
    for i in range(num_flowers):
        x, y, foot = (i + 0.5) / num_flowers + c.between(-0.06, 0.06), c.between(0.3, 0.5), c.between(0.2, 0.8)
        radius = min(0.32, 0.42 / num_flowers**0.6) * c.between(0.75, 1.0)
        c.line([(foot, 1.05), ((x + foot) / 2 + 0.03, 0.75), (x, y)], stem, 0.02)
        c.petal((x + foot) / 2 + 0.02, 0.8, c.between(-0.5, 0), 0.2, 0.09, stem)
        num_petals, width, turn, colour = c.count(5, 14), c.between(2.5, 5.5), c.between(0, 1), c.accent()
        for reach, tone in ((1.0, mix(colour, c.ink, 0.15)), (c.between(0.55, 0.75), mix(colour, c.light, 0.4))):
            for k in range(num_petals):
                c.petal(x, y, turn + k / num_petals, radius * reach, radius * reach * width / num_petals, tone)
        c.disc(x, y, radius * c.between(0.16, 0.32), c.accent())


def masks(c: Canvas) -> None:
    x, y, wide, tall = c.between(0.45, 0.55), c.between(0.48, 0.56), c.between(0.24, 0.36), c.between(0.28, 0.4)
    skin, hair, mark, num_rays = c.accent(c.light, 0.2), c.accent(c.ink, 0.5), c.accent(), c.count(0, 20)
    for k in range(num_rays):
        c.petal(x, y, k / num_rays, c.between(0.42, 0.5), 0.12, hair)
    c.oval(x, y, wide, tall, skin)
    apart, eye, flat = wide * c.between(0.38, 0.5), c.between(0.04, 0.08), c.between(0.5, 1.2)
    eye_y, brow = y - tall * c.between(0.1, 0.35), c.between(-0.05, 0.05)
    for side in (-apart, apart):
        c.oval(x + side, eye_y, 1.3 * eye, eye * flat, c.light)
        c.disc(x + side, eye_y, eye / 2, c.ink)
        c.line([(x + 0.4 * side, eye_y - 0.09 + brow), (x + 1.6 * side, eye_y - 0.09 - brow)], hair, 0.025)
        c.disc(x + side, y + 0.3 * tall, 0.8 * eye, mark)
    nose, mouth, smile = c.between(0.02, 0.07), wide * c.between(0.25, 0.55), c.between(-0.06, 0.1)
    c.polygon([(x, eye_y), (x + nose, y + 0.25 * tall), (x - nose, y + 0.25 * tall)], mix(skin, c.ink, 0.4))
    lip = y + 0.55 * tall
    c.line([(x - mouth, lip), (x, lip + smile), (x + mouth, lip)], mix(mark, c.ink, 0.4), c.between(0.015, 0.05))


def fish(c: Canvas) -> None:
    for _ in range(c.count(1, 5)):
        x, sway, top = c.between(0, 1), c.between(0.01, 0.05), c.between(0.4, 0.8)
        y = np.linspace(1, top, 12)
        c.line(np.stack([x + sway * np.sin(9 * y), y], 1), c.accent(c.ink, 0.4), 0.025)
    num_fish = c.count(1, 4)
    for i in range(num_fish):
        x, y = c.between(0.3, 0.7), (i + 0.5) / num_fish + c.between(-0.05, 0.05)
        length, plump, face = c.between(0.22, 0.32) / num_fish**0.4, c.between(0.4, 0.8), c.rng.choice([-1, 1])
        ahead, high, body, fin = face * length, length * plump, c.accent(), c.accent()
        tail = [(-0.7, 0), (-1.5, -0.6), (-1.25, 0), (-1.5, 0.6)]
        c.polygon([(x + ahead * across, y + length * down) for across, down in tail], fin)
        c.polygon([(x + 0.3 * ahead, y - 0.7 * high), (x - 0.5 * ahead, y - 1.6 * high), (x - 0.6 * ahead, y)], fin)
        c.oval(x, y, length, high, body)
        for place in np.linspace(-0.5, 0.35, c.count(0, 4)):
            half, along = 0.9 * high * math.sqrt(1 - place**2), x + ahead * place
            c.line([(along, y - half), (along, y + half)], mix(fin, c.ink, 0.25), 0.12 * length)
        c.disc(x + 0.65 * ahead, y - 0.2 * high, 0.14 * length, c.light)
        c.disc(x + 0.68 * ahead, y - 0.2 * high, 0.07 * length, c.ink)


def planets(c: Canvas) -> None:
    c.polygon([(0, 0), (1, 0), (1, 1), (0, 1)], mix(c.ink, c.accent(), 0.15))
    for star in c.rng.uniform(0, (1, 1, 0.012), (c.count(20, 70), 3)):
        c.disc(*star, c.light)
    x, y, radius, tilt = c.between(0.35, 0.65), c.between(0.4, 0.6), c.between(0.15, 0.33), c.between(-0.4, 0.4)
    c.disc(x, y, radius, c.accent())
    for place in np.linspace(-0.8, 0.8, c.count(0, 7)):
        half = 0.93 * radius * math.sqrt(1 - place**2)
        middle = y + place * radius
        c.line([(x - half, middle), (x + half, middle + 0.2 * tilt * radius)], c.accent(), 0.13 * radius)
    angle = np.linspace(0, TAU / 2, 30)
    ring = np.stack([x + 1.75 * radius * np.cos(angle), y + radius * (0.45 * np.sin(angle) + tilt * np.cos(angle))], 1)
    c.line(ring, c.accent(c.light, 0.3), c.between(0.05, 0.25) * radius)
    for _ in range(c.count(0, 3)):
        moon = c.between(0.025, 0.08)
        c.disc(c.between(0.08, 0.92), c.between(0.08, 0.25), moon, c.accent())


def stripes(c: Canvas) -> None:
    turns, wave, height = c.between(0, 1), c.between(0.8, 3.0), c.between(0, 0.1)
    along, start = np.linspace(-0.8, 0.8, 60), -0.9
    swing = height * np.sin(TAU * along * wave)
    while start < 0.85:
        width = c.between(0.02, 0.14)
        edges = [np.stack([along, swing + start], 1), np.stack([along, swing + start + width], 1)[::-1]]
        c.polygon(np.concatenate(edges) @ rotation(turns) + 0.5, c.accent())
        start += width + c.between(0, 0.09)


def dots(c: Canvas) -> None:
    num_rows, jitter, hole, first, second = c.count(4, 10), c.between(0, 0.3), c.between(0, 0.7), c.accent(), c.accent()
    wave, phase, stagger = c.rng.uniform(-1.2, 1.2, 2), c.between(0, 1), c.count(0, 1)
    for row, column in np.ndindex(num_rows, num_rows + 2):
        x = (column - 0.5 + 0.5 * stagger * (row % 2) + c.between(-jitter, jitter)) / num_rows
        y = (row + 0.5 + c.between(-jitter, jitter)) / num_rows
        swell = 0.5 + 0.5 * math.sin(TAU * (wave[0] * x + wave[1] * y + phase))
        radius = (0.15 + 0.33 * swell) / num_rows
        c.disc(x, y, radius, mix(first, second, swell))
        c.disc(x, y, radius * hole, c.ground)


def flows(c: Canvas) -> None:
    waves, phases, heights = c.rng.uniform(-1.3, 1.3, (3, 2)), c.rng.random(3), c.rng.uniform(0.05, 0.25, 3)
    bend, width, trails = c.between(0, 1), c.between(0.008, 0.03), [c.rng.random((c.count(50, 120), 2))]
    for _ in range(14):
        turns = bend + (heights * np.sin(TAU * (trails[-1] @ waves.T + phases))).sum(1)
        trails.append(trails[-1] + 0.03 * np.stack([np.cos(TAU * turns), np.sin(TAU * turns)], 1))
    for points in np.stack(trails, 1):
        c.line(points, c.accent(c.ink, c.between(0, 0.3)), width * c.between(0.5, 1.5))


def glyphs(c: Canvas) -> None:
    num_rows, ink = c.count(1, 4), c.accent(c.ink, 0.5)
    size, slant = 0.86 / num_rows, c.between(-0.2, 0.2)
    width = size * c.between(0.07, 0.16)
    for row, column in np.ndindex(num_rows, num_rows):
        for _ in range(c.count(2, 4)):
            y, x = np.divmod(c.rng.permutation(9)[:3], 3) / np.array([[2], [2]])
            points = np.stack([column + 0.15 + 0.7 * (x + slant * (0.5 - y)), row + 0.15 + 0.7 * y], 1)
            c.line(0.07 + size * points, ink if c.between(0, 1) < 0.8 else c.accent(), width)


MOTIFS: tuple[Callable[[Canvas], None], ...] = (hills, flowers, masks, fish, planets, stripes, dots, flows, glyphs)
COLLECTIONS = {draw.__name__: draw for draw in MOTIFS}


def draw_corpus(folder: Path, num_images: int, seed: int, image_px: int = 96) -> None:
    """Write <folder>/<collection>/<number>.png or .jpg, square RGB, and <folder>/metadata.csv (METADATA_COLUMNS).

    Every studio has a few palettes: colour identifies a studio, not an image. Raises AttribError if a corpus is there.
    """
    if (folder / "metadata.csv").exists():
        raise AttribError(f"{folder} already holds a corpus; give an empty folder, or delete it first")
    for collection in COLLECTIONS:
        (folder / collection).mkdir(parents=True, exist_ok=True)
    shares = 1 / np.arange(1, len(STUDIOS) + 1) ** 0.7
    streams = [np.random.default_rng([seed, _STUDIO, studio]) for studio in range(len(STUDIOS))]
    palettes = [[draw_palette(rng) for _ in range(PALETTES_PER_STUDIO)] for rng in streams]
    rows = []
    for number in range(num_images):
        rng = np.random.default_rng([seed, _IMAGE, number])
        studio = int(rng.choice(len(STUDIOS), p=shares / shares.sum()))
        collection = str(rng.choice(list(COLLECTIONS)))
        licence = LICENCES[int(rng.choice(len(LICENCES), p=np.roll((0.55, 0.25, 0.15, 0.05), studio)))]
        canvas = Canvas(image_px, palettes[studio][rng.integers(PALETTES_PER_STUDIO)], rng)
        COLLECTIONS[collection](canvas)
        suffix, options = ("jpg", {"quality": 92}) if rng.random() < 0.5 else ("png", {})
        key = f"{collection}/{number:05d}.{suffix}"
        canvas.finish().save(folder / key, **options)
        rows.append((key, STUDIOS[studio], licence, collection))
    with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([METADATA_COLUMNS, *rows])
