"""Damaged forms of the content of a file."""

import numpy as np


def damages(data: bytes) -> dict[str, bytes]:
    """The content with one bit flipped at ten places, cut, emptied, or extended."""
    found = {}
    for place in np.linspace(0, len(data) - 1, 10).astype(int):
        flipped = bytearray(data)
        flipped[place] ^= 4
        found[f"bit of byte {place}"] = bytes(flipped)
    return found | {"half": data[: len(data) // 2], "empty": b"", "longer": data + b"\0"}
