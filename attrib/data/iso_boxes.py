"""JPEG 2000 and AVIF files are made of boxes: what Pillow does not read in them, but the pixels depend on."""

from collections.abc import Iterator

from attrib.common.errors import ImageError

SIGNATURE, START = b"\x00\x00\x00\x0cjP  ", b"\xff\x4f"
SIZE, CODING_STYLE, START_OF_TILE = 0x51, 0x52, 0x90  # second bytes of markers
COLOURS = [number.to_bytes(4, "big") for number in (16, 17, 18, 12)]  # sRGB, grey, sYCC, CMYK
ENUMERATED, COLOUR, OPACITY, BY_PALETTE = 1, 0, 1, 1
MAX_LAYERS = 100  # encoders write 1 to 20; the memory of a decoder grows with their number


def boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield kind and content of boxes that follow each other; of a box that is cut off, what there is."""
    start = 0
    while start + 8 <= len(data):
        num_bytes, kind, header = int.from_bytes(data[start : start + 4], "big"), data[start + 4 : start + 8], 8
        if num_bytes == 1:  # the size does not fit into four bytes
            num_bytes, header = int.from_bytes(data[start + 8 : start + 16], "big"), 16
        stop = start + num_bytes if num_bytes else len(data)
        if stop < start + header:
            return
        yield kind, data[start + header : stop]
        start = stop


def check_avif(data: bytes) -> None:
    """Raise ImageError if the image is to be cropped, which Pillow does not do."""
    inner = data
    for kind, skipped in ((b"meta", 4), (b"iprp", 0), (b"ipco", 0)):
        inner = next((content[skipped:] for found, content in boxes(inner) if found == kind), b"")
    if any(kind == b"clap" for kind, _ in boxes(inner)):
        raise ImageError("decode", "not supported: AVIF with a clean aperture")


def check_jpeg2000(data: bytes) -> None:
    """Raise ImageError where Pillow would take the components for others, or would unpack them wrong.

    More than 8 bits of colour wrap at white. Nothing is raised for headers that are cut off.
    """
    header: dict[bytes, bytes] = {}
    stream = data
    if data.startswith(SIGNATURE):
        stream = b""
        for kind, content in boxes(data):
            if kind == b"jp2h":
                header = dict(reversed(list(boxes(content))))  # of several, the first holds
            if kind == b"jp2c":
                stream = content
                break
    segments = _main_header(stream)
    size = segments.get(SIZE, b"")
    num = int.from_bytes(size[34:36], "big")
    if len(size) != 36 + 3 * num or not num:
        return
    problem = _problem_of_components(size[36:], num) or _problem_of_boxes(header, num)
    if not problem and int.from_bytes(segments.get(CODING_STYLE, b"")[2:4], "big") > MAX_LAYERS:
        problem = f"more than {MAX_LAYERS} quality layers"
    if problem:
        raise ImageError("decode", f"not supported: JPEG2000 with {problem}")


def _main_header(stream: bytes) -> dict[int, bytes]:
    """Return the segments before the first tile by the second byte of their markers."""
    found: dict[int, bytes] = {}
    at = len(START)
    while stream[at : at + 1] == b"\xff" and stream[at + 1] != START_OF_TILE:
        stop = at + 2 + max(2, int.from_bytes(stream[at + 2 : at + 4], "big"))
        found.setdefault(stream[at + 1], stream[at + 4 : stop])
        at = stop
        if len(stream) < at + 2:
            break
    return found


def _problem_of_components(components: bytes, num: int) -> str | None:
    bits, *steps = (set(components[i::3]) for i in range(3))
    if num > 4:
        return f"{num} components"
    if bits != {7} and not (num == 1 and 7 < max(bits) < 16):
        return f"{num} components of {', '.join(str(value % 128 + 1) for value in sorted(bits))} bits"
    return "components of different sizes" if any(step != {1} for step in steps) else None


def _problem_of_boxes(header: dict[bytes, bytes], num: int) -> str | None:
    colours, definitions, palette = (header.get(kind, b"") for kind in (b"colr", b"cdef", b"pclr"))
    if colours[:1] == bytes([ENUMERATED]) and colours[3:7] not in COLOURS:
        return f"colour space {int.from_bytes(colours[3:7], 'big')}"
    if palette:
        columns, num_columns = header.get(b"cmap", b""), palette[2]
        in_order = b"".join(bytes([0, 0, BY_PALETTE, i]) for i in range(num_columns))
        if num != 1 or num_columns not in (3, 4) or set(palette[3 : 3 + num_columns]) != {7} or columns != in_order:
            return "a palette other than of 8-bit colours"
        num = num_columns
    for start in range(2, len(definitions), 6):
        channel, kind, of = (int.from_bytes(definitions[start + i : start + i + 2], "big") for i in (0, 2, 4))
        is_alpha = num in (2, 4) and channel == num - 1 and (kind, of) == (OPACITY, 0)
        if not is_alpha and (kind, of) != (COLOUR, channel + 1):
            return "channels of another order or kind"
    return None
