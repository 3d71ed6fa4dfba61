"""What a simulation did beside what the formulas of the plan foretell for its size."""

from dataclasses import dataclass

from attrib.capacity.layout import file_counts, lay_out, simulated_target, task_counts
from attrib.capacity.settings import Constant, ScaleSettings
from attrib.capacity.work import describe_work
from attrib.embed.estimate import num_probed

CHUNKS = "embeddings/_chunks/part-#/rows-#-#.parquet"
CPU_BATCH_SIZE = 16  # of attrib.models.encoder, which loads torch


@dataclass(frozen=True)
class Simulated:
    """What a simulation on raylets of one CPU each did. Files go by the pattern of their path, every number in it a #.

    tasks: per "job: function" those of each node; writes: per pattern the files that each node wrote; written_bytes: per pattern; requests: per
    folder of a job and kind (read, head, list, write, delete); seconds: per job; num_other_tasks: Ray Data's own; task_seconds: of the driver for
    a task that does nothing.
    """

    num_raylets: int
    dimension: int
    tasks: dict[str, list[int]]
    writes: dict[str, list[int]]
    written_bytes: dict[str, int]
    requests: dict[str, dict[str, int]]
    seconds: dict[str, float]
    num_other_tasks: int
    task_seconds: float


@dataclass(frozen=True)
class Row:
    """predicted, measured: of one thing; kept: False for files that are gone when their job ends."""

    name: str
    predicted: float
    measured: float
    kept: bool = True

    @property
    def ratio(self) -> float | None:
        return self.measured / self.predicted if self.predicted else None


@dataclass(frozen=True)
class Balance:
    """Work of the busiest node over the mean of all: predicted for equal tasks that are dealt in waves, and measured."""

    name: str
    num_tasks: int
    predicted: float
    measured: float


@dataclass(frozen=True)
class Check:
    """tasks, num_files, num_bytes: one row each; other_bytes: of files that the plan leaves out; balances: of every function with several tasks a node."""

    num_raylets: int
    tasks: list[Row]
    num_files: list[Row]
    num_bytes: list[Row]
    other_bytes: int
    requests: list[Row]
    balances: list[Balance]
    seconds: float
    num_other_tasks: int
    task_seconds: float

    def total(self, rows: list[Row], name: str, kept: bool | None = None) -> Row:
        chosen = [row for row in rows if kept is None or row.kept == kept]
        return Row(name, sum(row.predicted for row in chosen), sum(row.measured for row in chosen))


def check(settings: ScaleSettings, simulated: Simulated) -> Check:
    target = simulated_target(settings.simulation, settings.target, simulated.dimension)
    layout = lay_out(target)
    cpus = simulated.num_raylets
    done = dict(simulated.tasks)
    for role in ("sources", "generated"):
        done[f"{role}/embeddings: chunks"] = simulated.writes.get(f"{role}/{CHUNKS}", [])
    foretold = task_counts(layout, target, cpus)
    tasks = [Row(name, foretold.get(name, 0), sum(done.get(name, []))) for name in {**foretold, **done}]
    files = file_counts(layout, target, settings.constants)
    num_files = [Row(p, f.num_files, sum(simulated.writes.get(p, [])), f.kept) for p, f in files.items()]
    num_bytes = [Row(p, f.num_bytes, simulated.written_bytes.get(p, 0), f.kept) for p, f in files.items()]
    others = sum(size for pattern, size in simulated.written_bytes.items() if pattern not in files)
    balances = [
        Balance(name, sum(nodes), waves(sum(nodes), cpus), max(nodes) * cpus / sum(nodes))
        for name, nodes in done.items()
        if sum(nodes) > 2 * cpus
    ]
    return Check(
        cpus,
        tasks,
        num_files,
        num_bytes,
        others,
        _requests(settings, target, layout, files, simulated),
        balances,
        sum(simulated.seconds.values()),
        simulated.num_other_tasks,
        simulated.task_seconds,
    )


def waves(num_tasks: int, num_nodes: int) -> float:
    """The busiest node's share over the mean where equal tasks are dealt in waves."""
    return -(-num_tasks // num_nodes) * num_nodes / num_tasks


def _requests(settings: ScaleSettings, target, layout, files, simulated: Simulated) -> list[Row]:
    """One request per file that is opened, since the log counts files; deleted folders count as the files that were in them."""
    once = Constant(value=1, source="the log counts files")
    constants = settings.constants.model_copy(update={f"requests_per_{of}": once for of in ("image", "file", "write")})
    asked = settings.model_copy(update={"target": target, "constants": constants})
    works = describe_work(asked, layout, simulated.num_raylets)
    counts = {
        kind: sum(found.get(kind, 0) for found in simulated.requests.values())
        for kind in ("read", "head", "list", "write")
    }
    deleted = sum(sum(simulated.writes.get(pattern, [])) for pattern, found in files.items() if not found.kept)
    # Tar shards are listed without Storage, so that they are not in the log.
    streams = layout.sources.num_units + layout.queries.num_units
    images = target.num_sources + target.num_queries
    looked_at = 0  # by each embed job before it starts; the works do not count them
    for cut in (layout.sources, layout.queries):
        partition = min(target.partition_rows, cut.num_images)
        probed = num_probed(CPU_BATCH_SIZE, partition, target.chunk_rows)
        looked_at += probed + min(CPU_BATCH_SIZE, probed)
    return [
        Row("images read", images + looked_at, simulated.requests.get("images", {}).get("read", 0)),
        Row(
            "other reads (GET and HEAD)",
            sum(work.reads for work in works) - streams - images,
            counts["read"] + counts["head"] - simulated.requests.get("images", {}).get("read", 0),
        ),
        Row("writes (PUT, LIST and DELETE)", sum(w.writes for w in works), counts["write"] + counts["list"] + deleted),
    ]
