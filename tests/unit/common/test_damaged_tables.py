"""A damaged Parquet file that is in no record, such as a chunk of a killed run, is refused by name."""

import numpy as np
import pyarrow as pa
import pytest
from support.files import LOCAL

from attrib.common.errors import AttribError

TABLE = pa.table(
    {"id": pa.array(range(300)), "text": [f"row {i}" for i in range(300)], "score": np.linspace(0, 1, 300)}
)


def test_a_flipped_bit_of_a_page_is_refused_or_changes_nothing(tmp_path):
    """Pages have checksums, the footer has none: that of a file without a record is not protected."""
    uri = str(tmp_path / "chunk.parquet")
    LOCAL.write_table(uri, TABLE)
    data = LOCAL.read_bytes(uri)
    num_refused = 0
    pages = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    for place in range(4, pages, 7):
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 8
        LOCAL.write_bytes(uri, bytes(flipped))
        for read in (lambda: LOCAL.read_table(uri), lambda: LOCAL.read_rows(uri, 0, 300)):
            try:
                found = read()
            except AttribError as error:
                assert "chunk.parquet is damaged" in str(error)
                num_refused += 1
            else:  # of a page's statistics, which nothing reads
                assert found.to_pydict() == TABLE.to_pydict(), place
    assert num_refused > pages / 14


def test_an_absent_file_is_not_called_damaged(tmp_path):
    with pytest.raises(FileNotFoundError):
        LOCAL.read_table(str(tmp_path / "none.parquet"))
