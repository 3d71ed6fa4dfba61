"""The local disk: its storage, and its files."""

import os
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager

from attrib.common.settings import RescanSettings, StorageSettings
from attrib.common.storage import Storage

LOCAL = Storage(StorageSettings())


def files_below(folder) -> list[str]:
    return sorted(os.path.join(base, name) for base, _, names in os.walk(folder) for name in names)


@contextmanager
def full_disk(num_bytes: int) -> Iterator[None]:
    """A disk that takes no more than `num_bytes` of a file of this process: the operating system refuses the rest."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))  # CPython ignores its signal
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def not_made(settings: RescanSettings) -> list[str]:
    """Files of an output that `settings.made` does not tell, without records and hidden files."""
    names = [os.path.relpath(path, settings.output) for path in files_below(settings.output)]
    made = [re.compile(rf"{pattern}(/.*)?") for pattern in settings.made]
    records = [name for name in names if re.fullmatch(r"[a-z]+\.json|\..*", name)]
    return [name for name in names if name not in records and not any(known.fullmatch(name) for known in made)]
