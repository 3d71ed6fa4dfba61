"""Estimates against the memory and the bytes of real work, at sizes that no constant was fitted on; and how they are told."""

import pyarrow as pa
import pytest
from support.hostile import encode
from support.images import picture, write_folder
from support.memory import measure

from attrib.common.settings import PriceSettings
from attrib.data.estimate import RowBytes, estimate_manifest
from attrib.embed.estimate import EncoderProbe, embedding_row_bytes, estimate_embed
from attrib.runtime.estimate import Estimate

TOLERANCE = 0.25
NUM_IMAGES = 112


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    from attrib.common.settings import StorageSettings
    from attrib.common.storage import Storage

    folder = tmp_path_factory.mktemp("estimates")
    pictures = {f"{i}.jpg": encode(picture(i, 640, 480), "JPEG") for i in range(NUM_IMAGES)}
    write_folder(pictures, f"{folder}/images", Storage(StorageSettings()))
    return folder


@pytest.mark.parametrize(("backbone", "num_images", "chunk_rows"), [("resnet10t", 112, 56), ("resnet18", 96, 96)])
def test_embedding_takes_the_memory_and_the_bytes_that_were_estimated(images, backbone, num_images, chunk_rows):
    sizes = {"folder": str(images), "backbone": backbone, "num_images": num_images, "chunk_rows": chunk_rows}
    found = measure("probe", **sizes)
    probe = EncoderProbe(**{name: found[name] for name in EncoderProbe.__dataclass_fields__})
    estimate = estimate_embed(num_images, found["dimension"], num_images, chunk_rows, 100.0, probe, num_workers=1)
    took = measure("embed", **sizes, output=f"out-{backbone}")
    # Of the libraries every estimate knows, so the rest is what is tested.
    growth, estimated = took["peak_bytes"] - took["baseline_bytes"], estimate.worker_bytes - probe.baseline_bytes
    assert growth == pytest.approx(estimated, rel=TOLERANCE)
    assert took["peak_bytes"] == pytest.approx(estimate.worker_bytes, rel=TOLERANCE)
    assert took["chunks_on_disk"] == pytest.approx(estimate.temporary_bytes, rel=TOLERANCE)
    assert took["partition_on_disk"] == pytest.approx(estimate.output_bytes, rel=TOLERANCE)


def test_a_larger_chunk_and_a_larger_network_need_more():
    probe = EncoderProbe(16, 500 << 20, 50 << 20, 100 << 20, 300_000, 0.01)
    small, large = (estimate_embed(10_000, 256, 4_096, rows, 100.0, probe, 2) for rows in (64, 512))
    assert large.worker_bytes - small.worker_bytes == 448 * (300_000 + 4_096 + 4 * 256)
    assert small.seconds == pytest.approx(10_000 * 0.01 / 2)
    heavy = EncoderProbe(16, 500 << 20, 4 << 30, 100 << 20, 300_000, 0.01)
    # Loading holds the weights twice, which is more than one batch needs.
    assert estimate_embed(100, 256, 100, 16, 100.0, heavy, 1).worker_bytes == (500 << 20) + (8 << 30)


def test_a_manifest_is_estimated_from_its_listed_rows():
    rows = pa.table({"id": list(range(1000)), "key": [f"folder/{i}.jpg" for i in range(1000)]})
    row = RowBytes.of(rows)
    small, large = (estimate_manifest(n, 500, row, 10**8, 2, 1e-4) for n in (1_000, 1_000_000))
    assert large.worker_bytes == small.worker_bytes  # bounded by the partition
    assert large.driver_bytes - 10**8 == 1000 * (small.driver_bytes - 10**8)
    assert large.output_bytes == pytest.approx(1000 * small.output_bytes, rel=1e-3)
    assert large.seconds == pytest.approx(50)


ESTIMATE = Estimate(
    num_workers=4,
    worker_bytes=int(0.9 * 2**30),
    driver_bytes=2**29,
    output_bytes=3 * 2**30,
    seconds=720,
    mapped_bytes=2**30,
    scratch_bytes=2**29,
    num_writes=2_000_000,
    num_reads=3_000_000,
)
PRICES = PriceSettings(
    currency="EUR",
    per_cpu_worker_hour=0.5,
    per_gpu_worker_hour=4,
    storage_per_gib_month=0.1,
    per_million_reads=0.4,
    per_million_writes=5,
)


def test_cost_is_hours_bytes_and_requests_at_the_users_prices():
    assert ESTIMATE.cost(None) is None
    assert ESTIMATE.cost(PRICES) == pytest.approx(4 * 0.2 * 0.5 + 3 * 0.1 + 3 * 0.4 + 2 * 5)
    on_gpus = Estimate(**(ESTIMATE.to_dict() | {"on_gpus": True}))
    assert on_gpus.cost(PRICES) - ESTIMATE.cost(PRICES) == pytest.approx(4 * 0.2 * 3.5)


def test_an_estimate_is_one_line():
    assert ESTIMATE.describe(PRICES) == (
        "estimate: 4 workers of 0.9 GiB (+ 1.0 GiB mapped), driver 0.5 GiB, output 3.0 GiB, scratch 0.5 GiB a worker, "
        "2,000,000 writes and 3,000,000 reads, about 12 min, 11.90 EUR"
    )
    assert ESTIMATE.remote(0, 0).describe().endswith("scratch 0.5 GiB a worker, about 12 min")


def test_halves_of_a_vector_hardly_compress():
    assert 2 * 256 < embedding_row_bytes(256) < 2 * 256 + 60
