"""Amounts of bytes and seconds as text."""

GIB = 2**30


def gib(num_bytes: float) -> str:
    """GiB, or MiB below a tenth of one."""
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= 0.1 * GIB else f"{num_bytes / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, rounded; at least "1 s"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
