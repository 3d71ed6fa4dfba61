"""Tar shards: what is listed has the bytes of the packed file; the rest is counted, or the shard is refused by name."""

import io
import random
import tarfile
import time

import pytest
from support.images import pictures, tar_bytes
from support.odd_tars import (
    END,
    gnu_sparse,
    hardlink,
    header,
    member,
    pax,
    pax_sparse,
    symlink,
    unpacked,
)

from attrib.common.errors import AttribError
from attrib.data.collections import list_images, list_units
from attrib.data.reading import read_image
from attrib.data.selection import Reason, Skipped
from attrib.data.settings import CollectionSettings

IMAGES = pictures(["a.png", "b.png", "c.png"])
A, B, C = IMAGES.values()


def listed(archive: bytes, folder, storage) -> tuple[dict[str, bytes], dict[str, int], Skipped]:
    """Bytes by key of all listed images, and what was left out."""
    (folder / "0.tar").write_bytes(archive)
    collection, skipped = CollectionSettings(name="c", uri=str(folder), format="webdataset"), Skipped()
    units = list_units(collection, storage, skipped)
    rows = [row for unit in units for row in list_images(unit, collection, storage, skipped).to_pylist()]
    assert len({row["key"] for row in rows}) == len(rows)
    return {row["key"]: read_image(row, storage) for row in rows}, dict(skipped.counts), skipped


LISTED = {
    "joined archives": (member("a.png", A) + END + member("b.png", B) + END, {"a.png": A, "b.png": B}),
    "three joined, padded": (
        (member("a.png", A) + bytes(10240)) + member("b.png", B) + bytes(9728) + member("c.png", C) + END,
        IMAGES,
    ),
    "one empty block in the middle": (
        member("a.png", A) + bytes(512) + member("b.png", B) + END,
        {"a.png": A, "b.png": B},
    ),
    "hard link": (
        member("a.png", A) + hardlink("b.png", "a.png") + member("c.png", C) + END,
        {"a.png": A, "b.png": A, "c.png": C},
    ),
    "hard link to a hard link": (
        member("x", A) + hardlink("a.png", "x") + hardlink("b.png", "a.png") + END,
        {"a.png": A, "b.png": A},
    ),
    "hard link as ./": (member("./d/a.png", A) + hardlink("./b.png", "./d/a.png") + END, {"d/a.png": A, "b.png": A}),
    "symbolic link": (
        member("d/a.png", A) + symlink("d/b.png", "a.png") + symlink("c.png", "./d/a.png") + END,
        {"d/a.png": A, "d/b.png": A, "c.png": A},
    ),
    "symbolic link before its target": (
        symlink("b/b.png", "../a/a.png") + member("a/a.png", A) + END,
        {"a/a.png": A, "b/b.png": A},
    ),
    "link to a link": (
        symlink("c.png", "b.png") + symlink("b.png", "blob") + member("blob", A) + END,
        {"b.png": A, "c.png": A},
    ),
    "dot parts": (member("images/./sub/a.png", A) + member("././b.png", B) + END, {"images/sub/a.png": A, "b.png": B}),
    "dots that are names": (member("..a/b.png", B) + member("a..b/c.png", C) + END, {"a..b/c.png": C}),
    "up parts are names": (member("../a.png", A) + member("x/../b.png", B) + END, {"../a.png": A, "x/../b.png": B}),
    "long names": (tar_bytes({"d" * 150 + "/a.png": A}, tarfile.GNU_FORMAT), {"d" * 150 + "/a.png": A}),
    "pax size and path": (
        pax({"path": "ü.png", "size": str(len(A))}) + header("x", 0) + member("", A)[512:] + END,
        {"ü.png": A},
    ),
    "global attributes": (pax({"comment": "by git"}, tarfile.XGLTYPE) + member("a.png", A) + END, {"a.png": A}),
}


@pytest.mark.parametrize("kind", LISTED)
def test_every_member_is_listed_with_its_bytes(kind, tmp_path, local):
    archive, expected = LISTED[kind]
    found, _, _ = listed(archive, tmp_path, local)
    assert found == expected


SPARSE = [(0, b"x" * 1024), (8192, b"y" * 512)]
LEFT_OUT = {
    "old sparse": (gnu_sparse("a.png", SPARSE, 9000) + member("b.png", B) + END, Reason.SPARSE, "a.png"),
    "old sparse of 60 segments": (
        gnu_sparse("a.png", [(1024 * i, b"z" * 512) for i in range(60)], 61440) + member("b.png", B) + END,
        Reason.SPARSE,
        "a.png",
    ),
    "pax sparse": (pax_sparse("a.png", SPARSE, 9000) + member("b.png", B) + END, Reason.SPARSE, "a.png"),
    "hard link to nothing": (hardlink("a.png", "gone") + member("b.png", B) + END, Reason.BROKEN, "a.png"),
    "hard link to a sparse member": (
        gnu_sparse("s", SPARSE, 9000) + hardlink("a.png", "s") + member("b.png", B) + END,
        Reason.BROKEN,
        "a.png",
    ),
    "link out of the shard": (symlink("a.png", "/etc/passwd") + member("b.png", B) + END, Reason.BROKEN, "a.png"),
    "link to itself": (symlink("a.png", "a.png") + member("b.png", B) + END, Reason.BROKEN, "a.png"),
    "link circle": (symlink("a.png", "c") + symlink("c", "a.png") + member("b.png", B) + END, Reason.BROKEN, "a.png"),
    "device": (header("a.png", type=tarfile.CHRTYPE) + member("b.png", B) + END, Reason.IRREGULAR, "a.png"),
    "pipe": (header("a.png", type=tarfile.FIFOTYPE) + member("b.png", B) + END, Reason.IRREGULAR, "a.png"),
    "volume part": (header("a.png", 512, b"M") + bytes(512) + member("b.png", B) + END, Reason.IRREGULAR, "a.png"),
    "hidden": (member("._a.png", A) + member("b.png", B) + END, Reason.HIDDEN, "._a.png"),
    "excluded": (member("@eaDir/b.png/T.jpg", A) + member("b.png", B) + END, Reason.EXCLUDED, "@eaDir/b.png/T.jpg"),
    "other": (member("a.json", A) + member("b.png", B) + END, Reason.EXTENSION, "a.json"),
}


@pytest.mark.parametrize("kind", LEFT_OUT)
def test_what_is_left_out_is_counted_and_named(kind, tmp_path, local):
    archive, reason, name = LEFT_OUT[kind]
    found, counts, skipped = listed(archive, tmp_path, local)
    assert found == {"b.png": B}
    assert skipped.examples[reason] == [name] and counts.pop(reason) == 1
    assert counts.keys() <= {Reason.EXTENSION}


REFUSED = {
    "negative size": (member("a.png", A) + header("b.png", -512) + END, "-512 bytes"),
    "size of 100 GB": (member("a.png", A) + header("b.png", 100 << 30) + bytes(512) + END, "107,374,182,400 bytes"),
    "size in pax": (pax({"size": str(100 << 30)}) + member("a.png", A) + END, "107,374,182,400 bytes"),
    "negative size in pax": (pax({"size": "-1"}) + member("a.png", A) + END, "-1 bytes"),
    "size that is no number": (pax({"size": "many"}) + member("a.png", A) + END, "'many'"),
    "pax that claims much": (header("x", 100 << 30, tarfile.XHDTYPE) + bytes(512) + END, "of names and attributes"),
    "name that claims much": (
        header("x", 1 << 40, tarfile.GNUTYPE_LONGNAME) + bytes(512) + END,
        "of names and attributes",
    ),
    "negative name": (header("x", -512, tarfile.GNUTYPE_LONGNAME) + member("a.png", A) + END, "-512 bytes"),
    "pax lengths": (
        header("x", 8, tarfile.XHDTYPE) + b"99 a=bc\n".ljust(512, b"\0") + member("a.png", A) + END,
        "attributes",
    ),
    "pax of length 0": (
        header("x", 6, tarfile.XHDTYPE) + b"0 a=b\n".ljust(512, b"\0") + member("a.png", A) + END,
        "attributes",
    ),
    "endless sparse map": (gnu_sparse("a.png", [(i, b"z") for i in range(30)], 99)[:1024], "0 are left"),
    "text after the end": (member("a.png", A) + END + b"see README\n" * 60, "damaged header"),
    "second archive is cut": (member("a.png", A) + END + member("b.png", B)[:-512], "are left"),
    "second archive without an end": (member("a.png", A) + END + member("b.png", B), "no end-of-archive"),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", REFUSED)
def test_shard_that_claims_what_it_has_not_is_refused_at_once(kind, tmp_path, local):
    archive, expected = REFUSED[kind]
    with pytest.raises(AttribError, match=r"0\.tar is not a readable plain tar file") as error:
        listed(archive, tmp_path, local)
    assert expected in str(error.value)


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("seed", range(4))
def test_packed_folders_are_listed_as_tarfile_reads_them(seed, format, tmp_path, local):
    rng, names = random.Random(seed), []
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for i in range(30):
            info = tarfile.TarInfo(
                "/".join(rng.choice(["a", "ü", "b" * 40]) for _ in range(rng.randint(0, 3))) + f"/{i}.png"
            )
            if names and rng.random() < 0.4:
                info.type, info.linkname = tarfile.LNKTYPE, rng.choice(names)
                tar.addfile(info)
            else:
                data = rng.randbytes(rng.choice([0, 1, 511, 512, 513, 5000]))
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            names.append(info.name)
    found, counts, _ = listed(buffer.getvalue(), tmp_path, local)
    assert found == unpacked(buffer.getvalue()) and not counts


@pytest.mark.timeout(60)
def test_a_long_run_of_empty_blocks_takes_no_time(tmp_path, local):
    with open(tmp_path / "0.tar", "wb") as file:
        file.write(member("a.png", A))
        file.seek(1 << 30)
        file.write(member("b.png", B) + END)
    started = time.monotonic()
    collection = CollectionSettings(name="c", uri=str(tmp_path), format="webdataset")
    rows = list_images(list_units(collection, local)[0], collection, local).to_pylist()
    assert [row["key"] for row in rows] == ["a.png", "b.png"] and time.monotonic() - started < 30


@pytest.mark.timeout(120)
def test_any_bytes_end_in_a_listing_or_an_error(tmp_path, local):
    """Changed and cut archives never hang, claim memory or raise anything else."""
    rng = random.Random(0)
    whole = [archive for archive, *_ in (*LISTED.values(), *LEFT_OUT.values(), *REFUSED.values())]
    for _ in range(400):
        data = bytearray(rng.choice(whole))
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            listed(bytes(data[: rng.randint(1, len(data))]), tmp_path, local)
        except AttribError as error:
            assert "0.tar is not a readable plain tar file" in str(error)
