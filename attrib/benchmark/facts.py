"""What follows from the rows: slopes, speed-ups, Ray's share, and the constants that the page on scale starts from."""

import math
from dataclasses import dataclass

from attrib.benchmark.harness import Row

TEN_MINUTES = 600.0
RAY_LAPS = ("first no-op result", "no-op task", "no-op chunk")  # parts of their rows' sizes
JOB_CHUNK_ROWS = 128  # the embed job's default


@dataclass(frozen=True)
class Fact:
    what: str
    value: float | bool
    note: str = ""


def log_slope(small: float, large: float, factor: float) -> float:
    """The p of cost ~ size^p between two sizes, `factor` apart."""
    return math.log(large / small) / math.log(factor)


def find(rows: list[Row], stage: str, contender: str, **where) -> list[Row]:
    """The measured rows of a contender, in order; where: further values of their fields, `size` as a part of it."""
    size = where.pop("size", "")
    return [
        row
        for row in rows
        if row.stage == stage
        and row.contender == contender
        and row.seconds is not None
        and size in row.size
        and all(getattr(row, name) == value for name, value in where.items())
    ]


def build_slopes(rows: list[Row], sizes: tuple[int, ...]) -> list[Fact]:
    found = find(rows, "build slope", "attrib.index.shard.build_shard")
    return [
        Fact(
            f"log-log slope of build time, {small:,} to {large:,} vectors",
            log_slope(first.seconds, second.seconds, large / small),
            "training apart, one template",
        )
        for (small, first), (large, second) in zip(list(zip(sizes, found)), list(zip(sizes, found))[1:])
    ]


def search_slopes(rows: list[Row], sizes: tuple[int, ...], batches: tuple[int, ...]) -> list[Fact]:
    """In queries at every size; one thread, the vectors of images."""
    facts = []
    for size in sizes:
        found = find(rows, "search", "attrib.index.search.search_shard", threads=1, size=f"{size:,} x ")
        found = [row for row in found if "(images)" in row.size]
        for (few, first), (many, second) in zip(list(zip(batches, found)), list(zip(batches, found))[1:]):
            slope = log_slope(first.seconds, second.seconds, many / few)
            facts.append(Fact(f"log-log slope of search time, {few:,} to {many:,} queries", slope, f"{size:,} vectors"))
    return facts


def speed_up(rows: list[Row], stage: str, contender: str) -> list[Fact]:
    """Of the second worker: ratios are to the row of one worker, the first contender."""
    found = [row for row in find(rows, stage, contender) if row.workers > 1]
    return [
        Fact(f"{row.contender}: {row.workers} workers over one, times as fast", 1 / row.ratio, row.size)
        for row in found
    ]


def identical(rows: list[Row]) -> list[Fact]:
    """Of every contender in all rounds, and of the attribute job whatever its workers."""
    facts = [
        Fact(
            f"{row.contender}: the same answers in every round",
            row.found["identical"],
            f"{row.num_rounds} rounds; {row.size}",
        )
        for row in rows
        if "identical" in row.found
    ]
    jobs = find(rows, "attribute job", "jobs.attribute")
    if len(jobs) > 1:
        same = len({row.found["answers"] for row in jobs}) == 1
        facts.append(Fact("jobs.attribute: the same answers by one worker and by more", same, jobs[0].size))
    return facts


def embed_shares(rows: list[Row]) -> list[Fact]:
    """Images/s of the job over those of its parts, from the medians of the ratios."""
    bare, decoded = (find(rows, "embed job", name) for name in ("bare network", "decode + resize alone"))
    loaders = [row for row in rows if row.stage == "embed job" and row.contender.startswith("DataLoader") and row.ratio]
    if not (bare and decoded and loaders):
        return []
    return [
        Fact("embed job over 1 / (decode + forward)", bare[0].ratio + decoded[0].ratio, bare[0].size),
        Fact("embed job over the bare network", bare[0].ratio, bare[0].size),
        Fact("embed job over the best DataLoader script", min(row.ratio for row in loaders), bare[0].size),
    ]


def embed_cpu(rows: list[Row]) -> list[Fact]:
    """Where the CPU time of the job's steady part goes, beside what decoding and the network alone take: what bounds it."""
    job, bare, decoded = (
        find(rows, "embed job", name) for name in ("jobs.embed", "bare network", "decode + resize alone")
    )
    if not (job and bare and decoded and "cpu_ms_per_image" in job[0].found):
        return []
    spent = job[0].found["cpu_ms_per_image"]
    alone = 1000 * (bare[0].seconds * bare[0].workers + decoded[0].seconds * decoded[0].workers)
    facts = [Fact(f"embed job: CPU ms an image of {role}", value) for role, value in spent.items()]
    idle = 1000 * job[0].seconds * job[0].workers - sum(spent.values())
    return [
        *facts,
        Fact("embed job: ms an image that its workers' cores were idle", idle),
        Fact("decode + forward alone: ms an image", alone),
    ]


def estimates(rows: list[Row]) -> list[Fact]:
    """Of a job's time: what it said before it started, over what it took."""
    return [
        Fact(f"{row.contender}: time estimated over taken", row.found["estimated_over_measured"], row.size)
        for row in rows
        if "estimated_over_measured" in row.found
    ]


def peak_shares(rows: list[Row]) -> list[Fact]:
    """Our peak resident memory over autofaiss's, libraries included, training included."""
    return [
        Fact("peak memory of train and build over autofaiss's", row.peak_mib / theirs.peak_mib, row.size)
        for row in find(rows, "build", "attrib", size="train and build")
        for theirs in find(rows, "build", "autofaiss")
        if row.size == theirs.size
    ]


def ray_share(rows: list[Row]) -> list[Fact]:
    """Start and per-task time of a job of ten minutes, as a share of it, with as many chunks as it would embed."""
    start, task, chunk = (find(rows, "ray", "Ray", size=name) for name in RAY_LAPS)
    embed = find(rows, "embed job", "jobs.embed")
    if not (start and task and chunk and embed):
        return []
    num_chunks = TEN_MINUTES / (JOB_CHUNK_ROWS * embed[0].seconds)
    share = (start[0].seconds + num_chunks * chunk[0].seconds) / TEN_MINUTES
    note = f"start, and {num_chunks:,.0f} chunks of {JOB_CHUNK_ROWS} images at {1 / embed[0].seconds:,.0f} images/s"
    return [Fact("Ray's own share of an embed job of ten minutes", share, note)]


def constants(rows: list[Row], command: str) -> dict[str, dict]:
    """{name: value, unit, command}: what was measured on this machine, for the page on scale (attrib/capacity/settings.py)."""
    found: dict[str, dict] = {}

    def note(name: str, unit: str, only: str, rows_of: list[Row], value=lambda row: row.seconds) -> None:
        if rows_of:
            number = value(rows_of[-1])
            if number is not None:
                found[name] = {"value": number, "unit": unit, "command": f"{command} --set 'only=[{only}]'"}

    decoded = find(rows, "decode + resize", "attrib.data.decoding")
    note("decode_images_per_second_per_core", "images/s", "decode", decoded, lambda row: 1 / row.seconds)
    bare = find(rows, "embed job", "bare network")
    note("forward_images_per_second_per_core", "images/s", "embed", bare, lambda row: 1 / row.seconds / row.workers)
    job = find(rows, "embed job", "jobs.embed")
    note("embed_images_per_second_per_core", "images/s", "embed", job, lambda row: 1 / row.seconds / row.workers)
    note(
        "gemm_gflops_per_core",
        "Gflop/s",
        "ray",
        find(rows, "gemm", "NumPy float32", threads=1),
        lambda row: 1 / row.seconds,
    )
    whole = find(rows, "build", "attrib", size="train and build")
    whole = [row for row in whole if "(images)" in row.size]
    note("index_bytes_per_vector", "bytes", "build", whole, lambda row: row.found["bytes_per_vector"])
    note("embedding_bytes_per_image", "bytes", "build", whole, lambda row: row.found["embedding_bytes_per_vector"])
    filled = [row for row in find(rows, "build", "attrib.index.shard.build_shard") if "(images)" in row.size]
    note("build_seconds_largest_shard", "s", "build", filled)
    searched = [
        row for row in find(rows, "search", "attrib.index.search.search_shard", threads=1) if "(images)" in row.size
    ]
    note("search_seconds_largest_batch", "s", "build, search", searched)
    written = find(rows, "merge, score, write", "attrib")
    note("write_seconds_per_row", "s", "build, attribute", written, lambda row: row.seconds / row.found["num_rows"])
    note("train_seconds_per_step", "s", "train", find(rows, "train a head", "jobs.train"))
    note("ray_start_seconds", "s", "ray", find(rows, "ray", "Ray", size=RAY_LAPS[0]))
    note("ray_seconds_per_task", "s", "ray", find(rows, "ray", "Ray", size=RAY_LAPS[1]))
    note("ray_seconds_per_chunk", "s", "ray", find(rows, "ray", "Ray", size=RAY_LAPS[2]))
    return found


def format_facts(facts: list[Fact]) -> str:
    width = max((len(fact.what) for fact in facts), default=0)
    return "\n".join(f"  {fact.what:{width}}  {_value(fact.value):>8}  {fact.note}".rstrip() for fact in facts)


def _value(value: float | bool) -> str:
    return ("yes" if value else "NO") if isinstance(value, bool) else f"{value:.3g}"
