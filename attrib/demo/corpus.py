"""A drawn corpus with owners and licences: no download, no real artist, and any part of it can be redrawn from its seed.

Each picture depends on (seed, its number) alone, so the first n pictures of a larger corpus are those of a smaller one.
"""

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from attrib.common.errors import AttribError
from attrib.demo.canvas import Canvas, Palette, draw_palette, vary_palette
from attrib.demo.motifs import THINGS
from attrib.demo.patterns import PATTERNS

COLLECTIONS = {**THINGS, **PATTERNS}
STUDIOS = (
    "Atelier Nord", "Blue Kiln", "Casa Lumbre", "Driftwood & Daughters", "Eleven Looms", "Fennel Press",
    "Glasshaus", "Hinoki Works", "Inkwell Row", "Juniper Yard", "Kestrel Prints", "Low Tide Studio",
)  # fmt: skip
LICENCES = ("CC-BY-4.0", "CC-BY-NC-4.0", "stock-standard", "all-rights-reserved")
PALETTES_PER_STUDIO = 3
METADATA_COLUMNS = ("key", "owner", "licence", "collection")
_PICTURE, _STUDIO = 0, 1  # so that no picture and no studio draw from the same stream of chance


def draw_corpus(folder: Path, num_images: int, seed: int, image_px: int = 96) -> None:
    """Writes <folder>/<collection>/<name>.png or .jpg, square RGB of `image_px`, and <folder>/metadata.csv (METADATA_COLUMNS).

    A studio has a few palettes of its own, so colour alone points at a studio rather than at a picture. Raises AttribError if the
    folder already holds a corpus.
    """
    if (folder / "metadata.csv").exists():
        raise AttribError(f"{folder} already holds a corpus; give an empty folder, or delete it first")
    for collection in COLLECTIONS:
        (folder / collection).mkdir(parents=True, exist_ok=True)
    shares = 1 / np.arange(1, len(STUDIOS) + 1) ** 0.7
    shares /= shares.sum()
    palettes = [_studio_palettes(seed, studio) for studio in range(len(STUDIOS))]
    rows = []
    for number in range(num_images):
        rng = np.random.default_rng([seed, _PICTURE, number])
        studio = int(rng.choice(len(STUDIOS), p=shares))
        collection = str(rng.choice(list(COLLECTIONS)))
        palette = vary_palette(palettes[studio][rng.integers(PALETTES_PER_STUDIO)], rng)
        licence = LICENCES[int(rng.choice(len(LICENCES), p=np.roll((0.55, 0.25, 0.15, 0.05), studio)))]
        is_jpeg = bool(rng.random() < 0.5)
        key = f"{collection}/{number:05d}.{'jpg' if is_jpeg else 'png'}"
        picture = draw_picture(collection, palette, rng, image_px)
        picture.save(folder / key, **({"quality": 92} if is_jpeg else {}))
        rows.append((key, STUDIOS[studio], licence, collection))
    with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(METADATA_COLUMNS)
        writer.writerows(rows)


def draw_picture(collection: str, palette: Palette, rng: np.random.Generator, image_px: int) -> Image.Image:
    """One RGB picture, `image_px` square, of a collection of COLLECTIONS."""
    canvas = Canvas(image_px, palette, rng)
    COLLECTIONS[collection](canvas)
    return canvas.finish()


def _studio_palettes(seed: int, studio: int) -> list[Palette]:
    rng = np.random.default_rng([seed, _STUDIO, studio])
    return [draw_palette(rng) for _ in range(PALETTES_PER_STUDIO)]
