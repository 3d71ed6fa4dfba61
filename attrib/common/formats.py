"""Amounts of bytes and seconds, and tables, as text for the terminal and for table.txt."""

from collections.abc import Iterable, Sequence

from tabulate import tabulate

GIB = 2**30


def gib(num_bytes: float) -> str:
    """GiB, or MiB below a tenth of one."""
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= 0.1 * GIB else f"{num_bytes / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, rounded; at least "1 s"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def text_table(columns: dict[str, str], rows: Iterable[Sequence[str]], indent: str = "") -> str:
    """Aligned columns under their headers. columns: {header: "left" or "right"}; rows: one text per column."""
    # Values are shown as they were formatted: "1.10" keeps its zero, and a name such as "1e5" stays a name.
    aligned = tabulate(list(rows), list(columns), "plain", disable_numparse=True, colalign=list(columns.values()))
    return "\n".join(f"{indent}{line}".rstrip() for line in aligned.splitlines())
