"""Runs of the embed job on local folders and S3, and their rows by image key."""

import io
import random

from attrib.common.settings import StorageSettings
from attrib.common.storage import Storage, join
from attrib.data import job as manifest_job
from attrib.data.manifest import open_manifest
from attrib.data.settings import ManifestSettings
from attrib.embed import job as embed_job
from attrib.embed.embeddings import open_embeddings
from attrib.embed.settings import EmbedSettings
from support.files import LOCAL
from support.images import picture, write_tars

BACKBONE = {"name": "test_resnet", "weights": "random"}


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


def run_on_tars(folder, s3_endpoint: str, num_images: int) -> tuple[dict[str, bytes], EmbedSettings]:
    """Embed shuffled tar shards on S3 with one worker. Returns the images, one of them truncated, and the settings."""
    images = {}
    for i in range(num_images):  # large images, so that there is time to interrupt the run
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
    return images, settings
