"""The embed job: one row per image, resume and retry, vectors that depend on the image only."""

import os
import time
from hashlib import sha256

import numpy as np
import pytest
from PIL import Image
from support.embedding import LOCAL, make_manifest, rows_by_key, run_on_tars, settings_of
from support.hostile import hostile_images
from support.images import picture, pictures, write_folder, write_uri_parquet
from timm.data import create_transform, resolve_data_config

from attrib.common.errors import AttribError
from attrib.common.storage import Storage, join
from attrib.data.decoding import decode_image
from attrib.data.manifest import open_manifest
from attrib.embed import job as embed_job
from attrib.embed.embeddings import open_embeddings, read_vectors
from attrib.models.encoder import load_encoder
from attrib.models.settings import BackboneSettings

HOSTILE = hostile_images()
ORDINARY = pictures(f"ordinary {i}.jpg" for i in range(12))


@pytest.fixture(scope="module")
def hostile_run(local_ray, tmp_path_factory):
    """(settings, record, folder) of a run over hostile and valid images; one was deleted after it was listed."""
    folder = tmp_path_factory.mktemp("hostile")
    images = {name: data for name, (data, _) in HOSTILE.items()} | ORDINARY
    write_folder(images, str(folder / "files"), LOCAL)
    places = {key: str(folder / "files" / key) for key in images}
    write_uri_parquet(images, places, str(folder / "list"), LOCAL)  # lists files of any extension
    collection = {
        "name": "h",
        "uri": str(folder / "list"),
        "format": "parquet",
        "key_column": "name",
        "uri_column": "where",
        "allowed_roots": [str(folder / "files")],
    }
    make_manifest(collection, str(folder / "manifest"))
    os.unlink(places["ordinary 0.jpg"])
    settings = settings_of(folder, chunk_rows=16, num_workers=1)
    return settings, embed_job.run(settings), folder / "files"


def test_every_image_has_one_row_with_the_stage_and_reason_of_a_failure(hostile_run):
    settings, record, _ = hostile_run
    rows = rows_by_key(settings)
    expected = {name: expected for name, (_, expected) in HOSTILE.items()} | dict.fromkeys(ORDINARY)
    assert rows.keys() == expected.keys()
    for key, row in rows.items():
        if key == "ordinary 0.jpg":
            assert (row["stage"], row["reason"]) == ("read", "the file is gone since it was listed")
            assert row["content_sha256"] is None and row["embedding"] is None
            continue
        data = ORDINARY[key] if key in ORDINARY else HOSTILE[key][0]
        assert row["content_sha256"] == sha256(data).digest()
        if expected[key] is None:
            assert row["stage"] is None and row["reason"] is None, row
            image = decode_image(data, max_megapixels=100)
            assert (row["width"], row["height"], row["format"]) == (image.width, image.height, image.format)
            assert np.isfinite(row["embedding"]).all() and np.any(row["embedding"])
        else:
            assert row["stage"] == "decode" and expected[key] in row["reason"] and row["embedding"] is None

    failed = {key for key, row in rows.items() if row["stage"]}
    table = LOCAL.read_table(join(settings.output, "failures.parquet"))
    assert {(r["id"], r["key"], r["stage"], r["reason"]) for r in table.to_pylist()} == {
        (rows[key]["id"], key, rows[key]["stage"], rows[key]["reason"]) for key in failed
    }
    assert all(r["uri"].endswith("/" + r["key"]) for r in table.to_pylist()) and len(table) == len(failed)
    assert record["num_failed"] == len(failed) and record["num_images"] == len(rows)
    assert record["num_rows"] == [40, len(rows) - 40]
    assert sum(record["num_embedded"]) == len(rows) - len(failed)
    assert not os.path.exists(join(settings.output, "_chunks"))
    made = open_embeddings(settings.output, LOCAL)
    for partition in range(2):
        ids, vectors = read_vectors(made, partition, LOCAL)
        assert len(ids) == record["num_embedded"][partition] and vectors.dtype == np.float16
        with_vector = {r["id"]: np.float16(r["embedding"]) for r in rows.values() if r["embedding"]}
        assert all(np.array_equal(vector, with_vector[i]) for i, vector in zip(ids, vectors))


def test_vectors_equal_those_of_timm_and_pillow(hostile_run):
    settings, _, files = hostile_run

    encoder = load_encoder(settings.backbone, LOCAL)
    transform = create_transform(**resolve_data_config(model=encoder.model), is_training=False)
    rows = rows_by_key(settings)
    for key in list(ORDINARY)[1:]:
        with Image.open(files / key) as image:
            expected = encoder.model(transform(image.convert("RGB"))[None]).detach().numpy()[0]
        found = np.array(rows[key]["embedding"], np.float64)
        assert found @ expected / np.linalg.norm(found) / np.linalg.norm(expected) > 0.999


def test_finished_run_is_kept_and_other_settings_are_an_error(hostile_run):
    settings, record, _ = hostile_run
    started = time.monotonic()
    assert embed_job.run(settings) == record
    assert embed_job.run(settings.model_copy(update={"num_workers": 2, "max_failed_share": 0.9})) == record
    assert time.monotonic() - started < 20
    for changed in (
        {"backbone": BackboneSettings(name="test_resnet", weights="random", seed=1)},
        {"backbone": BackboneSettings(name="test_vit", weights="random")},
        {"max_megapixels": 1.0},
        {"chunk_rows": 9},
    ):
        with pytest.raises(
            AttribError,
            match=rf"belongs to a run with other settings or inputs \({next(iter(changed))}.*choose another output",
        ):
            embed_job.run(settings.model_copy(update=changed))


def test_retry_embeds_only_failed_images(hostile_run, monkeypatch):
    settings, record, files = hostile_run
    before = rows_by_key(settings)
    fixed, changed_since = {"truncated.jpg", "ordinary 0.jpg"}, "ordinary 1.jpg"
    for seed, key in enumerate([*fixed, changed_since]):
        picture(100 + seed, 200, 100).save(files / key)
    retry = settings.model_copy(update={"retry_failed": True})

    # An interrupted retry must not leave the record of the previous vectors.
    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(embed_job, "_retry_failed", killed)
        embed_job.run(retry)
    assert not os.path.exists(join(settings.output, "embeddings.json"))

    again = embed_job.run(retry)
    after = rows_by_key(settings)
    assert again["num_failed"] == record["num_failed"] - 2 and again["digest"] != record["digest"]
    assert {key for key in after if after[key] != before[key]} == fixed  # changed_since is unchanged
    encoder = load_encoder(settings.backbone, LOCAL, batch_size=8)
    for key in fixed:
        assert (
            after[key]["stage"] is None and after[key]["content_sha256"] == sha256((files / key).read_bytes()).digest()
        )
        pixels = decode_image((files / key).read_bytes(), max_megapixels=100).pixels
        expected = encoder.encode(encoder.preprocessing.resize_and_crop(pixels).numpy()[None])[0]
        assert np.allclose(after[key]["embedding"], expected, rtol=2e-3, atol=1e-4)
    assert embed_job.run(settings) == again


def test_too_many_failures_exit_with_code_3_and_retry_fixes_them(local_ray, start_job, tmp_path):
    images = pictures(f"{i}.jpg" for i in range(8)) | {"bad.jpg": b"no image"}
    write_folder(images, str(tmp_path / "images"), LOCAL)
    make_manifest({"name": "c", "uri": str(tmp_path / "images")}, str(tmp_path / "manifest"))
    settings = settings_of(tmp_path, chunk_rows=2, num_workers=1)
    values = settings.model_dump(mode="json") | {"max_failed_share": 0.05, "ray": {"address": local_ray}}
    job = start_job("embed", values, tmp_path)
    _, said = job.communicate(timeout=120)
    assert job.returncode == 3, said
    assert "error: 1 of 9 images failed, more than max_failed_share = 0.05 allows; e.g. bad.jpg: " in said
    assert "Traceback" not in said and "not an image" in said
    assert not (tmp_path / "embeddings" / "embeddings.json").exists()  # stopped early, and yet
    failures = LOCAL.read_table(str(tmp_path / "embeddings" / "failures.parquet")).to_pylist()
    assert [(row["key"], row["stage"]) for row in failures] == [("bad.jpg", "decode")]

    picture(5).save(tmp_path / "images" / "bad.jpg")
    record = embed_job.run(settings.model_copy(update={"max_failed_share": 0.0, "retry_failed": True}))
    assert record["num_failed"] == 0 and rows_by_key(settings)["bad.jpg"]["stage"] is None


def test_same_images_in_another_order_are_another_input(local_ray, s3_endpoint, tmp_path_factory, tmp_path):
    """Chunks are identified by manifest rows, which hold other images if the order differs."""
    images, reference = run_on_tars(tmp_path_factory.mktemp("tars"), s3_endpoint, 12)
    storage = Storage(reference.storage)
    write_folder(images, str(tmp_path / "images"), LOCAL)
    other = make_manifest(
        {"name": "c", "uri": str(tmp_path / "images")}, str(tmp_path / "manifest"), storage, partition_rows=17
    )
    assert other.digest == open_manifest(reference.manifest, storage).digest
    with pytest.raises(
        AttribError, match=r"other settings or inputs .input order., of .*rescan=true.*or choose another output"
    ):
        embed_job.run(reference.model_copy(update={"manifest": str(tmp_path / "manifest")}))


def test_missing_manifest_names_the_job_to_run(tmp_path):
    with pytest.raises(AttribError, match=r"manifest\.json is not there: run jobs\.manifest"):
        embed_job.run(settings_of(tmp_path))
    assert os.listdir(tmp_path) == []
