"""A record without a checksum that lacks a value, or holds one of another type, is refused by name."""

import json
from collections.abc import Callable

import pytest
from support.files import LOCAL

from attrib.common.errors import AttribError
from attrib.data.manifest import MANIFEST_RECORD, open_manifest
from attrib.embed.embeddings import EMBEDDINGS_RECORD, open_embeddings
from attrib.index.index import INDEX_RECORD, open_index
from attrib.index.quantizer import trained_sha256
from attrib.index.shard import SHARD_RECORD, finished_shard

READERS: dict[str, Callable[[str], object]] = {
    MANIFEST_RECORD: lambda folder: open_manifest(folder, LOCAL),
    EMBEDDINGS_RECORD: lambda folder: open_embeddings(folder, LOCAL),
    INDEX_RECORD: lambda folder: open_index(folder, LOCAL),
    SHARD_RECORD: lambda folder: finished_shard(folder, LOCAL),
    "template.json": lambda folder: trained_sha256(f"{folder}/template.faiss", LOCAL),
}
EMPTY = {MANIFEST_RECORD: {}, EMBEDDINGS_RECORD: {}, INDEX_RECORD: {"rates": {}}, SHARD_RECORD: {}, "template.json": {}}
OF_OTHER_TYPES = {
    MANIFEST_RECORD: {"settings": {"collection": {"name": 1}}},
    EMBEDDINGS_RECORD: {"encoder": 1, "digest": "", "num_rows": [], "num_embedded": [], "settings": "x"},
    INDEX_RECORD: {"rates": {}, "plan": ["flat"]},
    SHARD_RECORD: {"files": ["ids.npy"]},
}


@pytest.mark.parametrize("values", [EMPTY, OF_OTHER_TYPES])
@pytest.mark.parametrize("name", READERS)
def test_a_record_without_its_values_is_refused_by_name(name, values, tmp_path):
    (tmp_path / name).write_text(json.dumps(values.get(name, {"sha": 1})))
    with pytest.raises(AttribError, match=rf"{name} is damaged.*restore it from a copy"):
        READERS[name](str(tmp_path))
