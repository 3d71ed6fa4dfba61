"""What a benchmark ran on: processor, memory, system and versions."""

import os
import platform
import re
from pathlib import Path

import psutil

from attrib.common.config import versions
from attrib.common.formats import gib

CPU_INFO = Path("/proc/cpuinfo")


def machine() -> dict[str, str]:
    """Hardware and system, in words."""
    model = re.search(r"^model name\s*:\s*(.+)", CPU_INFO.read_text() if CPU_INFO.exists() else "", re.MULTILINE)
    return {
        "processor": model[1] if model else platform.processor() or platform.machine(),
        "cores": f"{psutil.cpu_count(logical=False) or '?'} physical, {os.cpu_count()} logical",
        "memory": gib(psutil.virtual_memory().total),
        "system": platform.platform(),
    }


def describe(facts: dict[str, str]) -> str:
    """One line for the machine and one for the versions, for the end of the table."""
    stamped = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"machine: {', '.join(facts.values())}\nversions: {stamped}"
