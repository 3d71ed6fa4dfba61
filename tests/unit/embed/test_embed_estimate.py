"""The arithmetic of the embed estimate; its peaks are compared with real work in tests/slow/test_estimates.py."""

import numpy as np
import pyarrow as pa
import pytest

from attrib.embed.estimate import EncoderProbe, embedding_row_bytes, estimate_embed, spread


def test_larger_chunk_and_larger_network_need_more_memory():
    probe = EncoderProbe(16, 500 << 20, 50 << 20, 100 << 20, 300_000, 0.01)
    small, large = (estimate_embed(10_000, 256, 4_096, rows, 100.0, probe, 2) for rows in (64, 512))
    assert large.worker_bytes - small.worker_bytes == 448 * (300_000 + 4 * 256)
    assert small.seconds == pytest.approx(10_000 * 0.01 / 2)
    heavy = EncoderProbe(16, 500 << 20, 4 << 30, 100 << 20, 300_000, 0.01)
    # Loading holds the weights twice, which is more than one batch needs.
    assert estimate_embed(100, 256, 100, 16, 100.0, heavy, 1).worker_bytes == (500 << 20) + (8 << 30)


def test_compression_saves_little_on_float16_vectors():
    assert 2 * 256 < embedding_row_bytes(256) < 2 * 256 + 60


def test_probed_images_are_spread_over_the_partition():
    rows = pa.table({"id": np.arange(100)})
    assert spread(rows, 5)["id"].to_pylist() == [0, 24, 49, 74, 99]
    assert spread(rows, 500)["id"].to_pylist() == list(range(100))
