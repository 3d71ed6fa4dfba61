"""The manifest job: all collection formats, stable ids and digests, metadata, invalid input."""

import random

import numpy as np
import pyarrow as pa
import pytest
from support.hostile import encode
from support.images import ODD_NAMES, picture, pictures, write_folder, write_parquet, write_tars, write_uri_parquet

from attrib.common.errors import AttribError
from attrib.common.settings import BudgetSettings, StorageSettings
from attrib.common.storage import Storage, join
from attrib.data import ids as identity
from attrib.data import job
from attrib.data.ids import image_ids
from attrib.data.manifest import ids_digest, open_manifest
from attrib.data.settings import CollectionSettings, ManifestSettings

IMAGES = pictures([*ODD_NAMES, *(f"more/{i}.jpg" for i in range(9))])


def run(collection: dict, output: str, storage: Storage = None, **settings) -> tuple[dict, pa.Table]:
    """The record of a manifest job and its rows in reading order."""
    storage = storage or Storage(StorageSettings())
    record = job.run(ManifestSettings(collection=collection, output=output, storage=storage.settings, **settings))
    manifest = open_manifest(output, storage)
    parts = [storage.read_table(manifest.partition_uri(i)) for i in range(len(manifest.num_rows))]
    assert [len(part) for part in parts] == record["num_rows"] and sum(map(len, parts)) == record["num_images"]
    assert not storage.exists(join(output, job.LISTINGS))
    return record, pa.concat_tables(parts)


def ids_by_key(rows: pa.Table) -> dict[str, int]:
    return dict(zip(rows["key"].to_pylist(), rows["id"].to_pylist()))


def test_ids_and_digest_depend_on_the_images_only(local_ray, s3_endpoint, tmp_path, local):
    shuffled = list(IMAGES.items())
    random.Random(0).shuffle(shuffled)
    write_folder(IMAGES, str(tmp_path / "folder"), local)
    write_tars(IMAGES, str(tmp_path / "one"), local)
    write_tars(dict(shuffled), str(tmp_path / "five"), local, num_shards=5)
    write_parquet(dict(shuffled), str(tmp_path / "parquet"), local, num_files=2)
    on_s3 = Storage(StorageSettings(endpoint=s3_endpoint))
    root = f"s3://attrib/{tmp_path.name}"
    write_folder(IMAGES, join(root, "folder"), on_s3)
    write_tars(dict(shuffled), join(root, "tars"), on_s3, num_shards=2)
    places = {key: join(root, "folder", key) for key in IMAGES}
    write_uri_parquet(dict(shuffled), places, str(tmp_path / "uris"), local)
    tar, bytes_inside = {"format": "webdataset"}, {"format": "parquet", "key_column": "name", "bytes_column": "image"}
    forms = [
        (local, str(tmp_path / "folder"), {}, 5),
        (local, str(tmp_path / "folder"), {}, 100),
        (local, str(tmp_path / "one"), tar, 7),
        (local, str(tmp_path / "five"), tar, 3),
        (local, str(tmp_path / "parquet"), bytes_inside, 4),
        (on_s3, join(root, "folder"), {}, 6),
        (on_s3, join(root, "tars"), tar, 6),
        (on_s3, str(tmp_path / "uris"), {"format": "parquet", "key_column": "name", "uri_column": "where"}, 6),
    ]
    expected = dict(zip(IMAGES, image_ids("c", list(IMAGES)).tolist()))
    records = []
    for number, (storage, uri, form, partition_rows) in enumerate(forms):
        output = join(root if storage is on_s3 else str(tmp_path), f"manifest-{number}")
        record, rows = run({"name": "c", "uri": uri, **form}, output, storage, partition_rows=partition_rows)
        assert ids_by_key(rows) == expected and record["num_images"] == len(IMAGES)
        records.append(record)
    assert len({record["digest"] for record in records}) == 1
    # Chunks are identified by their rows in the manifest, so order_digest must differ between orders.
    assert len({record["order_digest"] for record in records[:5]}) == 5
    fewer = ids_digest(CollectionSettings(name="c", uri="x"), np.sort(list(expected.values()))[1:])
    other = ids_digest(CollectionSettings(name="d", uri="x"), np.sort(list(expected.values())))
    assert len({records[0]["digest"], fewer, other}) == 3


def test_metadata_is_joined_in_all_partitions(local_ray, tmp_path, local):
    write_folder(IMAGES, str(tmp_path / "images"), local)
    described = list(IMAGES)[3:]
    (tmp_path / "about.csv").write_text("file,owner\n" + "".join(f'"c/{key}",{i}\n' for i, key in enumerate(described)))
    metadata = {"uri": str(tmp_path / "about.csv"), "key_column": "file", "key_prefix": "c/"}
    collection = {"name": "c", "uri": str(tmp_path / "images"), "metadata": metadata}
    record, rows = run(collection, str(tmp_path / "out"), partition_rows=4)
    assert record["metadata_columns"] == ["owner"]
    owners = {key: str(i) for i, key in enumerate(described)}
    assert dict(zip(rows["key"].to_pylist(), rows["owner"].to_pylist())) == {key: owners.get(key) for key in IMAGES}

    wrong = collection | {"metadata": metadata | {"key_prefix": ""}}
    with pytest.raises(
        AttribError,
        match=r"about\.csv describes none of the images: its keys look like 'c/.+', the collection's like '",
    ):
        run(wrong, str(tmp_path / "wrong"))
    assert not (tmp_path / "wrong" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("images", "form", "expected"),
    [
        ({"a.txt": b"x"}, {}, r"no files ending in \.jpg.* below .*; correct uri, format or extensions"),
        (
            {"same/name.jpg": b"x"},
            {"format": "webdataset"},
            r"the key 'same/name\.jpg' occurs more than once.*rename one",
        ),
    ],
)
def test_empty_collection_or_duplicate_key_is_an_error(images, form, expected, local_ray, tmp_path, local):
    root = str(tmp_path / "images")
    if form:
        write_tars(images, root, local)
        (tmp_path / "images" / "other.tar").write_bytes((tmp_path / "images" / "000.tar").read_bytes())
    else:
        write_folder(images, root, local)
    with pytest.raises(AttribError, match=expected):
        run({"name": "c", "uri": root, **form}, str(tmp_path / "out"))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_parquet_files_with_different_column_types_are_an_error(local_ray, tmp_path, local):
    for name, years in (("a", ["2001"]), ("b", [2002])):
        local.write_table(str(tmp_path / "p" / f"{name}.parquet"), pa.table({"u": [f"{name}.jpg"], "year": years}))
    collection = {
        "name": "c",
        "uri": str(tmp_path / "p"),
        "format": "parquet",
        "uri_column": "u",
        "metadata_columns": ["year"],
    }
    with pytest.raises(AttribError, match=r"'year' is int64 in .*b\.parquet but string in .*a\.parquet"):
        run(collection, str(tmp_path / "out"))


def test_finished_manifest_is_kept_and_other_settings_are_an_error(local_ray, tmp_path, local):
    write_folder(IMAGES, str(tmp_path / "images"), local)
    collection = {"name": "c", "uri": str(tmp_path / "images")}
    first, _ = run(collection, str(tmp_path / "out"))
    again, _ = run(collection, str(tmp_path / "out"))
    assert again == first  # including written_at: nothing was done
    with pytest.raises(
        AttribError,
        match=r"other settings or inputs \(partition_rows: there 16384, now 3\); choose another output folder",
    ):
        run(collection, str(tmp_path / "out"), partition_rows=3)


@pytest.mark.parametrize("seed", range(5))
def test_colliding_hashes_get_distinct_ids_that_depend_on_the_images_only(
    seed, local_ray, tmp_path, local, monkeypatch
):
    """Hashes are cut to 4 bits, since 63 bits never collide in a test. The job runs in this process."""
    full = image_ids
    monkeypatch.setattr(
        "attrib.data.collections.image_ids", lambda name, keys: full(name, keys) >> (identity.ID_BITS - 4)
    )
    monkeypatch.setattr("attrib.data.job.connect", lambda settings: None)
    monkeypatch.setattr("attrib.data.job.run_all", lambda unit, work, *progress: [unit(*w) for w in work])
    items = list(IMAGES.items())
    random.Random(seed).shuffle(items)
    write_tars(dict(items), str(tmp_path / "tars"), local, num_shards=1 + seed)
    record, rows = run(
        {"name": "c", "uri": str(tmp_path / "tars"), "format": "webdataset"}, str(tmp_path / "out"), partition_rows=5
    )
    ids = ids_by_key(rows)
    assert len(set(ids.values())) == len(IMAGES) and record["num_moved_ids"] > 2
    write_folder(IMAGES, str(tmp_path / "folder"), local)
    reference, rows = run({"name": "c", "uri": str(tmp_path / "folder")}, str(tmp_path / "reference"))
    assert ids_by_key(rows) == ids and reference["digest"] == record["digest"]
    # Reference: in order of (hash, key), a key whose hash is taken gets the next free id.
    hashes = dict(zip(IMAGES, (full("c", list(IMAGES)) >> (identity.ID_BITS - 4)).tolist()))
    taken, expected = set(hashes.values()), {}
    for key in sorted(hashes, key=lambda key: (hashes[key], key)):
        new = hashes[key]
        if new in expected.values():
            while new in taken:
                new += 1
        taken.add(new)
        expected[key] = new
    assert ids == expected


def test_a_job_logs_its_estimate_and_stops_over_the_budget(tmp_path, local, local_ray, caplog):
    caplog.set_level("INFO")
    write_folder({f"{i}.jpg": encode(picture(i), "JPEG") for i in range(3)}, f"{tmp_path}/images", local)
    collection, budget = {"name": "c", "uri": f"{tmp_path}/images"}, {"max_process_gib": 0.01}
    settings = ManifestSettings(collection=collection, output=f"{tmp_path}/out", budget=budget)
    with pytest.raises(AttribError, match="the job was not started"):
        job.run(settings)
    assert "estimate: " in caplog.text
    assert not local.names(settings.output, suffix=".parquet")
    record = job.run(settings.model_copy(update={"budget": BudgetSettings()}))
    assert record["num_images"] == 3
