"""Parquet collections as other tools write them: folders, structs, dictionaries, binary keys, other kinds of bytes."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.images import pictures

from attrib.common.errors import AttribError
from attrib.data.collections import list_images, list_units
from attrib.data.parquet_files import has_text, shown_rows
from attrib.data.reading import read_parquet_images
from attrib.data.settings import CollectionSettings

IMAGES = pictures(["a.png", "b.png", "c.png"])
KEYS, DATA = list(IMAGES), list(IMAGES.values())


def listed(folder, storage, **settings) -> dict[str, bytes]:
    """Bytes by key."""
    collection = CollectionSettings(name="c", uri=str(folder), format="parquet", **settings)
    rows = [row for u in list_units(collection, storage) for row in list_images(u, collection, storage).to_pylist()]
    return dict(zip([row["key"] for row in rows], read_parquet_images(rows, collection.bytes_column, storage)))


def structs(names: list[str], *columns: pa.Array) -> pa.Array:
    return pa.StructArray.from_arrays(list(columns), names)


def test_folders_that_are_called_parquet_are_read(tmp_path, local):
    for name, at in (
        ("images.parquet/part-0.parquet", 0),
        ("images.parquet/sub/part-1.PARQUET", 1),
        ("k=2/2.parquet", 2),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"key": [KEYS[at]], "jpg": [DATA[at]]}), tmp_path / name)
    for other in ("_SUCCESS", ".0.parquet.crc", "._0.parquet", "images.parquet/_temporary/0.parquet"):
        (tmp_path / other).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / other).write_bytes(b"no parquet")
    columns = {"key_column": "key", "bytes_column": "jpg"}
    assert listed(tmp_path, local, **columns) == IMAGES
    assert set(listed(tmp_path / "images.parquet", local, **columns)) == {"a.png", "b.png"}


def test_fields_of_structs_are_columns(tmp_path, local):
    image = structs(["bytes", "path"], pa.array(DATA), pa.array(KEYS))
    table = pa.table({"image": image, "label": [1, 2, 3], "deep": structs(["image"], image)})
    pq.write_table(table, tmp_path / "0.parquet", row_group_size=2)
    assert listed(tmp_path, local, key_column="image.path", bytes_column="image.bytes") == IMAGES
    assert listed(tmp_path, local, key_column="deep.image.path", bytes_column="deep.image.bytes") == IMAGES
    assert list(listed(tmp_path, local, key_column="label", bytes_column="image.bytes")) == ["1", "2", "3"]
    collection = CollectionSettings(
        name="c", uri=str(tmp_path), format="parquet", uri_column="image.path", metadata_columns=("image.path",)
    )
    rows = list_images(list_units(collection, local)[0], collection, local)
    assert rows["image.path"].to_pylist() == KEYS


def test_a_column_with_a_dot_in_its_name_comes_first(tmp_path, local):
    inner = structs(["bytes"], pa.array([b"wrong"] * 3))
    pq.write_table(pa.table({"image": inner, "image.bytes": DATA, "image.path": KEYS}), tmp_path / "0.parquet")
    assert listed(tmp_path, local, key_column="image.path", bytes_column="image.bytes") == IMAGES


def test_a_null_struct_is_a_row_without_bytes(tmp_path, local):
    image = pa.array([{"bytes": DATA[0]}, None, {"bytes": None}], pa.struct([("bytes", pa.binary())]))
    pq.write_table(pa.table({"key": KEYS, "image": image}), tmp_path / "0.parquet")
    found = listed(tmp_path, local, key_column="key", bytes_column="image.bytes")
    assert found["a.png"] == DATA[0]
    assert found["b.png"].reason == found["c.png"].reason == "the row holds no bytes"


@pytest.mark.parametrize(
    "kind", [pa.binary(), pa.large_binary(), pa.binary_view(), pa.dictionary(pa.int32(), pa.binary())]
)
def test_bytes_of_any_kind_are_read(kind, tmp_path, local):
    data = pa.array(DATA).dictionary_encode() if pa.types.is_dictionary(kind) else pa.array(DATA).cast(kind)
    pq.write_table(pa.table({"key": KEYS, "jpg": data}), tmp_path / "0.parquet")
    assert listed(tmp_path, local, key_column="key", bytes_column="jpg") == IMAGES


@pytest.mark.parametrize(
    "keys",
    [
        pa.array(KEYS).dictionary_encode(),
        pa.array([key.encode() for key in KEYS]),
        pa.array([key.encode() for key in KEYS]).dictionary_encode(),
        pa.array([key.encode() for key in KEYS], pa.large_binary()),
        pa.array([key.encode() for key in KEYS], pa.binary(5)),
        pa.array(KEYS, pa.string_view()),
        pa.array(KEYS, pa.large_string()),
    ],
    ids=lambda keys: str(keys.type),
)
def test_keys_of_any_kind_of_text_are_read(keys, tmp_path, local):
    pq.write_table(pa.table({"key": keys, "jpg": DATA}), tmp_path / "0.parquet")
    assert listed(tmp_path, local, key_column="key", bytes_column="jpg") == IMAGES


IMAGE = structs(["bytes", "path"], pa.array(DATA), pa.array(KEYS))
REFUSED = {
    "struct as bytes": (
        {"key": KEYS, "image": IMAGE},
        "key",
        "image",
        r"'image' holds struct.*set bytes_column to image\.bytes",
    ),
    "list as bytes": ({"key": KEYS, "b": [[1, 2]] * 3}, "key", "b", "'b' holds list<.*as binary"),
    "list of structs": (
        {"key": KEYS, "b": pa.array([[{"bytes": b"x"}]] * 3)},
        "key",
        "b.bytes",
        r"no column 'b\.bytes'",
    ),
    "field that is not there": (
        {"image": IMAGE},
        "image.name",
        "image.bytes",
        r"no column 'image\.name'; it has image\.bytes, image\.path",
    ),
    "text has no fields": ({"key": KEYS, "b": DATA}, "key.x", "b", r"no column 'key\.x'"),
    "struct as key": ({"image": IMAGE}, "image", "image.bytes", "'image' holds struct.*no text"),
    "list as key": ({"key": [["a"], ["b"], ["c"]], "b": DATA}, "key", "b", "'key' holds list.*no text"),
    "bytes that are no text": (
        {"key": [b"a", b"\xff", b"c"], "b": DATA},
        "key",
        "b",
        "'key' holds binary values that are no text",
    ),
    "digests": (
        {"key": pa.array([b"\xff" * 20] * 3, pa.binary(20)), "b": DATA},
        "key",
        "b",
        "'key' holds fixed_size_binary.*no text",
    ),
    "null struct as key": (
        {"image": pa.array([{"bytes": b"x", "path": "p"}, None])},
        "image.path",
        "image.bytes",
        "holds nulls",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_columns_that_cannot_be_used_are_refused_by_name(kind, tmp_path, local):
    columns, key_column, bytes_column, expected = REFUSED[kind]
    pq.write_table(pa.table(columns), tmp_path / "0.parquet")
    with pytest.raises(AttribError, match=rf"0\.parquet.*{expected}"):
        listed(tmp_path, local, key_column=key_column, bytes_column=bytes_column)


@pytest.mark.parametrize("twice", ["key", "image"])
def test_two_columns_of_one_name_are_refused_by_name(twice, tmp_path, local):
    columns = {"key": pa.array(KEYS), "image": IMAGE}
    arrays = [*columns.values(), columns[twice]]
    pq.write_table(pa.Table.from_arrays(arrays, [*columns, twice]), tmp_path / "0.parquet")
    with pytest.raises(AttribError, match=rf"0\.parquet has more than one column '{twice}.*'; rename"):
        listed(tmp_path, local, key_column="key", bytes_column="image.bytes")


def test_credentials_in_uris_are_not_kept(tmp_path, local):
    uris = ["s3://KEY:canary@bucket/a.png", "http://user:canary@host/b.png", "c.png"]
    pq.write_table(pa.table({"u": uris}), tmp_path / "0.parquet")
    collection = CollectionSettings(name="c", uri=str(tmp_path), format="parquet", uri_column="u")
    (unit,) = list_units(collection, local)
    rows = list_images(unit, collection, local).to_pylist()
    assert "canary" not in str(rows) and sorted(row["key"] for row in rows)[2] == "s3://***@bucket/a.png"


def test_values_that_python_cannot_hold_are_shown():
    table = pa.table({
        "far": pa.array([2**62, None], pa.timestamp("s")),
        "mars": pa.array([0, None], pa.timestamp("us", tz="Mars/X")),
        "days": pa.array([2**30, 0], pa.date32()),
        "thumb": pa.array([b"\xff" * 2000, None], pa.large_binary()),
        "list": [[1], []],
        "n": [2**53 + 1, None],
    })  # fmt: skip
    first, second = shown_rows(table)
    assert first["thumb"] == "2,000 bytes" and first["n"] == 2**53 + 1 and first["list"] == [1]
    assert all(isinstance(first[name], str) for name in ("far", "mars", "days"))
    assert second["far"] is None and second["mars"] is None and second["thumb"] is None


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        *((kind, True) for kind in (pa.string(), pa.int64(), pa.bool_(), pa.date32(), pa.null(), pa.decimal128(9, 2))),
        *((kind, True) for kind in (pa.dictionary(pa.int8(), pa.string()), pa.timestamp("ns", tz="UTC"), pa.json_())),
        *((kind, False) for kind in (pa.binary(), pa.large_binary(), pa.binary(20), pa.binary_view(), pa.uuid())),
        *((kind, False) for kind in (pa.dictionary(pa.int8(), pa.binary()), pa.list_(pa.int8()), pa.struct([]))),
        *((kind, False) for kind in (pa.timestamp("us", tz="Mars/X"), pa.month_day_nano_interval())),
    ],
    ids=str,
)
def test_types_without_text_are_known(kind, expected):
    assert has_text(kind) == expected
