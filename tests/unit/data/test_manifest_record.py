"""What the manifest job counts, keeps in its record and refuses. The job runs in this process, without Ray."""

import os

import pyarrow.parquet as pq
import pytest
from support.images import pictures, tar_bytes, write_folder

from attrib.common.errors import AttribError
from attrib.common.settings import IDENTITY, result_settings
from attrib.data import job
from attrib.data.manifest import MANIFEST_RECORD
from attrib.data.settings import EXCLUDE, EXTENSIONS, CollectionSettings, ManifestSettings

IMAGES = pictures([f"{i}.png" for i in range(6)])


@pytest.fixture(autouse=True)
def without_ray(monkeypatch):
    monkeypatch.setattr(job, "connect", lambda settings: None)
    monkeypatch.setattr(job, "num_cluster_cpus", lambda: 1)
    monkeypatch.setattr(job, "admit", lambda *arguments: None)
    monkeypatch.setattr(job, "run_all", lambda unit, work, *progress: [unit(*arguments) for arguments in work])


def manifest(tmp_path, *, max_skipped_share: float = 0.5, **collection) -> ManifestSettings:
    collection = {"name": "c", "uri": str(tmp_path / "images")} | collection
    return ManifestSettings(collection=collection, output=str(tmp_path / "out"), max_skipped_share=max_skipped_share)


def test_the_record_counts_what_was_left_out(tmp_path, local, caplog):
    write_folder(IMAGES | dict.fromkeys(["d/notes.txt", "x.json", ".h/a.png", "d/.a.png", "d/@eaDir/a.png"], b"x"),
                 str(tmp_path / "images"), local)  # fmt: skip
    (tmp_path / "images" / os.fsdecode(b"caf\xe9.png")).write_bytes(b"x")
    os.symlink("..", tmp_path / "images" / "d" / "up")
    record = job.run(manifest(tmp_path))
    expected = {"other extension": 2, "hidden": 2, "excluded by a pattern": 1, "name is not UTF-8": 1}
    assert record["skipped"] == expected | {"link to a folder that is listed": 1} and record["num_images"] == len(
        IMAGES
    )
    assert local.read_json(str(tmp_path / "out" / MANIFEST_RECORD))["skipped"] == record["skipped"]
    assert "2 other extension (e.g. 'x.json', 'd/notes.txt')" in caplog.text and "caf" in caplog.text


def test_more_left_out_than_allowed_fails_with_counts_and_names(tmp_path, local):
    write_folder(IMAGES, str(tmp_path / "images"), local)
    (tmp_path / "images" / os.fsdecode(b"caf\xe9.png")).write_bytes(b"x")
    with pytest.raises(
        AttribError, match=r"1 of 7 images .*max_skipped_share = 0\.1 .*1 name is not UTF-8 \(e\.g\. .*caf"
    ):
        job.run(manifest(tmp_path, max_skipped_share=0.1))
    assert not (tmp_path / "out" / MANIFEST_RECORD).exists()
    record = job.run(manifest(tmp_path, max_skipped_share=0.2))
    assert record["num_images"] == 6


def test_shards_that_cannot_be_listed_are_limited_by_themselves(tmp_path, local):
    names = ["0.tar", "1.tar.gz", "2.tgz"]
    for i, name in enumerate(names):
        local.write_bytes(
            str(tmp_path / "images" / name), tar_bytes({f"{i}-{key}": data for key, data in IMAGES.items()})
        )
    with pytest.raises(
        AttribError, match=r"2 of 3 shards cannot be listed.*2 compressed shard \(e\.g\. '1\.tar\.gz', '2\.tgz'\)"
    ):
        job.run(manifest(tmp_path, format="webdataset"))
    record = job.run(manifest(tmp_path, format="webdataset", max_skipped_share=0.7))
    assert record["skipped"] == {"compressed shard": 2} and record["num_images"] == len(IMAGES)


def test_an_ordinary_folder_with_sidecar_files_is_within_every_limit(tmp_path, local):
    others = [f"{i}.{extension}" for i in range(6) for extension in ("json", "txt", "npy")]
    write_folder(IMAGES | dict.fromkeys(others, b"x") | dict.fromkeys([f"._{key}" for key in IMAGES], b"x"),
                 str(tmp_path / "images"), local)  # fmt: skip
    record = job.run(manifest(tmp_path, max_skipped_share=0))
    assert record["skipped"] == {"other extension": 18, "hidden": 6}


def test_every_row_holds_the_version_of_its_file(tmp_path, local):
    write_folder(IMAGES, str(tmp_path / "images"), local)
    job.run(manifest(tmp_path))
    rows = pq.read_table(tmp_path / "out" / "part-00000.parquet").to_pylist()
    for row in rows:
        found = os.stat(row["uri"])
        assert row["listed_version"] == f"{found.st_size} {found.st_mtime_ns}"


def test_an_empty_collection_says_what_was_left_out(tmp_path, local):
    write_folder({"a.heic": b"x", "b.heic": b"x"}, str(tmp_path / "images"), local)
    with pytest.raises(AttribError, match=r"no files ending in .*2 other extension \(e\.g\. 'a\.heic', 'b\.heic'\)"):
        job.run(manifest(tmp_path))


def test_a_partial_match_of_metadata_is_said_and_counted(tmp_path, local, caplog):
    write_folder(IMAGES, str(tmp_path / "images"), local)
    (tmp_path / "about.csv").write_text("key,title\n0.png,A\n1,B\nelse.png,C\n")
    record = job.run(manifest(tmp_path, metadata={"uri": str(tmp_path / "about.csv")}))
    assert (record["num_described"], record["num_metadata_rows"]) == (2, 2)
    assert "describes 2 of 6 images" in caplog.text and "1 of its 3 rows found no image, e.g. 'else.png'" in caplog.text


def test_a_damaged_sidecar_is_refused_before_anything_is_listed(tmp_path, local, monkeypatch):
    write_folder(IMAGES, str(tmp_path / "images"), local)
    (tmp_path / "about.csv").write_text('key,title\n0.png,"A\n')
    monkeypatch.setattr(job, "list_units", None)
    with pytest.raises(AttribError, match="a quote that is not closed"):
        job.run(manifest(tmp_path, metadata={"uri": str(tmp_path / "about.csv")}))


OLD_COLLECTION = {
    "name": "c", "uri": "/x", "format": "folder", "key_column": None, "bytes_column": None, "uri_column": None,
    "extensions": [".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"], "metadata_columns": [],
}  # fmt: skip
OLD_METADATA = {"uri": "/m.csv", "key_column": "key", "key_prefix": ""}


@pytest.mark.parametrize("metadata", [None, OLD_METADATA])
def test_runs_of_earlier_versions_keep_their_identity(metadata):
    """A finished run is found by a digest of its settings, as they were written before options were added."""
    old = OLD_COLLECTION | {"metadata": metadata}
    settings = ManifestSettings(collection={"name": "c", "uri": "/x", "metadata": metadata}, output="/o")
    assert result_settings(settings, IDENTITY) == {"collection": old, "partition_rows": 16_384}
    assert CollectionSettings.model_validate(old).exclude == EXCLUDE


def test_records_hold_what_was_listed():
    settings = CollectionSettings(name="c", uri="/x")
    assert settings.model_dump(mode="json")["extensions"] == list(EXTENSIONS)
    changed = CollectionSettings(name="c", uri="/x", exclude=("a",), extensions=(".png",))
    assert changed.model_dump(context=IDENTITY)["extensions"] == (".png",)
    assert CollectionSettings.model_validate(changed.model_dump(mode="json")) == changed
