"""Storage behaves the same with every client: a local disk, and an S3 server over HTTP through arrow and s3fs."""

import os
import pickle

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from safetensors.torch import save_file
from support.files import files_below, full_disk

from attrib.common.errors import AttribError, ImageError
from attrib.common.settings import StorageSettings
from attrib.common.storage import Storage, join
from attrib.common.swap import read_or_none, swap
from attrib.data.collections import list_images, list_units
from attrib.data.reading import read_image
from attrib.data.settings import CollectionSettings
from attrib.models.encoder import load_encoder
from attrib.models.settings import BackboneSettings

NAMES = (
    "plain",
    "with space",
    "日本 ü",
    "hash#a",
    "question?x=1",
    "plus+a",
    "percent%20a",
    "a&b=c",
    "star*[x]{y}",
    "~tilde",
)


@pytest.fixture(params=["local", "s3 by arrow", "s3 by s3fs"])
def place(request, tmp_path) -> tuple[Storage, str]:
    """A storage and an empty folder in it; each test runs once per client."""
    if request.param == "local":
        return Storage(StorageSettings()), str(tmp_path / "store")
    client = request.param.removeprefix("s3 by ")
    storage = Storage(StorageSettings(client=client, endpoint=request.getfixturevalue("s3_endpoint")))
    return storage, f"s3://attrib/{client}/{tmp_path.name}"


def test_bytes_json_and_tables_come_back_as_written(place):
    storage, root = place
    storage.write_bytes(join(root, "a/data.bin"), b"\0\1\2")
    assert storage.read_bytes(join(root, "a/data.bin")) == b"\0\1\2"
    storage.write_bytes(join(root, "a/data.bin"), pa.py_buffer(b"again"))
    assert storage.read_bytes(join(root, "a/data.bin")) == b"again"
    storage.write_bytes(join(root, "empty"), b"")
    assert storage.exists(join(root, "empty")) and storage.read_bytes(join(root, "empty")) == b""
    value = {"key": ["ü", 1, None, 0.5]}
    storage.write_json(join(root, "record.json"), value)
    assert storage.read_json(join(root, "record.json")) == value
    table = pa.table(
        {"id": pa.array(range(10), pa.int64()), "vector": pa.array([[0.5, 1.5]] * 10, pa.list_(pa.float16(), 2))}
    )
    storage.write_table(join(root, "table.parquet"), table, row_group_rows=4)
    assert storage.read_table(join(root, "table.parquet")).equals(table)
    assert storage.read_table(join(root, "table.parquet"), columns=["id"], filter=pc.field("id") > 7)[
        "id"
    ].to_pylist() == [8, 9]
    assert storage.dataset([join(root, "table.parquet")] * 2, format="parquet").count_rows() == 20


def test_a_multipart_upload_comes_back_whole(place):
    storage, root = place
    data = os.urandom(1 << 20) * 17  # above the size of a part of either client
    storage.write_bytes(join(root, "large.bin"), data)
    assert storage.read_bytes(join(root, "large.bin")) == data


@pytest.mark.parametrize("name", NAMES)
def test_special_characters_in_names_are_literal(name, place):
    storage, root = place
    uri = join(root, f"folder {name}", f"{name}.bin")
    storage.write_bytes(uri, name.encode())
    assert storage.exists(uri) and storage.read_bytes(uri) == name.encode()
    assert storage.names(join(root, f"folder {name}")) == [f"{name}.bin"]
    (found,) = storage.list_folder(root, recursive=True, suffix=f"{name}.bin")
    assert ("s3://" if uri.startswith("s3://") else "") + found.path == uri
    assert found.size == len(name.encode())


def test_listing_is_by_path_and_filtered_by_suffix(place):
    storage, root = place
    for name in ("b.tar", "a.tar", "sub/c.tar", "a.txt"):
        storage.write_bytes(join(root, name), b"x")
    assert storage.names(root) == ["a.tar", "a.txt", "b.tar", "sub"]
    assert storage.names(root, suffix=".tar") == ["a.tar", "b.tar"]
    assert [i.base_name for i in storage.list_folder(root, recursive=True, suffix=".tar")] == [
        "a.tar",
        "b.tar",
        "c.tar",
    ]
    assert storage.list_folder(join(root, "absent")) == [] and storage.names(join(root, "absent"), ".tar") == []


def test_a_missing_file_raises_file_not_found(place):
    storage, root = place
    storage.write_bytes(join(root, "there"), b"x")
    assert not storage.exists(join(root, "absent"))
    for read in (storage.read_bytes, storage.read_table, storage.open, storage.read_json):
        with pytest.raises(FileNotFoundError, match="absent"):
            read(join(root, "absent"))
    with pytest.raises(AttribError, match=r"absent/x\.json is not there: run jobs\.embed to its end"):
        storage.require(join(root, "absent/x.json"), "jobs.embed")


def test_delete_leaves_the_neighbours(place):
    storage, root = place
    for name in ("a/1", "a/b/2", "ab/3", "file"):
        storage.write_bytes(join(root, name), b"x")
    storage.delete_folder(join(root, "a"))
    storage.delete_folder(join(root, "never there"))
    assert not storage.exists(join(root, "a/b/2")) and not storage.exists(join(root, "a"))
    assert storage.exists(join(root, "ab/3"))
    storage.delete_file(join(root, "file"))
    assert not storage.exists(join(root, "file"))


def test_publish_and_localise(place, tmp_path):
    storage, root = place
    source = tmp_path / "made here.bin"
    for folder in ("a_b/c", "a/b_c"):
        source.write_bytes(b"content" * 1000)
        storage.publish(str(source), join(root, folder, "file.bin"))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    copies = [storage.localise(join(root, folder, "file.bin"), str(scratch)) for folder in ("a_b/c", "a/b_c")]
    assert copies[0] != copies[1]
    for copy in copies:
        with open(copy, "rb") as file:
            assert file.read() == b"content" * 1000
    assert not source.exists()
    if not root.startswith("s3://"):
        assert copies[0] == join(root, "a_b/c/file.bin") and files_below(scratch) == []


@pytest.mark.parametrize("client", ["arrow", "s3fs"])
def test_a_copy_that_does_not_fit_the_disk_names_its_place_there(client, s3_endpoint, tmp_path):
    storage = Storage(StorageSettings(client=client, endpoint=s3_endpoint))
    uri = f"s3://attrib/{tmp_path.name}/large.bin"
    storage.write_bytes(uri, bytes(1 << 17))
    with full_disk(1 << 16), pytest.raises(OSError, match=f"File too large: '{tmp_path}/.*-large.bin'"):
        storage.localise(uri, str(tmp_path))


def test_a_storage_can_be_pickled(place):
    storage, root = place
    storage.write_bytes(join(root, "x"), b"1")
    copy = pickle.loads(pickle.dumps(storage))
    assert copy.settings == storage.settings and copy.read_bytes(join(root, "x")) == b"1"


def test_weights_on_s3_load_as_local_weights(s3_endpoint, tmp_path, local):
    backbone = BackboneSettings(name="test_resnet", weights="random")
    state = {key: value.contiguous() for key, value in load_encoder(backbone, local).model.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    storage = Storage(StorageSettings(endpoint=s3_endpoint))
    storage.write_bytes("s3://attrib/weights/w.safetensors", (tmp_path / "w.safetensors").read_bytes())
    on_disk = backbone.model_copy(update={"weights": str(tmp_path / "w.safetensors")})
    on_s3 = backbone.model_copy(update={"weights": "s3://attrib/weights/w.safetensors"})
    assert load_encoder(on_s3, storage).identity == load_encoder(on_disk, local).identity


def test_a_local_parquet_file_may_list_s3_objects(s3_endpoint, tmp_path):
    storage = Storage(StorageSettings(endpoint=s3_endpoint))
    storage.write_bytes("s3://attrib/pointed at/a.jpg", b"x")
    pq.write_table(
        pa.table({"u": ["s3://attrib/pointed at/a.jpg", "s3://no-such-bucket/a.jpg"]}), tmp_path / "p.parquet"
    )
    collection = CollectionSettings(name="c", uri=str(tmp_path), format="parquet", uri_column="u")
    units = list_units(collection, storage)
    there, absent = (row for unit in units for row in list_images(unit, collection, storage).to_pylist())
    assert read_image(there, storage) == b"x"
    with pytest.raises(ImageError, match="the file is gone"):
        read_image(absent, storage)


@pytest.mark.parametrize("client", ["arrow", "s3fs"])
def test_a_conditional_write_that_fails_names_the_object(client, s3_endpoint):
    absent = Storage(StorageSettings(client=client, endpoint=s3_endpoint))
    with pytest.raises(AttribError, match="s3://no-such-bucket/a: there is no bucket 'no-such-bucket'; create it"):
        swap("s3://no-such-bucket/a", b"x", None, absent)
    away = Storage(StorageSettings(client=client, endpoint="http://127.0.0.1:1", max_attempts=1))
    for expected in (None, b"y"):
        with pytest.raises(OSError, match="attrib/a"):
            swap("s3://attrib/a", b"x", expected, away)
    with pytest.raises(OSError, match="attrib/a"):
        read_or_none("s3://attrib/a", away)
