"""The embed job: one outcome per image, resumption, and vectors that depend on the image alone."""

import io
import os
import random
import signal
import time
from hashlib import sha256

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from safetensors.torch import save_file
from support.hostile import hostile_images
from support.images import picture, pictures, write_folder, write_tars, write_uri_parquet
from timm.data import create_transform, resolve_data_config

from attrib.common.errors import AttribError
from attrib.common.settings import StorageSettings
from attrib.common.storage import Storage, join
from attrib.data import job as manifest_job
from attrib.data.chunks import failures_of, plan_chunks
from attrib.data.collections import list_images, list_units
from attrib.data.decoding import decode_image
from attrib.data.manifest import Manifest, open_manifest
from attrib.data.settings import CollectionSettings, ManifestSettings
from attrib.embed import job as embed_job
from attrib.embed.embeddings import open_embeddings, read_vectors
from attrib.embed.encode import PreparedChunk, encode_chunk, prepare_images
from attrib.embed.settings import EmbedSettings
from attrib.models.encoder import load_encoder
from attrib.models.settings import BackboneSettings

BACKBONE = {"name": "test_resnet", "weights": "random"}
HOSTILE = hostile_images()
ORDINARY = pictures(f"ordinary {i}.jpg" for i in range(12))
LOCAL = Storage(StorageSettings())


def make_manifest(collection: dict, output: str, storage: Storage = LOCAL, partition_rows: int = 40):
    settings = {"collection": collection, "output": output, "partition_rows": partition_rows}
    manifest_job.run(ManifestSettings(**settings, storage=storage.settings))
    return open_manifest(output, storage)


def settings_of(folder, **changed) -> EmbedSettings:
    values = {"manifest": str(folder / "manifest"), "output": str(folder / "embeddings"), "backbone": BACKBONE}
    return EmbedSettings(**values | {"device_batch_size": 8, "max_failed_share": 1.0} | changed)


def rows_by_key(settings: EmbedSettings) -> dict[str, dict]:
    storage = Storage(settings.storage)
    listed, made = open_manifest(settings.manifest, storage), open_embeddings(settings.output, storage)
    rows = {}
    for i in range(len(listed.num_rows)):
        part = storage.read_table(made.part_uri(i))
        assert part["id"].to_pylist() == sorted(part["id"].to_pylist())
        keys = dict(zip(*(storage.read_table(listed.partition_uri(i))[name].to_pylist() for name in ("id", "key"))))
        assert keys.keys() == set(part["id"].to_pylist())
        rows |= {keys[row["id"]]: row for row in part.to_pylist()}
    assert len(rows) == listed.num_images
    return rows


def vectors_of(rows: dict[str, dict]) -> dict[str, bytes | None]:
    """The bits of every vector."""
    return {k: r["embedding"] and np.array(r["embedding"], np.float16).tobytes() for k, r in rows.items()}


@pytest.fixture(scope="module")
def hostile_run(local_ray, tmp_path_factory):
    """(settings, record) of a run over hostile and ordinary images, of which one was deleted after it was listed."""
    folder = tmp_path_factory.mktemp("hostile")
    images = {name: data for name, (data, _) in HOSTILE.items()} | ORDINARY
    write_folder(images, str(folder / "files"), LOCAL)
    places = {key: str(folder / "files" / key) for key in images}
    write_uri_parquet(
        images, places, str(folder / "list"), LOCAL
    )  # such a list takes every name, whatever its extension
    collection = {
        "name": "h",
        "uri": str(folder / "list"),
        "format": "parquet",
        "key_column": "name",
        "uri_column": "where",
    }
    make_manifest(collection, str(folder / "manifest"))
    os.unlink(places["ordinary 0.jpg"])
    settings = settings_of(folder, chunk_rows=16, num_workers=1)
    return settings, embed_job.run(settings), folder / "files"


def test_every_image_has_one_outcome_with_the_stage_and_reason_of_its_failure(hostile_run):
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


def test_a_finished_run_is_kept_and_other_settings_are_refused(hostile_run):
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
            AttribError, match=f"holds results of other settings.*{next(iter(changed))}.*choose another output"
        ):
            embed_job.run(settings.model_copy(update=changed))


def test_retry_embeds_again_only_what_failed(hostile_run, monkeypatch):
    settings, record, files = hostile_run
    before = rows_by_key(settings)
    mended, changed_since = {"truncated.jpg", "ordinary 0.jpg"}, "ordinary 1.jpg"
    for seed, key in enumerate([*mended, changed_since]):
        picture(100 + seed, 200, 100).save(files / key)
    retry = settings.model_copy(update={"retry_failed": True})

    # A retry that is killed must not leave the record of the vectors before it.
    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(embed_job, "_retry_failed", killed)
        embed_job.run(retry)
    assert not os.path.exists(join(settings.output, "embeddings.json"))

    again = embed_job.run(retry)
    after = rows_by_key(settings)
    assert again["num_failed"] == record["num_failed"] - 2 and again["digest"] != record["digest"]
    assert {key for key in after if after[key] != before[key]} == mended  # so not changed_since
    encoder = load_encoder(settings.backbone, LOCAL, batch_size=8)
    for key in mended:
        assert (
            after[key]["stage"] is None and after[key]["content_sha256"] == sha256((files / key).read_bytes()).digest()
        )
        pixels = decode_image((files / key).read_bytes(), max_megapixels=100).pixels
        expected = encoder.encode(encoder.preprocessing.resize_and_crop(pixels).numpy()[None])[0]
        assert np.allclose(after[key]["embedding"], expected, rtol=2e-3, atol=1e-4)
    assert embed_job.run(settings) == again


def test_too_many_failures_end_the_job_with_code_3_and_a_retry_mends_it(local_ray, start_job, tmp_path):
    images = pictures(f"{i}.jpg" for i in range(8)) | {"bad.jpg": b"no image"}
    write_folder(images, str(tmp_path / "images"), LOCAL)
    make_manifest({"name": "c", "uri": str(tmp_path / "images")}, str(tmp_path / "manifest"))
    settings = settings_of(tmp_path, chunk_rows=2, num_workers=1)
    values = settings.model_dump(mode="json") | {"max_failed_share": 0.05, "ray": {"address": local_ray}}
    job = start_job("embed", values, tmp_path)
    _, said = job.communicate(timeout=120)
    assert job.returncode == 3, said
    assert (
        "error: 1 of 9 images failed, more than max_failed_share = 0.05 allows; e.g. " in said
        and "Traceback" not in said
    )
    assert "not an image" in said and not (tmp_path / "embeddings" / "embeddings.json").exists()

    picture(5).save(tmp_path / "images" / "bad.jpg")
    record = embed_job.run(settings.model_copy(update={"max_failed_share": 0.0, "retry_failed": True}))
    assert record["num_failed"] == 0 and rows_by_key(settings)["bad.jpg"]["stage"] is None


@pytest.fixture(scope="module")
def undisturbed(local_ray, s3_endpoint, tmp_path_factory):
    """(images, settings, rows) of a run by one worker over shuffled tar shards on S3."""
    folder = tmp_path_factory.mktemp("undisturbed")
    images = {}
    for i in range(40):  # large ones, so that a run takes long enough to be killed half-way
        buffer = io.BytesIO()
        picture(i, 1000, 800).save(buffer, "JPEG")
        images[f"{i:02}.jpg"] = buffer.getvalue()
    images["broken.jpg"] = images["00.jpg"][:5000]
    shuffled = list(images.items())
    random.Random(1).shuffle(shuffled)
    storage = Storage(StorageSettings(endpoint=s3_endpoint))
    root = f"s3://attrib/{folder.name}"
    write_tars(dict(shuffled), join(root, "tars"), storage, num_shards=3)
    collection = {"name": "c", "uri": join(root, "tars"), "format": "webdataset"}
    make_manifest(collection, join(root, "manifest"), storage, partition_rows=17)
    places = {"manifest": join(root, "manifest"), "output": join(root, "embeddings"), "storage": storage.settings}
    settings = settings_of(folder, **places, num_workers=1, chunk_rows=11)
    embed_job.run(settings)
    return images, settings, rows_by_key(settings)


def chunks_in(output: str) -> list[str]:
    return [
        info.path for info in LOCAL.list_folder(output, recursive=True, suffix=".parquet") if "_chunks" in info.path
    ]


def test_a_killed_run_ends_with_the_same_bits_in_another_order_place_and_number_of_workers(
    undisturbed, local_ray, start_job, tmp_path
):
    images, _, expected = undisturbed
    write_folder(images, str(tmp_path / "images"), LOCAL)
    make_manifest({"name": "c", "uri": str(tmp_path / "images")}, str(tmp_path / "manifest"), partition_rows=20)
    settings = settings_of(tmp_path, chunk_rows=1, num_workers=2)
    job = start_job("embed", settings.model_dump(mode="json") | {"ray": {"address": local_ray}}, tmp_path)
    deadline = time.monotonic() + 120
    while len(chunks_in(settings.output)) < 5 and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    job.send_signal(signal.SIGKILL)
    _, said = job.communicate()
    assert job.returncode == -signal.SIGKILL, said
    committed = chunks_in(settings.output)
    while time.sleep(2) or chunks_in(settings.output) != committed:  # workers end a moment after their driver
        committed = chunks_in(settings.output)
    assert 5 <= len(committed) < len(expected), "the run was not killed half-way; give it more images"

    # A mark in what is committed shows whether it is computed again.
    marked = set()
    for path in committed:
        chunk = LOCAL.read_table(path)
        marked |= set(chunk["id"].to_pylist())
        LOCAL.write_table(path, chunk.set_column(4, chunk.schema.field("format"), pa.array(["MARKED"] * len(chunk))))
    record = embed_job.run(settings)
    rows = rows_by_key(settings)
    assert {row["id"] for row in rows.values() if row["format"] == "MARKED"} == marked
    without_mark = {key: row | {"format": expected[key]["format"]} for key, row in rows.items()}
    assert without_mark == expected and record["num_failed"] == 1
    assert vectors_of(rows) == vectors_of(expected)


def test_another_order_of_the_same_images_is_not_mixed_with_committed_chunks(undisturbed, s3_endpoint, tmp_path):
    """Chunks are known by their place in the manifest, which another manifest of the same images fills with others."""
    images, reference, _ = undisturbed
    storage = Storage(reference.storage)
    write_folder(images, str(tmp_path / "images"), LOCAL)
    other = make_manifest(
        {"name": "c", "uri": str(tmp_path / "images")}, str(tmp_path / "manifest"), storage, partition_rows=17
    )
    assert other.digest == open_manifest(reference.manifest, storage).digest
    with pytest.raises(AttribError, match=r"other settings or inputs .input order.; choose another output"):
        embed_job.run(reference.model_copy(update={"manifest": str(tmp_path / "manifest")}))


@pytest.mark.parametrize(
    ("scale", "reason"), [(1e4, "the embedding is not finite in float16"), (0, "the embedding is zero")]
)
def test_a_vector_that_float16_cannot_hold_is_a_failure_of_its_image(scale, reason, tmp_path):
    images = {f"{i}.jpg": data for i, data in enumerate(list(ORDINARY.values())[:3])} | {"3.jpg": b"broken"}
    write_folder(images, str(tmp_path / "images"), LOCAL)
    collection = CollectionSettings(name="c", uri=str(tmp_path / "images"))
    listed = list_images(list_units(collection, LOCAL)[0], collection, LOCAL)
    place = Manifest(str(tmp_path), collection, "", "", "", [4], [])
    plain = load_encoder(BackboneSettings(**BACKBONE), LOCAL, batch_size=4)
    norms = {
        k: v * scale if v.ndim == 1 and k.endswith(("weight", "bias")) else v
        for k, v in plain.model.state_dict().items()
    }
    save_file({k: v.contiguous() for k, v in norms.items()}, tmp_path / "scaled.safetensors")
    weights = str(tmp_path / "scaled.safetensors")
    scaled = load_encoder(BackboneSettings(name="test_resnet", weights=weights), LOCAL, batch_size=4)

    prepared = prepare_images(listed, place, plain.preprocessing, settings_of(tmp_path), LOCAL)
    prepared = PreparedChunk.from_row(prepared.to_row())  # as it travels to encoders on GPUs
    assert encode_chunk(prepared, plain)["stage"].to_pylist() == [None, None, None, "decode"]
    table = encode_chunk(prepared, scaled)
    assert table["stage"].to_pylist() == ["embed", "embed", "embed", "decode"]
    assert table["reason"].to_pylist()[:3] == [reason] * 3
    assert table["embedding"].null_count == 4
    failed = failures_of(table, listed)
    assert failed.select(["key", "uri"]).to_pylist() == listed.select(["key", "uri"]).to_pylist()
    assert failed["stage"].to_pylist() == table["stage"].to_pylist()


@pytest.mark.parametrize(("num_rows", "chunk_rows"), [(0, 3), (1, 3), (3, 3), (10, 3)])
def test_chunks_cover_every_row_once(num_rows, chunk_rows):
    chunks = plan_chunks(num_rows, 7, chunk_rows)
    assert [row for c in chunks for row in range(c.start, c.stop)] == list(range(num_rows))
    assert all(c.partition == 7 and 0 < c.stop - c.start <= chunk_rows for c in chunks)
    assert len({c.uri("out") for c in chunks}) == len(chunks)


def test_a_run_without_its_manifest_names_the_job_to_run(tmp_path):
    with pytest.raises(AttribError, match=r"manifest\.json is not there: run jobs\.manifest"):
        embed_job.run(settings_of(tmp_path))
    assert os.listdir(tmp_path) == []
