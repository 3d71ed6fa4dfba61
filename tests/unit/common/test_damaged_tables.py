"""A damaged file that is in no record yet, such as a chunk of a killed run, is refused by name."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from support.files import LOCAL

from attrib.common.errors import AttribError
from attrib.common.seal import SEAL_BYTES, sealed_sha256

TABLE = pa.table(
    {
        "id": pa.array(range(300)),
        "text": [f"row {i}" for i in range(300)],
        "maybe": pa.array([None if i % 3 else i for i in range(300)]),
        "score": np.linspace(0, 1, 300),
    }
)
SOME_IDS = pc.field("id").isin(range(20, 40))


def sealed_file(folder, row_group_rows: int = 100) -> tuple[str, bytes]:
    uri = str(folder / "chunk.parquet")
    LOCAL.write_table(uri, TABLE, row_group_rows)
    return uri, LOCAL.read_bytes(uri)


def flipped(data: bytes, place: int, bit: int) -> bytes:
    changed = bytearray(data)
    changed[place] ^= 1 << bit
    return bytes(changed)


def test_every_flipped_bit_of_a_sealed_table_is_refused(tmp_path):
    uri, data = sealed_file(tmp_path)
    for place in range(len(data)):
        with pytest.raises(AttribError, match=r"chunk\.parquet is damaged"):
            sealed_sha256(flipped(data, place, place % 8), uri)


def test_a_table_that_was_cut_or_continued_is_refused(tmp_path):
    uri, data = sealed_file(tmp_path)
    with pytest.raises(AttribError, match=r"chunk\.parquet is damaged"):
        sealed_sha256(data + data, uri)
    for changed in [data[:length] for length in range(0, len(data), 97)] + [data + b"\0"]:
        LOCAL.write_bytes(uri, changed)
        for read in (LOCAL.read_sealed, lambda uri: LOCAL.read_rows(uri, 0, 9, check_footer=True)):
            with pytest.raises(AttribError, match=r"chunk\.parquet is damaged"):
                read(uri)


def test_a_flipped_bit_of_what_is_read_in_part_is_refused_or_changes_nothing(tmp_path):
    """Pages have their own checksums and the footer has that of the seal. Headers of pages have neither."""
    uri, data = sealed_file(tmp_path)
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    groups = pq.read_metadata(uri)
    starts = [groups.row_group(g).column(c).data_page_offset for g in range(3) for c in range(4)]
    headers = {start + byte for start in starts for byte in range(60)}
    num_refused = 0
    for place in range(0, len(data), 11):
        LOCAL.write_bytes(uri, flipped(data, place, place % 8))
        for read, expected in (
            (lambda: LOCAL.read_table(uri, filter=SOME_IDS, check_footer=True), TABLE.slice(20, 20)),
            (lambda: LOCAL.read_rows(uri, 90, 120, check_footer=True), TABLE.slice(90, 30)),
        ):
            try:
                found = read()
            except AttribError as error:
                assert "chunk.parquet is damaged" in str(error)
                num_refused += 1
            else:
                assert place < footer - SEAL_BYTES // 2, "a bit of the footer went unseen"
                assert place in headers or found.to_pydict() == expected.to_pydict(), place
    assert num_refused > len(data) / 11


def test_a_sealed_table_is_plain_parquet_for_others(tmp_path):
    uri, _ = sealed_file(tmp_path)
    assert LOCAL.read_sealed(uri) == TABLE == pq.read_table(uri) == pyarrow.dataset.dataset(uri).to_table()
    assert LOCAL.read_sealed(uri, ["id"], SOME_IDS)["id"].to_pylist() == list(range(20, 40))
    assert LOCAL.read_rows(uri, 90, 120, ["id"], check_footer=True)["id"].to_pylist() == list(range(90, 120))


def test_a_damaged_array_is_refused(tmp_path):
    uri, array = str(tmp_path / "lists.npy"), np.arange(32)
    LOCAL.write_array(uri, array)
    data = LOCAL.read_bytes(uri)
    assert (LOCAL.read_array(uri, sealed=True) == array).all() and (np.load(uri) == array).all()
    for changed in [flipped(data, place, place % 8) for place in range(len(data))] + [data[:-32], b"", data + b"\0"]:
        LOCAL.write_bytes(uri, changed)
        with pytest.raises(AttribError, match=r"lists\.npy is damaged"):
            LOCAL.read_array(uri, sealed=True)


def test_an_absent_file_is_not_called_damaged(tmp_path):
    for read in (LOCAL.read_table, LOCAL.read_sealed):
        with pytest.raises(FileNotFoundError):
            read(str(tmp_path / "none.parquet"))


def test_an_array_with_any_bit_of_its_header_flipped_is_read_or_refused(tmp_path):
    """NumPy parses the header as Python."""
    uri = str(tmp_path / "ids.npy")
    LOCAL.write_array(uri, np.arange(5))
    data, num_refused = LOCAL.read_bytes(uri), 0
    for place in range(len(data) - 72):  # what follows are the numbers and their checksum
        for bit in range(8):
            LOCAL.write_bytes(uri, flipped(data, place, bit))
            try:
                LOCAL.read_array(uri)
            except AttribError as error:
                assert "ids.npy is damaged" in str(error)
                num_refused += 1
    assert num_refused > 100
