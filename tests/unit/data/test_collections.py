"""All collection formats on a local disk, compared with the images that were written."""

import io
import os
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.images import (
    ODD_NAMES,
    pictures,
    tar_bytes,
    write_folder,
    write_parquet,
    write_tars,
    write_uri_parquet,
)

from attrib.common.errors import AttribError, ImageError
from attrib.common.storage import join
from attrib.data.collections import LOCATION_FIELDS, RESERVED_COLUMNS, list_images, list_units
from attrib.data.ids import image_ids
from attrib.data.reading import read_image, read_parquet_images
from attrib.data.settings import CollectionSettings

IMAGES = pictures(ODD_NAMES)


def listed(collection: CollectionSettings, storage) -> list[dict]:
    units = list_units(collection, storage)
    return [row for unit in units for row in list_images(unit, collection, storage).to_pylist()]


def read(rows: list[dict], collection: CollectionSettings, storage) -> list[bytes | ImageError]:
    if collection.bytes_column:
        return read_parquet_images(rows, collection.bytes_column, storage)
    return [read_image(row, storage) for row in rows]


def check_equals(collection: CollectionSettings, storage, images: dict[str, bytes]) -> None:
    rows = listed(collection, storage)
    assert {row["key"]: data for row, data in zip(rows, read(rows, collection, storage))} == images
    assert len(rows) == len(images)
    assert [row["id"] for row in rows] == image_ids(collection.name, [row["key"] for row in rows]).tolist()


def write_form(form: str, uri: str, storage) -> dict:
    """Write the images in one format; return the settings that differ from those of a folder."""
    if form == "folder":
        write_folder(IMAGES, uri, storage)
        return {}
    if form.startswith("tar"):
        _, num_shards, kind = form.split()
        write_tars(IMAGES, uri, storage, int(num_shards), {"pax": tarfile.PAX_FORMAT, "gnu": tarfile.GNU_FORMAT}[kind])
        return {"format": "webdataset"}
    if form.startswith("parquet bytes"):
        write_parquet(IMAGES, uri, storage, num_files=int(form.split()[-1]))
        return {"format": "parquet", "key_column": "name", "bytes_column": "image"}
    write_folder(IMAGES, join(uri, "files"), storage)
    places = {key: f"files/{key}" if form.endswith("relative") else join(uri, "files", key) for key in IMAGES}
    write_uri_parquet(IMAGES, places, uri, storage)
    return {"format": "parquet", "key_column": "name", "uri_column": "where"}


FORMS = (
    "folder",
    "tar 1 pax",
    "tar 5 gnu",
    "parquet bytes 1",
    "parquet bytes 2",
    "parquet relative",
    "parquet absolute",
)


@pytest.mark.parametrize("form", FORMS)
def test_all_formats_give_the_same_images_and_bytes(form, tmp_path, local):
    storage, root = local, str(tmp_path / "store")
    settings = write_form(form, root, storage)
    check_equals(CollectionSettings(name="c", uri=root, **settings), storage, IMAGES)


def test_collection_may_be_one_file(tmp_path, local):
    storage, root = local, str(tmp_path / "store")
    write_tars(IMAGES, root, storage)
    check_equals(CollectionSettings(name="c", uri=join(root, "000.tar"), format="webdataset"), storage, IMAGES)


def test_tar_keys_equal_folder_keys(tmp_path, local):
    hidden = {".hidden.jpg": b"x", "._plain.jpg": b"x", ".cache/a.jpg": b"x", "deep/.cache/a.jpg": b"x"}
    others = {"notes.txt": b"x", "jpg": b"x", "archive.jpg.zip": b"x"}
    write_folder(IMAGES | hidden | others, str(tmp_path / "images"), local)
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(tmp_path / "images", arcname=".")  # as `tar -C images .` does: members are called ./plain.jpg
    check_equals(CollectionSettings(name="c", uri=str(tmp_path / "images")), local, IMAGES)
    tars = CollectionSettings(name="c", uri=str(tmp_path / "images.tar"), format="webdataset")
    check_equals(tars, local, IMAGES)


@pytest.mark.parametrize("extensions", [(".png",), ("png",), (".PNG",)])
def test_extensions_ignore_case_and_dot(extensions, tmp_path, local):
    write_folder(pictures(["a.png", "b.PNG", "c.jpg"]), str(tmp_path), local)
    rows = listed(CollectionSettings(name="c", uri=str(tmp_path), extensions=extensions), local)
    assert [row["key"] for row in rows] == ["a.png", "b.PNG"]


def test_missing_collection_is_named(tmp_path, local):
    storage, root = local, str(tmp_path / "store")
    for format in ("folder", "webdataset"):
        with pytest.raises(AttribError, match=r"collection 'c': .*/absent does not exist"):
            list_units(CollectionSettings(name="c", uri=join(root, "absent"), format=format), storage)
    write_folder(IMAGES, root, storage)
    with pytest.raises(AttribError, match=r"no \.tar file below"):
        list_units(CollectionSettings(name="c", uri=root, format="webdataset"), storage)
    with pytest.raises(AttribError, match="is a file; set format to webdataset or parquet"):
        list_units(CollectionSettings(name="c", uri=join(root, "plain.jpg")), storage)


WHOLE_TAR = tar_bytes(pictures([f"{i}.jpg" for i in range(4)]))


def damaged_tars() -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(WHOLE_TAR)) as tar:
        members = tar.getmembers()
    third, last = members[2], members[-1]
    boundary = last.offset_data + -(-last.size // 512) * 512
    return {
        "empty": b"",
        "no tar": b"<html>not found</html>" * 100,
        "gzip": b"\x1f\x8b" + bytes(2000),
        "damaged header": WHOLE_TAR[: third.offset + 100] + b"\xff" * 30 + WHOLE_TAR[third.offset + 130 :],
        "cut within an image": WHOLE_TAR[: third.offset_data + 100],
        "cut within a header": WHOLE_TAR[: third.offset + 100],
        "cut between images": WHOLE_TAR[: third.offset],
        "cut before the end mark": WHOLE_TAR[:boundary],
    }


@pytest.mark.parametrize("damage", damaged_tars())
def test_damaged_tar_is_an_error(damage, tmp_path, local):
    storage, root = local, str(tmp_path / "store")
    storage.write_bytes(join(root, "bad.tar"), damaged_tars()[damage])
    with pytest.raises(AttribError, match=r"bad\.tar is not a readable plain tar file \(.+\); fetch it again"):
        listed(CollectionSettings(name="c", uri=root, format="webdataset"), storage)


def test_tar_names_without_utf_8_become_printable_keys(tmp_path, local):
    odd = os.fsdecode(b"caf\xe9.jpg")
    (tmp_path / "a.tar").write_bytes(tar_bytes({odd: IMAGES["plain.jpg"]}, tarfile.GNU_FORMAT))
    collection = CollectionSettings(name="c", uri=str(tmp_path), format="webdataset")
    check_equals(collection, local, {"caf\\xe9.jpg": IMAGES["plain.jpg"]})


def parquet(folder, table: pa.Table, **settings) -> CollectionSettings:
    folder.mkdir(exist_ok=True)
    pq.write_table(table, folder / "a.parquet")
    return CollectionSettings(name="c", uri=str(folder), format="parquet", **settings)


@pytest.mark.parametrize(
    ("columns", "settings", "expected"),
    [
        ({"k": ["a"]}, {"key_column": "k", "bytes_column": "b"}, r"has no column 'b'; it has k"),
        ({"k": ["a", None], "b": [b"1", b"2"]}, {"key_column": "k", "bytes_column": "b"}, "'k' holds nulls"),
        ({"u": ["a", None]}, {"uri_column": "u"}, "'u' holds nulls"),
        (
            {"k": ["a"], "b": ["text"]},
            {"key_column": "k", "bytes_column": "b"},
            "'b' holds string values, .* as binary",
        ),
        ({"u": ["a"], "id": [1]}, {"uri_column": "u", "metadata_columns": ("id",)}, "'id' has a reserved name; rename"),
    ],
)
def test_unsuitable_parquet_file_is_named(columns, settings, expected, tmp_path, local):
    with pytest.raises(AttribError, match=expected) as error:
        listed(parquet(tmp_path, pa.table(columns), **settings), local)
    assert "a.parquet" in str(error.value)


def test_unreadable_parquet_file_is_named(tmp_path, local):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(AttribError, match=r"a\.parquet is not a readable Parquet file"):
        listed(CollectionSettings(name="c", uri=str(tmp_path), format="parquet", uri_column="u"), local)


def test_keys_may_be_numbers_and_uris_are_keys_by_default(tmp_path, local):
    table = pa.table({"n": [7, 8], "b": [b"x", b"y"], "owner": ["o", None]})
    settings = {"key_column": "n", "bytes_column": "b", "metadata_columns": ("owner",)}
    rows = listed(parquet(tmp_path / "1", table, **settings), local)
    assert [(row["key"], row["owner"]) for row in rows] == [("7", "o"), ("8", None)]
    rows = listed(parquet(tmp_path / "2", pa.table({"u": ["x/1.jpg"]}), uri_column="u"), local)
    assert (rows[0]["key"], rows[0]["uri"]) == ("x/1.jpg", str(tmp_path / "2" / "x/1.jpg"))


@pytest.mark.parametrize(
    ("place_of_image", "expected"),
    [
        ("gone.jpg", "the file is gone"),
        (None, "."),
        ("http://example.org/a.jpg", "http:// is not supported; use a local path or s3://"),
    ],
)
def test_unreadable_image_fails_alone(place_of_image, expected, tmp_path, local):
    storage, root = local, str(tmp_path / "store")
    storage.write_bytes(join(root, "there.jpg"), b"x")
    write_uri_parquet({"a": b"", "b": b""}, {"a": place_of_image, "b": "there.jpg"}, root, storage)
    collection = CollectionSettings(name="c", uri=root, format="parquet", key_column="name", uri_column="where")
    by_key = {row["key"]: row for row in listed(collection, storage)}
    assert read_image(by_key["b"], storage) == b"x"
    with pytest.raises(ImageError, match=f"read: .*{expected}"):
        read_image(by_key["a"], storage)


def test_a_shard_that_is_gone_fails_per_image(tmp_path, local):
    images = pictures(["a.jpg", "b.jpg"])
    write_tars(images, str(tmp_path / "tar"), local)
    (first, second) = listed(CollectionSettings(name="c", uri=str(tmp_path / "tar"), format="webdataset"), local)
    os.truncate(tmp_path / "tar" / "000.tar", second["offset"] + 10)
    # A manifest of an earlier version holds no version of the file.
    assert read_image(first | {"listed_version": None}, local) == images[first["key"]]
    with pytest.raises(ImageError, match="the shard ends early: 10 of"):
        read_image(second | {"listed_version": None}, local)

    write_parquet(images, str(tmp_path / "p"), local, row_group_rows=1)
    collection = CollectionSettings(
        name="c", uri=str(tmp_path / "p"), format="parquet", key_column="name", bytes_column="image"
    )
    rows = listed(collection, local)
    os.unlink(tmp_path / "p" / "000.parquet")
    assert {e.reason for e in read_parquet_images(rows, "image", local)} == {"the file is gone since it was listed"}


def test_metadata_columns_cannot_clash_with_later_tables():
    """Attribution tables add a prefix to metadata names; RESERVED_COLUMNS prevents clashes with their columns."""
    from attrib.attribute.rows import ATTRIBUTION_FIELDS, QUERY_RESULT_FIELDS

    assert {field.name for field in LOCATION_FIELDS} < RESERVED_COLUMNS
    for fields, prefix in ((ATTRIBUTION_FIELDS, "source_"), (QUERY_RESULT_FIELDS, "query_")):
        clashing = {field.name.removeprefix(prefix) for field in fields if field.name.startswith(prefix)}
        assert clashing and clashing <= RESERVED_COLUMNS
    assert {"stage", "reason"} <= RESERVED_COLUMNS  # beside the bare metadata in block_queries
