"""What the fuzz tier reads: whole inputs of users of each kind, and the readers that get their damaged forms.

Files that jobs write are in fuzz_records.py.
"""

import io
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from attrib.common.errors import ImageError
from attrib.data.collections import list_images, list_units
from attrib.data.decoding import decode_pixels
from attrib.data.parquet_files import shown_rows
from attrib.data.reading import read_image_or_error, read_parquet_images
from attrib.data.settings import CollectionSettings, MetadataSettings
from attrib.data.sidecar import Met, describe_met, join_metadata
from support.bmp_gif import bmp_table, gif_table
from support.files import LOCAL
from support.fuzz import Target
from support.fuzz_records import RECORD_TARGETS
from support.hostile import encode, hostile_images, picture
from support.images import pictures, tar_bytes
from support.mutations import repair_image, repair_tar
from support.odd_tars import END, gnu_sparse, hardlink, member, pax, pax_sparse, symlink
from support.png import png_table

MAX_MEGAPIXELS = 0.5
MIN_SIDE_PX = 8  # of a scaled JPEG
IMAGES = pictures(["a.png", "b.jpg", "c.png"])
KEYS, DATA = list(IMAGES), list(IMAGES.values())


def _images() -> dict[str, bytes]:
    rng = random.Random(0)
    plain, small = picture(), picture(48, 40)
    found = {name: data for name, (data, reason) in hostile_images().items() if reason is None and len(data) < 40_000}
    for kind, table in {"png": png_table(), "bmp": bmp_table(), "gif": gif_table()}.items():
        for name in rng.sample(sorted(table), 24):
            data = table[name]
            found[f"{name}.{kind}"] = data if isinstance(data, bytes) else data[0]
    modes = {"1": "1", "L": "L", "LA": "LA", "P": "P", "RGB": "RGB", "RGBA": "RGBA", "CMYK": "CMYK", "YCbCr": "YCbCr"}
    for compression in (None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "group3", "group4"):
        for mode in modes if compression not in ("group3", "group4") else ("1",):
            if compression == "jpeg" and mode not in ("L", "RGB", "YCbCr", "CMYK"):
                continue
            if compression is None or mode in ("1", "RGB", "P", "CMYK"):
                image = small.convert("L").convert("LA") if mode == "LA" else small.convert(mode)
                found[f"{mode}-{compression}.tif"] = encode(image, "TIFF", compression=compression)
    deep = np.arange(48 * 40, dtype=np.uint16).reshape(40, 48) * 34
    found["16.tif"] = encode(Image.fromarray(deep), "TIFF", compression="tiff_lzw")
    found["float.tif"] = encode(Image.fromarray(deep.astype(np.float32)), "TIFF", compression="tiff_adobe_deflate")
    found["pages.tif"] = encode(small, "TIFF", save_all=True, append_images=[small.convert("L"), small])
    for sampling in (0, 1, 2):
        found[f"sampling-{sampling}.jpg"] = encode(plain, "JPEG", subsampling=sampling)
    found |= {
        "restarts.jpg": encode(plain, "JPEG", restart_marker_blocks=2),
        "optimised.jpg": encode(plain, "JPEG", optimize=True, progressive=True),
        "progressive-cmyk.jpg": encode(plain.convert("CMYK"), "JPEG", progressive=True),
        "alpha.webp": encode(small.convert("RGBA"), "WEBP"),
        "lossless.webp": encode(small, "WEBP", lossless=True),
        "plain.avif": encode(small, "AVIF", quality=60),
        "alpha.avif": encode(small.convert("RGBA"), "AVIF"),
        "frames.avif": encode(small, "AVIF", save_all=True, append_images=[small.transpose(1)]),
        "plain.jp2": encode(small, "JPEG2000"),
        "lossy.jp2": encode(small, "JPEG2000", irreversible=True, quality_layers=[20, 5]),
        "tiles.jp2": encode(small, "JPEG2000", tile_size=(16, 16)),
        "codestream.j2k": encode(small.convert("L"), "JPEG2000", no_jp2=True),
    }
    return found


def _read_image(name: str, data: bytes, folder: Path) -> None:
    pixels, width, height, format, _ = decode_pixels(data, max_megapixels=MAX_MEGAPIXELS)
    assert pixels.dtype == np.uint8 and pixels.shape == (height, width, 3)
    assert 0 < pixels.size <= 3e6 * MAX_MEGAPIXELS
    if format in ("JPEG", "MPO"):
        scaled, *size, _, shrink = decode_pixels(data, max_megapixels=MAX_MEGAPIXELS, min_side_px=MIN_SIDE_PX)
        assert size == [width, height] and scaled.dtype == np.uint8
        assert scaled.shape == (-(-height // shrink), -(-width // shrink), 3)


def _tars() -> dict[str, bytes]:
    a, b, c = DATA
    segments = [(1024 * i, b"z" * 512) for i in range(30)]
    return {
        "plain": tar_bytes(IMAGES),
        "long names": tar_bytes({"d" * 150 + "/a.png": a}, format=1),
        "joined": member("a.png", a) + END + member("b.png", b) + bytes(512) + member("c.png", c) + END,
        "links": member("x", a) + hardlink("a.png", "x") + symlink("b.png", "a.png") + symlink("c.png", "c.png") + END,
        "sparse": gnu_sparse("a.png", segments, 61440) + pax_sparse("c.png", segments[:2], 9000) + END,
        "attributes": pax({"path": "ü.png", "size": str(len(a)), "comment": "x" * 600}) + member("x", a) + END,
        "global": pax({"comment": "by git"}, b"g") + member("a.png", a) + END,
    }


def _read_tar(name: str, data: bytes, folder: Path) -> None:
    (folder / "0.tar").write_bytes(data)
    collection = CollectionSettings(name="c", uri=str(folder), format="webdataset")
    for row in _listed(collection):
        found = read_image_or_error(row, LOCAL, collection)
        assert isinstance(found, bytes) and len(found) == row["num_bytes"]
        assert data[row["offset"] : row["offset"] + row["num_bytes"]] == found


def _listed(collection: CollectionSettings) -> list[dict]:
    return [row for u in list_units(collection, LOCAL) for row in list_images(u, collection, LOCAL).to_pylist()]


def _parquet(table: pa.Table, **options) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


def _parquet_collections() -> dict[str, bytes]:
    images = pa.StructArray.from_arrays([pa.array(DATA), pa.array(KEYS)], ["bytes", "path"])
    plain = {"key": KEYS, "image": pa.array(DATA, pa.binary()), "n": [1, 2, 3]}
    dictionary = pa.array(KEYS).dictionary_encode()
    large = pa.array(DATA, pa.large_binary())
    return {
        "bytes plain": _parquet(pa.table(plain)),
        "bytes groups": _parquet(pa.table(plain), row_group_size=1, compression="zstd", data_page_version="2.0"),
        "bytes dictionary": _parquet(pa.table({"key": dictionary, "image": large, "n": [None, 1.5, 2]})),
        "bytes gzip": _parquet(pa.table(plain), compression="gzip", use_dictionary=False),
        "struct": _parquet(pa.table({"image": images, "n": pa.array([1, 2, 3], pa.timestamp("ns", "UTC"))})),
        "uris": _parquet(pa.table({"key": KEYS, "n": [["x"], [], None]})),
    }


def _read_parquet_collection(name: str, data: bytes, folder: Path) -> None:
    (folder / "0.parquet").write_bytes(data)
    (folder / "a.png").write_bytes(DATA[0])
    columns = {"key_column": "key", "bytes_column": "image"}
    if name == "struct":
        columns = {"key_column": "image.path", "bytes_column": "image.bytes"}
    elif name == "uris":
        columns = {"uri_column": "key"}
    collection = CollectionSettings(
        name="c", uri=str(folder), format="parquet", metadata_columns=("n",), max_image_bytes=1 << 20, **columns
    )
    tables = [list_images(unit, collection, LOCAL) for unit in list_units(collection, LOCAL)]
    rows = [row for table in tables for row in table.drop_columns("n").to_pylist()]
    for table in tables:
        shown_rows(table.slice(0, 100))
        LOCAL.write_table(str(folder / "listing"), table)  # as jobs.manifest does
    if collection.bytes_column:
        found = list(read_parquet_images(rows, collection.bytes_column, LOCAL))
    else:
        found = [read_image_or_error(row, LOCAL, collection) for row in rows]
    assert all(isinstance(image, bytes | ImageError) for image in found)


def _sidecars() -> dict[str, bytes]:
    rows = [["key", "owner", "year"], ["a.png", 'Bob, "Jr."', "1"], ["b.jpg", "the\nline", "2"], ["c", "ü", ""]]
    quoted = "\n".join(",".join('"' + cell.replace('"', '""') + '"' for cell in row) for row in rows)
    tabbed = "\n".join("\t".join(cell.replace("\n", " ") for cell in row) for row in rows)
    table = pa.table({"key": ["a.png", "b", "c"], "owner": ["x", None, "y"], "when": pa.array([0, 1, 2], pa.date32())})
    views = pa.table({"key": pa.array(["a.png", "b"], pa.string_view()), "label": [[1], [2, 3]]})
    return {
        "about.csv": quoted.encode(),
        "crlf.csv": quoted.replace("\n", "\r\n").encode(),
        "long.csv": ("key,owner\na.png,first\n" + "".join(f"{i}.png,owner {i}\n" for i in range(3000))).encode(),
        "about.tsv": tabbed.encode(),
        "about.parquet": _parquet(table, compression="zstd"),
        "views.parquet": _parquet(views),
    }


def _read_sidecar(name: str, data: bytes, folder: Path) -> None:
    (folder / name).write_bytes(data)
    settings = MetadataSettings(uri=str(folder / name))
    collection, met = CollectionSettings(name="c", uri=str(folder / "images"), metadata=settings), Met()
    images = pa.table({"key": KEYS})
    joined = join_metadata(images, collection, LOCAL, met)
    assert joined["key"].to_pylist() == KEYS and met.num_images == len(KEYS)
    shown_rows(joined)
    LOCAL.write_table(str(folder / "part.parquet"), joined)
    describe_met(met, collection, [str(folder / "part.parquet")], LOCAL)


TARGETS = {
    "image": Target(_images, _read_image, (ImageError,), repair_image, weight=10),
    "tar": Target(_tars, _read_tar, repair=repair_tar, weight=3),
    "Parquet collection": Target(_parquet_collections, _read_parquet_collection, weight=2),
    "sidecar": Target(_sidecars, _read_sidecar, weight=2),
} | RECORD_TARGETS
