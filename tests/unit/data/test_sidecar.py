"""Metadata tables beside a collection: how keys meet rows, what is said where they do not, and what is refused."""

import os
import unicodedata

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.files import LOCAL
from support.images import ODD_NAMES, pictures, write_folder

from attrib.common.errors import AttribError
from attrib.common.storage import join
from attrib.data.collections import list_images, list_units
from attrib.data.settings import CollectionSettings, MetadataSettings
from attrib.data.sidecar import Met, describe_met, join_metadata, open_sidecar

IMAGES = pictures(ODD_NAMES)

OWNERS = {
    "plain.jpg": "Ann",
    "with space.png": "Bob, Jr.",
    "日本/ü.jpg": 'the "line\nbreaker"',
    "not of the collection.jpg": "X",
}


def write_sidecar(uri: str, storage, prefix: str = "", key="key", rows=None) -> None:
    rows = list((OWNERS if rows is None else rows).items())
    if uri.endswith(".parquet"):
        columns = {
            key: [prefix + k for k, _ in rows],
            "owner": [o for _, o in rows],
            "year": [2000 + i for i in range(len(rows))],
        }
        storage.write_table(uri, pa.table(columns))
        return
    cells = [[key, "owner", "year"], *([prefix + k, o, str(2000 + i)] for i, (k, o) in enumerate(rows))]
    if uri.endswith(".tsv"):
        lines = ["\t".join(row) for row in cells]
    else:
        lines = [",".join('"' + cell.replace('"', '""') + '"' for cell in row) for row in cells]
    storage.write_bytes(uri, ("\n".join(lines) + "\n").encode())


def listing_with_sidecar(uri: str, storage, **settings) -> tuple[pa.Table, CollectionSettings]:
    folder = uri.rsplit("/", 1)[0] + "/images"
    write_folder(IMAGES, folder, storage)
    collection = CollectionSettings(name="c", uri=folder, metadata=MetadataSettings(uri=uri, **settings))
    return pa.concat_tables(
        list_images(unit, collection, storage) for unit in list_units(collection, storage)
    ), collection


@pytest.mark.parametrize("extension", ["csv", "tsv", "parquet", "CSV"])
def test_sidecar_is_joined_by_key(extension, tmp_path, local):
    storage, root = local, str(tmp_path / "store")
    uri = join(root, f"about.{extension}")
    owners = OWNERS if extension != "tsv" else {key: owner.replace("\n", " ") for key, owner in OWNERS.items()}
    write_sidecar(uri, storage, prefix="set/", key="file", rows=owners)
    images, collection = listing_with_sidecar(uri, storage, key_column="file", key_prefix="set/")
    joined = join_metadata(images, collection, storage)
    assert joined.schema.names == [*images.schema.names, "owner", "year"]
    assert joined.select(images.schema.names).equals(images)
    for key, owner, year in zip(*(joined[name].to_pylist() for name in ("key", "owner", "year"))):
        assert owner == owners.get(key)
        expected = 2000 + list(OWNERS).index(key) if key in OWNERS else None
        assert year == (expected if extension == "parquet" or expected is None else str(expected))


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_sidecar_keys_of_any_text_type_match(kind, tmp_path, local):
    keys = pa.array(list(OWNERS)).cast(pa.string())
    table = pa.table(
        {
            "key": keys.dictionary_encode() if pa.types.is_dictionary(kind) else keys.cast(kind),
            "owner": list(OWNERS.values()),
        }
    )
    pq.write_table(table, tmp_path / "about.parquet")
    images, collection = listing_with_sidecar(str(tmp_path / "about.parquet"), local)
    joined = join_metadata(images, collection, local)
    assert dict(zip(joined["key"].to_pylist(), joined["owner"].to_pylist())) == {k: OWNERS.get(k) for k in IMAGES}


@pytest.mark.parametrize(
    ("text", "settings", "expected"),
    [
        ("key,owner\nplain.jpg,A\nplain.jpg,B\n", {}, "the key 'plain.jpg' has more than one row"),
        ("file,owner\nplain.jpg,A\n", {}, r"no column 'key' \(metadata.key_column\); it has file, owner"),
        ("key,id\nplain.jpg,1\n", {}, "'id' has a reserved name; rename it"),
        ("key,stage\nplain.jpg,1\n", {}, "'stage' has a reserved name; rename it"),
        ("key,owner,owner\nplain.jpg,1,2\n", {}, "'owner' occurs twice"),
        ("key,owner\nplain.jpg,A,B\n", {}, "cannot be read: .*Expected 2 columns, got 3"),
        ("", {}, "cannot be read"),
    ],
)
def test_unsuitable_sidecar_is_named(text, settings, expected, tmp_path, local):
    (tmp_path / "about.csv").write_text(text)
    images, collection = listing_with_sidecar(str(tmp_path / "about.csv"), local, **settings)
    with pytest.raises(AttribError, match=f"about.csv.*{expected}"):
        join_metadata(images, collection, local)


def test_missing_sidecar_or_other_file_type_is_named(tmp_path, local):
    for name, expected in (("absent.csv", "does not exist"), ("about.json", "must be .csv, .tsv or .parquet")):
        (tmp_path / "about.json").write_text("{}")
        images, collection = listing_with_sidecar(str(tmp_path / name), local)
        with pytest.raises(AttribError, match=f"{name}.*{expected}"):
            join_metadata(images, collection, local)


def test_parquet_and_sidecar_metadata_need_different_names(tmp_path, local):
    table = pa.table({"u": ["plain.jpg"], "owner": ["inside"]})
    (tmp_path / "about.csv").write_text("key,owner\nplain.jpg,beside\n")
    sidecar = MetadataSettings(uri=str(tmp_path / "about.csv"))
    (tmp_path / "p").mkdir()
    pq.write_table(table, tmp_path / "p" / "a.parquet")
    columns = {"uri_column": "u", "metadata_columns": ("owner",)}
    collection = CollectionSettings(name="c", uri=str(tmp_path / "p"), format="parquet", metadata=sidecar, **columns)
    images = list_images(list_units(collection, local)[0], collection, local)
    with pytest.raises(AttribError, match="'owner' occurs twice; rename or remove"):
        join_metadata(images, collection, local)


def joined(keys: list[str], folder, storage, name: str, **settings) -> tuple[dict[str, str | None], str | None]:
    """Titles by key of empty images, and what is said about rows and images that did not meet."""
    for key in keys:
        storage.write_bytes(join(str(folder), "images", key), b"x")
    metadata = MetadataSettings(uri=str(folder / name), **settings)
    collection, met = CollectionSettings(name="c", uri=str(folder / "images"), metadata=metadata), Met()
    parts = []
    for unit in list_units(collection, storage):
        table = join_metadata(list_images(unit, collection, storage), collection, storage, met)
        parts.append(str(folder / f"part-{len(parts)}.parquet"))
        storage.write_table(parts[-1], table)
    rows = [row for part in parts for row in storage.read_table(part).to_pylist()]
    return {row["key"]: row.get("title") for row in rows}, describe_met(met, collection, parts, storage)


def test_tsv_has_no_quotes(tmp_path, local):
    titles = ['"Untitled', "foo", 'the bar"', '""', 'a "b" c', '"x"', "'"]
    keys = [f"{i}.png" for i in range(len(titles))]
    lines = ["key\ttitle", *(f"{key}\t{title}" for key, title in zip(keys, titles))]
    (tmp_path / "about.tsv").write_text("\n".join(lines) + "\n")
    assert joined(keys, tmp_path, local, "about.tsv") == (dict(zip(keys, titles)), None)


OPEN_QUOTES = {
    "in the second row": ('key,title\na.png,"Untitled\nb.png,foo\n', "line 2"),
    "in the last row": ('key,title\na.png,x\nb.png,"foo\n', "line 3"),
    "at the very end": ('key,title\na.png,x\nb.png,"', "line 3"),
    "after a closed one": ('key,title\na.png,"x""\nb.png,y\n', "line 2"),
    "in the header": ('key,"title\na.png,x\n', "line 1"),
    "in a key": ('key,title\n"a.png,x\nb.png,y\n', "line 2"),
    "text after a quote": ('key,title\na.png,"x"y\n', "line 2"),
    "far from the end": ("key,title\n" + "b.png,y\n" * 999 + 'a.png,"x\n' + "b,y\n" * 900_000, "line 1001"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OPEN_QUOTES)
def test_a_quote_that_is_not_closed_is_refused_by_line(kind, tmp_path, local):
    text, line = OPEN_QUOTES[kind]
    (tmp_path / "about.csv").write_text(text)
    with pytest.raises(AttribError, match=rf"about\.csv cannot be read: .* begins in {line} has a quote"):
        open_sidecar(MetadataSettings(uri=str(tmp_path / "about.csv")), local)


def test_quotes_inside_of_a_csv_are_read(tmp_path, local):
    (tmp_path / "about.csv").write_text('key,title\na.png,"x, ""y""\nz"\r\nb.png,5" pipe\n"c.png",""\n')
    found, said = joined(["a.png", "b.png", "c.png"], tmp_path, local, "about.csv")
    assert found == {"a.png": 'x, "y"\nz', "b.png": '5" pipe', "c.png": ""} and said is None


@pytest.mark.parametrize(
    ("keys", "table", "settings", "expected"),
    [
        (["000000000.jpg", "1.x.png"], ["000000000", "1.x"], {}, ["000000000", "1.x"]),
        (["a.jpg", "a.png"], ["a"], {}, ["a", "a"]),
        (["a.jpg", "a.png"], ["a", "a.png"], {}, ["a", "a.png"]),  # the whole key comes first
        (["d.x/a.jpg"], ["d"], {}, "none"),
        (["d/a.jpg"], ["set/d/a"], {"key_prefix": "set/"}, ["set/d/a"]),
        (["00000/0001.jpg", "00001/0002.jpg"], ["0001", "0002"], {"ignore_folders": True}, ["0001", "0002"]),
        (["00000/0001.jpg", "00001/0002.jpg"], ["p0001", "p0002.jpg"], {"ignore_folders": True, "key_prefix": "p"},
         ["p0001", "p0002.jpg"]),
        (["00000/0001.jpg"], ["0001"], {}, "none"),
    ],
)  # fmt: skip
def test_rows_meet_images_without_extension_or_folders(keys, table, settings, expected, tmp_path, local):
    pq.write_table(pa.table({"key": table, "title": table}), tmp_path / "about.parquet")
    if expected == "none":
        with pytest.raises(AttribError, match="describes none of the images"):
            joined(keys, tmp_path, local, "about.parquet", **settings)
        return
    assert joined(keys, tmp_path, local, "about.parquet", **settings) == (dict(zip(keys, expected)), None)


def test_a_folder_of_tables_is_one_table(tmp_path, local):
    keys = [f"{i}.jpg" for i in range(6)]
    for shard in range(3):
        mine = [str(2 * shard), str(2 * shard + 1)]
        table = pa.table({"key": mine, "title": [f"t{key}" for key in mine]} | ({"year": [1, 2]} if shard == 2 else {}))
        local.write_table(str(tmp_path / "set" / f"sub{shard}" / f"{shard:05d}.parquet"), table)
    for other in ("00000.tar", "_SUCCESS", "00000_stats.json", "sub0/._00000.parquet", "_temporary/0/1.parquet"):
        local.write_bytes(str(tmp_path / "set" / other), b"no table")
    assert joined(keys, tmp_path, local, "set") == ({key: f"t{key[0]}" for key in keys}, None)
    years = open_sidecar(MetadataSettings(uri=str(tmp_path / "set")), local).to_table()["year"].to_pylist()
    assert sorted(years, key=str) == [1, 2, None, None, None, None]
    (tmp_path / "empty").mkdir()
    with pytest.raises(AttribError, match=r"no \.parquet file below .*empty"):
        open_sidecar(MetadataSettings(uri=str(tmp_path / "empty")), local)
    local.write_table(str(tmp_path / "set" / "x.parquet"), pa.table({"key": ["9"], "title": [9]}))
    with pytest.raises(AttribError, match=r"cannot be read: .*title"):
        open_sidecar(MetadataSettings(uri=str(tmp_path / "set")), local)


def test_a_partial_match_says_what_met_and_how_the_others_differ(tmp_path, local):
    composed, decomposed = (unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD"))
    (tmp_path / "about.csv").write_text(f"key,title\n{decomposed},E\na.png ,A\nsub\\b.png,B\nc.png,C\nD.PNG,D\n")
    found, said = joined(["a.png", "b.png", "c.png", "d.png", composed], tmp_path, local, "about.csv")
    assert found == {"a.png": None, "b.png": None, "c.png": "C", "d.png": None, composed: None}
    assert "about.csv describes 1 of 5 images" in said and "4 of its 5 rows found no image" in said
    for kind in ("the Unicode form", "spaces around them", "folders", "upper and lower case"):
        assert f"differ in {kind}" in said, said
    assert "'a.png '" in said and "'a.png'" in said


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (["a.png"], ["describes 1 of 2 images", "without a row are e.g. 'b.png'"]),
        (["a.png", "b.png", "x"], ["describes 2 of 2 images", "1 of its 3 rows found no image, e.g. 'x'"]),
    ],
)
def test_each_side_of_a_partial_match_is_said(rows, expected, tmp_path, local):
    pq.write_table(pa.table({"key": rows}), tmp_path / "about.parquet")
    _, said = joined(["a.png", "b.png"], tmp_path, local, "about.parquet")
    for part in expected:
        assert part in said, said


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view(), pa.string_view(), pa.binary(5)])
def test_binary_and_view_columns_are_keys_and_metadata(kind, tmp_path, local):
    keys = pa.array([b"a.png", b"b.png"]).cast(kind if kind != pa.string_view() else pa.string()).cast(kind)
    pq.write_table(pa.table({"key": keys, "title": keys}), tmp_path / "about.parquet")
    found, said = joined(["a.png", "b.png"], tmp_path, local, "about.parquet")
    text = kind == pa.string_view()
    assert found == {key: key if text else key.encode() for key in ("a.png", "b.png")} and said is None


def test_keys_that_are_no_text_are_refused_by_name(tmp_path, local):
    pq.write_table(pa.table({"key": [b"\xff\xfe"], "title": ["x"]}), tmp_path / "about.parquet")
    with pytest.raises(AttribError, match=r"about\.parquet cannot be read: .*UTF8"):
        joined(["a.png"], tmp_path, local, "about.parquet")


@pytest.mark.timeout(30)
@pytest.mark.parametrize("extension", ["csv", "tsv", "parquet"])
def test_a_pipe_is_refused_and_never_waited_for(extension, tmp_path, local):
    os.mkfifo(tmp_path / f"about.{extension}")
    with pytest.raises(AttribError, match=r"about\..* is no regular file"):
        open_sidecar(MetadataSettings(uri=str(tmp_path / f"about.{extension}")), local)


@pytest.mark.parametrize("name", ["table.csv", "table.tsv"])
@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
@pytest.mark.parametrize("text", ["key,é\na.png,1\n", "key,v\na.png,é\n"])
def test_a_table_in_another_encoding_is_refused_with_the_remedy(name, encoding, text, tmp_path):
    table = tmp_path / name
    table.write_bytes(text.replace(",", "\t" if name.endswith(".tsv") else ",").encode(encoding))
    with pytest.raises(AttribError, match=r"is not UTF-8 .*save it as UTF-8"):
        open_sidecar(MetadataSettings(uri=str(table)), LOCAL)
