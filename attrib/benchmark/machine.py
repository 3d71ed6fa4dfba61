"""What a benchmark ran on: processor, memory, system and versions."""

import os
import platform

import psutil

from attrib.common.config import versions
from attrib.common.formats import gib


def machine() -> dict[str, str]:
    """Hardware and system, in words."""
    return {
        "processor": processor_name(),
        "cores": f"{psutil.cpu_count(logical=False) or '?'} physical, {os.cpu_count()} logical",
        "memory": gib(psutil.virtual_memory().total),
        "system": platform.platform(),
    }


def processor_name() -> str:
    """Model of the processor; its architecture where the system does not give the model."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def describe(facts: dict[str, str]) -> str:
    """One line for the end of the table."""
    stamped = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"machine: {', '.join(facts.values())}\nversions: {stamped}"
