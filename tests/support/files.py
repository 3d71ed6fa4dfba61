"""Lists files on the local disk."""

import os


def files_below(folder) -> list[str]:
    return sorted(os.path.join(base, name) for base, _, names in os.walk(folder) for name in names)
