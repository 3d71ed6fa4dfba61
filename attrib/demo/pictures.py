"""Drawn source images with owners and licences: no download, no real artist, and the same files from the same seed.

Each image depends on (seed, its number) alone, so the first n images of a larger corpus are those of a smaller one.
"""

import colorsys
import csv
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from attrib.common.errors import AttribError

STUDIOS = ("Atelier Nord", "Blue Kiln", "Casa Lumbre", "Eleven Looms", "Fennel Press", "Hinoki Works", "Inkwell Row")
LICENCES = ("CC-BY-4.0", "CC-BY-NC-4.0", "stock-standard", "all-rights-reserved")
PALETTES_PER_STUDIO = 5
METADATA_COLUMNS = ("key", "owner", "licence", "collection")
SUPERSAMPLING = 3  # ImageDraw does not antialias
TAU = 2 * math.pi

Colour = tuple[int, int, int]


def mix(first: Colour, second: Colour, share: float) -> Colour:
    return tuple(round(a + (b - a) * share) for a, b in zip(first, second))


def draw_palette(rng: np.random.Generator) -> np.ndarray:
    """Return uint8 [8, 3] RGB: two ends of a light or dark ground, darkest, lightest, four accents."""
    hue, ground, value = rng.random(), rng.random(), rng.choice([0.25, 0.9], p=(0.35, 0.65))
    colours = [(ground, 0.25, value), (ground + 0.05, 0.4, abs(value - 0.2)), (hue, 0.4, 0.18), (hue, 0.08, 0.97)]
    colours += zip(hue + rng.choice([0, 0.1, 0.5], 4), rng.uniform(0.45, 0.9, 4), rng.uniform(0.5, 0.95, 4))
    return np.array([np.multiply(255, colorsys.hsv_to_rgb(*colour)) for colour in colours], dtype=np.uint8)


class Canvas:
    """Draws with random numbers and a palette of its own.

    A point is the complex number x + iy, x from 0 to 1 to the right, y from 0 to 1 downwards; lengths are in sides.
    """

    def __init__(self, image_px: int, palette: np.ndarray, rng: np.random.Generator):
        """palette: uint8 [8, 3] of draw_palette; its colours move a little, and its accents change places."""
        self.image_px, self.side_px, self.rng = image_px, image_px * SUPERSAMPLING, rng
        colours = np.clip(palette + rng.normal(0, 9, palette.shape), 0, 255).astype(int)
        self.ground, self.far, self.ink, self.light = (tuple(colour) for colour in colours[:4].tolist())
        self.accents = [tuple(colour) for colour in colours[4:].tolist()]
        gradient = Image.linear_gradient("L").rotate(90 * self.count(0, 3)).resize((self.side_px, self.side_px))
        self.image = ImageOps.colorize(gradient, self.ground, self.far)
        self.draw = ImageDraw.Draw(self.image)

    def accent(self, towards: Colour = (0, 0, 0), share: float = 0.0) -> Colour:
        return mix(self.accents[self.rng.integers(len(self.accents))], towards, share)

    def between(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def point(self, low: float, high: float, count: int | None = None) -> complex | np.ndarray:
        return self.rng.uniform(low, high, count) + 1j * self.rng.uniform(low, high, count)

    def count(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high + 1))

    def polygon(self, points: np.ndarray, fill: Colour) -> None:
        self.draw.polygon([(point.real, point.imag) for point in points * self.side_px], fill=fill)

    def line(self, points: np.ndarray, fill: Colour, width: float) -> None:
        """A stroke with round ends."""
        pixels = [(point.real, point.imag) for point in points * self.side_px]
        self.draw.line(pixels, fill=fill, width=max(1, round(width * self.side_px)), joint="curve")
        self.disc(points[0], width / 2, fill)
        self.disc(points[-1], width / 2, fill)

    def disc(self, centre: complex, radius: float, fill: Colour) -> None:
        place = centre * self.side_px
        self.draw.circle((place.real, place.imag), radius * self.side_px, fill=fill)

    def finish(self) -> Image.Image:
        """The drawing at its final size, with a little grain."""
        pixels = np.asarray(self.image.resize((self.image_px, self.image_px), Image.Resampling.BOX), dtype=np.float32)
        grain = self.rng.normal(0, self.between(0.5, 3.0), pixels.shape[:2])
        return Image.fromarray(np.clip(pixels + grain[..., None], 0, 255).astype(np.uint8))


def hills(c: Canvas) -> None:
    c.disc(c.between(0.15, 0.85) + 1j * c.between(0.15, 0.4), c.between(0.06, 0.16), c.accent(c.light, 0.4))
    near, far, roughness, x = c.accent(c.ink, 0.4), c.accent(c.far, 0.5), c.count(2, 7), np.linspace(0, 1, 60)
    for depth in np.linspace(0, 1, c.count(3, 5)):
        waves = [np.sin(TAU * (c.between(0.4, 0.9) * k * x + c.between(0, 1))) / k for k in range(1, roughness + 1)]
        ridge = x + 1j * (0.45 + 0.4 * depth - c.between(0.05, 0.12) * np.sum(waves, 0))
        c.polygon(np.array([1j, *ridge, 1 + 1j]), mix(far, near, depth))
        for foot in c.rng.choice(ridge, c.count(0, 9)):
            c.polygon(foot + 0.02j + c.between(0.05, 0.14) * np.array([-1 / 3, -1j, 1 / 3]), near)


def flowers(c: Canvas) -> None:
    num_flowers, stem = c.count(1, 4), c.accent(c.ink, 0.4)
    for i in range(num_flowers):
        head = (i + 0.5) / num_flowers + c.between(-0.06, 0.06) + 1j * c.between(0.3, 0.5)
        foot, radius, num_petals = c.between(0.2, 0.8) + 1.05j, min(0.32, 0.42 / num_flowers**0.6), c.count(5, 14)
        c.line(np.array([foot, (foot + head) / 2 + 0.03, head]), stem, 0.02)
        star = radius * np.exp(TAU * 1j * (c.between(0, 1) + np.arange(2 * num_petals) / (2 * num_petals)))
        star[::2] *= c.between(0.3, 0.7)
        colour = c.accent()
        c.polygon(head + star, mix(colour, c.ink, 0.15))
        c.polygon(head + c.between(0.55, 0.75) * star, mix(colour, c.light, 0.4))
        c.disc(head, radius * c.between(0.16, 0.32), c.accent())


def stripes(c: Canvas) -> None:
    x, turn = np.linspace(-0.8, 0.8, 60), np.exp(TAU * 1j * c.between(0, 1))
    edge = x + 1j * c.between(0, 0.1) * np.sin(TAU * x * c.between(0.8, 3.0)) - 0.9j
    while edge[0].imag < 0.85:
        width = c.between(0.02, 0.14)
        c.polygon(0.5 + 0.5j + turn * np.concatenate([edge, edge[::-1] + 1j * width]), c.accent())
        edge = edge + 1j * (width + c.between(0, 0.09))


def dots(c: Canvas) -> None:
    num_rows, jitter, hole, first, second = c.count(4, 10), c.between(0, 0.3), c.between(0, 0.7), c.accent(), c.accent()
    wave, phase, stagger = c.point(-1.2, 1.2), c.between(0, 1), c.count(0, 1) / 2
    for row, column in np.ndindex(num_rows, num_rows + 2):
        centre = (column - 0.5 + stagger * (row % 2) + 1j * (row + 0.5) + c.point(-jitter, jitter)) / num_rows
        swell = 0.5 + 0.5 * math.sin(TAU * (phase + (wave * centre).real))
        radius = (0.15 + 0.33 * swell) / num_rows
        c.disc(centre, radius, mix(first, second, swell))
        c.disc(centre, radius * hole, c.ground)


def flows(c: Canvas) -> None:
    waves, phases, heights = c.point(-1.3, 1.3, 3), c.rng.random(3), c.rng.uniform(0.05, 0.25, 3)
    bend, width, trails = c.between(0, 1), c.between(0.008, 0.03), [c.point(0, 1, c.count(50, 120))]
    for _ in range(14):
        turns = bend + np.sin(TAU * (phases + np.outer(trails[-1], waves).real)) @ heights
        trails.append(trails[-1] + 0.03 * np.exp(TAU * 1j * turns))
    for trail in np.stack(trails, 1):
        c.line(trail, c.accent(c.ink, c.between(0, 0.3)), width * c.between(0.5, 1.5))


def glyphs(c: Canvas) -> None:
    num_rows, ink, weight = c.count(1, 4), c.accent(c.ink, 0.5), c.between(0.07, 0.16)
    nodes = 0.15 + 0.15j + 0.35 * np.add.outer(np.arange(3) * (1j + c.between(-0.2, 0.2)), np.arange(3)).ravel()
    for corner in np.add.outer(1j * np.arange(num_rows), np.arange(num_rows)).ravel():
        for _ in range(c.count(2, 4)):
            points = 0.07 + 0.07j + 0.86 / num_rows * (corner + c.rng.choice(nodes, 3, replace=False))
            c.line(points, ink if c.between(0, 1) < 0.8 else c.accent(), 0.86 / num_rows * weight)


COLLECTIONS = {draw.__name__: draw for draw in (hills, flowers, stripes, dots, flows, glyphs)}


def draw_corpus(folder: Path, num_images: int, seed: int, image_px: int = 96) -> list[str]:
    """Write <folder>/<collection>/<number>.png or .jpg, square RGB, and <folder>/metadata.csv (METADATA_COLUMNS).

    Returns the paths of the images below `folder`. Every studio has a few palettes: colour identifies a studio, not an
    image. Raises AttribError if a corpus is there.
    """
    if (folder / "metadata.csv").exists():
        raise AttribError(f"{folder} already holds a corpus; give an empty folder, or delete it first")
    for collection in COLLECTIONS:
        (folder / collection).mkdir(parents=True, exist_ok=True)
    shares = 1 / np.arange(1, len(STUDIOS) + 1) ** 0.7
    rng = np.random.default_rng(seed)
    palettes = [[draw_palette(rng) for _ in range(PALETTES_PER_STUDIO)] for _ in STUDIOS]
    rows = []
    for number in range(num_images):
        rng = np.random.default_rng([seed, number + 1])  # [seed, 0] is the stream of the palettes
        studio = int(rng.choice(len(STUDIOS), p=shares / shares.sum()))
        collection = str(rng.choice(list(COLLECTIONS)))
        licence = str(rng.choice(LICENCES, p=np.roll((0.55, 0.25, 0.15, 0.05), studio)))
        canvas = Canvas(image_px, palettes[studio][rng.integers(PALETTES_PER_STUDIO)], rng)
        COLLECTIONS[collection](canvas)
        key = f"{collection}/{number:05d}.{rng.choice(['jpg', 'png'])}"
        canvas.finish().save(folder / key, quality=92)
        rows.append((key, STUDIOS[studio], licence, collection))
    with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([METADATA_COLUMNS, *rows])
    return [key for key, *_ in rows]
