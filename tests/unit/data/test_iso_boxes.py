"""JPEG 2000 and AVIF whose boxes change what the components mean."""

import struct

import imagecodecs
import numpy as np
import pytest
from support.decoding import decoded, refusal
from support.hostile import picture

PICTURE = np.asarray(picture())
GREY = PICTURE[..., 0].copy()
PALETTE = np.random.default_rng(1).integers(0, 256, (256, 4)).astype(np.uint8)
SRGB = struct.pack(">3BI", 1, 0, 0, 16)


def box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content) + 8) + kind + content


def jp2(samples: np.ndarray, *header: bytes, before: bytes = b"") -> bytes:
    """A JP2 file of uint8 samples [h, w] or [h, w, channels]. header: boxes after the first one of jp2h."""
    stream = imagecodecs.jpeg2k_encode(samples, level=0, codecformat="j2k", reversible=True)
    num = 1 if samples.ndim == 2 else samples.shape[2]
    size = box(b"ihdr", struct.pack(">IIHBBBB", *samples.shape[:2], num, 7, 7, 0, 0))
    start = box(b"jP  ", b"\r\n\x87\n") + box(b"ftyp", b"jp2 \0\0\0\0jp2 ")
    return start + before + box(b"jp2h", size + b"".join(header)) + box(b"jp2c", stream)


def palette(colours: np.ndarray, order: list[int], bits: int = 8) -> tuple[bytes, bytes]:
    channels = colours.shape[1]
    entries = colours.tobytes() if bits == 8 else (colours.astype(">u2") * 257).astype(">u2").tobytes()
    table = box(b"pclr", struct.pack(">HB", len(colours), channels) + bytes([bits - 1]) * channels + entries)
    return table, box(b"cmap", b"".join(struct.pack(">HBB", 0, 1, column) for column in order))


def channels(*meanings: tuple[int, int]) -> bytes:
    """(type, colour) of each channel."""
    entries = b"".join(struct.pack(">HHH", i, *meaning) for i, meaning in enumerate(meanings))
    return box(b"cdef", struct.pack(">H", len(meanings)) + entries)


RGB_ALPHA = channels((0, 1), (0, 2), (0, 3), (1, 0))


@pytest.mark.parametrize("alpha", [False, True])
def test_palette(alpha):
    colours = PALETTE if alpha else PALETTE[:, :3].copy()
    boxes = palette(colours, list(range(colours.shape[1])))
    data = jp2(GREY, box(b"colr", SRGB), *boxes, *([RGB_ALPHA] if alpha else []))
    expected = colours[GREY].astype(float)
    if alpha:
        expected = expected[..., :3] * expected[..., 3:] / 255 + 255 - expected[..., 3:]
    assert np.abs(decoded(data) - expected).max() <= 1


@pytest.mark.parametrize(
    "boxes",
    [palette(PALETTE[:, :3].copy(), [2, 1, 0]), palette(PALETTE[:, :1].copy(), [0]), palette(PALETTE, [0, 1, 2])],
)
def test_other_palettes_are_refused(boxes):
    assert refusal(jp2(GREY, box(b"colr", SRGB), *boxes)).startswith("not supported: JPEG2000 with a palette")


def test_16_bit_palette_is_refused():
    boxes = palette(PALETTE[:, :3], [0, 1, 2], bits=16)
    assert refusal(jp2(GREY, box(b"colr", SRGB), *boxes)).startswith("not supported: JPEG2000 with a palette")


@pytest.mark.parametrize(
    "meanings",
    [
        ((0, 3), (0, 2), (0, 1)),  # blue first
        ((0, 1), (0, 2), (0, 3), (2, 0)),  # premultiplied
        ((0, 1), (0, 2), (0, 3), (65535, 65535)),  # of no known meaning
        ((1, 0), (0, 1), (0, 2), (0, 3)),  # alpha first
    ],
)
def test_channels_of_another_order_or_kind_are_refused(meanings):
    samples = PICTURE if len(meanings) == 3 else np.dstack([PICTURE, GREY])
    data = jp2(samples, box(b"colr", SRGB), channels(*meanings))
    assert refusal(data) == "not supported: JPEG2000 with channels of another order or kind"


def test_usual_channels_are_read():
    np.testing.assert_array_equal(decoded(jp2(PICTURE, box(b"colr", SRGB), channels((0, 1), (0, 2), (0, 3)))), PICTURE)
    alpha = GREY[..., None] / 255
    data = jp2(np.dstack([PICTURE, GREY]), box(b"colr", SRGB), RGB_ALPHA)
    assert np.abs(decoded(data) - (PICTURE * alpha + 255 * (1 - alpha))).max() <= 1


def test_text_before_the_header_is_no_colour_space():
    data = jp2(PICTURE, box(b"colr", SRGB), before=box(b"xml ", b"<a>colr\1\0\0\0\0\0\x0e</a>"))
    np.testing.assert_array_equal(decoded(data), PICTURE)


def test_the_first_colour_space_holds():
    lab = struct.pack(">3BI", 1, 0, 0, 14)
    np.testing.assert_array_equal(decoded(jp2(PICTURE, box(b"colr", SRGB), box(b"colr", lab))), PICTURE)
    assert refusal(jp2(PICTURE, box(b"colr", lab), box(b"colr", SRGB))).endswith("colour space 14")


def test_five_components_are_not_supported():
    samples = np.dstack([PICTURE, PICTURE])[..., :5].copy()
    assert refusal(jp2(samples, box(b"colr", SRGB))) == "not supported: JPEG2000 with 5 components"


def test_a_header_that_is_cut_off_is_damaged():
    data = jp2(PICTURE, box(b"colr", SRGB))
    reasons = [refusal(data[:size]) for size in range(40, 150)]
    assert all(reason.startswith("damaged JPEG2000") for reason in reasons), reasons


def with_property(avif: bytes, added: bytes) -> bytes:
    """An AVIF file of imagecodecs with another property of its item, which is the only one."""
    data = bytearray(avif)
    at = {kind: data.index(kind) - 4 for kind in (b"meta", b"iloc", b"iprp", b"ipco", b"ipma", b"mdat")}
    size = {kind: int.from_bytes(data[start : start + 4], "big") for kind, start in at.items()}
    offset = data.index(struct.pack(">I", at[b"mdat"] + 8), at[b"iloc"])
    numbers = at[b"ipma"] + 18  # their count, then the properties of the item
    for position, growth in [(at[kind], len(added)) for kind in (b"meta", b"iprp", b"ipco")] + [
        (at[b"meta"], 1), (at[b"iprp"], 1), (at[b"ipma"], 1), (offset, len(added) + 1)
    ]:  # fmt: skip
        data[position : position + 4] = struct.pack(">I", struct.unpack_from(">I", data, position)[0] + growth)
    data[numbers] += 1
    # Properties are numbered from 1, and the new one is the last. 0x80: it is essential.
    data.insert(at[b"ipma"] + size[b"ipma"], data[numbers] | 0x80)
    end = at[b"ipco"] + size[b"ipco"]
    return bytes(data[:end]) + added + bytes(data[end:])


def test_a_cropped_avif_is_refused_and_a_turned_one_is_turned():
    avif = imagecodecs.avif_encode(PICTURE, level=100, pixelformat="444", speed=9)
    plain = decoded(avif)
    crop = box(b"clap", struct.pack(">IIIIiIiI", 48, 1, 32, 1, 0, 1, 0, 1))
    assert refusal(with_property(avif, crop)) == "not supported: AVIF with a clean aperture"
    np.testing.assert_array_equal(decoded(with_property(avif, box(b"irot", b"\1"))), np.rot90(plain))
    np.testing.assert_array_equal(decoded(with_property(avif, box(b"imir", b"\1"))), plain[:, ::-1])
