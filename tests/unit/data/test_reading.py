"""Reading: only what is as it was listed, lies in the allowed roots, is a regular file and is not too large."""

import os
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.images import pictures, write_folder, write_parquet, write_tars

from attrib.common.errors import ImageError
from attrib.common.storage import Storage
from attrib.data.collections import LOCATION_FIELDS, list_images, list_units
from attrib.data.manifest import Manifest, open_places
from attrib.data.places import CHANGED
from attrib.data.reading import _read_row_group, accept_repaired, read_all
from attrib.data.settings import CollectionSettings

IMAGES = pictures(["a.png", "b.png", "c.png"])
FORMS = {
    "folder": {},
    "webdataset": {"format": "webdataset"},
    "parquet": {"format": "parquet", "key_column": "name", "bytes_column": "image"},
    "uris": {"format": "parquet", "key_column": "name", "uri_column": "where"},
}


def listed(collection: CollectionSettings, storage: Storage) -> list[dict]:
    units = list_units(collection, storage)
    return [row for unit in units for row in list_images(unit, collection, storage).to_pylist()]


def read(rows: list[dict], collection: CollectionSettings, storage: Storage) -> dict[str, bytes | str]:
    """Bytes, or the reason of the failure, by key."""
    _read_row_group.cache_clear()  # a worker keeps the row group that it read last
    manifest = Manifest("", collection, "", "", "", [len(rows)], [])
    found = read_all(rows, manifest, 2, storage)
    return {row["key"]: data.reason if isinstance(data, ImageError) else data for row, data in zip(rows, found)}


def write(form: str, root: Path, storage: Storage, images: dict[str, bytes]) -> CollectionSettings:
    if form == "folder":
        write_folder(images, str(root), storage)
    elif form == "webdataset":
        write_tars(images, str(root), storage)
    elif form == "parquet":
        write_parquet(images, str(root), storage)
    else:
        write_folder(images, str(root / "files"), storage)
        names = list(images)
        pq.write_table(pa.table({"name": names, "where": [f"files/{n}" for n in names]}), root / "0.parquet")
    return CollectionSettings(name="c", uri=str(root), **FORMS[form])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("change", ["other bytes", "same size", "only the time"])
def test_what_changed_since_it_was_listed_fails_with_that_reason(form, change, tmp_path, local):
    collection = write(form, tmp_path, local, IMAGES)
    rows = listed(collection, local)
    assert read(rows, collection, local) == IMAGES
    swapped = dict(zip(IMAGES, [*list(IMAGES.values())[1:], b"other"]))
    if change == "same size":
        swapped = {key: bytes(reversed(data)) for key, data in IMAGES.items()}
    if change == "only the time":  # what a copy leaves: the same names, and perhaps the same sizes
        swapped = IMAGES
    time.sleep(0.02)  # the clock of some file systems ticks slowly
    write(form, tmp_path, local, swapped)
    assert set(read(rows, collection, local).values()) == {CHANGED}
    assert read(listed(collection, local), collection, local) == swapped


@pytest.mark.parametrize("form", FORMS)
def test_manifests_of_earlier_versions_are_read_without_a_comparison(form, tmp_path, local):
    collection = write(form, tmp_path / "images", local, IMAGES)
    images = pa.Table.from_pylist(listed(collection, local), pa.schema(LOCATION_FIELDS)).drop_columns("listed_version")
    local.write_table(str(tmp_path / "part.parquet"), images)
    rows = open_places([str(tmp_path / "part.parquet")], local).to_table().to_pylist()
    assert {row["listed_version"] for row in rows} == {None}
    assert read(rows, collection, local) == IMAGES
    assert read(images.to_pylist(), collection, local) == IMAGES


@pytest.mark.parametrize("form", FORMS)
def test_a_retry_takes_repaired_files_and_no_changed_shards(form, tmp_path, local):
    collection = write(form, tmp_path, local, IMAGES | {"a.png": b"broken"})
    images = pa.Table.from_pylist(listed(collection, local), pa.schema(LOCATION_FIELDS))
    time.sleep(0.02)
    write(form, tmp_path, local, IMAGES)
    found = read(accept_repaired(images).to_pylist(), collection, local)
    assert found == IMAGES if form in ("folder", "uris") else set(found.values()) == {CHANGED}


def uris(root: Path, places: dict[str, str], **settings) -> CollectionSettings:
    root.mkdir(exist_ok=True)
    pq.write_table(pa.table({"name": list(places), "where": list(places.values())}), root / "list.parquet")
    return CollectionSettings(name="c", uri=str(root), **FORMS["uris"], **settings)


OUTSIDE = "outside of the collection's folder"


@pytest.mark.parametrize("as_file", [False, True])
def test_uris_are_limited_to_the_collections_own_folder(as_file, tmp_path, local):
    for name in ("in/a.png", "in/sub/a.png", "out/secret.png", "in-between/a.png"):
        local.write_bytes(str(tmp_path / name), IMAGES["a.png"])
    os.symlink("../out/secret.png", tmp_path / "in" / "link.png")
    os.symlink("../out", tmp_path / "in" / "folder")
    os.symlink("a.png", tmp_path / "in" / "inner.png")
    places = {
        "own": "a.png",
        "sub": f"{tmp_path}/in/sub/a.png",
        "inner link": "inner.png",
        "back": "sub/../a.png",
        "other folder": f"{tmp_path}/out/secret.png",
        "up": "../out/secret.png",
        "link": "link.png",
        "over a folder": "folder/secret.png",
        "prefix": f"{tmp_path}/in-between/a.png",
        "system": "/etc/passwd",
        "file uri": "file:///etc/passwd",
        "process": "/proc/self/environ",
        "store": "s3://bucket/a.png",
        "itself": "list.parquet/../../out/secret.png",
    }
    collection = uris(tmp_path / "in", places)
    if as_file:
        collection = collection.model_copy(update={"uri": f"{collection.uri}/list.parquet"})
    found = read(listed(collection, local), collection, local)
    inside = {"own", "sub", "inner link", "back"}
    assert {key for key, data in found.items() if data == IMAGES["a.png"]} == inside
    for key in places.keys() - inside:
        assert OUTSIDE in found[key] and "collection.allowed_roots" in found[key], key


def test_allowed_roots_widen_and_replace_the_own_folder(tmp_path, local):
    for name in ("in/a.png", "out/b.png"):
        local.write_bytes(str(tmp_path / name), IMAGES[name[-5:]])
    os.symlink("out", tmp_path / "alias")
    places = {"in": "a.png", "out": f"{tmp_path}/out/b.png", "alias": f"{tmp_path}/alias/b.png"}
    collection = uris(tmp_path / "in", places, allowed_roots=(f"{tmp_path}/out",))
    found = read(listed(collection, local), collection, local)
    assert found["out"] == found["alias"] == IMAGES["b.png"] and OUTSIDE in found["in"]
    everything = uris(tmp_path / "in", places, allowed_roots=("/",))
    assert set(read(listed(everything, local), everything, local).values()) == {IMAGES["a.png"], IMAGES["b.png"]}
    with pytest.raises(ValueError, match="allowed_roots limits uri_column"):
        CollectionSettings(name="c", uri="x", allowed_roots=("/",))


@pytest.mark.timeout(30)
def test_pipes_devices_folders_and_sockets_never_block(tmp_path, local):
    import socket

    (tmp_path / "in" / "folder.png").mkdir(parents=True)
    os.mkfifo(tmp_path / "in" / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "in" / "socket.png"))
    places = {name: f"{name}.png" for name in ("pipe", "socket", "folder")}
    places |= {name: f"/dev/{name}" for name in ("zero", "random", "tty", "stdin")}
    collection = uris(tmp_path / "in", places, allowed_roots=("/",))
    found = read(listed(collection, local), collection, local)
    assert not any(isinstance(data, bytes) for data in found.values()), found
    assert found["pipe"] == found["zero"] == found["random"] == found["folder"] == "not a regular file"


@pytest.mark.timeout(30)
def test_a_pipe_that_takes_the_place_of_a_listed_file_never_blocks(tmp_path, local):
    collection = write("folder", tmp_path, local, IMAGES)
    rows = listed(collection, local)
    (tmp_path / "a.png").unlink()
    os.mkfifo(tmp_path / "a.png")
    done: list[dict] = []
    thread = threading.Thread(target=lambda: done.append(read(rows, collection, local)), daemon=True)
    thread.start()
    thread.join(10)
    assert done and done[0]["a.png"] == "not a regular file" and done[0]["b.png"] == IMAGES["b.png"]


@pytest.mark.parametrize("form", ["folder", "webdataset", "uris"])
def test_files_above_the_limit_are_not_read(form, tmp_path, local):
    images = {"a.png": b"x" * 100, "b.png": b"y" * 101}
    collection = write(form, tmp_path, local, images).model_copy(update={"max_image_bytes": 100})
    found = read(listed(collection, local), collection, local)
    assert found == {"a.png": images["a.png"], "b.png": "larger than collection.max_image_bytes = 100"}


def test_file_uris_are_percent_decoded(tmp_path, local):
    names = ["ü 1.png", "100%.png", "a%20b.png", "plain.png"]
    for name in names:
        local.write_bytes(str(tmp_path / "in" / name), name.encode())
    base = tmp_path / "in"
    places = {f"uri {name}": (base / name).as_uri() for name in names}
    places |= {f"host {name}": (base / name).as_uri().replace("file://", "file://localhost") for name in names}
    places |= {f"short {name}": (base / name).as_uri().replace("file://", "FILE:") for name in names}
    places |= {f"written {name}": f"file://{base}/{name}" for name in names}
    places |= {f"path {name}": f"{base}/{name}" for name in names} | {f"relative {name}": name for name in names}
    collection = uris(base, places | {"host other": f"file://server{base}/plain.png"})
    found = read(listed(collection, local), collection, local)
    assert found.pop("host other") == "file:// is not supported; use a local path or s3://"
    assert found == {key: key.split(" ", 1)[1].encode() for key in places}
