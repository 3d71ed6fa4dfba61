"""PNG files of every kind, and a second decoder written from the standard (ISO/IEC 15948): slow, without Pillow."""

import itertools
import struct
import zlib

import numpy as np

from support.hostile import png_chunk

GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6
CHANNELS = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGBA: 4}
DEPTHS = {GREY: (1, 2, 4, 8, 16), RGB: (8, 16), PALETTE: (1, 2, 4, 8), GREY_ALPHA: (8, 16), RGBA: (8, 16)}
# Adam7: first row, first column, step down, step right
PASSES = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
WHOLE = ((0, 0, 1, 1),)


def _predicted(row: np.ndarray, above: np.ndarray, at: int, step: int, filter_type: int) -> int:
    """Section 9.2: what the filter expects of byte `at` of a row."""
    a = int(row[at - step]) if at >= step else 0
    b = int(above[at])
    c = int(above[at - step]) if at >= step else 0
    if filter_type == 4:
        p = a + b - c
        return min((a, b, c), key=lambda value: abs(p - value))
    return (0, a, b, (a + b) // 2)[filter_type]


def _to_bytes(samples: np.ndarray, depth: int) -> np.ndarray:
    """Rows of samples [h, w * channels] as packed bytes [h, row bytes]."""
    bits = (samples[..., None] >> np.arange(depth - 1, -1, -1)) & 1
    return np.packbits(bits.reshape(len(samples), -1).astype(np.uint8), axis=1)


def write_png(samples: np.ndarray, depth: int, colour: int, interlaced: bool = False, **chunks: bytes) -> bytes:
    """A PNG of unsigned samples [h, w, channels] that uses all filters. chunks: contents, e.g. PLTE, in order."""
    height, width, channels = samples.shape
    raw = bytearray()
    step = max(1, channels * depth // 8)
    for top, left, down, right in PASSES if interlaced else WHOLE:
        part = samples[top::down, left::right]
        rows = _to_bytes(part.reshape(len(part), -1), depth) if part.size else ()
        above = np.zeros_like(rows[0]) if len(rows) else None
        for number, row in enumerate(rows):
            raw.append(number % 5)
            raw += bytes((int(row[i]) - _predicted(row, above, i, step, number % 5)) % 256 for i in range(len(row)))
            above = row
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    body = b"".join(png_chunk(name.encode(), content) for name, content in chunks.items())
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + body
        + png_chunk(b"IDAT", zlib.compress(bytes(raw)))
        + png_chunk(b"IEND", b"")
    )


def read_png(data: bytes) -> np.ndarray:
    """float64 [h, w, 3] from 0 to 255: the image on white."""
    chunks: dict[bytes, bytes] = {}
    position = 8
    while position < len(data):
        (length,), name = struct.unpack_from(">I", data, position), data[position + 4 : position + 8]
        chunks[name] = chunks.get(name, b"") + data[position + 8 : position + 8 + length]
        position += 12 + length
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    channels = CHANNELS[colour]
    step, raw = max(1, channels * depth // 8), zlib.decompress(chunks[b"IDAT"])
    samples, at = np.zeros((height, width, channels), np.int64), 0
    for top, left, down, right in PASSES if interlaced else WHOLE:
        part = samples[top::down, left::right]
        num_bytes = -(-part.shape[1] * channels * depth // 8)
        above = np.zeros(num_bytes, np.uint8)
        for number in range(len(part) if num_bytes else 0):
            filter_type, row = raw[at], np.frombuffer(raw, np.uint8, num_bytes, at + 1).copy()
            for i in range(num_bytes):
                row[i] = (int(row[i]) + _predicted(row, above, i, step, filter_type)) % 256
            bits = np.unpackbits(row)[: part.shape[1] * channels * depth].reshape(-1, depth)
            part[number] = (bits @ (1 << np.arange(depth - 1, -1, -1))).reshape(-1, channels)
            at, above = at + 1 + num_bytes, row
    full = 2**depth - 1
    key, alpha = chunks.get(b"tRNS"), np.ones((height, width, 1))
    if colour == PALETTE:
        entries = np.frombuffer(chunks[b"PLTE"], np.uint8).reshape(-1, 3)
        alphas = np.full(len(entries), 255)
        alphas[: len(key or b"")] = list(key or b"")
        return _on_white(entries[samples[..., 0]] / 255, alphas[samples[..., 0], None] / 255)
    if key is not None:
        alpha = 1.0 - (samples == struct.unpack(f">{channels}H", key)).all(axis=2, keepdims=True)
    if colour in (GREY_ALPHA, RGBA):
        alpha, samples = samples[..., -1:] / full, samples[..., :-1]
    return _on_white(np.broadcast_to(samples / full, (height, width, 3)), alpha)


def _on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return 255 * (colour * alpha + 1 - alpha)


def png_table() -> dict[str, bytes]:
    """{name: file} of all colour types, depths and kinds of transparency, interlaced or not."""
    rng = np.random.default_rng(5)
    table = {}
    for colour, interlaced in itertools.product(CHANNELS, (False, True)):
        for depth in DEPTHS[colour]:
            samples = rng.integers(0, 2**depth, (13, 11, CHANNELS[colour]))
            samples[:4, :4] = samples[0, 0]  # an area in the transparent colour
            near = samples[0, 0].copy()
            near[0] ^= 1
            samples[4:6, :4] = near  # one bit apart from it
            entries = rng.integers(0, 256, (2**depth, 3), np.uint8).tobytes() if colour == PALETTE else b""
            chunks = {"PLTE": entries} if entries else {}
            keys = {"": None}
            if colour == PALETTE:
                keys |= {"-one-clear": bytes(2**depth - 1) + b"", "-alphas": rng.bytes(2**depth), "-short": b"\x00"}
                keys["-one-clear"] = b"\xff" * (2**depth - 1) + b"\x00"
            elif colour in (GREY, RGB):
                keys["-key"] = struct.pack(f">{len(near)}H", *samples[0, 0])
            for name, key in keys.items():
                content = chunks | ({} if key is None else {"tRNS": key})
                full_name = f"colour-{colour}-depth-{depth}{name}{'-adam7' if interlaced else ''}"
                table[full_name] = write_png(samples, depth, colour, interlaced, **content)
    return table
