"""Machines, hours and cost of every stage.

Sources are listed, embedded and indexed once; queries are listed, embedded and attributed every night. The stages of a
phase run one after another on the smallest number of machines that meets the deadline of the phase.
"""

from bisect import bisect_left
from dataclasses import dataclass
from math import ceil

from attrib.capacity.layout import Files, Layout, file_counts, lay_out
from attrib.capacity.settings import ScaleSettings
from attrib.capacity.work import Work, describe_work
from attrib.common.errors import AttribError
from attrib.common.formats import GIB

MAX_MACHINES = 1 << 17
DEADLINES = {"sources": "build_hours", "queries": "night_hours"}


@dataclass(frozen=True)
class Stage:
    """A stage on `num_machines` machines. bounds: hours by resource. hours: the driver plus the largest other bound."""

    work: Work
    num_machines: int
    hours: float
    bounds: dict[str, float]
    machine_cost: float
    request_cost: float

    @property
    def bound_by(self) -> str:
        return max(self.bounds, key=self.bounds.get)


@dataclass(frozen=True)
class Plan:
    """num_machines: by phase. kept_bytes, passing_bytes: of files that stay, and of temporary files."""

    layout: Layout
    files: dict[str, Files]
    stages: list[Stage]
    num_machines: dict[str, int]
    kept_bytes: float
    passing_bytes: float
    storage_per_month: float

    def hours(self, phase: str) -> float:
        return sum(stage.hours for stage in self.stages if stage.work.phase == phase)

    def cost(self, phase: str) -> float:
        return sum(s.machine_cost + s.request_cost for s in self.stages if s.work.phase == phase)


def plan(settings: ScaleSettings) -> Plan:
    """The plan with the fewest machines. Raises AttribError if none meets a deadline or a task fits no machine."""
    return plan_on(settings, {phase: _fewest(settings, phase) for phase in DEADLINES})


def plan_on(settings: ScaleSettings, num_machines: dict[str, int]) -> Plan:
    """The plan on a given number of machines per phase, whatever the deadlines."""
    layout = lay_out(settings.target)
    files = file_counts(layout, settings.target, settings.constants)
    kept, passing = (sum(f.num_bytes for f in files.values() if f.kept is stays) for stays in (True, False))
    stages = [stage for phase, count in num_machines.items() for stage in _stages(settings, layout, phase, count)]
    per_month = kept / GIB * settings.prices.storage_per_gib_month
    return Plan(layout, files, stages, num_machines, kept, passing, per_month)


def _stages(settings: ScaleSettings, layout: Layout, phase: str, num_machines: int) -> list[Stage]:
    works = describe_work(settings, layout, num_machines * settings.machines[settings.target.search_on].num_cpus)
    return [schedule(work, num_machines, settings) for work in works if work.phase == phase]


def _fewest(settings: ScaleSettings, phase: str) -> int:
    layout, deadline = lay_out(settings.target), getattr(settings.target, DEADLINES[phase])

    def hours(num_machines: int) -> float:
        return sum(stage.hours for stage in _stages(settings, layout, phase, num_machines))

    most = 1
    while hours(most) > deadline:  # more machines take more tasks, so the search does not start at MAX_MACHINES
        if most == MAX_MACHINES:
            raise AttribError(
                f"the {phase} take {hours(most):,.1f} h with any number of machines and may take {deadline:g} h: the "
                "driver and the request limits of the object store bound them; plan for fewer images or raise "
                f"target.{DEADLINES[phase]}"
            )
        most *= 2
    return bisect_left(range(most), True, lo=most // 2 + 1, key=lambda count: hours(count) <= deadline)


def schedule(work: Work, num_machines: int, settings: ScaleSettings) -> Stage:
    """A stage on `num_machines` machines. Tasks are equal and use one core each, so the last round counts in full."""
    machine, constants, prices = settings.machines[work.machine], settings.constants, settings.prices
    fitting = int(machine.memory_gib * GIB // work.memory_bytes) if work.memory_bytes else machine.num_cpus
    if not fitting:
        raise AttribError(
            f"{work.name}: a shard takes {work.memory_bytes / GIB:.1f} GiB and a machine {work.machine!r} has "
            f"{machine.memory_gib:g}; lower target.shard_rows or plan for larger machines"
        )
    slots = min(machine.num_cpus, fitting) * num_machines
    compute = work.core_seconds / work.num_tasks * ceil(work.num_tasks / slots)
    if work.gpu_seconds:
        compute = max(compute, work.gpu_seconds / (machine.num_gpus * num_machines))
    network = (work.read_bytes + work.written_bytes + work.moved_bytes) * 8
    reads, writes = constants.reads_per_prefix_second.value, constants.writes_per_prefix_second.value
    bounds = {
        "compute": compute / 3600,
        "network": network / (machine.network_gbit_per_second * 1e9 * num_machines) / 3600,
        "requests": max(work.reads / reads, work.writes / writes) / 3600,
        "driver": (work.num_tasks * constants.task_seconds.value + work.serial_seconds) / 3600,
    }
    hours = bounds["driver"] + max(value for name, value in bounds.items() if name != "driver")
    requests = (work.reads * prices.per_million_reads + work.writes * prices.per_million_writes) / 1e6
    return Stage(work, num_machines, hours, bounds, hours * num_machines * machine.price_per_hour, requests)
