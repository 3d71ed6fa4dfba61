"""Whether a collection is as it was listed: every kind of change is named, and nothing else is one."""

import os
import shutil

import pytest
from support.images import pictures, write_folder, write_parquet, write_tars

from attrib.common.errors import AttribError
from attrib.common.settings import StorageSettings
from attrib.common.storage import Storage
from attrib.data.collections import list_units
from attrib.data.job import _list_unit
from attrib.data.rescan import change_since, collection_state
from attrib.data.settings import CollectionSettings

LOCAL = Storage(StorageSettings())
FORMS = {
    "folder": {},
    "webdataset": {"format": "webdataset"},
    "parquet": {"format": "parquet", "key_column": "name", "bytes_column": "image"},
}


def make(folder, form: str, images: dict) -> CollectionSettings:
    """Write a collection of two files or more, with metadata in a table beside it."""
    uri = str(folder / "c")
    if form == "folder":
        write_folder(images, uri, LOCAL)
    elif form == "webdataset":
        write_tars(images, uri, LOCAL, num_shards=2)
    else:
        write_parquet(images, uri, LOCAL, num_files=2)
    (folder / "about.csv").write_text("key,owner\n0.jpg,x\n")
    return CollectionSettings(name="c", uri=uri, metadata={"uri": str(folder / "about.csv")}, **FORMS[form])


def recorded(collection: CollectionSettings, folder) -> dict:
    """The record of a manifest as far as it tells the state of the files: of the listing itself."""
    listed = [_list_unit(unit, collection, str(folder / "listing"), LOCAL) for unit in list_units(collection, LOCAL)]
    return {"files": collection_state([state for *_, state in listed], collection, LOCAL)}


@pytest.fixture(params=FORMS)
def listed(request, tmp_path):
    """A collection, its record, and one of its files."""
    collection = make(tmp_path, request.param, pictures([*(f"{i}.jpg" for i in range(3)), "deep/er/3.jpg"]))
    files = sorted(path for path in (tmp_path / "c").rglob("*") if path.is_file())
    return collection, recorded(collection, tmp_path), files[0]


def test_what_listing_found_is_no_change(listed):
    collection, record, _ = listed
    assert record["files"]["num_files"] >= 2
    assert change_since(record, collection, LOCAL) == ""


def test_a_file_that_is_added_or_gone_is_a_change(listed):
    collection, record, file = listed
    count = record["files"]["num_files"]
    other = file.with_name(f"another{file.suffix}")
    shutil.copy(file, other)
    message = f"collection 'c' ({collection.uri}) changed since then: it had {count} files and has"
    assert change_since(record, collection, LOCAL) == f"{message} {count + 1}"
    other.unlink()
    assert change_since(record, collection, LOCAL) == ""
    file.unlink()
    assert change_since(record, collection, LOCAL, ignore_versions=True) == f"{message} {count - 1}"


def test_a_file_that_is_renamed_is_a_change(listed):
    collection, record, file = listed
    file.rename(file.with_name(f"another{file.suffix}"))
    assert "files have other names" in change_since(record, collection, LOCAL)


def test_another_time_alone_is_a_change_unless_files_were_repaired(listed):
    collection, record, file = listed
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    assert "files have another size or time" in change_since(record, collection, LOCAL)
    assert change_since(record, collection, LOCAL, ignore_versions=True) == ""


@pytest.mark.parametrize("ignore_versions", [False, True])
def test_other_metadata_are_a_change(ignore_versions, listed, tmp_path):
    collection, record, _ = listed
    (tmp_path / "about.csv").write_text("key,owner\n0.jpg,another\n")
    changed = change_since(record, collection, LOCAL, ignore_versions)
    assert changed.endswith(f"its metadata {tmp_path}/about.csv have another size or time")


def test_metadata_in_a_folder_are_compared_too(tmp_path):
    collection = make(tmp_path, "folder", pictures(["0.jpg"]))
    write_parquet(pictures(["0.jpg"]), str(tmp_path / "about"), LOCAL)
    metadata = {"uri": str(tmp_path / "about"), "key_column": "name"}
    collection = CollectionSettings(name="c", uri=collection.uri, metadata=metadata)
    record = recorded(collection, tmp_path)
    assert change_since(record, collection, LOCAL) == ""
    write_parquet(pictures(["0.jpg"]), str(tmp_path / "about" / "more"), LOCAL)
    assert "about have another size or time" in change_since(record, collection, LOCAL)


def test_what_is_not_listed_is_no_change(tmp_path):
    collection = make(tmp_path, "folder", pictures(["0.jpg", "a/1.jpg"]))
    record = recorded(collection, tmp_path)
    (tmp_path / "c" / "empty").mkdir()
    for name in ("notes.txt", ".hidden.jpg", "@eaDir/thumb.jpg", "a/Thumbs.db"):
        (tmp_path / "c" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "c" / name).write_bytes(b"x")
    assert change_since(record, collection, LOCAL) == ""


def test_records_without_a_state_or_of_another_client_are_not_compared(listed):
    collection, record, file = listed
    file.unlink()
    assert change_since({}, collection, LOCAL) == ""
    assert change_since({"files": record["files"] | {"client": "s3fs"}}, collection, LOCAL) == ""


def test_what_is_gone_is_an_error_and_no_change_that_a_rescan_would_follow(listed, tmp_path):
    collection, record, _ = listed
    (tmp_path / "about.csv").unlink()
    with pytest.raises(AttribError, match=r"about.csv does not exist"):
        change_since(record, collection, LOCAL)
    (tmp_path / "about.csv").write_text("key\n")
    shutil.rmtree(tmp_path / "c")
    (tmp_path / "c").mkdir()  # as a mount point whose disk is away
    with pytest.raises(AttribError, match=r"no file is left below|no \.\w+ file below"):
        change_since(record, collection, LOCAL)
    (tmp_path / "c").rmdir()
    with pytest.raises(AttribError, match="does not exist; correct uri"):
        change_since(record, collection, LOCAL)
