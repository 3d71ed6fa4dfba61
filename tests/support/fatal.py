"""An image that kills every process that decodes it, in processes that find `sitecustomize.py` on their path."""

from pathlib import Path

FATAL_END = b"this kills"
SITECUSTOMIZE = f"""
import os, signal
import PIL.Image

ordinary = PIL.Image.open

def open(file, *arguments, **options):
    if file.getvalue().endswith({FATAL_END!r}):
        os.kill(os.getpid(), signal.SIGKILL)
    return ordinary(file, *arguments, **options)

PIL.Image.open = open
"""


def write_sitecustomize(folder: Path) -> str:
    """Write the module that Python imports at its start; returns the folder for PYTHONPATH."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE, encoding="utf-8")
    return str(folder)
