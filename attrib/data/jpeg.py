"""Decode JPEGs with libjpeg-turbo; refuse what it would repair without an error.

libjpeg fills missing data with grey and warns at most. simplejpeg raises the first warning as an error. What libjpeg
does not even warn of, such as scans that are missing as a whole, is found in the marker segments.
"""

import io
import re
from typing import Literal

import numpy as np
import simplejpeg
from PIL import Image

from attrib.common.errors import ImageError

# Encoders write at most 10 scans of a colour image and 18 of CMYK (libjpeg), a few more after optimisation. Each scan
# may need no bytes, but takes time for every block of the image.
MAX_SCANS = 64
# Bytes of entropy-coded data are no markers: 0xff is followed by 0x00 or a restart marker. 0xff itself is fill.
MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)
NO_SEGMENT = (0x01, 0xD8)
BASELINE = 0xC0
PROCESSES = (BASELINE, 0xC1, 0xC2, 0xC9, 0xCA)  # sequential and progressive, with Huffman or arithmetic coding
PROGRESSIVE = (0xC2, 0xCA)
FRAMES = (*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0), 0xF7)  # 0xf7: JPEG-LS
START_OF_SCAN, END_OF_IMAGE = 0xDA, 0xD9
NUM_COEFFICIENTS = 64
NOT_SENT = 255
# Warnings of libjpeg that leave all pixels right; the others tell of repairs.
HARMLESS = re.compile("extraneous bytes before|JFIF revision|Adobe color transform|ICC")
ENDS_EARLY = re.compile("premature end|marker 0xd9 instead of RST", re.IGNORECASE)
MAX_WARNING_CHARS = 140


def check_scans(data: bytes) -> int:
    """Return the position of the end-of-image marker that follows the last scan.

    Raises ImageError for lossless, hierarchical and 12-bit coding, for more than MAX_SCANS scans, and if the marker, a
    component or a bit of a coefficient is missing.
    """
    position, num_scans, is_progressive = 2, 0, False
    low_bits: dict[int, bytearray] = {}  # component -> lowest bit that was sent, per coefficient
    while found := MARKER.search(data, position):
        marker, position = data[found.end() - 1], found.end()
        if marker == END_OF_IMAGE and num_scans:
            break
        if marker in NO_SEGMENT or marker == END_OF_IMAGE:
            continue
        segment = data[position + 2 : position + int.from_bytes(data[position : position + 2], "big")]
        position += 2 + len(segment)
        if marker in FRAMES and len(segment) >= 6:
            if marker not in PROCESSES or segment[0] != 8:
                process = f"coding process {marker - BASELINE} and {segment[0]} bits per sample"
                raise ImageError("decode", f"not supported: JPEG with {process}")
            if not any(segment[1:3]):
                raise ImageError("decode", "not supported: JPEG whose height follows its first scan")
            is_progressive = marker in PROGRESSIVE
            low_bits = {component: bytearray([NOT_SENT]) * NUM_COEFFICIENTS for component in segment[6::3]}
        elif marker == START_OF_SCAN and len(segment) >= 4:
            num_scans += 1
            if num_scans > MAX_SCANS:
                raise ImageError("decode", f"not supported: JPEG with more than {MAX_SCANS} scans")
            first, last, low = (segment[-3], segment[-2], segment[-1] & 15) if is_progressive else (0, 63, 0)
            for component in segment[1:-3:2]:
                if component in low_bits and first <= last < NUM_COEFFICIENTS:
                    low_bits[component][first : last + 1] = bytes([low]) * (last + 1 - first)
    else:
        raise ImageError("decode", "damaged JPEG: truncated, it has no end-of-image marker")
    if any(any(sent) for sent in low_bits.values()):
        raise ImageError("decode", "damaged JPEG: truncated, some of its scans are missing")
    return found.start()


def decode_jpeg(data: bytes, end: int, width: int, height: int, colours: Literal["RGB", "CMYK"]) -> np.ndarray | None:
    """Return uint8 [height, width, 3 or 4] of a JPEG whose end-of-image marker is at `end`.

    width, height: of the result, 1/1, 1/2, 1/4 or 1/8 of the size in the header, rounded up.
    CMYK samples are as stored, inverted or not. None: the data are complete, but simplejpeg refuses them.
    Raises ImageError if libjpeg fails or had to repair the data.
    """
    size = {"min_height": height, "min_width": width, "min_factor": 1}
    try:
        pixels: np.ndarray = simplejpeg.decode_jpeg(data, colours, **size)
        return pixels
    except ValueError as error:
        warning = str(error)
    # The first warning hides those that follow. Other bytes after the data change the pixels only if these end early.
    if HARMLESS.search(warning):
        other = data[:end] + bytes(range(1, 255)) * 4 + data[end:]
        if Image.open(io.BytesIO(data), formats=("JPEG",)).tobytes() == Image.open(io.BytesIO(other)).tobytes():
            return None
    if HARMLESS.search(warning) or ENDS_EARLY.search(warning):
        raise ImageError("decode", "damaged JPEG: truncated, its data end early")
    kind = "not supported: JPEG, " if "unsupported" in warning.lower() else "damaged JPEG: "
    raise ImageError("decode", kind + warning.removeprefix("Corrupt JPEG data: ")[:MAX_WARNING_CHARS])
