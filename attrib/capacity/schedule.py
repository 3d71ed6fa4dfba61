"""Machines, hours and cost of every stage.

Sources are listed, embedded and indexed once; queries are listed, embedded and attributed every night. The stages of a
phase run one after another on the smallest number of machines that meets the deadline of the phase.
"""

from bisect import bisect_left
from dataclasses import dataclass
from math import ceil

from attrib.capacity.layout import Layout, file_counts, lay_out
from attrib.capacity.settings import ScaleSettings
from attrib.capacity.work import Work, describe_work
from attrib.common.errors import AttribError
from attrib.common.formats import GIB

MAX_DOUBLINGS = 17  # of the number of machines
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
    bound_by: str


@dataclass(frozen=True)
class Plan:
    """num_machines, hours, cost: by phase. kept_bytes, passing_bytes: of files that stay, and of temporary files."""

    num_machines: dict[str, int]
    hours: dict[str, float]
    cost: dict[str, float]
    kept_bytes: float
    passing_bytes: float
    layout: Layout
    stages: list[Stage]


def plan(settings: ScaleSettings, num_machines: dict[str, int] | None = None) -> Plan:
    """The plan on `num_machines` per phase. None: the fewest that meet each deadline.

    Raises AttribError if no number of machines meets a deadline, or a task fits no machine.
    """
    layout = lay_out(settings.target)
    files = file_counts(layout, settings.target, settings.constants).values()
    num_machines = num_machines or {phase: _fewest(settings, phase) for phase in DEADLINES}
    hours, cost, stages = {}, {}, []
    for phase, num in num_machines.items():
        num_cpus = num * settings.machines[settings.target.search_on].num_cpus
        found = [schedule(work, num, settings) for work in describe_work(settings, layout, phase, num_cpus)]
        hours[phase] = sum(stage.hours for stage in found)
        cost[phase] = sum(stage.machine_cost + stage.request_cost for stage in found)
        stages += found
    kept, passing = (sum(kind.num_bytes for kind in files if kind.kept is stays) for stays in (True, False))
    return Plan(num_machines, hours, cost, kept, passing, layout, stages)


def _fewest(settings: ScaleSettings, phase: str) -> int:
    deadline = getattr(settings.target, DEADLINES[phase])

    def hours(num_machines: int) -> float:
        return plan(settings, {phase: num_machines}).hours[phase]

    # More machines take more tasks, so the search does not start at the largest number.
    enough = next((1 << n for n in range(MAX_DOUBLINGS + 1) if hours(1 << n) <= deadline), None)
    if enough is None:
        raise AttribError(
            f"the {phase} take {hours(1 << MAX_DOUBLINGS):,.1f} h with any number of machines and may take "
            f"{deadline:g} h: the driver and the request limits of the object store bound them; plan for fewer images "
            f"or raise target.{DEADLINES[phase]}"
        )
    return bisect_left(range(enough), True, lo=enough // 2 + 1, key=lambda count: hours(count) <= deadline)


def schedule(work: Work, num_machines: int, settings: ScaleSettings) -> Stage:
    """A stage on `num_machines` machines. Tasks are equal and use one core each, so the last round counts in full."""
    machine, c, prices = settings.machines[work.machine], settings.constants.values(), settings.prices
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
    network_bits = (work.read_bytes + work.written_bytes + work.moved_bytes) * 8
    requests = max(work.reads / c.reads_per_prefix_second, work.writes / c.writes_per_prefix_second)
    bounds = {
        "compute": compute / 3600,
        "network": network_bits / (machine.network_gbit_per_second * 1e9 * num_machines) / 3600,
        "requests": requests / 3600,
        "driver": (work.num_tasks * c.task_seconds + work.serial_seconds) / 3600,
    }
    hours = bounds["driver"] + max(bounds["compute"], bounds["network"], bounds["requests"])
    cost = hours * num_machines * machine.price_per_hour
    request_cost = (work.reads * prices.per_million_reads + work.writes * prices.per_million_writes) / 1e6
    return Stage(work, num_machines, hours, bounds, cost, request_cost, max(bounds, key=bounds.__getitem__))
