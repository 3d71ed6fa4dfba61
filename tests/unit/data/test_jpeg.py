"""JPEGs that end early, that cost too much, or that libjpeg would repair: refused; harmless oddities are not."""

import io

import numpy as np
import pytest
from PIL import Image
from support.hostile import encode, picture

from attrib.common.errors import ImageError
from attrib.data.decoding import decode_image
from attrib.data.jpeg import MARKER, MAX_SCANS

END = b"\xff\xd9"
NOISE = Image.fromarray(np.random.default_rng(9).integers(0, 256, (120, 160, 3), dtype=np.uint8))
KINDS = {
    "baseline": (NOISE, {}),
    "444": (NOISE, {"subsampling": 0}),
    "restarts": (NOISE, {"restart_marker_blocks": 3}),
    "progressive": (NOISE, {"progressive": True}),
    "progressive with restarts": (NOISE, {"progressive": True, "restart_marker_rows": 1}),
    "grey": (NOISE.convert("L"), {}),
    "progressive grey": (NOISE.convert("L"), {"progressive": True}),
    "CMYK": (NOISE.convert("CMYK"), {}),
    "progressive CMYK": (NOISE.convert("CMYK"), {"progressive": True}),
}
FILES = {name: encode(image, "JPEG", **options) for name, (image, options) in KINDS.items()}


def reason(data: bytes, **options) -> str:
    with pytest.raises(ImageError) as caught:
        decode_image(data, max_megapixels=1.0, **options)
    return caught.value.reason


def decoded(data: bytes) -> np.ndarray:
    return decode_image(data, max_megapixels=1.0).pixels.numpy()


def scans_of(data: bytes) -> list[int]:
    """Positions of the start-of-scan markers."""
    return [found.start() for found in MARKER.finditer(data) if found[0] == b"\xff\xda"]


@pytest.mark.parametrize("min_side_px", [float("inf"), 15])
@pytest.mark.parametrize("name", FILES)
def test_data_that_end_early_before_an_end_marker_are_refused(name, min_side_px):
    data = FILES[name]
    start = scans_of(data)[0] + 20
    assert decode_image(data, max_megapixels=1.0, min_side_px=min_side_px).width == 160
    for end in np.linspace(start, len(data) - 5, 40).astype(int):
        while data[end - 1] == 0xFF:  # the cut must not make a marker of its own
            end -= 1
        assert reason(data[:end] + END, min_side_px=min_side_px).startswith("damaged JPEG: truncated"), end


@pytest.mark.parametrize("name", [name for name in FILES if "progressive" in name])
def test_missing_scans_are_refused(name):
    data = FILES[name]
    for scan in scans_of(data)[1:]:
        tables = max(found.start() for found in MARKER.finditer(data, 0, scan))
        cut = tables if data[tables : tables + 2] == b"\xff\xc4" else scan
        assert "scans are missing" in reason(data[:cut] + END)


def test_a_component_without_a_scan_is_refused():
    """A baseline file of one scan per component, with the scans of the last two cut off."""
    grey = encode(NOISE.convert("L"), "JPEG")
    frame = grey.index(b"\xff\xc0")
    three = bytes.fromhex("ffc0 0011 08") + grey[frame + 5 : frame + 9] + bytes([3, 1, 17, 0, 2, 17, 0, 3, 17, 0])
    assert "scans are missing" in reason(grey[:frame] + three + grey[frame + 13 :])


@pytest.mark.parametrize("name", ["baseline", "progressive", "CMYK"])
@pytest.mark.parametrize("cut", [0, 500])
def test_harmless_warnings_do_not_hide_an_early_end(name, cut):
    """libjpeg tells its first warning alone."""
    data = FILES[name]
    tables = data.index(b"\xff\xdb")
    odd = data[:tables] + b"odd" + data[tables:]
    odd = odd[: len(odd) - 2 - cut] + END
    if cut:
        assert reason(odd).startswith("damaged JPEG: truncated")
    else:
        np.testing.assert_array_equal(decoded(odd), decoded(data))


@pytest.mark.parametrize("name", ["baseline", "progressive", "grey"])
def test_bytes_after_the_data_are_harmless(name):
    data = FILES[name]
    padded = data[:-2] + bytes(20) + b"odd" + END + b"after the end" + bytes(100)
    np.testing.assert_array_equal(decoded(padded), decoded(data))


def test_a_repaired_image_is_refused():
    data = bytearray(FILES["restarts"])
    marker = data.index(b"\xff\xd3", scans_of(data)[0])
    data[marker + 1] = 0xD6
    assert reason(bytes(data)).startswith("damaged JPEG: ")


def test_scans_are_counted_before_any_is_decoded():
    data = FILES["progressive"]
    last = scans_of(data)[-1]
    scan = data[last:-2]
    allowed = MAX_SCANS - len(scans_of(data))
    assert "progression" in reason(data[:-2] + scan * allowed + END)  # libjpeg decoded it: the last bit came twice
    assert "more than 64 scans" in reason(data[:-2] + scan * (allowed + 1) + END)


@pytest.mark.parametrize("change", [(1, 0xC3), (1, 0xC5), (4, 12)])
def test_other_coding_processes_are_not_supported(change):
    data = bytearray(FILES["baseline"])
    frame = data.index(b"\xff\xc0")
    data[frame + change[0]] = change[1]
    assert reason(bytes(data)).startswith("not supported: JPEG")


def test_scaled_pixels_equal_those_of_pillow():
    for width, height in ((1, 9), (3, 3), (17, 40), (160, 120)):
        data = encode(picture(width, height), "JPEG")
        for side in (1, 2, 5, 15, 30):
            image = decode_image(data, max_megapixels=1.0, min_side_px=side)
            opened = Image.open(io.BytesIO(data))
            if image.shrink > 1:
                opened.draft(None, (width // image.shrink, height // image.shrink))
            expected = np.asarray(opened.convert("RGB"))
            np.testing.assert_array_equal(image.pixels.permute(1, 2, 0).numpy(), expected)
