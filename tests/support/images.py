"""Small collections of ordinary pictures, written in every form in which a collection may come."""

import io
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from attrib.common.storage import Storage, join
from support.hostile import encode

ODD_NAMES = (
    "plain.jpg",
    "with space.png",
    "UPPER.JPG",
    "日本/ü.jpg",
    "signs #?+%41&=.png",
    "deep/er/and/deeper.jpg",
    f"deep/{'long' * 40}.jpg",
)


def picture(seed: int, width: int = 64, height: int = 48) -> Image.Image:
    """A few soft blobs of colour, so that different seeds look different to any network."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def pictures(keys) -> dict[str, bytes]:
    """{key: encoded image}, in the format that the key's extension names."""
    return {
        key: encode(picture(seed), "PNG" if key.lower().endswith("png") else "JPEG") for seed, key in enumerate(keys)
    }


def write_folder(images: dict[str, bytes], uri: str, storage: Storage) -> None:
    for key, data in images.items():
        storage.write_bytes(join(uri, key), data)


def tar_bytes(images: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for key, data in images.items():
            member = tarfile.TarInfo(key)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def write_tars(
    images: dict[str, bytes], uri: str, storage: Storage, num_shards: int = 1, format: int = tarfile.PAX_FORMAT
) -> None:
    """Images dealt to the shards in turn, the last first, so that the order is not that of a folder."""
    items = list(images.items())[::-1]
    for shard in range(num_shards):
        storage.write_bytes(join(uri, f"{shard:03}.tar"), tar_bytes(dict(items[shard::num_shards]), format))


def write_parquet(images: dict[str, bytes], uri: str, storage: Storage, num_files: int = 1, row_group_rows: int = 3):
    """Columns name and image."""
    items = list(images.items())[::-1]
    for number in range(num_files):
        names, data = zip(*items[number::num_files])
        sink = io.BytesIO()
        table = pa.table({"name": pa.array(names), "image": pa.array(data, pa.binary())})
        pq.write_table(table, sink, row_group_size=row_group_rows)
        storage.write_bytes(join(uri, f"{number:03}.parquet"), sink.getvalue())


def write_uri_parquet(images: dict[str, bytes], uris: dict[str, str | None], uri: str, storage: Storage) -> None:
    """Columns name and where: uris[key] for every key, in reverse order."""
    names = list(images)[::-1]
    storage.write_table(join(uri, "images.parquet"), pa.table({"name": names, "where": [uris[name] for name in names]}))
