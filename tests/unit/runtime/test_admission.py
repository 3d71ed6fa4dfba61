"""A job over its budget, or larger than the disk, is an error with the numbers, before any work."""

import pytest

from attrib.common.config import validate
from attrib.common.errors import AttribError
from attrib.common.settings import BudgetSettings, JobSettings, PriceSettings, result_settings
from attrib.data.settings import ManifestSettings
from attrib.pipeline.settings import PipelineSettings
from attrib.runtime.admission import check_budget, check_free_space
from attrib.runtime.estimate import Estimate

GIB = 2**30
ESTIMATE = Estimate(
    num_workers=2, worker_bytes=3 * GIB, driver_bytes=GIB, output_bytes=4 * GIB, seconds=7200, temporary_bytes=2 * GIB,
    scratch_bytes=5 * GIB,
)  # fmt: skip
PRICES = PriceSettings(currency="EUR", per_cpu_worker_hour=2.0)


def test_estimate_within_the_limits_is_admitted():
    check_budget(ESTIMATE, BudgetSettings(), {})
    limits = BudgetSettings(
        max_process_gib=3, max_output_gib=6, max_scratch_gib=5, max_hours=2, max_cost=8, prices=PRICES
    )
    check_budget(ESTIMATE, limits, {})


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (
            {"max_process_gib": 2.9},
            "memory of a worker: about 3 GiB, budget.max_process_gib = 2.9; lower chunk_rows, or",
        ),
        ({"max_output_gib": 5}, "output and temporary files: about 6 GiB, budget.max_output_gib = 5; raise"),
        ({"max_scratch_gib": 4}, "local disk of a worker: about 5 GiB, budget.max_scratch_gib = 4"),
        ({"max_hours": 1}, "time: about 2 h, budget.max_hours = 1"),
        ({"max_cost": 7, "prices": PRICES}, "cost: about 8 EUR, budget.max_cost = 7"),
    ],
)
def test_exceeded_limit_is_named_with_both_numbers_and_a_remedy(limits, expected):
    with pytest.raises(AttribError) as error:
        check_budget(ESTIMATE, BudgetSettings(**limits), {"max_process_gib": "lower chunk_rows"})
    assert expected in str(error.value) and str(error.value).count("\n") == 1


def test_error_names_all_exceeded_limits_and_the_driver():
    with pytest.raises(AttribError) as error:
        check_budget(ESTIMATE, BudgetSettings(max_process_gib=1, max_hours=1), {})
    assert str(error.value).count("\n") == 2
    driver = Estimate(**(ESTIMATE.to_dict() | {"driver_bytes": 9 * GIB}))
    with pytest.raises(AttribError, match="memory of the driver: about 9 GiB"):
        check_budget(driver, BudgetSettings(max_process_gib=4), {})


def test_cost_limit_needs_prices():
    values = {"collection": {"name": "c", "uri": "images"}, "output": "out", "budget": {"max_cost": 3}}
    with pytest.raises(AttribError, match="max_cost needs prices"):
        validate(ManifestSettings, values, "config.yaml")


def test_too_small_disk_is_named_with_its_free_space(tmp_path, monkeypatch):
    output = str(tmp_path / "not" / "there")
    check_free_space(Estimate(1, 0, 0, output_bytes=1000, seconds=1, scratch_bytes=1000), output, 1)
    with pytest.raises(AttribError, match=r"1048576\.0 GiB below .*there, and .* GiB are free there; free some space"):
        check_free_space(Estimate(1, 0, 0, output_bytes=2**50, seconds=1), output, 1)
    monkeypatch.setenv("ATTRIB_SCRATCH", str(tmp_path))
    with pytest.raises(AttribError, match="ATTRIB_SCRATCH"):
        check_free_space(Estimate(4, 0, 0, output_bytes=0, seconds=1, scratch_bytes=2**50), "s3://bucket/x", 4)
    # Files of an earlier run count as written; this sparse file has the size of the whole output.
    (tmp_path / "not" / "there").mkdir(parents=True)
    with open(tmp_path / "not" / "there" / "part", "wb") as file:
        file.truncate(2**42)
    check_free_space(Estimate(1, 0, 0, output_bytes=2**42, seconds=1), output, 1)


def test_budget_is_not_part_of_the_identity_and_reaches_every_stage():
    settings = ManifestSettings(collection={"name": "c", "uri": "images"}, output="out")
    limited = settings.model_copy(update={"budget": BudgetSettings(max_hours=1)})
    assert result_settings(settings) == result_settings(limited) and "budget" in JobSettings.execution_only
    pipeline = PipelineSettings(
        sources={"name": "a", "uri": "x"}, generated={"name": "b", "uri": "y"}, output="out",
        backbone={"name": "n", "weights": "random"}, budget={"max_hours": 3}, embed={"budget": {"max_hours": 5}},
    )  # fmt: skip
    hours = {name: stage.budget.max_hours for name, stage in pipeline.stages().items()}
    assert hours["index"] == 3 and hours["sources/embeddings"] == 5 and len(hours) == 7
