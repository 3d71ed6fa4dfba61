"""jobs.scale: compute the plan and its limits from constants, print both as tables, write <output>/scale.json."""

from dataclasses import asdict, astuple

from attrib.attribute.rows import ATTRIBUTIONS_RECORD
from attrib.capacity.limits import Break, breaks
from attrib.capacity.schedule import Plan, Stage, plan
from attrib.capacity.settings import SEARCH_RATES, Constant, Constants, ScaleSettings
from attrib.common.config import versions
from attrib.common.errors import AttribError
from attrib.common.formats import GIB, duration, text_table
from attrib.common.run_record import rewriting
from attrib.common.storage import Storage, join
from attrib.data.manifest import MANIFEST_RECORD
from attrib.embed.embeddings import EMBEDDINGS_RECORD
from attrib.index.cost_model import SearchRates
from attrib.index.index import INDEX_RECORD

RECORD = "scale.json"
PHASES = {"sources": "Sources, once", "queries": "Queries, every night"}


def run(settings: ScaleSettings) -> str:
    """Write scale.json and return the tables. Raises AttribError if no number of machines reaches the target."""
    storage = Storage(settings.storage)
    settings = with_constants(settings, storage)
    planned, broken = plan(settings), breaks(settings)
    record = {"settings": settings.model_dump(mode="json"), "versions": versions(), **asdict(planned)}
    uri = join(settings.output, RECORD)
    with rewriting(settings, storage):
        storage.write_json(uri, record | {"breaks": [asdict(found) for found in broken]})
    return f"{tables(settings, planned, broken)}\n\nwritten: {uri}"


def with_constants(settings: ScaleSettings, storage: Storage) -> ScaleSettings:
    """The settings with constants of `settings.run` and `settings.benchmark` in place of those of the config.

    Raises AttribError if a record is missing or a constant of the benchmark has another unit.
    """
    found = constants_of_run(settings, storage) if settings.run else {}
    measured = storage.require(settings.benchmark, "jobs.benchmark").get("constants", {}) if settings.benchmark else {}
    for name in measured.keys() & Constants.model_fields.keys():
        given, unit = measured[name], Constants.model_fields[name].title
        if given["unit"] != unit:
            raise AttribError(
                f"{settings.benchmark} gives {name} in {given['unit']!r}, not {unit!r}; "
                "run jobs.benchmark of this version"
            )
        found[name] = Constant(value=given["value"], source=given["command"])
    return settings.model_copy(update={"constants": settings.constants.model_copy(update=found)})


def constants_of_run(settings: ScaleSettings, storage: Storage) -> dict[str, Constant]:
    """Search rates and bytes per row of a finished jobs.pipeline, from its records and the sizes of its files."""

    def record(folder: str, name: str) -> dict:
        return storage.require(join(settings.run, folder, name), "jobs.pipeline")

    embedded, attributed = record("sources/embeddings", EMBEDDINGS_RECORD), record("attributions", ATTRIBUTIONS_RECORD)
    values = dict(zip(SEARCH_RATES, astuple(SearchRates(**record("index", INDEX_RECORD)["rates"]))))
    parts = {
        "manifest": ("sources/manifest", sum(record("sources/manifest", MANIFEST_RECORD)["num_rows"])),
        "embedding": ("sources/embeddings", sum(embedded["num_rows"])),
        "attribution": ("attributions/attributions", attributed["num_rows"]),
        "outcome": ("attributions/outcomes", attributed["num_queries"]),
    }
    for kind, (folder, num_rows) in parts.items():
        found = storage.list_folder(join(settings.run, folder), suffix=".parquet")
        # failures.parquet is small and not of these rows.
        sizes = [file.size for file in found if not file.path.endswith("failures.parquet")]
        num_bytes = sum(sizes) - len(sizes) * getattr(settings.constants, f"{kind}_file_bytes").value
        vector_bytes = 2 * embedded["encoder"]["dimension"] if kind == "embedding" else 0
        values[f"{kind}_row_bytes"] = num_bytes / max(num_rows, 1) - vector_bytes
    source = f"records of {settings.run}"
    return {name: Constant(value=value, source=source) for name, value in values.items() if value > 0}


def tables(settings: ScaleSettings, planned: Plan, broken: list[Break]) -> str:
    """The plan of each phase, the storage, and what breaks first, for the terminal."""
    target, currency = settings.target, settings.prices.currency
    lines = [
        f"{count(target.num_sources)} sources, {count(target.num_queries)} queries per night.",
        "Computed from constants, not run.",
        f"Constants: {settings.hardware}. Prices: of the config.",
    ]
    columns = {"stage": "left", "machine": "left", "tasks": "right", "hours": "right", "bound by": "left"}
    columns |= dict.fromkeys(("core hours", "read", "written", "via Ray", "reads", "writes", currency), "right")
    for phase, title in PHASES.items():
        num, hours, cost = (of[phase] for of in (planned.num_machines, planned.hours, planned.cost))
        machines = f"{num:,} machine{'s' if num > 1 else ''}"
        lines += ["", f"{title}: {machines}, {duration(3600 * hours)}, {count(cost)} {currency}"]
        lines += [text_table(columns, [_row(s) for s in planned.stages if s.work.phase == phase], "  ")]
    kept, passing = amount(planned.kept_bytes, "bytes"), amount(planned.passing_bytes, "bytes")
    month = f"{count(planned.kept_bytes / GIB * settings.prices.storage_per_gib_month)} {currency} per month"
    lines += ["", f"Storage: {kept} kept ({month}, without the images), {passing} of temporary files"]
    lines += ["", "What breaks first (number of sources at which a limit is exceeded; * = exceeded at the target)"]
    columns = {"sources": "right", "what grows, its limit and the remedy": "left"}
    columns |= {"at target": "right", "limit": "right"}
    rows = []
    for b in broken:
        mark = "*" if b.num_sources and b.num_sources <= target.num_sources else ""
        what = f"{b.what} ({b.order})\n  limit: {b.limited_by}\n  remedy: {b.remedy}"
        sizes = [amount(value, b.unit) for value in (b.at_target, b.limit)]
        rows.append([f"{mark}{count(b.num_sources)}" if b.num_sources else "never", what, *sizes])
    return "\n".join([*lines, text_table(columns, rows, "  ")])


def _row(stage: Stage) -> list[str]:
    work = stage.work
    names = [work.name, work.machine, count(work.num_tasks), duration(3600 * stage.hours), stage.bound_by]
    num_bytes = [amount(n, "bytes") for n in (work.read_bytes, work.written_bytes, work.moved_bytes)]
    requests = [count(n) for n in (work.reads, work.writes, stage.machine_cost + stage.request_cost)]
    return [*names, count(work.core_seconds / 3600), *num_bytes, *requests]


def count(value: float) -> str:
    """1,234 up to a million, then 1.23 million, billion or trillion."""
    for size, name in ((1e12, " trillion"), (1e9, " billion"), (1e6, " million")):
        if value >= size:
            return f"{value / size:,.3g}{name}"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def amount(value: float, unit: str) -> str:
    """A value with its unit: bytes up to PiB, seconds as hours from one hour."""
    if unit == "bytes":
        power = min(5, (int(value).bit_length() - 1) // 10) if value >= 1 else 0
        return f"{count(value / 1024**power)} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB')[power]}"
    if unit in ("seconds", "core seconds") and value >= 3600:
        return f"{count(value / 3600)} {unit.replace('seconds', 'hours')}"
    return f"{count(value)} {unit}"
