"""The estimate of a job: its cost and its description."""

from dataclasses import replace

import pytest

from attrib.common.settings import PriceSettings
from attrib.runtime.estimate import Estimate

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


def test_cost_is_the_sum_of_hours_bytes_and_requests():
    assert ESTIMATE.cost(None) is None
    assert ESTIMATE.cost(PRICES) == pytest.approx(4 * 0.2 * 0.5 + 3 * 0.1 + 3 * 0.4 + 2 * 5)
    on_gpus = Estimate(**(ESTIMATE.to_dict() | {"on_gpus": True}))
    assert on_gpus.cost(PRICES) - ESTIMATE.cost(PRICES) == pytest.approx(4 * 0.2 * 3.5)


def test_description_is_one_line():
    assert ESTIMATE.describe(PRICES) == (
        "estimate: 4 workers of 0.9 GiB (+ 1.0 GiB mapped), driver 0.5 GiB, output 3.0 GiB, scratch 0.5 GiB a worker, "
        "2,000,000 writes and 3,000,000 reads, about 12 min, 11.90 EUR"
    )
    assert replace(ESTIMATE, num_writes=0, num_reads=0).describe().endswith("scratch 0.5 GiB a worker, about 12 min")
