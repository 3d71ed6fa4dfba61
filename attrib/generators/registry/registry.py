"""The registry on disk: generators, and the negatives against which their scores are calibrated.

<registry>/registry.json                       method, degradations and all entries; replaced as a whole
<registry>/references/<name>-v<version>.npy    float32 [degradations, images, d], unit rows; nan for too small images

Registration trains nothing. It stores the fingerprints of 10 to 100 images per generator, but not the images.

There is no lock, because object stores have none that all clients respect. Before a run writes, it reads the record
again and stops if another run has changed it. If two runs write at the same moment, one of the two entries can still be
lost.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime

import numpy as np
from pydantic import TypeAdapter

from attrib.common.config import digest
from attrib.common.errors import AttribError, MismatchError, first_line
from attrib.common.progress import Progress
from attrib.common.storage import Storage, bytes_sha256, join
from attrib.generators.fingerprints.base import Method
from attrib.generators.registry.quality import BLANK, ReferenceFilter, format_counts
from attrib.generators.registry.settings import MIN_REFERENCES, RegistryMethodSettings, Role
from attrib.generators.signals.degradations import parse
from attrib.generators.signals.samples import Sample, recoded

RECORD = "registry.json"
EMBED_IMAGES = 64  # embedded together


@dataclass(frozen=True)
class Entry:
    """One version of a generator or of a set of negatives.

    source_sizes: images of each source (a generator, a photograph, a model of a pool), in order. codecs: images by
    format. sides_px: smallest and largest shorter side. left_out: refused images by reason.
    """

    name: str
    version: int
    role: Role
    source_sizes: tuple[int, ...]
    codecs: dict[str, int]
    sides_px: tuple[int, int]
    sha256: str
    registered_at: str
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def num_images(self) -> int:
        return sum(self.source_sizes)

    @property
    def file(self) -> str:
        return f"references/{self.name}-v{self.version}.npy"


@dataclass(frozen=True)
class Registry:
    """The record of a registry. method: of all references. entries: all versions, in the order of registration."""

    uri: str
    method: RegistryMethodSettings
    method_digest: str
    degradations: tuple[str, ...]
    entries: tuple[Entry, ...]

    @property
    def active(self) -> list[Entry]:
        """The newest version of each name, by name."""
        newest = {entry.name: entry for entry in sorted(self.entries, key=lambda entry: entry.version)}
        return [newest[name] for name in sorted(newest)]

    @property
    def generators(self) -> list[Entry]:
        return [entry for entry in self.active if entry.role == "generator"]

    @property
    def negatives(self) -> list[Entry]:
        return [entry for entry in self.active if entry.role != "generator"]

    @property
    def digest(self) -> str:
        """Digest of everything in the registry that a verdict depends on."""
        entries = [[entry.name, entry.version, entry.role, entry.source_sizes, entry.sha256] for entry in self.active]
        return digest([self.method_digest, self.method.scoring, self.degradations, entries])

    def read(self, entry: Entry, storage: Storage) -> np.ndarray:
        """References of an entry, float32 [degradations, images, d]. Raises AttribError if the file was changed."""
        uri = join(self.uri, entry.file)
        array = storage.read_array(uri) if storage.exists(uri) else None
        if array is None or _sha256(array) != entry.sha256:
            what = "is missing" if array is None else "is not the file that was registered"
            raise AttribError(f"{uri} {what}; restore it, or remove {entry.name!r} and register it again")
        return array

    def check_method(self, method: Method) -> None:
        """Raises MismatchError if another method made the references: their vectors cannot be compared."""
        if method.digest != self.method_digest:
            raise MismatchError(
                f"{self.uri} holds fingerprints of another {self.method.name} than the one that was loaded, and they "
                "cannot be compared; restore the one that made them, or register all generators again in a new registry"
            )


def new_registry(
    uri: str, settings: RegistryMethodSettings, method: Method, degradations: Sequence[str], storage: Storage
) -> Registry:
    """An empty registry; its record is written with the first entry.

    Raises AttribError if one exists, a degradation is unknown, or the method is a leak control.
    """
    if storage.exists(join(uri, RECORD)):
        raise AttribError(f"{uri} is a registry already; choose another folder")
    if not method.looks_at_trace:
        raise AttribError(
            f"{method.name} is a leak control and measures no trace of a generator; choose another method"
        )
    for name in degradations:
        parse(name)
    return Registry(uri, settings, method.digest, tuple(degradations), ())


def open_registry(uri: str, storage: Storage) -> Registry:
    """The registry at a URI. Raises AttribError if it is missing or damaged."""
    place = join(uri, RECORD)
    try:
        record = storage.require(place, "jobs.registry with action: register")
        return TypeAdapter(Registry).validate_python(record | {"uri": uri})
    except (ValueError, TypeError) as error:
        raise AttribError(
            f"{place} is damaged ({type(error).__name__}: {first_line(error)}); restore it from a copy, or delete "
            f"{uri} and register again"
        ) from error


def register(
    registry: Registry,
    name: str,
    role: Role,
    sources: Sequence[Sequence[Sample]],
    method: Method,
    storage: Storage,
    new_version: bool = False,
    left_out: dict[str, int] | None = None,
) -> tuple[Registry, Entry]:
    """Add an entry. Returns the registry with it, and the entry.

    sources: images of each source; for a generator all images are one source. Copies and images that cannot be assessed
    are left out. left_out: images that the caller has left out already, by reason. Raises AttribError if the name is
    taken and new_version is false, the role differs from that of earlier versions, fewer than MIN_REFERENCES images
    remain, or another run has changed the registry; MismatchError for another method.
    """
    registry.check_method(method)
    earlier = [entry for entry in registry.entries if entry.name == name]
    if earlier and not new_version:
        raise AttribError(
            f"{name!r} is in {registry.uri} already (version {earlier[-1].version}); set new_version to replace its "
            "references, or choose another name"
        )
    if earlier and earlier[-1].role != role:
        raise AttribError(f"{name!r} was registered with role {earlier[-1].role!r}, not {role!r}; choose another name")
    wanted = ReferenceFilter(method)
    wanted.left_out.update(left_out or {})
    kept = [(i, sample) for i, source in enumerate(sources) for sample in source if wanted.takes(sample)]
    if kept:
        progress = Progress(f"fingerprints of {name}", len(kept) * len(registry.degradations), "images")
        references = embed_degraded(method, [sample for _, sample in kept], registry.degradations, progress)
        progress.close()
        there = np.isfinite(references[0]).all(axis=1)
        wanted.left_out += Counter({BLANK: int(np.count_nonzero(~there))})
        kept, references = [kept[i] for i in np.flatnonzero(there)], references[:, there]
    if len(kept) < MIN_REFERENCES:
        without = f" (left out: {format_counts(wanted.left_out)})" if wanted.left_out else ""
        raise AttribError(
            f"{name!r} has {len(kept)} distinct images that can be assessed{without} and needs {MIN_REFERENCES}; add "
            f"images of {method.min_side_px} px or more"
        )
    sides = sorted(sample.side_px for _, sample in kept)
    version = max((entry.version for entry in earlier), default=0) + 1
    sizes = tuple(Counter(i for i, _ in kept).values())
    codecs = dict(sorted(Counter(sample.codec for _, sample in kept).items()))
    entry = Entry(
        *(name, version, role, sizes, codecs, (sides[0], sides[-1]), _sha256(references)),
        registered_at=datetime.now(UTC).isoformat(timespec="seconds"),
        left_out=dict(sorted(wanted.left_out.items())),
    )
    return _replaced(registry, (*registry.entries, entry), storage, {entry.file: references}), entry


def remove(registry: Registry, name: str, storage: Storage, version: int | None = None) -> Registry:
    """Remove an entry, or one version of it. Returns the registry without it.

    Raises AttribError if the entry does not exist or another run has changed the record.
    """
    gone = [entry for entry in registry.entries if entry.name == name and version in (None, entry.version)]
    if not gone:
        known = ", ".join(entry.name for entry in registry.active) or "nothing"
        which = name if version is None else f"{name} version {version}"
        raise AttribError(f"{registry.uri} has no entry {which!r}; it has {known}")
    registry = _replaced(registry, tuple(entry for entry in registry.entries if entry not in gone), storage)
    for entry in gone:
        storage.delete_file(join(registry.uri, entry.file))
    return registry


def embed_degraded(
    method: Method, samples: Sequence[Sample], degradations: Sequence[str], progress: Progress | None = None
) -> np.ndarray:
    """float32 [len(degradations), n, d]: fingerprints of the samples under each degradation.

    nan where the degraded image is too small or has no residual.
    """
    rows: dict[tuple[int, int], np.ndarray] = {}
    for place, name in enumerate(degradations):
        for start in range(0, len(samples), EMBED_IMAGES):
            made = [recoded(sample, parse(name)) for sample in samples[start : start + EMBED_IMAGES]]
            large = [i for i, sample in enumerate(made) if sample.side_px >= method.min_side_px]
            if large:
                rows |= {(place, start + i): row for i, row in zip(large, method.embed([made[i] for i in large]))}
            if progress:
                progress.update(len(made))
    found = np.full((len(degradations), len(samples), len(next(iter(rows.values())))), np.nan, np.float32)
    for at, row in rows.items():
        found[at] = fingerprint_or_nan(row)
    return found


def fingerprint_or_nan(row: np.ndarray) -> np.ndarray:
    """The row, or nan if it is zero or not finite: an image without any residual has no fingerprint."""
    return row if np.isfinite(row).all() and row.any() else np.full_like(row, np.nan)


def _replaced(
    registry: Registry, entries: tuple[Entry, ...], storage: Storage, files: dict[str, np.ndarray] | None = None
) -> Registry:
    """Write the registry with these entries and new files. Raises AttribError if another run has changed its record."""
    place = join(registry.uri, RECORD)
    if (registry.entries or storage.exists(place)) and open_registry(registry.uri, storage) != registry:
        raise AttribError(f"{registry.uri} was changed by another run, so nothing was written; run this again")
    for name, array in (files or {}).items():
        storage.write_array(join(registry.uri, name), array)
    # The record is written last, so every entry in it has its file.
    registry = replace(registry, entries=entries)
    record = {"method": registry.method.model_dump(mode="json"), "method_digest": registry.method_digest}
    record |= {"degradations": registry.degradations, "entries": [asdict(entry) for entry in entries]}
    storage.write_json(place, record | {"digest": registry.digest})
    return registry


def _sha256(array: np.ndarray) -> str:
    return bytes_sha256(np.ascontiguousarray(array).tobytes())
