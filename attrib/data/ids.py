"""Stable image ids: a 63-bit hash of collection name and image key, independent of listing order and sharding."""

import hashlib

import numpy as np

from attrib.common.errors import AttribError

ID_BITS = 63


def image_ids(collection: str, keys: list[str]) -> np.ndarray:
    """Return ids int64 [n] in [0, 2**63): the first 63 bits of BLAKE2b over (collection, key)."""
    seed = hashlib.blake2b(collection.encode() + b"\0", digest_size=8)
    ids = np.empty(len(keys), dtype=np.int64)
    for i, key in enumerate(keys):
        h = seed.copy()
        h.update(key.encode("utf-8", "surrogateescape"))
        ids[i] = int.from_bytes(h.digest(), "big") >> 1
    return ids


def duplicated_ids(sorted_ids: np.ndarray) -> np.ndarray:
    """Return the distinct values that occur more than once. sorted_ids: int64 [n], ascending -> int64 [m]."""
    return np.unique(sorted_ids[1:][sorted_ids[1:] == sorted_ids[:-1]])


def resolve_collisions(colliding: list[tuple[int, str]], sorted_ids: np.ndarray) -> dict[str, int]:
    """Return {key: new id} of the keys whose id changes because another key has the same hash.

    colliding: (id, key) of every image whose id is duplicated. sorted_ids: int64 [n], all ids of the collection,
    ascending. Of the images with one id, the first by key keeps it; each other one takes the next free id above.
    Raises AttribError if a key occurs twice.
    """
    moved: dict[str, int] = {}
    given: set[int] = set()
    ordered = sorted(colliding)
    for (previous_id, previous_key), (image_id, key) in zip(ordered, ordered[1:]):
        if image_id != previous_id:
            continue
        if key == previous_key:
            raise AttribError(
                f"the key {key!r} occurs more than once in the collection; a key must name one image, so rename one "
                "of them (in tar shards the key is the path of the member, without the name of the shard)"
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
    """Return a pseudo-random sort key uint64 [n] that depends on the ids only (the finaliser of SplitMix64).

    Samples in this order are the same for every sharding of the collection.
    """
    x = ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
