"""Which files of a collection are its images or shards, and the count of what is left out, by reason."""

import fnmatch
import os
import re
from collections import Counter
from collections.abc import Callable
from enum import StrEnum

from attrib.common.errors import AttribError
from attrib.data.settings import CollectionSettings

SHARD_EXTENSIONS = {"webdataset": ".tar", "parquet": ".parquet"}
COMPRESSED_SHARD = re.compile(
    r"\.(tar|parquet)\.(gz|bz2|xz|zst|zstd|lz4|lz|lzma|lzo|br|z|snappy)$|\.(tgz|taz|tbz2?|txz|tzst|tlz)$", re.IGNORECASE
)
MAX_EXAMPLES = 3  # names that are kept of each reason
MAX_NAME_CHARS = 100


class Reason(StrEnum):
    """Why listing leaves out a file, a folder or a member of a shard."""

    HIDDEN = "hidden"
    EXCLUDED = "excluded by a pattern"
    EXTENSION = "other extension"
    LISTED = "link to a folder that is listed"
    NOT_UTF_8 = "name is not UTF-8"
    BROKEN = "link to nothing"
    IRREGULAR = "not a regular file"
    SPARSE = "sparse member of a tar"
    COMPRESSED = "compressed shard"
    KEY = "key that the storage client cannot read"


# What no image is lost by, or what the settings ask for. Everything else counts towards max_skipped_share.
INTENDED = frozenset({Reason.HIDDEN, Reason.EXCLUDED, Reason.EXTENSION, Reason.LISTED})
NameFilter = Callable[[str], Reason | None]


class Skipped:
    """What listing left out: counts by reason, and a few names of each."""

    def __init__(self) -> None:
        self.counts: Counter[Reason] = Counter()
        self.examples: dict[Reason, list[str]] = {}

    def add(self, reason: Reason, name: str) -> None:
        self.counts[reason] += 1
        names = self.examples.setdefault(reason, [])
        if len(names) < MAX_EXAMPLES:
            names.append(name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")[:MAX_NAME_CHARS])

    def update(self, other: "Skipped") -> None:
        self.counts += other.counts
        for reason, names in other.examples.items():
            self.examples[reason] = (self.examples.get(reason, []) + names)[:MAX_EXAMPLES]

    def select(self, names_of: NameFilter, name: str) -> bool:
        """Return whether a name is selected; else count it."""
        reason = names_of(name) or (None if _is_utf_8(name) else Reason.NOT_UTF_8)
        if reason:
            self.add(reason, name)
        return reason is None

    @property
    def num_lost(self) -> int:
        """How much was left out that looks like images or shards."""
        return sum(count for reason, count in self.counts.items() if reason not in INTENDED)

    def describe(self) -> str:
        parts = (
            f"{count:,} {reason} (e.g. {', '.join(map(repr, self.examples[reason]))})"
            for reason, count in self.counts.most_common()
        )
        return "; ".join(parts) or "nothing"

    def check(self, name: str, num_listed: int, max_skipped_share: float, of: str = "images") -> None:
        """Raise AttribError if too much of what looks like an image, or a shard, was left out."""
        num_lost = self.num_lost
        if num_lost > max_skipped_share * (num_listed + num_lost):
            raise AttribError(
                f"collection {name!r}: {num_lost:,} of {num_listed + num_lost:,} {of} cannot be listed, more than "
                f"max_skipped_share = {max_skipped_share:g} allows; left out: {self.describe()}. Repair or unpack "
                "them, name them in collection.exclude, or raise max_skipped_share"
            )


def _is_utf_8(name: str) -> bool:
    """File systems may hold other bytes in a name, which Python shows as surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def folder_filter(collection: CollectionSettings) -> NameFilter:
    """Return why a folder is left out: it is hidden, or matches an exclude pattern. Names are relative to the root."""
    by_part, by_path = (
        re.compile("|".join(fnmatch.translate(pattern) for pattern in patterns) or r"(?!)")
        for patterns in (
            [pattern for pattern in collection.exclude if "/" not in pattern],
            [pattern.strip("/") for pattern in collection.exclude if "/" in pattern],
        )
    )
    has_paths = any("/" in pattern for pattern in collection.exclude)

    def left_out(name: str) -> Reason | None:
        parts = name.split("/")
        # Hidden are e.g. thumbnails and the ._NAME files of macOS; a part . or .. is none, as GNU tar writes ./NAME.
        if any(part.startswith(".") and part not in (".", "..") for part in parts):
            return Reason.HIDDEN
        if any(map(by_part.match, parts)):
            return Reason.EXCLUDED
        paths = ("/".join(parts[: i + 1]) for i in range(len(parts))) if has_paths else ()
        return Reason.EXCLUDED if any(map(by_path.match, paths)) else None

    return left_out


def image_filter(collection: CollectionSettings) -> NameFilter:
    """Return why a name is none of an image."""
    in_folder = folder_filter(collection)
    extensions = {f".{extension.lower().removeprefix('.')}" for extension in collection.extensions}

    def left_out(name: str) -> Reason | None:
        fits = os.path.splitext(name)[1].lower() in extensions
        return in_folder(name) or (None if fits else Reason.EXTENSION)

    return left_out


def shard_filter(collection: CollectionSettings) -> NameFilter:
    """Return why a name is none of a shard: a tar or a Parquet file."""
    in_folder, suffix = folder_filter(collection), SHARD_EXTENSIONS[collection.format]

    def left_out(name: str) -> Reason | None:
        other = Reason.COMPRESSED if COMPRESSED_SHARD.search(name) else Reason.EXTENSION
        return in_folder(name) or (None if name.lower().endswith(suffix) else other)

    return left_out
