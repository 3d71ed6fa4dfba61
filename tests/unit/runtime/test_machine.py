"""Measurements of the memory of this process and the speed of this machine."""

import time
from dataclasses import asdict

import numpy as np
import pytest

from attrib.runtime.machine import fastest, measure_answers, measure_machine, peak_bytes, reset_peak, resident_bytes

MIB = 2**20


def test_peak_remains_after_the_memory_is_freed():
    reset_peak()
    before = resident_bytes()
    np.ones(64 * MIB, np.uint8)
    assert 60 * MIB < peak_bytes() - before < 80 * MIB
    reset_peak()
    assert peak_bytes() - resident_bytes() < 8 * MIB


@pytest.mark.parametrize("measured", [lambda: measure_machine(64, 1), lambda: measure_answers(64)])
def test_rates_are_finite(measured):
    rates = asdict(measured())
    assert len(rates) >= 3 and all(0 < value < float("inf") for value in rates.values())


def test_fastest_call_is_returned_and_the_first_is_ignored():
    seconds = iter([0.0, 0.02, 0.005, 0.02, *[1.0] * 9])
    assert 0.005 <= fastest(lambda: time.sleep(next(seconds)), 0.03) < 0.02
    assert next(seconds) == 1.0  # it stopped once 0.03 s had passed
