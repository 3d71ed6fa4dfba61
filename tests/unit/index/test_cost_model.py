"""The cost model: predicted seconds and chosen engines."""

import dataclasses

import numpy as np
import pytest
from support.shards import make_plan

from attrib.index.cost_model import SearchRates, exact_seconds, lists_seconds, measure_rates, plan_search
from attrib.index.index import Index

RATES = SearchRates(per_list=2e-5, per_value=2e-10, per_list_product=3e-11, per_block_product=2e-11)
MILLION = 1_000_000


def index(kind: str = "ivf_flat", num_vectors: int = MILLION, nprobe: int = 40, **changes) -> Index:
    recall = {"probed_share": nprobe / 4096}
    shards = [{"num_vectors": num_vectors // 2}] * 2
    encoder = {"dimension": 256}
    made = Index("/i", "d", encoder, make_plan(kind, 4096), "t", shards, nprobe, 8, recall, [], True, {})
    return dataclasses.replace(made, rates=RATES.to_dict(), **changes)


def test_lists_are_chosen_if_a_query_sees_a_small_share():
    plan = plan_search(index(), 10_000)
    assert (plan.engine, plan.nprobe) == ("lists", 40)
    assert plan.seconds < exact_seconds(RATES, MILLION, 10_000, 256) / 10
    assert f"expected {plan.seconds:.1f} s" in plan.reason and "exact" in plan.reason


def test_exact_search_is_chosen_if_lists_save_nothing():
    """For vectors without structure, the recall target needs almost all lists."""
    plan = plan_search(index(nprobe=3900), 10_000)
    assert (plan.engine, plan.nprobe) == ("exact", 0)
    assert plan.seconds == exact_seconds(RATES, MILLION, 10_000, 256)
    assert plan_search(index("flat"), 10).engine == "exact"


def test_codes_are_scanned_only_if_vectors_do_not_fit():
    assert plan_search(index("ivf_sq8"), 10_000).engine == "lists"
    plan = plan_search(index("ivf_sq8", vectors_fit=False), 10_000)
    assert plan.engine == "codes" and "the vectors exceed the memory" in plan.reason


def test_engine_of_the_config_is_used():
    for wanted in ("exact", "lists", "codes"):
        plan = plan_search(index("ivf_pq"), 10_000, wanted)
        assert (plan.engine, plan.nprobe, plan.reason) == (
            wanted,
            0 if wanted == "exact" else 40,
            "chosen in the config",
        )
    assert plan_search(index(nprobe=3900), 10_000, nprobe=3950).engine == "lists"
    assert plan_search(index(), 10, nprobe=99_999).nprobe == 4096


def test_seconds_grow_with_the_work():
    assert exact_seconds(RATES, 2 * MILLION, 50, 256) == pytest.approx(2 * exact_seconds(RATES, MILLION, 50, 256))
    ten, twenty = (lists_seconds(RATES, index(), n, 40, 40 / 4096, 256) for n in (10_000, 20_000))
    assert 1.5 < twenty / ten < 2  # lists are visited once, however many queries there are
    few = lists_seconds(RATES, index(), 1, 40, 40 / 4096, 256)
    assert few < ten / 100


def test_seconds_count_the_operations_of_a_scan():
    """One shard with all lists probed: the sum of all operations, computed by hand."""
    one = dataclasses.replace(index(num_vectors=4000), shards=[{"num_vectors": 4000}])
    parts = [4096 * RATES.per_list, 4000 * 256 * RATES.per_value, 7 * 4000 * 256 * RATES.per_list_product]
    parts.append(7 * 4096 * 256 * RATES.per_block_product)
    assert lists_seconds(RATES, one, 7, 4096, 1.0, 256) == pytest.approx(sum(parts))


def test_measured_rates_are_plausible_and_survive_json():
    rates = measure_rates(64)
    values = list(rates.to_dict().values())
    assert all(0 < value < 1e-3 for value in values)
    assert rates.per_list > 100 * rates.per_value > 0
    assert SearchRates(**rates.to_dict()) == rates
    assert np.isfinite(values).all()
