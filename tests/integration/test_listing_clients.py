"""Keys of an object store that are no paths: each client lists an object once and reads it, or counts it by name."""

import pyarrow as pa
import pytest
from support.images import pictures, tar_bytes, write_parquet

from attrib.common.errors import AttribError, ImageError
from attrib.common.settings import StorageSettings
from attrib.common.storage import Storage, join
from attrib.data.collections import list_images, list_units
from attrib.data.job import _list_unit
from attrib.data.places import CHANGED
from attrib.data.reading import _read_row_group, read_image, read_parquet_images
from attrib.data.rescan import change_since, collection_state
from attrib.data.selection import Reason, Skipped
from attrib.data.settings import CollectionSettings
from attrib.data.sidecar import open_sidecar

ODD_KEYS = (
    "./a.png", "/b.png", "../c.png", "d.png", "a.png", "a.png/b.png", "sub//e.png", "sub/./f.png", "sub/../g.png",
    "%2e/h.png", "x/", "ü ü/ü#?.png", "marked/", "marked/i.png",
)  # fmt: skip
HIDDEN = (".h/a.png", "@eaDir/a.png", "notes.txt")
NOT_BY_ARROW = {"./a.png", "/b.png", "../c.png", "sub//e.png", "sub/./f.png", "sub/../g.png"}


@pytest.fixture(params=["arrow", "s3fs"])
def place(request, s3_endpoint, tmp_path) -> tuple[Storage, str]:
    storage = Storage(StorageSettings(client=request.param, endpoint=s3_endpoint))
    return storage, f"s3://attrib/listing-{request.param}/{tmp_path.name}"


def put(endpoint: str, root: str, objects: dict[str, bytes]) -> None:
    import boto3

    bucket, _, prefix = root.removeprefix("s3://").partition("/")
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
    for key, data in objects.items():
        client.put_object(Bucket=bucket, Key=f"{prefix}/{key}", Body=data)


def listed(collection: CollectionSettings, storage: Storage) -> tuple[list[dict], Skipped]:
    skipped = Skipped()
    units = list_units(collection, storage, skipped)
    return [row for u in units for row in list_images(u, collection, storage, skipped).to_pylist()], skipped


def test_every_object_is_listed_once_and_read_or_counted(place, s3_endpoint):
    storage, root = place
    put(s3_endpoint, root, {key: b"" if key.endswith("/") else key.encode() for key in (*ODD_KEYS, *HIDDEN)})
    rows, skipped = listed(CollectionSettings(name="c", uri=root), storage)
    images = {key for key in ODD_KEYS if not key.endswith("/")}
    expected = images - NOT_BY_ARROW if storage.settings.client == "arrow" else images
    assert sorted(row["key"] for row in rows) == sorted(expected)
    assert {row["key"]: read_image(row, storage) for row in rows} == {key: key.encode() for key in expected}
    assert skipped.counts[Reason.KEY] == len(images - expected)
    assert skipped.counts[Reason.HIDDEN] + skipped.counts[Reason.EXCLUDED] == 2


@pytest.mark.parametrize("data", [b"", b"an object"])
def test_collection_whose_uri_is_also_an_object_is_listed(data, place, s3_endpoint):
    storage, root = place
    put(s3_endpoint, root, {"c": data, "c/a.png": b"a", "c/d/b.png": b"b", "alone": data})
    rows, _ = listed(CollectionSettings(name="c", uri=join(root, "c")), storage)
    assert sorted(row["key"] for row in rows) == ["a.png", "d/b.png"]
    with pytest.raises(AttribError, match="is a file"):
        listed(CollectionSettings(name="c", uri=join(root, "alone")), storage)


def test_objects_that_changed_fail_with_that_reason(place, s3_endpoint):
    storage, root = place
    images = pictures(["a.png", "b.png"])
    put(s3_endpoint, root, {"folder/a.png": b"x", "tars/0.tar": tar_bytes(images)})
    write_parquet(images, join(root, "parquet"), storage)
    parquet = {"format": "parquet", "key_column": "name", "bytes_column": "image"}
    for name, form in (("folder", {}), ("tars", {"format": "webdataset"}), ("parquet", parquet)):
        collection = CollectionSettings(name="c", uri=join(root, name), **form)
        rows, _ = listed(collection, storage)
        assert rows and all(row["listed_version"] for row in rows)

        def read(rows=rows, collection=collection) -> list:
            _read_row_group.cache_clear()
            if collection.bytes_column:
                return read_parquet_images(rows, collection.bytes_column, storage)
            return [read_image(row, storage) for row in rows]

        assert all(isinstance(data, bytes) for data in read())
        key = rows[0]["uri"].removeprefix(f"{root}/")
        put(s3_endpoint, root, {key: storage.read_bytes(rows[0]["uri"]) + b"more"})
        if collection.bytes_column:
            assert {error.reason for error in read()} == {CHANGED}
        else:
            with pytest.raises(ImageError, match=CHANGED):
                read()


def test_what_one_client_listed_the_other_one_reads(s3_endpoint, tmp_path):
    root = f"s3://attrib/both/{tmp_path.name}"
    put(s3_endpoint, root, {"a.png": b"x", "sub/b.png": b"y"})
    clients = [Storage(StorageSettings(client=client, endpoint=s3_endpoint)) for client in ("arrow", "s3fs")]
    for one, other in (clients, clients[::-1]):
        rows, _ = listed(CollectionSettings(name="c", uri=root), one)
        assert [read_image(row, other) for row in rows] == [b"x", b"y"]


def test_uris_of_objects_are_limited_to_the_allowed_roots(place, s3_endpoint):
    storage, root = place
    put(s3_endpoint, root, {"in/a.png": b"x", "in-between/a.png": b"y", "out/a.png": b"z"})
    places = {"own": "a.png", "whole": join(root, "in/a.png"), "other": join(root, "out/a.png")}
    places |= {"prefix": join(root, "in-between/a.png"), "up": join(root, "in/../out/a.png"), "local": "/etc/passwd"}
    storage.write_table(join(root, "in/list.parquet"), pa.table({"n": list(places), "u": list(places.values())}))
    columns = {"format": "parquet", "key_column": "n", "uri_column": "u"}
    cases = [
        (join(root, "in"), (), {"own", "whole"}),
        (join(root, "in/list.parquet"), (), {"own", "whole"}),
        (join(root, "in"), (join(root, "out"),), {"other"}),
    ]
    for uri, roots, allowed in cases:
        collection = CollectionSettings(name="c", uri=uri, allowed_roots=roots, **columns)
        rows, _ = listed(collection, storage)
        for row in rows:
            if row["key"] in allowed:
                assert read_image(row, storage, collection) in (b"x", b"z")
            else:
                with pytest.raises(ImageError, match="outside of the collection's folder"):
                    read_image(row, storage, collection)


def test_a_folder_of_tables_in_a_store_is_one_table(place):
    from attrib.data.settings import MetadataSettings

    storage, root = place
    for i in range(2):
        storage.write_table(join(root, f"set/{i}.parquet"), pa.table({"key": [str(i)]}))
    storage.write_bytes(join(root, "set/0.tar"), b"x")
    assert open_sidecar(MetadataSettings(uri=join(root, "set")), storage).count_rows() == 2


@pytest.mark.parametrize("form", ["folder", "webdataset", "one shard"])
def test_a_collection_is_unchanged_until_an_object_is(form, place, s3_endpoint, tmp_path):
    storage, root = place
    put(s3_endpoint, root, {"deep/er/a.png": b"x", "b.png": b"y", "0.tar": tar_bytes(pictures(["0.png"]))})
    put(s3_endpoint, root, {"about.csv": b"key,owner\n"})
    uri = join(root, "0.tar") if form == "one shard" else root
    kind = "folder" if form == "folder" else "webdataset"
    collection = CollectionSettings(name="c", uri=uri, format=kind, metadata={"uri": join(root, "about.csv")})
    units = list_units(collection, storage)
    states = [_list_unit(unit, collection, str(tmp_path / "listing"), storage)[-1] for unit in units]
    record = {"files": collection_state(states, collection, storage)}
    assert change_since(record, collection, storage) == ""
    put(
        s3_endpoint,
        root,
        {"b.png": b"larger"} if form == "folder" else {"0.tar": tar_bytes(pictures(["0.png", "1.png"]))},
    )
    assert "files have another size or time" in change_since(record, collection, storage)
