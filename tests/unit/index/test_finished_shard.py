"""A shard of a run that did not end is made again unless all of its files are there."""

import pytest
from support.files import LOCAL

from attrib.common.json_records import with_checksum
from attrib.common.storage import bytes_sha256
from attrib.index.shard import SHARD_RECORD, finished_shard

SOURCES = b"rows of sources"


@pytest.fixture
def shard(tmp_path):
    record = {"files": {"ids.npy": {"sha256": bytes_sha256(b"ids"), "num_bytes": 3}}, "num_vectors": 1}
    record["sources_sha256"] = bytes_sha256(SOURCES)
    LOCAL.write_json(str(tmp_path / SHARD_RECORD), with_checksum(record))
    (tmp_path / "ids.npy").write_bytes(b"ids")
    (tmp_path / "sources.parquet").write_bytes(SOURCES)
    return tmp_path


def test_a_whole_shard_is_kept(shard):
    assert finished_shard(str(shard), LOCAL)["num_vectors"] == 1


@pytest.mark.parametrize("name", ["ids.npy", "sources.parquet"])
@pytest.mark.parametrize("content", [None, b"", b"idsx", SOURCES + b"x"])
def test_a_shard_whose_file_is_missing_or_another_one_is_made_again(shard, name, content):
    (shard / name).unlink()
    if content is not None:
        (shard / name).write_bytes(content)
    assert finished_shard(str(shard), LOCAL) is None
