"""Damaged Parquet files and tables of users are refused by name: kinds of damage that the fuzz tier found."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.images import pictures

from attrib.common.errors import AttribError
from attrib.data.collections import list_images, list_units
from attrib.data.settings import CollectionSettings, MetadataSettings
from attrib.data.sidecar import Met, describe_met, join_metadata

KEYS = ["a.png", "b.png"]
BROKEN = pa.array([b"a.png", b"\xff.png"]).view(pa.string())  # as programs write that do not check what they write


def described(folder, storage, name: str) -> pa.Table:
    """KEYS with the columns of the sidecar of this name, as jobs.manifest reads it."""
    settings = MetadataSettings(uri=str(folder / name))
    collection, met = CollectionSettings(name="c", uri=str(folder), metadata=settings), Met()
    joined = join_metadata(pa.table({"key": KEYS}), collection, storage, met)
    storage.write_table(str(folder / "part.parquet"), joined)
    describe_met(met, collection, [str(folder / "part.parquet")], storage)
    return joined


def test_a_sidecar_with_any_bit_of_its_footer_flipped_is_read_or_refused(tmp_path, local):
    """Arrow ended the process for statistics of damaged columns."""
    pq.write_table(pa.table({"key": KEYS, "label": [[1], [2, 3]]}), whole := tmp_path / "whole.parquet")
    data, num_refused = whole.read_bytes(), 0
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    for at in range(footer, len(data)):
        flipped = bytearray(data)
        flipped[at] ^= 4
        (tmp_path / "about.parquet").write_bytes(flipped)
        try:
            described(tmp_path, local, "about.parquet")
        except AttribError as error:
            assert "about.parquet" in str(error)
            num_refused += 1
    assert num_refused > 50


def test_a_sidecar_with_a_damaged_page_is_refused_by_name(tmp_path, local):
    pq.write_table(pa.table({"key": KEYS, "owner": ["x" * 50, "y"]}), path := tmp_path / "about.parquet")
    data = path.read_bytes()
    path.write_bytes(data[:4] + bytes(40) + data[44:])
    with pytest.raises(AttribError, match=r"about\.parquet cannot be read"):
        described(tmp_path, local, "about.parquet")


@pytest.mark.parametrize("column", ["key", "owner"])
def test_texts_of_a_sidecar_that_are_not_utf_8_are_refused_by_name(column, tmp_path, local):
    pq.write_table(pa.table({"key": KEYS, "owner": KEYS} | {column: BROKEN}), tmp_path / "about.parquet")
    with pytest.raises(AttribError, match=r"about\.parquet cannot be read: .*UTF8"):
        described(tmp_path, local, "about.parquet")


@pytest.mark.parametrize("name", ["about.csv", "about.tsv"])
def test_names_of_columns_that_are_not_utf_8_are_refused(name, tmp_path, local):
    separator = b"\t" if name.endswith("tsv") else b","
    (tmp_path / name).write_bytes(separator.join([b"key", b"own\xff"]) + b"\n" + separator.join([b"a.png", b"x"]))
    with pytest.raises(AttribError, match=f"{name} cannot be read"):
        described(tmp_path, local, name)


def test_an_error_that_lists_columns_is_one_line(tmp_path, local):
    (tmp_path / "about.csv").write_text('id,"two\nlines"\na.png,x\n')
    with pytest.raises(AttribError, match=r"has no column 'key'.* it has id, two lines$") as error:
        described(tmp_path, local, "about.csv")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("column", ["key", "owner", "name of a column"])
def test_texts_of_a_collection_that_are_not_utf_8_are_refused_by_name(column, tmp_path, local):
    columns = {"key": KEYS, "owner": KEYS, "image": list(pictures(KEYS).values())}
    pq.write_table(pa.table(columns | {column: BROKEN}), path := tmp_path / "0.parquet", store_schema=False)
    collection = CollectionSettings(
        name="c", uri=str(path), format="parquet", key_column="key", bytes_column="image", metadata_columns=("owner",)
    )
    if column == "name of a column":
        path.write_bytes(path.read_bytes().replace(b"name of a column", b"name of a c\xfflumn"))
    with pytest.raises(AttribError, match=r"0\.parquet is not a readable Parquet file"):
        list_images(list_units(collection, local)[0], collection, local)
