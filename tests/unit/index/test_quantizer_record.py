"""A quantizer of a killed build counts as trained only with its record, and not when it is damaged."""

import os

import numpy as np
import pytest
from support.files import LOCAL

from attrib.common.errors import AttribError
from attrib.index.normalize import unit_rows
from attrib.index.planning import IndexPlan
from attrib.index.quantizer import record_uri, train_quantizer, trained_sha256, write_quantizer


def test_only_an_undamaged_quantizer_with_its_record_is_used(tmp_path):
    uri = str(tmp_path / "template.faiss")
    assert trained_sha256(uri, LOCAL) is None
    vectors = unit_rows(np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32))
    write_quantizer(train_quantizer(vectors, IndexPlan("ivf_sq8", 2, 0, 1, 0, 0, 0, "test"), 0), uri, LOCAL)
    assert trained_sha256(uri, LOCAL)
    data = bytearray(LOCAL.read_bytes(uri))
    data[len(data) // 2] ^= 1
    LOCAL.write_bytes(uri, bytes(data))
    with pytest.raises(AttribError, match=r"template\.faiss is damaged"):
        trained_sha256(uri, LOCAL)
    os.unlink(record_uri(uri))  # killed between the two files: trained again
    assert trained_sha256(uri, LOCAL) is None
