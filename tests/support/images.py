"""Small collections of valid images, written in every collection format."""

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
    """A few smooth blobs of colour; images of different seeds have clearly different features."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def pictures(keys) -> dict[str, bytes]:
    """{key: encoded image}; the extension of the key gives the format."""
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
    """Distribute the images over the shards, last first, so that the order differs from that of a folder."""
    items = list(images.items())[::-1]
    for shard in range(num_shards):
        storage.write_bytes(join(uri, f"{shard:03}.tar"), tar_bytes(dict(items[shard::num_shards]), format))


def write_parquet(images: dict[str, bytes], uri: str, storage: Storage, num_files: int = 1, row_group_rows: int = 3):
    """Write Parquet files with the columns name and image."""
    items = list(images.items())[::-1]
    for number in range(num_files):
        names, data = zip(*items[number::num_files])
        sink = io.BytesIO()
        table = pa.table({"name": pa.array(names), "image": pa.array(data, pa.binary())})
        pq.write_table(table, sink, row_group_size=row_group_rows)
        storage.write_bytes(join(uri, f"{number:03}.parquet"), sink.getvalue())


def write_uri_parquet(images: dict[str, bytes], uris: dict[str, str | None], uri: str, storage: Storage) -> None:
    """Write a Parquet file with the columns name and where (uris[key]), in reverse order."""
    names = list(images)[::-1]
    storage.write_table(join(uri, "images.parquet"), pa.table({"name": names, "where": [uris[name] for name in names]}))
