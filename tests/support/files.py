"""The local disk: its storage, and its files."""

import os

from attrib.common.settings import StorageSettings
from attrib.common.storage import Storage

LOCAL = Storage(StorageSettings())


def files_below(folder) -> list[str]:
    return sorted(os.path.join(base, name) for base, _, names in os.walk(folder) for name in names)
