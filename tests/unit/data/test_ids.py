"""Image ids: fixed values, collisions, and the order of samples."""

import hashlib
import os

import numpy as np
import pytest

from attrib.common.errors import AttribError
from attrib.data.ids import duplicated_ids, image_ids, resolve_collisions, sampling_rank

LAST = (1 << 63) - 1


def test_ids_never_change():
    """Other values would separate every published index from its images."""
    assert image_ids("sources", ["a.jpg", "folder/ü.png", ""]).tolist() == [
        1035765455778124473,
        3797333840538017540,
        1683658886558214516,
    ]


def test_ids_are_the_first_63_bits_of_the_hash():
    keys = [f"{i}.jpg" for i in range(500)] + ["ä/ö.jpg", "a\nb", "x" * 5000]
    ids = image_ids("c", keys)
    expected = [
        int.from_bytes(hashlib.blake2b(b"c\0" + key.encode(), digest_size=8).digest(), "big") // 2 for key in keys
    ]
    assert ids.dtype == np.int64 and ids.tolist() == expected
    assert (ids >= 0).all() and len(set(ids.tolist())) == len(keys)
    assert ids.max() > 1 << 62  # all 63 bits are used
    assert not set(ids.tolist()) & set(image_ids("d", keys).tolist())
    assert image_ids("c", []).shape == (0,)


def test_file_names_without_utf_8_have_ids():
    name = os.fsdecode(b"caf\xe9-\xff.jpg")
    assert "\udce9" in name
    expected = int.from_bytes(hashlib.blake2b(b"c\0caf\xe9-\xff.jpg", digest_size=8).digest(), "big") >> 1
    assert image_ids("c", [name]).tolist() == [expected]


def test_duplicated_ids():
    assert duplicated_ids(np.array([1, 1, 2, 3, 3, 3, 9])).tolist() == [1, 3]
    assert duplicated_ids(np.array([1, 2])).tolist() == []
    assert duplicated_ids(np.empty(0, np.int64)).tolist() == []


@pytest.mark.parametrize("seed", range(4))
def test_collisions_get_the_next_free_ids_in_any_order(seed):
    colliding = [(5, "b"), (5, "a"), (5, "c"), (7, "z"), (7, "y"), (LAST, "p"), (LAST, "q"), (LAST, "r")]
    taken = np.array(sorted([image_id for image_id, _ in colliding] + [0, 6, 8, 9]))
    order = np.random.default_rng(seed).permutation(len(colliding))
    moved = resolve_collisions([colliding[i] for i in order], taken)
    # a, y and p keep theirs; past 5 the ids 6 to 9 are taken; past the last id comes 0, which is taken too.
    assert moved == {"b": 10, "c": 11, "z": 12, "q": 1, "r": 2}


def test_no_id_changes_without_collisions():
    assert resolve_collisions([], np.array([1, 2])) == {}
    assert resolve_collisions([(1, "a"), (2, "b")], np.array([1, 2])) == {}


def test_duplicate_key_is_named():
    with pytest.raises(AttribError, match=r"'cats/1\.jpg' occurs more than once"):
        resolve_collisions([(4, "other"), (4, "cats/1.jpg"), (4, "cats/1.jpg")], np.array([4, 4, 4]))


def splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def test_sampling_rank_is_splitmix64_of_each_id():
    # The first output of the published generator from the seed 0.
    assert splitmix64(0) == 0xE220A8397B1DCDAF
    ids = np.concatenate([[0, 1, LAST], np.random.default_rng(17).integers(0, LAST, 200)])
    assert sampling_rank(ids).dtype == np.uint64
    assert sampling_rank(ids).tolist() == [splitmix64(int(i)) for i in ids]
    assert np.array_equal(sampling_rank(ids[::-1]), sampling_rank(ids)[::-1])


@pytest.mark.parametrize("ids", [np.arange(64_000), 2**63 - 1 - 1024 * np.arange(64_000)])
def test_sampling_rank_is_distinct_and_uniform_even_for_regular_ids(ids):
    rank = sampling_rank(ids)
    assert len(np.unique(rank)) == len(ids)
    for shift in (58, 20, 0):  # the highest bits, which samples are taken by, and others
        counts = np.bincount(((rank >> np.uint64(shift)) & np.uint64(63)).astype(int), minlength=64)
        chi_square = ((counts - 1000.0) ** 2 / 1000).sum()
        assert 25 < chi_square < 120  # 63 degrees of freedom: beyond either end once in 100,000
    assert abs(np.corrcoef(ids.astype(float), rank.astype(float))[0, 1]) < 0.02
