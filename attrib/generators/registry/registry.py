"""The registry on disk: generators, and the negatives against which their scores are calibrated.

<registry>/registry.json                      method, degradations, all entries and a generation number
<registry>/references/<name>-<sha256>.npy     float32 [degradations, images, d], unit rows; nan for too small images

Registration trains nothing. It stores the fingerprints of 10 to 100 images per generator, but not the images.

Any number of runs may change a registry at once. The record is replaced by compare-and-swap: a run whose record is no
longer the present one repeats its change on the present one. The name of a reference file holds its digest, so two runs
never write different files under one name.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime

import numpy as np
from pydantic import TypeAdapter

from attrib.common.config import digest
from attrib.common.errors import AttribError, MismatchError, first_line
from attrib.common.json_records import parse_record, with_checksum
from attrib.common.progress import Progress
from attrib.common.storage import Storage, bytes_sha256, join
from attrib.common.swap import read_or_none, swap
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
    def files(self) -> tuple[str, str]:
        """Name of the reference file, and the name that earlier versions of attrib gave it."""
        return f"references/{self.name}-{self.sha256[:16]}.npy", f"references/{self.name}-v{self.version}.npy"


@dataclass(frozen=True)
class Registry:
    """The record of a registry. method: of all references. entries: all versions, in the order of registration."""

    uri: str
    method: RegistryMethodSettings
    method_digest: str
    degradations: tuple[str, ...]
    entries: tuple[Entry, ...]
    generation: int = 0  # number of changes so far

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
        uri, earlier = (join(self.uri, name) for name in entry.files)
        uri = uri if storage.exists(uri) or not storage.exists(earlier) else earlier
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
    """An empty registry; its record is written before the files of its first entry.

    Raises AttribError if a degradation is unknown or the method is a leak control.
    """
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
    if (content := read_or_none(place, storage)) is None:
        raise AttribError(f"{place} is not there: run jobs.registry with action: register first, or correct the path")
    return _parsed(uri, content)


def _parsed(uri: str, content: bytes) -> Registry:
    place = join(uri, RECORD)
    try:
        record = parse_record(place, content)
        registry = TypeAdapter(Registry).validate_python(record | {"uri": uri})
        if record.get("digest", registry.digest) != registry.digest:
            raise ValueError("its digest differs")
        return registry
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
    remain; MismatchError for another method.
    """
    registry.check_method(method)
    _next_version(registry, name, role, new_version)
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
    sizes = tuple(Counter(i for i, _ in kept).values())
    codecs = dict(sorted(Counter(sample.codec for _, sample in kept).items()))
    entry = Entry(
        *(name, 0, role, sizes, codecs, (sides[0], sides[-1]), _sha256(references)),
        registered_at=datetime.now(UTC).isoformat(timespec="seconds"),
        left_out=dict(sorted(wanted.left_out.items())),
    )
    if not registry.entries and not storage.exists(join(registry.uri, RECORD)):
        # First an empty record: a run that dies now leaves a registry, and not files that no record names.
        swap(join(registry.uri, RECORD), _content(registry), None, storage)
    # The record with the entry is written last, so every entry in it has its file.
    storage.write_array(join(registry.uri, entry.files[0]), references)

    def add(present: Registry) -> tuple[Entry, ...]:
        return *present.entries, replace(entry, version=_next_version(present, name, role, new_version))

    registry = _changed(registry, add, storage)
    return registry, registry.entries[-1]


def _next_version(registry: Registry, name: str, role: Role, new_version: bool) -> int:
    """The version of a new entry. Raises AttribError if it is not wanted or has another role."""
    earlier = [entry for entry in registry.entries if entry.name == name]
    if earlier and not new_version:
        raise AttribError(
            f"{name!r} is in {registry.uri} already (version {earlier[-1].version}); set new_version to replace its "
            "references, or choose another name"
        )
    if earlier and earlier[-1].role != role:
        raise AttribError(f"{name!r} was registered with role {earlier[-1].role!r}, not {role!r}; choose another name")
    return max((entry.version for entry in earlier), default=0) + 1


def remove(registry: Registry, name: str, storage: Storage, version: int | None = None) -> Registry:
    """Remove an entry, or one version of it. Returns the registry without it.

    Raises AttribError if the entry does not exist.
    """
    gone: list[Entry] = []

    def without(present: Registry) -> tuple[Entry, ...]:
        gone[:] = [entry for entry in present.entries if entry.name == name and version in (None, entry.version)]
        if not gone:
            known = ", ".join(entry.name for entry in present.active) or "nothing"
            which = name if version is None else f"{name} version {version}"
            raise AttribError(f"{present.uri} has no entry {which!r}; it has {known}")
        return tuple(entry for entry in present.entries if entry not in gone)

    registry = _changed(registry, without, storage)
    kept = {entry.files[0] for entry in registry.entries}  # a version of the same images has the same file
    for place in (join(registry.uri, name) for entry in gone for name in entry.files if name not in kept):
        if storage.exists(place):
            storage.delete_file(place)
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


def _changed(registry: Registry, change: Callable[[Registry], tuple[Entry, ...]], storage: Storage) -> Registry:
    """Write and return the registry on disk with the entries that `change` makes of it.

    If another run was faster, `change` is called again with its registry. Raises AttribError if the registry on disk is
    of another method or other degradations.
    """
    place = join(registry.uri, RECORD)
    while True:
        content = read_or_none(place, storage)
        if content is None and registry.entries:
            raise AttribError(f"{place} is gone; restore it from a copy, or register again in a new registry")
        present = registry if content is None else _parsed(registry.uri, content)
        if (present.method_digest, present.degradations) != (registry.method_digest, registry.degradations):
            raise AttribError(
                f"{registry.uri} was made with another method or other degradations; choose another folder"
            )
        changed = replace(present, entries=change(present), generation=present.generation + 1)
        if swap(place, _content(changed), content, storage):
            return changed


def _content(registry: Registry) -> bytes:
    """The record of a registry, as JSON."""
    record = {"method": registry.method.model_dump(mode="json"), "method_digest": registry.method_digest}
    record |= {"degradations": registry.degradations, "entries": [asdict(entry) for entry in registry.entries]}
    record |= {"digest": registry.digest, "generation": registry.generation}
    return json.dumps(with_checksum(record), indent=1).encode()


def _sha256(array: np.ndarray) -> str:
    return bytes_sha256(np.ascontiguousarray(array).tobytes())
