"""The scale job: constants, the plan from them, simulations beside it, and the page.

<output>/scale.html           the page
<output>/scale.json           settings, versions, constants, stages, breaks and simulations
<output>/simulations/N/       what the cluster of N raylets made, with its log
"""

import dataclasses
import logging
import os
import shutil

from attrib.capacity.check import Check, check
from attrib.capacity.constants import measure_constants
from attrib.capacity.derive import Plan, by_size, derive
from attrib.capacity.limits import Break, breaks
from attrib.capacity.page import PAGE, SIZES, amount, count, hours, ratio, write_page
from attrib.capacity.settings import Constant, Constants, ScaleSettings, unit_of
from attrib.capacity.simulate import simulate
from attrib.common.config import versions
from attrib.common.errors import AttribError
from attrib.common.storage import Storage, join

logger = logging.getLogger(__name__)

RECORD = "scale.json"


def run(settings: ScaleSettings) -> str:
    """Write the page and its JSON; returns a summary. Raises AttribError if the target cannot be reached with any number of machines."""
    storage = Storage(settings.storage)
    settings = with_constants(settings, storage)
    plan = derive(settings)
    sizes = sorted({*(size for size in SIZES if size < plan.target.num_sources), plan.target.num_sources})
    broken = breaks(settings)
    checks = []
    for num_raylets in settings.simulation.num_raylets:
        folder = join(settings.output, "simulations", str(num_raylets))
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
        logger.info(f"scale: the jobs on {num_raylets} raylets, log in {folder}/driver.log")
        checks.append(check(settings, simulate(settings.simulation, num_raylets, folder)))
    record = {"settings": settings.model_dump(mode="json"), "versions": versions()}
    storage.write_json(join(settings.output, RECORD), record | _numbers(plan, broken, checks))
    write_page(settings, plan, by_size(settings, plan, sizes), broken, checks, record, storage)
    return _summary(settings, plan, broken, checks)


def with_constants(settings: ScaleSettings, storage: Storage) -> ScaleSettings:
    """The config's constants, over them what this machine measures (if asked), over those what a benchmark.json holds.

    Raises AttribError if the benchmark holds none, or one in another unit.
    """
    found: dict[str, Constant] = {}
    if settings.measure:
        logger.info("scale: measuring constants")
        found |= measure_constants("measured by jobs.scale on this machine, one thread, CPU seconds")
    if settings.benchmark:
        record = storage.require(settings.benchmark, "jobs.benchmark")
        for name, given in record.get("constants", {}).items():
            if name not in Constants.model_fields:
                continue
            if given["unit"] != unit_of(name):
                raise AttribError(
                    f"{settings.benchmark} gives {name} in {given['unit']!r}, not {unit_of(name)!r}; run jobs.benchmark of this version"
                )
            found[name] = Constant(value=given["value"], source=given["command"])
    return settings.model_copy(update={"constants": settings.constants.model_copy(update=found)})


def _numbers(plan: Plan, broken: list[Break], checks: list[Check]) -> dict:
    return {
        "num_machines": plan.num_machines,
        "hours": {phase: plan.hours(phase) for phase in plan.num_machines},
        "cost": {phase: plan.cost(phase) for phase in plan.num_machines},
        "kept_bytes": plan.kept_bytes,
        "passing_bytes": plan.passing_bytes,
        "layout": dataclasses.asdict(plan.layout),
        "stages": [dataclasses.asdict(stage) | {"bound_by": stage.bound_by} for stage in plan.stages],
        "breaks": [
            {"what": b.growth.name, "num_sources": b.num_sources, "at_target": b.at_target, "limit": b.growth.limit}
            | {"unit": b.growth.unit, "limited_by": b.growth.limited_by, "remedy": b.growth.remedy}
            for b in broken
        ],
        "simulations": [dataclasses.asdict(c) for c in checks],
    }


def _summary(settings: ScaleSettings, plan: Plan, broken: list[Break], checks: list[Check]) -> str:
    lines = []
    for phase, machines in plan.num_machines.items():
        cost = f"{count(plan.cost(phase))} {settings.prices.currency}"
        lines.append(
            f"{phase}: {machines:,} machine{'s' if machines > 1 else ''} for {hours(plan.hours(phase))}, {cost}"
        )
    lines.append(f"storage: {amount(plan.kept_bytes, 'bytes')} kept, {amount(plan.passing_bytes, 'bytes')} in passing")
    for b in broken[:3]:
        lines.append(f"breaks at {count(b.num_sources or 0)} sources: {b.growth.name}")
    for c in checks:
        tasks, kept, passing = c.total(c.tasks, ""), c.total(c.num_bytes, "", True), c.total(c.num_bytes, "", False)
        worst = max(c.balances, key=lambda b: b.measured / b.predicted) if c.balances else None
        said = (
            f"; furthest from balance: {worst.name} {worst.measured:.2f} (predicted {worst.predicted:.2f})"
            if worst
            else ""
        )
        lines.append(
            f"{c.num_raylets} raylets: {tasks.measured:,.0f} tasks of {tasks.predicted:,.0f} predicted; bytes over predicted "
            f"{ratio(kept.ratio)} kept, {ratio(passing.ratio)} in passing{said}"
        )
    return "\n".join([*lines, f"page: {join(settings.output, PAGE)}"])
