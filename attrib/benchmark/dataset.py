"""The benchmark vectors as the jobs read them: a manifest and embeddings on disk.

Apart from vectors.py, because the contenders of building and searching import this module and must not load torch: it would
dominate their peak memory.
"""

import os

import numpy as np
import pyarrow as pa

from attrib.common.config import digest
from attrib.common.settings import StorageSettings
from attrib.common.storage import Storage, join
from attrib.data.collections import LOCATION_FIELDS
from attrib.data.ids import image_ids
from attrib.data.manifest import MANIFEST_RECORD, part_name
from attrib.data.settings import CollectionSettings
from attrib.embed.embeddings import EMBEDDINGS_RECORD, RESULT_FIELDS, schema

PARTITION_ROWS = 16_384  # the manifest job's default


def row_ids(name: str, num_rows: int) -> np.ndarray:
    """int64 [n]: the id of each vector, by its row."""
    return image_ids(name, [_key(row) for row in range(num_rows)])


def _key(row: int) -> str:
    return f"{row:08d}.jpg"


def write_dataset(folder: str, name: str, vectors: np.ndarray) -> str:
    """Write a manifest and embeddings of `vectors`, float16 [n, d], unless they exist. Returns the embeddings' URI.

    Ids are those of the keys 00000000.jpg, ... in the collection `name`; rows are sorted by id within each partition.
    """
    storage = Storage(StorageSettings())
    uri, manifest_uri = join(folder, "embeddings"), join(folder, "manifest")
    if storage.exists(join(uri, EMBEDDINGS_RECORD)):
        return uri
    num_rows = []
    for partition, start in enumerate(range(0, len(vectors), PARTITION_ROWS)):
        rows = np.arange(start, min(start + PARTITION_ROWS, len(vectors)))
        keys = [_key(row) for row in rows]
        ids = image_ids(name, keys)
        order = np.argsort(ids)
        num_rows.append(len(rows))
        _write_manifest_part(join(manifest_uri, part_name(partition)), name, keys, ids, order, storage)
        _write_embeddings_part(join(uri, part_name(partition)), ids[order], vectors[rows[order]], storage)
    collection = CollectionSettings(name=name, uri=folder)
    stamp = digest([name, len(vectors), vectors.shape[1], os.path.basename(folder)])
    listed = {
        "settings": {"collection": collection.model_dump(mode="json")},
        "num_rows": num_rows,
        "metadata_columns": [],
    }
    digests = dict.fromkeys(("digest", "order_digest", "rows_digest"), stamp)
    storage.write_json(join(manifest_uri, MANIFEST_RECORD), listed | digests)
    embedded = {
        "settings": {"manifest": manifest_uri},
        "encoder": {
            "name": "benchmark",
            "model_digest": "benchmark",
            "preprocessing": {},
            "dimension": vectors.shape[1],
        },
        "digest": stamp,
        "num_rows": num_rows,
        "num_embedded": num_rows,
    }
    storage.write_json(join(uri, EMBEDDINGS_RECORD), embedded)
    return uri


def _write_manifest_part(uri: str, name: str, keys: list[str], ids: np.ndarray, order: np.ndarray, storage: Storage):
    columns = {field.name: pa.nulls(len(keys), field.type) for field in LOCATION_FIELDS}
    columns["id"] = pa.array(ids[order])
    columns["key"] = pa.array([keys[i] for i in order])
    columns["uri"] = pa.array([f"/{name}/{keys[i]}" for i in order])
    storage.write_table(uri, pa.table(list(columns.values()), schema=pa.schema(LOCATION_FIELDS)))


def _write_embeddings_part(uri: str, ids: np.ndarray, vectors: np.ndarray, storage: Storage) -> None:
    columns = [pa.nulls(len(ids), field.type) for field in RESULT_FIELDS]
    columns[0] = pa.array(ids)
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    storage.write_table(uri, pa.table([*columns, embedding], schema=schema(vectors.shape[1])))
