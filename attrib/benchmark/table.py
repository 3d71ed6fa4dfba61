"""The table of a benchmark."""

from itertools import groupby

from attrib.benchmark.harness import Row

SHOWN = (
    "recall",
    "nprobe",
    "num_lists",
    "num_rows",
    "images_per_second",
    "identical",
    "share_embedded_twice",
)  # of what contenders found
COLUMNS = ("contender", "threads", "seconds", "CPU s", "peak MiB", "their time / ours")


def format_table(rows: list[Row]) -> str:
    """Aligned; one block per stage and size."""
    if not rows:
        return ""
    width = max(len(row.contender) for row in rows)
    lines = []
    for (stage, size), block in groupby(rows, key=lambda row: (row.stage, row.size)):
        lines += ["", f"{stage}: {size}"]
        header = f"  {COLUMNS[0]:{width}}  {COLUMNS[1]:>7}  {COLUMNS[2]:>10}  {COLUMNS[3]:>10}  {COLUMNS[4]:>9}  {COLUMNS[5]:22}  note"
        lines.append(header)
        lines += [_line(row, width) for row in block]
    return "\n".join(lines[1:])


def _line(row: Row, width: int) -> str:
    threads = f"{row.workers} x {row.threads}" if row.workers > 1 else str(row.threads)
    ratio = "" if row.ratio is None else f"{row.ratio:.2f} ({row.ratio_lowest:.2f} to {row.ratio_highest:.2f})"
    found = [f"{name} {_brief(value)}" for name, value in row.found.items() if name in SHOWN]
    note = "; ".join([*([row.note] if row.note else []), *found])
    numbers = f"{_number(row.seconds):>10}  {_number(row.cpu_seconds):>10}  {_number(row.peak_mib):>9}"
    return f"  {row.contender:{width}}  {threads:>7}  {numbers}  {ratio:22}  {note}".rstrip()


def _brief(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
