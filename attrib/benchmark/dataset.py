"""The benchmark vectors as the jobs read them: a manifest and embeddings on disk.

Contenders of building and searching import this module, so it must not load torch, which would dominate their memory.
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
from attrib.embed.embeddings import EMBEDDINGS_RECORD, schema

PARTITION_ROWS = 16_384  # the manifest job's default


def row_ids(name: str, num_rows: int) -> np.ndarray:
    """int64 [n]: the id of each vector, by its row. Its key is 00000000.jpg, 00000001.jpg, ..."""
    return image_ids(name, [f"{row:08d}.jpg" for row in range(num_rows)])


def write_dataset(folder: str, name: str, vectors: np.ndarray) -> str:
    """Write a manifest and embeddings of `vectors`, float16 [n, d], unless they exist. Returns the embeddings' URI.

    Rows are sorted by id within each partition.
    """
    storage, dimension = Storage(StorageSettings()), vectors.shape[1]
    uri, manifest_uri = join(folder, "embeddings"), join(folder, "manifest")
    if storage.exists(join(uri, EMBEDDINGS_RECORD)):
        return uri
    ids, num_rows = row_ids(name, len(vectors)), []
    for partition, start in enumerate(range(0, len(vectors), PARTITION_ROWS)):
        rows = start + np.argsort(ids[start : start + PARTITION_ROWS])
        keys = [f"{row:08d}.jpg" for row in rows]
        located = {
            "id": pa.array(ids[rows]),
            "key": pa.array(keys),
            "uri": pa.array([f"/{name}/{key}" for key in keys]),
        }
        values = pa.array(vectors[rows].ravel())
        embedded = {"id": located["id"], "embedding": pa.FixedSizeListArray.from_arrays(values, dimension)}
        _write(join(manifest_uri, part_name(partition)), located, pa.schema(LOCATION_FIELDS), storage)
        _write(join(uri, part_name(partition)), embedded, schema(dimension), storage)
        num_rows.append(len(rows))
    stamp = digest([name, len(vectors), dimension, os.path.basename(folder)])
    collection = CollectionSettings(name=name, uri=folder).model_dump(mode="json")
    listed = {"settings": {"collection": collection}, "num_rows": num_rows, "metadata_columns": []}
    listed |= dict.fromkeys(("digest", "order_digest", "rows_digest"), stamp)
    storage.write_json(join(manifest_uri, MANIFEST_RECORD), listed)
    encoder = {"name": "benchmark", "model_digest": "benchmark", "preprocessing": {}, "dimension": dimension}
    embedded = {"settings": {"manifest": manifest_uri}, "encoder": encoder, "digest": stamp}
    storage.write_json(join(uri, EMBEDDINGS_RECORD), embedded | dict.fromkeys(("num_rows", "num_embedded"), num_rows))
    return uri


def _write(uri: str, columns: dict[str, pa.Array], fields: pa.Schema, storage: Storage) -> None:
    """Write a table; columns that are not given are null."""
    num_rows = len(columns["id"])
    arrays = [columns.get(field.name, pa.nulls(num_rows, field.type)) for field in fields]
    storage.write_table(uri, pa.table(arrays, schema=fields))
