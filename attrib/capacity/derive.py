"""The cost of a size on paper: hours, machines, bytes, requests and money of every stage, from measured constants.

Two phases, each with its own deadline: sources are listed, embedded and indexed once; queries are listed, embedded and attributed every night.
The stages of a phase follow one another on the same number of machines, each on its kind, and that number is the smallest that meets the deadline.
"""

from dataclasses import dataclass
from math import ceil

from attrib.capacity.layout import Files, Layout, file_counts, lay_out
from attrib.capacity.settings import ScaleSettings, TargetSettings
from attrib.capacity.work import Work, describe_work
from attrib.common.errors import AttribError

GIB = 2**30
MAX_MACHINES = 1 << 17


@dataclass(frozen=True)
class Stage:
    """Work on machines. bounds: hours by what could hold it up (compute, network, requests, driver); its hours are those of the driver and the largest other one."""

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
    """stages: in their order. deadlines, num_machines: by phase; kept_bytes and passing_bytes: of files that stay, and that are gone at a job's end."""

    target: TargetSettings
    layout: Layout
    files: dict[str, Files]
    stages: list[Stage]
    deadlines: dict[str, float]
    num_machines: dict[str, int]
    kept_bytes: float
    passing_bytes: float
    storage_per_month: float

    def hours(self, phase: str) -> float:
        return sum(stage.hours for stage in self.stages if stage.work.phase == phase)

    def cost(self, phase: str) -> float:
        return sum(s.machine_cost + s.request_cost for s in self.stages if s.work.phase == phase)

    def total(self, phase: str, name: str) -> float:
        """Of a number of `Work`, such as read_bytes."""
        return sum(getattr(s.work, name) for s in self.stages if s.work.phase == phase)


def derive(settings: ScaleSettings) -> Plan:
    """Raises AttribError if a deadline cannot be met with any number of machines, or if a task fits no machine."""
    target = settings.target
    deadlines = {"sources": target.build_hours, "queries": target.night_hours}
    layout = lay_out(target)
    fewest = {
        phase: _fewest(lambda count, phase=phase: _run(settings, target, layout, phase, count), hours, phase)
        for phase, hours in deadlines.items()
    }
    return _derived(settings, target, fewest)


def _derived(settings: ScaleSettings, target: TargetSettings, num_machines: dict[str, int]) -> Plan:
    layout = lay_out(target)
    files = file_counts(layout, target, settings.constants)
    kept = sum(found.num_bytes for found in files.values() if found.kept)
    return Plan(
        target,
        layout,
        files,
        [s for phase, n in num_machines.items() for s in _run(settings, target, layout, phase, n)],
        {"sources": target.build_hours, "queries": target.night_hours},
        num_machines,
        kept,
        sum(found.num_bytes for found in files.values() if not found.kept),
        kept / GIB * settings.prices.storage_per_gib_month,
    )


def _run(settings: ScaleSettings, target: TargetSettings, layout: Layout, phase: str, count: int) -> list[Stage]:
    """The stages of a phase on so many machines."""
    num_cpus = count * settings.machines[target.search_on].num_cpus
    works = describe_work(settings.model_copy(update={"target": target}), layout, num_cpus)
    return [schedule(work, count, settings) for work in works if work.phase == phase]


def _fewest(run, hours: float, phase: str) -> int:
    """The smallest number of machines whose stages take at most so many hours."""
    most = 1
    while sum(stage.hours for stage in run(most)) > hours:
        most *= 2
        if most > MAX_MACHINES:
            needed = sum(stage.hours for stage in run(MAX_MACHINES))
            raise AttribError(
                f"the {phase} take {needed:,.1f} h with any number of machines and may take {hours:g} h: the driver and the object store's "
                "limits bound them; see the list of what breaks for a smaller target, or raise the deadline"
            )
    fewest = most // 2 + 1
    while fewest < most:
        middle = (fewest + most) // 2
        if sum(stage.hours for stage in run(middle)) > hours:
            fewest = middle + 1
        else:
            most = middle
    return most


def schedule(work: Work, num_machines: int, settings: ScaleSettings) -> Stage:
    """A stage on `num_machines` of its kind. Tasks are equal and one core each, so the last wave counts whole."""
    machine, constants, prices = settings.machines[work.machine], settings.constants, settings.prices
    fitting = int(machine.memory_gib * GIB // work.memory_bytes) if work.memory_bytes else machine.num_cpus
    if not fitting:
        raise AttribError(
            f"{work.name}: a shard takes {work.memory_bytes / GIB:.1f} GiB and a machine {work.machine!r} has {machine.memory_gib:g}; "
            "lower target.shard_rows or plan for larger machines"
        )
    slots = min(machine.num_cpus, fitting) * num_machines
    task_seconds = work.core_seconds / work.num_tasks
    compute = task_seconds * ceil(work.num_tasks / slots)
    if work.gpu_seconds:
        compute = max(compute, work.gpu_seconds / (machine.num_gpus * num_machines))
    network = (work.read_bytes + work.written_bytes + work.moved_bytes) * 8
    by_prefix = max(
        work.reads / constants.reads_per_prefix_second.value, work.writes / constants.writes_per_prefix_second.value
    )
    bounds = {
        "compute": compute / 3600,
        "network": network / (machine.network_gbit_per_second * 1e9 * num_machines) / 3600,
        "requests": by_prefix / 3600,
        "driver": (work.num_tasks * constants.task_seconds.value + work.serial_seconds) / 3600,
    }
    hours = bounds["driver"] + max(value for name, value in bounds.items() if name != "driver")
    requests = (work.reads * prices.per_million_reads + work.writes * prices.per_million_writes) / 1e6
    return Stage(work, num_machines, hours, bounds, hours * num_machines * machine.price_per_hour, requests)


def by_size(settings: ScaleSettings, plan: Plan, sizes: list[int]) -> list[Plan]:
    """The plan's machines at other numbers of sources, whatever the deadlines: their hours and costs."""
    return [_derived(settings, settings.target.model_copy(update={"num_sources": n}), plan.num_machines) for n in sizes]
