"""Stable image ids: a 63-bit hash of the collection's name and the image's key, so that listing order and sharding never matter."""

import hashlib

import numpy as np

from attrib.common.errors import AttribError

ID_BITS = 63


def image_ids(collection: str, keys: list[str]) -> np.ndarray:
    """int64 [n], each in [0, 2**63): the first 63 bits of BLAKE2b over (collection, key)."""
    seed = hashlib.blake2b(collection.encode() + b"\0", digest_size=8)
    ids = np.empty(len(keys), dtype=np.int64)
    for i, key in enumerate(keys):
        h = seed.copy()
        h.update(key.encode("utf-8", "surrogateescape"))
        ids[i] = int.from_bytes(h.digest(), "big") >> 1
    return ids


def duplicated_ids(sorted_ids: np.ndarray) -> np.ndarray:
    """The distinct values that occur more than once in ascending ids: int64 [n] -> int64 [m]."""
    return np.unique(sorted_ids[1:][sorted_ids[1:] == sorted_ids[:-1]])


def resolve_collisions(colliding: list[tuple[int, str]], sorted_ids: np.ndarray) -> dict[str, int]:
    """New ids for keys whose hashes coincide: {key: id}, only for the keys that move.

    colliding: (id, key) of every image whose id is duplicated; sorted_ids: int64 [n], all ids of the collection, ascending. Of the images
    that share an id the first by key keeps it and each other takes the next free id above, so the outcome depends on the set alone.
    Raises AttribError when a key occurs twice: two images under one name cannot be told apart afterwards.
    """
    moved: dict[str, int] = {}
    given: set[int] = set()
    ordered = sorted(colliding)
    for (previous_id, previous_key), (image_id, key) in zip(ordered, ordered[1:]):
        if image_id != previous_id:
            continue
        if key == previous_key:
            raise AttribError(
                f"the key {key!r} occurs more than once in the collection; keys name images for good, so rename one of them "
                "(in tar shards the member's path is the key, and the shard's name is not part of it)"
            )
        free = image_id
        while free in given or _contains(sorted_ids, free):
            free = (free + 1) % (1 << ID_BITS)
        given.add(free)
        moved[key] = free
    return moved


def _contains(sorted_ids: np.ndarray, image_id: int) -> bool:
    at = np.searchsorted(sorted_ids, image_id)
    return bool(at < len(sorted_ids) and sorted_ids[at] == image_id)


def sampling_rank(ids: np.ndarray) -> np.ndarray:
    """uint64 [n]: a pseudo-random order of images that depends on their ids alone (the finaliser of SplitMix64).

    Samples taken by it are the same however the collection is sharded, and independent of the ids' own order.
    """
    x = ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
