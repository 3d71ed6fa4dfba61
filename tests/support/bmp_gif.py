"""BMP and GIF files whose pixels are known without a decoder."""

import struct

import numpy as np

HEIGHT, WIDTH = 6, 10


def bmp(header_size: int, bits: int, body: bytes, *, compression: int = 0, extra: bytes = b"", flip=False) -> bytes:
    """A BMP of WIDTH x HEIGHT pixels. extra: what follows the first 40 bytes of the header (masks), or the palette."""
    if header_size == 12:
        header = struct.pack("<IHHHH", 12, WIDTH, HEIGHT, 1, bits)
    else:
        height = -HEIGHT if flip else HEIGHT
        header = struct.pack("<IiiHHIIiiII", header_size, WIDTH, height, 1, bits, compression, len(body), 0, 0, 0, 0)
        header += extra[: header_size - 40].ljust(header_size - 40, b"\0")
        extra = extra[header_size - 40 :]
    header += extra
    return b"BM" + struct.pack("<IHHI", 14 + len(header) + len(body), 0, 0, 14 + len(header)) + header + body


def _rows(samples: np.ndarray, bits: int, flip: bool) -> bytes:
    """Rows of samples [h, w], packed and padded to four bytes, the lowest row first."""
    samples = samples if flip else samples[::-1]
    if bits <= 8:
        packed = np.packbits((samples[..., None] >> np.arange(bits - 1, -1, -1) & 1).reshape(HEIGHT, -1), axis=1)
        rows = [row.tobytes() for row in packed.astype(np.uint8)]
    else:
        rows = [b"".join(int(value).to_bytes(bits // 8, "little") for value in row) for row in samples]
    return b"".join(row + bytes(-len(row) % 4) for row in rows)


def _widened(samples: np.ndarray, mask: int) -> np.ndarray:
    """The channel under a mask, from 0 to 255."""
    shift = (mask & -mask).bit_length() - 1
    return (samples & mask) / mask * 255 if mask < 2**31 else (samples >> shift & mask >> shift) / (mask >> shift) * 255


def bmp_table() -> dict[str, tuple[bytes, np.ndarray]]:
    """{name: (file, float64 [h, w, 3])} of depths, headers, palettes, masks, alpha and run lengths."""
    rng = np.random.default_rng(6)
    table = {}
    for bits in (1, 4, 8):
        samples = rng.integers(0, 2**bits, (HEIGHT, WIDTH))
        palettes = {
            "colours": rng.integers(0, 256, (2**bits, 3)),
            "dark-greys": np.repeat(np.arange(2**bits)[:, None], 3, 1),
            "white-first": np.repeat(np.linspace(255, 0, 2**bits).astype(int)[:, None], 3, 1),
            "greys": np.repeat(np.linspace(0, 255, 2**bits).astype(int)[:, None], 3, 1),
        }
        for name, palette in palettes.items():
            for size in (12, 40, 64, 124):
                padding = b"" if size == 12 else b"\0"
                entries = b"".join(bytes(int(v) for v in entry[::-1]) + padding for entry in palette)
                extra = bytes(max(0, size - 40)) + entries
                for flip in (False, True) if size > 12 else (False,):
                    data = bmp(size, bits, _rows(samples, bits, flip), extra=extra, flip=flip)
                    table[f"{bits}-bit-{name}-{size}{'-flip' * flip}"] = (data, palette[samples].astype(float))
    masks = {
        "555": (16, 0, (0x7C00, 0x3E0, 0x1F, 0)),
        "555-masks": (16, 3, (0x7C00, 0x3E0, 0x1F, 0)),
        "565": (16, 3, (0xF800, 0x7E0, 0x1F, 0)),
        "444": (16, 3, (0xF00, 0xF0, 0xF, 0)),
        "1555": (16, 3, (0x7C00, 0x3E0, 0x1F, 0x8000)),
        "bgr": (24, 0, (0xFF0000, 0xFF00, 0xFF, 0)),
        "bgrx": (32, 0, (0xFF0000, 0xFF00, 0xFF, 0)),
        "bgrx-masks": (32, 3, (0xFF0000, 0xFF00, 0xFF, 0)),
        "rgbx-masks": (32, 3, (0xFF, 0xFF00, 0xFF0000, 0)),
        "bgra": (32, 3, (0xFF0000, 0xFF00, 0xFF, 0xFF000000)),
        "rgba": (32, 3, (0xFF, 0xFF00, 0xFF0000, 0xFF000000)),
        "10-bit": (32, 3, (0x3FF00000, 0xFFC00, 0x3FF, 0)),
    }
    for name, (bits, compression, channels) in masks.items():
        samples = rng.integers(0, 2**bits, (HEIGHT, WIDTH))
        for size in (40, 52, 56, 108, 124):
            num_masks = 3 if size < 56 else 4
            alpha = channels[3] if num_masks == 4 else 0
            variants = {"": samples, "-no-alpha": samples & ~alpha} if alpha else {"": samples}
            for suffix, values in variants.items():
                extra = struct.pack(f"<{num_masks}I", *channels[:num_masks]) if compression else b""
                if size > 56:
                    extra = extra.ljust(size - 40, b"\0")
                data = bmp(size, bits, _rows(values, bits, False), compression=compression, extra=extra)
                colour = np.stack([_widened(values, mask) for mask in channels[:3]], axis=-1)
                if alpha and (values & alpha).any():
                    share = _widened(values, alpha)[..., None] / 255
                    colour = colour * share + 255 * (1 - share)
                table[f"{bits}-bit-{name}-{size}{suffix}"] = (data, colour)
    palette = rng.integers(0, 256, (256, 3))
    entries = b"".join(bytes(int(v) for v in entry[::-1]) + b"\0" for entry in palette)
    samples = rng.integers(0, 256, (HEIGHT, WIDTH))
    samples[:, :4] = samples[:, :1]
    runs = b"".join(
        bytes([4, row[0], 0, WIDTH - 4]) + bytes(row[4:].astype(np.uint8)) + b"\0\0" for row in samples[::-1]
    )
    table["rle8"] = (bmp(40, 8, runs + b"\0\1", compression=1, extra=entries), palette[samples].astype(float))
    samples = rng.integers(0, 16, (HEIGHT, WIDTH))
    nibbles = b"".join(bytes(v for s in row for v in (1, int(s) << 4)) + b"\0\0" for row in samples[::-1])
    for name, colours in (("", palette[:16]), ("-dark-greys", np.repeat(np.arange(16)[:, None], 3, 1))):
        entries = b"".join(bytes(int(v) for v in entry[::-1]) + b"\0" for entry in colours)
        data = bmp(40, 4, nibbles + b"\0\1", compression=2, extra=entries)
        table[f"rle4{name}"] = (data, colours[samples].astype(float))
    return table


def _lzw(indices: np.ndarray) -> bytes:
    """Section F of the GIF89a specification, without compression: a clear code before each pair of pixels."""
    bits: list[int] = []
    for i, index in enumerate(indices.ravel()):
        for code in ([256] if i % 2 == 0 else []) + [int(index)]:
            bits += [code >> bit & 1 for bit in range(9)]
    bits += [257 >> bit & 1 for bit in range(9)]
    data = np.packbits(bits, bitorder="little").tobytes()
    blocks = b"".join(bytes([len(data[i : i + 255])]) + data[i : i + 255] for i in range(0, len(data), 255))
    return b"\x08" + blocks + b"\0"


def gif_table() -> dict[str, tuple[bytes, np.ndarray]]:
    """{name: (file, float64 [h, w, 3])} of frames that cover the canvas or not, tables, transparency, disposal."""
    rng = np.random.default_rng(7)
    table = {}
    for left, top, width, height in ((0, 0, WIDTH, HEIGHT), (2, 1, 5, 3), (0, 0, 4, HEIGHT), (3, 2, 7, 4)):
        for is_global in (True, False):
            for kind in ("colours", "greys"):
                greys = np.repeat(np.arange(256)[:, None], 3, 1)
                palette = greys if kind == "greys" else rng.integers(0, 256, (256, 3))
                indices = rng.integers(0, 256, (height, width))
                for key in (None, int(indices[0, 0])):
                    for disposal in (0, 2, 3):
                        for interlaced in (False, True):
                            order = [r for s, d in ((0, 8), (4, 8), (2, 4), (1, 2)) for r in range(s, height, d)]
                            stored = indices[order] if interlaced else indices
                            entries = palette.astype(np.uint8).tobytes()
                            data = b"GIF89a" + struct.pack("<HHBBB", WIDTH, HEIGHT, 0xF7 if is_global else 0x70, 2, 0)
                            data += entries if is_global else b""
                            data += bytes([0x21, 0xF9, 4, disposal << 2 | (key is not None), 0, 0, key or 0, 0])
                            flags = (0 if is_global else 0x87) | (0x40 if interlaced else 0)
                            data += b"," + struct.pack("<HHHHB", left, top, width, height, flags)
                            data += (b"" if is_global else entries) + _lzw(stored) + b";"
                            expected = np.full((HEIGHT, WIDTH, 3), 255.0)
                            frame = palette[indices].astype(float)
                            frame[indices == (-1 if key is None else key)] = 255
                            expected[top : top + height, left : left + width] = frame
                            name = f"{left}-{top}-{width}x{height}-{'global' if is_global else 'local'}-{kind}"
                            name += f"-key-{key is not None}-disposal-{disposal}{'-interlaced' * interlaced}"
                            table[name] = (data, expected)
    return table
