"""Measurements of this process and machine."""

import time
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pytest

from attrib.data.estimate import RowBytes, row_bytes
from attrib.data.manifest import Manifest
from attrib.embed.estimate import spread
from attrib.runtime.machine import fastest, measure_answers, measure_machine, peak_bytes, reset_peak, resident_bytes

MIB = 2**20


def test_the_peak_is_seen_after_the_memory_is_gone():
    reset_peak()
    before = resident_bytes()
    np.ones(64 * MIB, np.uint8)
    assert 60 * MIB < peak_bytes() - before < 80 * MIB
    reset_peak()
    assert peak_bytes() - resident_bytes() < 8 * MIB


def test_bytes_of_a_row_are_those_of_the_table_and_its_file():
    ids = np.random.default_rng(0).integers(0, 2**62, 5000)
    row = RowBytes.of(pa.table({"id": ids}))
    assert row.in_memory == 8 and row.on_disk == pytest.approx(8, rel=0.25)
    assert RowBytes.of(pa.table({"id": ids[:0]})) == RowBytes(0.0, 0.0)


def test_rows_of_a_collection_are_seen_without_their_places(tmp_path, local):
    keys = [f"{i}.jpg" for i in range(2000)]
    table = pa.table({"id": np.arange(2000)[::-1], "key": keys, "uri": keys, "owner": ["x"] * 2000, "row": keys})
    manifest = Manifest(str(tmp_path), None, "", "", "", [0, 2000], ["owner"])
    local.write_table(manifest.partition_uri(1), table)
    assert row_bytes(manifest, local) == RowBytes.of(table.drop_columns(["row"]).sort_by("id"))


def test_images_are_taken_from_all_of_a_partition():
    rows = pa.table({"id": np.arange(100)})
    assert spread(rows, 5)["id"].to_pylist() == [0, 24, 49, 74, 99]
    assert spread(rows, 500)["id"].to_pylist() == list(range(100))


@pytest.mark.parametrize("measured", [lambda: measure_machine(64, 1), lambda: measure_answers(64)])
def test_rates_are_finite(measured):
    rates = asdict(measured())
    assert len(rates) == 4 and all(0 < value < float("inf") for value in rates.values())


def test_the_quickest_call_is_told_and_the_first_is_left_out():
    seconds = iter([0.0, 0.02, 0.005, 0.02, *[1.0] * 9])
    assert 0.005 <= fastest(lambda: time.sleep(next(seconds)), 0.03) < 0.02
    assert next(seconds) == 1.0  # it stopped once 0.03 s had passed
