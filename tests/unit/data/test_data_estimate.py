"""Row sizes and the estimate of a manifest job."""

import numpy as np
import pyarrow as pa
import pytest

from attrib.data.estimate import RowBytes, estimate_manifest, row_bytes
from attrib.data.manifest import Manifest


def test_row_bytes_are_those_of_the_table_and_its_file():
    ids = np.random.default_rng(0).integers(0, 2**62, 5000)
    row = RowBytes.of(pa.table({"id": ids}))
    assert row.in_memory == 8 and row.on_disk == pytest.approx(8, rel=0.25)
    assert RowBytes.of(pa.table({"id": ids[:0]})) == RowBytes(0.0, 0.0)


def test_row_bytes_of_a_manifest_leave_out_the_row_column(tmp_path, local):
    keys = [f"{i}.jpg" for i in range(2000)]
    table = pa.table({"id": np.arange(2000)[::-1], "key": keys, "uri": keys, "owner": ["x"] * 2000, "row": keys})
    manifest = Manifest(str(tmp_path), None, "", "", "", [0, 2000], ["owner"])
    local.write_table(manifest.partition_uri(1), table)
    assert row_bytes(manifest, local) == RowBytes.of(table.drop_columns(["row"]).sort_by("id"))


def test_manifest_estimate_scales_with_the_listed_rows():
    rows = pa.table({"id": list(range(1000)), "key": [f"folder/{i}.jpg" for i in range(1000)]})
    row = RowBytes.of(rows)
    small, large = (estimate_manifest(n, 500, row, 10**8, 2, 1e-4) for n in (1_000, 1_000_000))
    assert large.worker_bytes == small.worker_bytes  # bounded by the partition
    assert large.driver_bytes - 10**8 == 1000 * (small.driver_bytes - 10**8)
    assert large.output_bytes == pytest.approx(1000 * small.output_bytes, rel=1e-3)
    assert large.seconds == pytest.approx(50)
