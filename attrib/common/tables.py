"""Tables as plain text, for the terminal and for table.txt."""

from collections.abc import Iterable, Sequence

from tabulate import tabulate


def text_table(columns: dict[str, str], rows: Iterable[Sequence[str]], indent: str = "") -> str:
    """Aligned columns under their headers. columns: {header: "left" or "right"}; rows: one text per column."""
    # Values are shown as they were formatted: "1.10" keeps its zero, and a name such as "1e5" stays a name.
    aligned = tabulate(list(rows), list(columns), "plain", disable_numparse=True, colalign=list(columns.values()))
    return "\n".join(f"{indent}{line}".rstrip() for line in aligned.splitlines())
