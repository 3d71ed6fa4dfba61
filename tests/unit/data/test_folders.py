"""Folders on a local disk: links, names that are not UTF-8, what is no file, hidden and excluded folders; shards."""

import os

import pytest
from support.images import pictures, tar_bytes

from attrib.common.errors import AttribError
from attrib.data.collections import list_images, list_units
from attrib.data.selection import COMPRESSED_SHARD, Reason, Skipped
from attrib.data.settings import CollectionSettings

X = pictures(["x.png"])["x.png"]


def keys(folder, storage, **settings) -> tuple[list[str], dict[Reason, int], Skipped]:
    collection, skipped = CollectionSettings(name="c", uri=str(folder), **settings), Skipped()
    units = list_units(collection, storage, skipped)
    tables = [list_images(unit, collection, storage, skipped) for unit in units]
    return sorted(key for table in tables for key in table["key"].to_pylist()), dict(skipped.counts), skipped


def write(root, *names: str, links: dict[str, str] | None = None) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(X)
    for name, target in (links or {}).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        os.symlink(target.format(root=root), root / name)


# Files, links, keys that are listed, counts. The collection is the folder `in`.
LINKS = {
    "to the root": (["in/a/x.png"], {"in/a/up": ".."}, ["a/x.png"], {Reason.LISTED: 1}),
    "to itself": (["in/a/x.png"], {"in/a/up": "."}, ["a/x.png"], {Reason.LISTED: 1}),
    "absolute": (["in/a/x.png"], {"in/a/up": "{root}/in"}, ["a/x.png"], {Reason.LISTED: 1}),
    "above the root": (["in/a/x.png", "other/y.png"], {"in/a/up": "../.."}, ["a/x.png"], {Reason.LISTED: 1}),
    "in the root": (["in/x.png"], {"in/up": "."}, ["x.png"], {Reason.LISTED: 1}),
    "mutual": (
        ["in/a/x.png", "in/b/x.png"],
        {"in/a/b": "../b", "in/b/a": "../a"},
        ["a/x.png", "b/x.png"],
        {Reason.LISTED: 2},
    ),
    "chain": (["in/a/x.png"], {"in/a/1": "2", "in/a/2": "3", "in/a/3": ".."}, ["a/x.png"], {Reason.LISTED: 3}),
    "over another root": (
        ["in/a/x.png", "other/y.png"],
        {"in/a/o": "../../other", "other/back": "../in"},
        ["a/o/y.png", "a/x.png"],
        {Reason.LISTED: 1},
    ),
    "circle in another root": (
        ["in/x.png", "o/p/y.png"],
        {"in/o": "../o", "o/p/up": "..", "o/p/me": "."},
        ["o/p/y.png", "x.png"],
        {Reason.LISTED: 2},
    ),
    "twice to another root": (
        ["in/x.png", "o/y.png"],
        {"in/1": "../o", "in/2": "../o"},
        ["1/y.png", "x.png"],
        {Reason.LISTED: 1},
    ),
    "twice in one folder": (
        ["in/a/x.png", "o/y.png"],
        {"in/a/1": "../../o", "in/a/2": "../../o"},
        ["a/1/y.png", "a/x.png"],
        {Reason.LISTED: 1},
    ),
    "a part and the whole of another root": (
        ["in/a/x.png", "o/p/y.png"],
        {"in/a/1": "../../o/p", "in/a/2": "../../o"},
        ["a/1/y.png", "a/x.png"],
        {Reason.LISTED: 1},
    ),
    "to a hidden store": (["in/.store/x.png"], {"in/shown": ".store"}, ["shown/x.png"], {Reason.HIDDEN: 1}),
    "to a file": (["in/a/x.png"], {"in/y.png": "a/x.png"}, ["a/x.png", "y.png"], {}),
    "file to nothing": (["in/x.png"], {"in/y.png": "gone.png"}, ["x.png"], {Reason.BROKEN: 1}),
    "file to itself": (["in/x.png"], {"in/y.png": "y.png"}, ["x.png"], {Reason.BROKEN: 1}),
    "file to a device": (["in/x.png"], {"in/y.png": "/dev/zero"}, ["x.png"], {Reason.IRREGULAR: 1}),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", LINKS)
def test_links_never_list_a_file_again(kind, tmp_path, local):
    files, links, expected, counts = LINKS[kind]
    write(tmp_path, *files, links=links)
    found, skipped, _ = keys(tmp_path / "in", local)
    assert found == expected and skipped == counts


@pytest.mark.timeout(60)
def test_a_web_of_links_lists_every_folder_once(tmp_path, local):
    """Each of 12 folders links to all others: following them all would list 12! paths."""
    names = [f"d{i}" for i in range(12)]
    write(tmp_path, *(f"in/{name}/x.png" for name in names))
    write(tmp_path, links={f"in/{a}/{b}": f"../{b}" for a in names for b in names if a != b})
    assert keys(tmp_path / "in", local)[0] == sorted(f"{name}/x.png" for name in names)
    write(tmp_path, "far/x.png", *(f"o/{name}/x.png" for name in names))
    write(tmp_path, links={f"o/{a}/{b}": f"../{b}" for a in names for b in names if a != b} | {"far/all": "../o"})
    assert len(keys(tmp_path / "far", local)[0]) == 1 + len(names)


def test_the_root_may_be_a_link(tmp_path, local):
    write(tmp_path, "in/a/x.png", links={"link": "in"})
    assert keys(tmp_path / "link", local)[0] == ["a/x.png"]


@pytest.mark.parametrize("place", ["", "sub/", "sub/deeper/"])
def test_one_name_that_is_not_utf_8_is_counted(place, tmp_path, local):
    write(tmp_path, "a.png", "sub/b.png")
    os.makedirs(tmp_path / place, exist_ok=True)
    (tmp_path / place / os.fsdecode(b"caf\xe9.png")).write_bytes(X)
    (tmp_path / place / os.fsdecode(b"f\xe9")).mkdir()
    (tmp_path / place / os.fsdecode(b"f\xe9") / "c.png").write_bytes(X)
    found, counts, skipped = keys(tmp_path, local)
    assert found == ["a.png", "sub/b.png"]
    assert counts == {Reason.NOT_UTF_8: 2}
    assert "caf" in skipped.describe() and skipped.describe().isprintable()


def test_hidden_and_excluded_files_are_counted(tmp_path, local):
    write(
        tmp_path,
        "a.png",
        ".h.png",
        "._a.png",
        ".cache/b.png",
        "d/.cache/b.png",
        "@eaDir/a.png/T.jpg",
        "d/@eaDir/b.png/T.jpg",
    )
    write(tmp_path, "d/b.png", "notes.txt", "d/thumbs/b.png", "d/keep/b_thumb.png")
    found, counts, _ = keys(tmp_path, local)
    assert found == ["a.png", "d/b.png", "d/keep/b_thumb.png", "d/thumbs/b.png"]
    assert counts == {Reason.HIDDEN: 4, Reason.EXCLUDED: 2, Reason.EXTENSION: 1}
    assert keys(tmp_path, local, exclude=("thumbs", "*_thumb.png", "@eaDir"))[0] == ["a.png", "d/b.png"]
    assert "d/thumbs/b.png" not in keys(tmp_path, local, exclude=("d/thumbs",))[0]
    assert keys(tmp_path, local, exclude=("*/*",))[0] == ["a.png"]
    assert "@eaDir/a.png/T.jpg" in keys(tmp_path, local, exclude=())[0]


@pytest.mark.timeout(30)
def test_pipes_and_sockets_are_counted_not_opened(tmp_path, local):
    write(tmp_path, "a.png")
    os.mkfifo(tmp_path / "b.png")
    assert keys(tmp_path, local)[:2] == (["a.png"], {Reason.IRREGULAR: 1})
    os.mkfifo(tmp_path / "b.tar")
    (tmp_path / "a.tar").write_bytes(tar_bytes({"a.png": X}))
    found, counts, _ = keys(tmp_path, local, format="webdataset")
    assert found == ["a.png"] and counts[Reason.IRREGULAR] == 1


def test_a_folder_without_permission_is_named(tmp_path, local, monkeypatch):
    write(tmp_path, "d/a.png")

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    collection = CollectionSettings(name="c", uri=str(tmp_path))
    units = list_units(collection, local)
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(AttribError, match=r"/d cannot be listed: Permission denied"):
        list_images(units[1], collection, local)


def test_new_formats_are_in_the_default_extensions(tmp_path, local):
    write(tmp_path, "a.avif", "b.jp2", "c.J2K", "d.jpx", "e.jpg", "f.heic")
    found, counts, _ = keys(tmp_path, local)
    assert found == ["a.avif", "b.jp2", "c.J2K", "d.jpx", "e.jpg"] and counts == {Reason.EXTENSION: 1}


COMPRESSED = ("1.tar.gz", "2.tgz", "3.tar.zst", "4.tar.bz2", "5.TAR.XZ", "6.tbz2", "7.tar.lz4", "8.TGZ")


def test_shards_in_other_forms_are_listed_or_counted(tmp_path, local):
    for i, name in enumerate(
        ("0.tar", "9.TAR", "a/10.Tar", *COMPRESSED, "._0.tar", ".part/0.tar", "@eaDir/0.tar", "0.json")
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(tar_bytes({f"{i}.png": X}))
    found, counts, skipped = keys(tmp_path, local, format="webdataset")
    assert found == ["0.png", "1.png", "2.png"]
    assert counts == {Reason.COMPRESSED: len(COMPRESSED), Reason.HIDDEN: 2, Reason.EXCLUDED: 1, Reason.EXTENSION: 1}
    assert "1.tar.gz" in skipped.describe()
    with pytest.raises(
        AttribError, match=r"8 of 11 shards cannot be listed, more than max_skipped_share = 0.5 .*1.tar.gz"
    ):
        skipped.check("c", 3, 0.5, "shards")
    for name in ("0.tar", "9.TAR", "a/10.Tar"):
        (tmp_path / name).unlink()
    with pytest.raises(AttribError, match=r"no \.tar file below .*8 compressed shard .*unpack"):
        keys(tmp_path, local, format="webdataset")


@pytest.mark.parametrize("name", ["a.gz", "a.tar", "tar.gz.png", "a.targz", "a.zip", "a.parquet"])
def test_other_names_are_no_compressed_shards(name):
    assert not COMPRESSED_SHARD.search(name)


def test_a_shard_is_listed_once_over_links(tmp_path, local):
    write(tmp_path, links={"in/a/up": ".."})
    (tmp_path / "in" / "a" / "0.tar").write_bytes(tar_bytes({"a.png": X}))
    assert keys(tmp_path / "in", local, format="webdataset")[0] == ["a.png"]


@pytest.mark.parametrize(
    ("num_listed", "lost", "share", "fails"),
    [
        (9, {Reason.NOT_UTF_8: 1}, 0.1, False),
        (9, {Reason.NOT_UTF_8: 1}, 0.09, True),
        (9, {Reason.BROKEN: 1}, 0, True),
        (1, {Reason.HIDDEN: 9, Reason.EXTENSION: 9, Reason.EXCLUDED: 9, Reason.LISTED: 9}, 0, False),
        (0, {}, 0, False),
    ],
)
def test_the_limit_counts_what_looks_like_an_image(num_listed, lost, share, fails):
    skipped = Skipped()
    for reason, count in lost.items():
        for i in range(count):
            skipped.add(reason, f"{i}.png")
    if not fails:
        skipped.check("c", num_listed, share)
        return
    with pytest.raises(AttribError, match=r"1 of 10 images cannot be listed.*max_skipped_share.*e\.g\. '0\.png'"):
        skipped.check("c", num_listed, share)
