"""Every layout of the formats: the pixels of a second decoder, or the reason that the layout is not supported.

PNG: a reader written from the standard. TIFF: tifffile, which does not use libtiff. BMP and GIF: built from pixels.
JPEG 2000, AVIF, WebP: imagecodecs.
"""

import io
import itertools
import re

import imagecodecs
import numpy as np
import pytest
import tifffile
from support.bmp_gif import bmp_table, gif_table
from support.hostile import picture
from support.png import png_table, read_png

from attrib.common.errors import ImageError
from attrib.data.decoding import decode_image

WIDTH, HEIGHT = 53, 37
NUM_SAMPLES = {"grey": 1, "grey-alpha": 2, "grey-associated": 2, "palette": 1, "rgb": 3, "rgb-alpha": 4}
NUM_SAMPLES |= {"rgb-associated": 4, "rgb-other": 4, "cmyk": 4, "ycbcr": 3}
SAMPLES = {str(bits): f"u{1 if bits <= 8 else 2 if bits <= 16 else 4}" for bits in (1, 2, 4, 8, 12, 14, 16, 32)}
SAMPLES |= {"f16": "f2", "f32": "f4", "f64": "f8", "s8": "i1", "s16": "i2"}


def problem_of(data: bytes, expected: np.ndarray, tolerance: float = 1.0) -> str:
    """ "" if the pixels are within the tolerance of float [h, w, 3]; else the reason of the refusal or "wrong"."""
    try:
        pixels = decode_image(data, max_megapixels=1.0).pixels.permute(1, 2, 0).numpy().astype(float)
    except ImageError as error:
        return error.reason
    right = pixels.shape == expected.shape and np.abs(pixels - expected).max() <= tolerance
    return "" if right else "wrong"


def on_white(samples: np.ndarray, kind: str) -> np.ndarray:
    """float [h, w, 3] from 0 to 255 of samples [h, w, channels] from 0 to 1."""
    colour, last = samples[..., :3], samples[..., -1:]
    if kind.endswith("-alpha") or kind.endswith("-associated"):
        grey_or_rgb = samples[..., :-1] * (1 if kind.endswith("-associated") else last)
        colour = np.broadcast_to(grey_or_rgb + 1 - last, (*samples.shape[:2], 3))
    elif kind == "cmyk":
        colour = (1 - colour) * (1 - last)
    elif kind == "ycbcr":
        y, cb, cr = (samples[..., i] * 255 - (0, 128, 128)[i] for i in range(3))
        colour = np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], axis=-1) / 255
    return 255 * np.broadcast_to(colour, (*samples.shape[:2], 3)).clip(0, 1)


def ramps(channels: int) -> np.ndarray:
    """float [HEIGHT, WIDTH, channels] from 0 to 1, each channel another ramp."""
    x, y = np.meshgrid(np.linspace(0, 1, WIDTH), np.linspace(0, 1, HEIGHT))
    return np.stack([x, y, (x + y) / 2, 1 - x], axis=-1)[..., :channels]


@pytest.mark.parametrize("name", png_table())
def test_png(name):
    data = png_table()[name]
    assert problem_of(data, read_png(data)) == ""


@pytest.mark.parametrize("kind", ["bits", "rle", "32-bit", "16-bit", "24-bit"])
def test_bmp(kind):
    table = {
        name: cell for name, cell in bmp_table().items() if (kind == "bits") != bool(re.match("rle|16|24|32", name))
    }
    problems = {name: problem_of(*cell) for name, cell in table.items() if kind == "bits" or name.startswith(kind)}
    refused = {name for name, problem in problems.items() if problem}
    assert problems and all(problems[name].startswith("not supported: BMP") for name in refused), problems
    assert all(re.search("444|1555|10-bit|rgbx-masks|rgba-(40|52)", name) for name in refused), refused


def test_gif():
    table = gif_table()
    assert len(table) == 192 and {name for name, cell in table.items() if problem_of(*cell)} == set()


def tiff(kind: str, sample: str, byte_order: str, layout: str, planes: str, codec: str | None, white: int) -> tuple:
    """(file, float [h, w, 3]); raises ValueError if tifffile cannot write it."""
    associated, channels = kind.endswith("-associated"), NUM_SAMPLES[kind]
    dtype, share = np.dtype(SAMPLES[sample]), ramps(channels)
    full = 1 if dtype.kind == "f" else 2 ** (int(sample.strip("s")) - (dtype.kind == "i")) - 1
    if associated:
        share[..., :-1] *= share[..., -1:]
    samples = (share * full if dtype.kind == "f" else np.rint(share * full)).astype(dtype)
    options = {"photometric": {"grey": "minisblack", "cmyk": "separated"}.get(kind.split("-")[0], kind.split("-")[0])}
    if white:
        options["photometric"] = "miniswhite"
    if channels > 1:
        options["planarconfig"] = planes
    extra = {"alpha": "unassalpha", "associated": "assocalpha", "other": "unspecified"}.get(kind.split("-")[-1])
    if extra:
        options["extrasamples"] = [extra]
    if kind == "palette":
        options["colormap"] = np.random.default_rng(8).integers(0, 256, (3, full + 1)).astype(np.uint16) * 257
    options |= {"tiles": {"tile": (16, 32)}, "strips": {"rowsperstrip": 8}}.get(layout, {"rowsperstrip": HEIGHT})
    if codec:
        options |= {"compression": codec.removesuffix("-predictor"), "predictor": codec.endswith("-predictor")}
    if dtype.kind == "u" and full not in (2**8 - 1, 2**16 - 1, 2**32 - 1):
        options["bitspersample"] = int(sample)
    file = io.BytesIO()
    stored = np.moveaxis(samples, -1, 0) if channels > 1 and planes == "separate" else samples
    tifffile.imwrite(file, stored[..., 0] if channels == 1 else stored, byteorder=byte_order, metadata=None, **options)
    with tifffile.TiffFile(io.BytesIO(file.getvalue())) as opened:
        page = opened.pages[0]
        read = page.asarray()
        read = np.moveaxis(read, 0, -1) if channels > 1 and planes == "separate" else read.reshape(HEIGHT, WIDTH, -1)
        if kind == "palette":
            return file.getvalue(), page.colormap.T[read[..., 0]] / 257
    share = read.astype(float) / full
    return file.getvalue(), on_white(1 - share if white else share, kind)


# What must be decoded; the rest of the table may be refused as not supported.
RIGHT = {("grey", sample): {0, 1} for sample in ("1", "2", "4", "8", "12", "16")}
RIGHT |= {("palette", "8"): {0}, ("grey", "f32"): {0}, ("grey-alpha", "8"): {0}}
RIGHT |= {(kind, "8"): {0} for kind in ("rgb", "rgb-alpha", "rgb-associated", "rgb-other", "cmyk", "ycbcr")}
RIGHT |= {(kind, "16"): {0} for kind in ("rgb", "rgb-alpha", "rgb-associated", "rgb-other", "cmyk")}


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("kind", NUM_SAMPLES)
def test_tiff(kind, sample):
    if kind == "palette" and sample not in ("1", "2", "4", "8"):
        return
    num_right = 0
    for byte_order, layout, planes, codec, white in itertools.product(
        "<>",
        ("strips", "one strip", "tiles"),
        ("contig", "separate"),
        (None, "zlib", "zlib-predictor", "lzw", "packbits"),
        (0, 1) if kind == "grey" else (0,),
    ):
        if byte_order == ">" and sample in ("12", "14"):
            continue  # tifffile swaps the bytes of packed samples, against the standard
        try:
            data, expected = tiff(kind, sample, byte_order, layout, planes, codec, white)
        except (ValueError, TypeError):
            continue
        problem = problem_of(data, expected)
        cell = (byte_order, layout, planes, codec, white, problem)
        assert not problem or problem.startswith("not supported: "), cell
        num_right += not problem
        separate_alpha = planes == "separate" and (
            kind in ("grey-alpha", "rgb-associated") or (sample == "16" and kind != "rgb")
        )
        must = white in RIGHT.get((kind, sample), ()) and not (separate_alpha and kind != "rgb-other")
        assert not (must and problem), cell
    assert num_right > 0 or (kind, sample) not in RIGHT


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("bits", [4, 8, 10, 12, 16])
@pytest.mark.parametrize("container", ["j2k", "jp2"])
def test_jpeg2000(container, bits, channels):
    kind = ("grey", "grey-alpha", "rgb", "rgb-alpha")[channels - 1]
    full = 2**bits - 1
    samples = np.rint(ramps(channels) * full).astype(np.uint8 if bits <= 8 else np.uint16)
    stored = samples[..., 0] if channels == 1 else samples
    data = imagecodecs.jpeg2k_encode(stored, level=0, codecformat=container, bitspersample=bits, reversible=True)
    read = imagecodecs.jpeg2k_decode(data).reshape(HEIGHT, WIDTH, channels)
    problem = problem_of(data, on_white(read / full, kind))
    if bits == 8 or (bits > 8 and channels == 1):
        assert problem == ""
    else:
        assert problem.startswith("not supported: JPEG2000")  # Pillow makes white black there


@pytest.mark.parametrize("colours", ["SRGB", "SYCC", "CMYK"])
def test_jpeg2000_colour_spaces(colours):
    kind = {"SRGB": "rgb", "SYCC": "ycbcr", "CMYK": "cmyk"}[colours]
    samples = np.rint(ramps(NUM_SAMPLES[kind]) * 255).astype(np.uint8)
    data = imagecodecs.jpeg2k_encode(
        samples, level=0, codecformat="jp2", reversible=True, colorspace=colours, mct=False
    )
    assert problem_of(data, on_white(samples / 255, kind)) == ""


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("bits", [8, 10, 12])
def test_avif(bits, channels):
    kind = ("grey", "grey-alpha", "rgb", "rgb-alpha")[channels - 1]
    samples = np.rint(ramps(channels) * (2**bits - 1)).astype(np.uint8 if bits == 8 else np.uint16)
    stored = samples[..., 0] if channels == 1 else samples
    data = imagecodecs.avif_encode(stored, level=100, bitspersample=bits, pixelformat="444", speed=8)
    expected = on_white(samples / (2**bits - 1), kind)
    assert problem_of(data, expected, 2.0) == ""  # libavif rounds deep samples and their alpha to 8 bits, each


@pytest.mark.parametrize("channels", [3, 4])
def test_webp(channels):
    samples = np.rint(ramps(channels) * 255).astype(np.uint8)
    data = imagecodecs.webp_encode(samples, lossless=True, level=100)
    read = imagecodecs.webp_decode(data)
    assert problem_of(data, on_white(read / 255, "rgb" if channels == 3 else "rgb-alpha")) == ""


@pytest.mark.parametrize("subsampling", [(1, 1), (2, 1), (2, 2)])
def test_jpeg_inside_tiff(subsampling):
    file = io.BytesIO()
    options = {"compression": "jpeg", "photometric": "ycbcr", "subsampling": subsampling, "metadata": None}
    tifffile.imwrite(file, np.asarray(picture()), tile=(32, 32), **options)
    expected = tifffile.imread(io.BytesIO(file.getvalue()))
    assert problem_of(file.getvalue(), expected.astype(float), 3.0) == ""
