"""Seeded changes of whole files, for tests that read damaged ones. Checksums can be made right again, so that a change
reaches what lies behind them.
"""

import copy
import json
import random
import struct
import zlib
from collections.abc import Callable

from attrib.common.json_records import CHECKSUM
from support.odd_tars import BLOCK, with_checksum

Mutation = Callable[[random.Random, bytearray, bytes], bytes | bytearray]  # of a file; the second one may be used, too

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
EDGES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF, 1 << 63)
TEXTS = (b"-1", b"99999999999", b"0", b'"', b",", b"\n", b"\t", b"\0", b"\xff\xfe", b"{", b"]", b"\\ud800", b"1e999")
VALUES = (None, True, -1, 1 << 70, 0.5, float("nan"), "", "\ud800", "/\0", [], {}, [[]], {"a": []}, [1, "2"])
MAX_SLICE = 4096
MAX_BYTES = 1 << 18  # of an input: duplicated slices do not add up to a large one


def _place(rng: random.Random, data: bytes | bytearray) -> int:
    """A position; half of them near an end of the file, where headers and footers are."""
    near, side = min(len(data), 256), rng.random()
    if side < 0.35:
        return rng.randrange(near)
    return rng.randrange(len(data)) if side < 0.85 else len(data) - 1 - rng.randrange(near)


def _slice(rng: random.Random, data: bytes | bytearray) -> slice:
    start = _place(rng, data)
    return slice(start, min(len(data), start + 1 + int(rng.triangular(0, min(len(data), MAX_SLICE), 0))))


def flip_bits(rng: random.Random, data: bytearray, other: bytes) -> bytearray:
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        data[_place(rng, data)] ^= 1 << rng.randrange(8)
    return data


def overwrite(rng: random.Random, data: bytearray, other: bytes) -> bytearray:
    """Numbers at the edges of their types, as in fields of lengths and sizes, in both byte orders; or a text."""
    at, size = _place(rng, data), rng.choice((1, 2, 4, 4, 8))
    number = rng.choice((rng.choice(EDGES), rng.getrandbits(16), len(data))) % (1 << 8 * size)
    new = number.to_bytes(size, rng.choice(("little", "big"))) if rng.random() < 0.8 else rng.choice(TEXTS)
    data[at : at + len(new)] = new
    return data


def cut(rng: random.Random, data: bytearray, other: bytes) -> bytearray:
    return data[: _place(rng, data)]


def delete(rng: random.Random, data: bytearray, other: bytes) -> bytearray:
    del data[_slice(rng, data)]
    return data


def duplicate(rng: random.Random, data: bytearray, other: bytes) -> bytearray:
    part, at = data[_slice(rng, data)], _place(rng, data)
    data[at:at] = part * rng.choice((1, 1, 2, 30))
    return data


def exchange(rng: random.Random, data: bytearray, other: bytes) -> bytearray:
    """Two slices change places."""
    first, second = sorted((_slice(rng, data), _slice(rng, data)), key=lambda part: part.start)
    stop = min(first.stop, second.start)
    middle = data[stop : second.start]
    return data[: first.start] + data[second] + middle + data[first.start : stop] + data[second.stop :]


def splice(rng: random.Random, data: bytearray, other: bytes) -> bytearray:
    """The start of one file and the end of the other, or a slice of the other in between."""
    at = _place(rng, data)
    part = other[_slice(rng, other)]
    return data[:at] + (part + data[at + len(part) :] if rng.random() < 0.5 else other[_place(rng, other) :])


def noise(rng: random.Random, data: bytearray, other: bytes) -> bytearray:
    """A header that is kept, followed by noise; or a slice of noise."""
    if rng.random() < 0.4:
        at = _place(rng, data)
        return data[:at] + rng.randbytes(len(data) - at)
    part = _slice(rng, data)
    data[part] = rng.randbytes(part.stop - part.start)
    return data


MUTATIONS: dict[str, Mutation] = {
    mutation.__name__: mutation for mutation in (flip_bits, overwrite, cut, delete, duplicate, exchange, splice, noise)
}
WEIGHTS = (4, 4, 1, 2, 2, 1, 2, 1)


def mutated(
    rng: random.Random, data: bytes, other: bytes, repair: Callable[[bytes], bytes] | None
) -> tuple[bytes, str]:
    """The file with one to four changes, and their names. repair: applied to half of the files, afterwards."""
    names, changed = rng.choices(list(MUTATIONS), WEIGHTS, k=rng.choice((1, 1, 2, 4))), bytearray(data)
    for name in names:
        if changed:
            changed = bytearray(MUTATIONS[name](rng, changed, other)[:MAX_BYTES])
    if repair and rng.random() < 0.5:
        names.append(repair.__name__)
        return repair(bytes(changed)), "+".join(names)
    return bytes(changed), "+".join(names)


def repair_image(data: bytes) -> bytes:
    """Right checksums of the chunks of a PNG; other files as they are."""
    if not data.startswith(PNG_SIGNATURE):
        return data
    found, at = bytearray(data), len(PNG_SIGNATURE)
    while at + 12 <= len(found):
        (length,) = struct.unpack_from(">I", found, at)
        end = at + 8 + length
        if end + 4 > len(found):
            break
        found[end : end + 4] = struct.pack(">I", zlib.crc32(found[at + 4 : end]))
        at = end + 4
    return bytes(found)


def repair_tar(data: bytes) -> bytes:
    """Right checksums of all blocks that may be headers."""
    found = bytearray(data)
    for at in range(0, len(found) - BLOCK + 1, BLOCK):
        if b"ustar" in found[at + 255 : at + 265]:
            found[at : at + BLOCK] = with_checksum(found[at : at + BLOCK])
    return bytes(found)


def change_json(rng: random.Random, data: bytes) -> bytes:
    """A record of which one to three values are left out, of another type, or values of other keys; no checksum."""
    record = json.loads(data)
    record.pop(CHECKSUM, None)
    for _ in range(rng.choice((1, 1, 2, 3))):
        node = record
        while True:
            keys = list(node) if isinstance(node, dict) else range(len(node))
            key = rng.choice(keys) if keys else None
            if key is None or not isinstance(node[key], dict | list) or rng.random() < 0.4:
                break
            node = node[key]
        if key is None:
            continue
        kind = rng.choice(("left out", "other type", "other value"))
        if kind == "left out":
            del node[key]
        else:
            node[key] = copy.deepcopy(rng.choice(VALUES if kind == "other type" else list(record.values())))
    return json.dumps(record).encode()
