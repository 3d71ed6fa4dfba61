"""Summary of an identify run: verdict counts, prevalence and its change, candidate generators, and verdicts on sets."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from attrib.common.config import digest
from attrib.common.errors import AttribError
from attrib.common.storage import Storage, join
from attrib.data.ids import sampling_rank
from attrib.data.manifest import Manifest
from attrib.generators.identify.candidates import find_candidates, reference_cut
from attrib.generators.identify.files import CANDIDATES, SETS, SHARE_DRAWS, Identified, read_fingerprints
from attrib.generators.identify.prevalence import OTHER, changes, estimate_shares, mixed_confusion
from attrib.generators.identify.sets import SetVerdict, judge_set
from attrib.generators.identify.settings import IdentifySettings
from attrib.generators.identify.verdicts import FAMILY, KNOWN, UNASSESSABLE, UNKNOWN, Judge
from attrib.generators.registry.comparability import query_warnings, registry_warnings
from attrib.generators.registry.registry import Registry

BATCH_ROWS = 2_048  # fingerprints that are compared with clusters at a time
COLUMNS = ["verdict", "generator", "gallery", "stage", "reason", "codec", "width", "height"]
KINDS = (KNOWN, FAMILY, UNKNOWN, UNASSESSABLE)
MAX_REASONS = 20
MAX_SETS_LISTED = 50  # in the record and on the page; sets.parquet has all

_ARROW = {int: pa.int64(), str: pa.string(), str | None: pa.string(), float: pa.float64(), float | None: pa.float64()}
SET_SCHEMA = pa.schema([(column.name, _ARROW[column.type]) for column in fields(SetVerdict)])


@dataclass
class Tally:
    """Counts over all verdict parts.

    kinds: number of images by verdict. reasons: number of unassessable images by the part of the reason before the
    colon; examples: a full reason of each. galleries: number of images with a fingerprint by gallery. attributed:
    number of attributed images by (gallery, generator). codecs, sides_px: formats and shorter sides of all decoded
    images.
    """

    num_images: int = 0
    num_failed: int = 0
    kinds: Counter = field(default_factory=Counter)
    reasons: Counter = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    galleries: Counter = field(default_factory=Counter)
    attributed: Counter = field(default_factory=Counter)
    codecs: Counter = field(default_factory=Counter)
    sides_px: list[np.ndarray] = field(default_factory=list)

    def add(self, part: pa.Table) -> None:
        """Add a verdict part; its COLUMNS are needed."""
        self.num_images += len(part)
        self.num_failed += len(part) - part["stage"].null_count
        self.kinds.update(part["verdict"].to_pylist())
        for reason in part.filter(pc.equal(part["verdict"], UNASSESSABLE))["reason"].to_pylist():
            kind = reason.partition(":")[0]
            self.reasons[kind] += 1
            self.examples.setdefault(kind, reason)
        named = part.filter(pc.is_valid(part["generator"]))
        self.attributed.update(zip(named["gallery"].to_pylist(), named["generator"].to_pylist()))
        self.galleries.update(part["gallery"].drop_null().to_pylist())
        readable = part.filter(pc.is_valid(part["width"]))
        self.codecs.update(readable["codec"].to_pylist())
        self.sides_px.append(pc.min_element_wise(readable["width"], readable["height"]).to_numpy())

    @property
    def side_range_px(self) -> tuple[float, float] | None:
        """5th and 95th percentile of the shorter side."""
        sides = np.concatenate([np.empty(0, np.int32), *self.sides_px])
        return tuple(np.percentile(sides, [5, 95]).tolist()) if len(sides) else None

    def described_reasons(self) -> list[dict]:
        """{reason, count, example} by falling count; reasons after MAX_REASONS share one row."""
        ordered = sorted(self.reasons.items(), key=lambda item: (-item[1], item[0]))
        rows = [{"reason": reason, "count": count, "example": self.examples[reason]} for reason, count in ordered]
        shown, rest = rows[:MAX_REASONS], rows[MAX_REASONS:]
        if rest:
            count = sum(row["count"] for row in rest)
            shown.append({"reason": f"{len(rest):,} other reasons", "count": count, "example": rest[0]["example"]})
        return shown


def summarise(
    settings: IdentifySettings,
    manifest: Manifest,
    registry: Registry,
    judge: Judge,
    previous: Identified | None,
    storage: Storage,
) -> dict:
    """The record's figures from the verdict parts. Writes share_draws.npy and, with a set_column, sets.parquet."""
    identified = Identified(settings.output, {})
    uris = {part: identified.part_uri(part) for part, num_rows in enumerate(manifest.num_rows) if num_rows}
    counted = Tally()
    for uri in uris.values():
        counted.add(storage.read_table(uri, columns=COLUMNS))
    shares, warnings = _shares(counted, settings, registry, judge, previous, storage)
    warnings += judge.warnings
    warnings += query_warnings(counted.codecs, counted.side_range_px, registry.active)
    warnings += registry_warnings(registry.active)
    return {
        "num_images": counted.num_images,
        "num_failed": counted.num_failed,
        "verdicts": {kind: counted.kinds[kind] for kind in KINDS},
        "unassessable_reasons": counted.described_reasons(),
        "families": [name for name, size in zip(judge.families, judge.family_sizes) if size > 1],
        "floor": judge.floor,
        "negatives": judge.calibration.units(),
        "left_out_rates": {name: round(rate, 4) for name, rate in judge.left_out_rates.items()},
        "abstains": judge.abstains,
        "warnings": warnings,
        "candidates": _candidates(settings, list(uris.values()), judge, storage),
        "sets": _sets(settings, manifest, uris, judge, storage) if settings.prevalence.set_column else None,
    } | shares


def _shares(
    counted: Tally,
    settings: IdentifySettings,
    registry: Registry,
    judge: Judge,
    previous: Identified | None,
    storage: Storage,
) -> tuple[dict, list[str]]:
    """{shares, changes, recognised, num_share_images} (None and 0 if nothing can be estimated), and warnings.

    Uses all images in assessable galleries. Some of them are unassessable, because few references are recognised there;
    they are used because this error rate is known and corrected.
    """
    galleries, names = judge.calibration.degradations, judge.families
    in_gallery = np.where(judge.assessable, [counted.galleries[name] for name in galleries], 0.0)
    num_assessed = 0 if judge.abstains else int(in_gallery.sum())
    if not num_assessed:
        reason = "no image could be assessed, so the prevalence of generators is not known"
        nothing = {"shares": None, "changes": None, "recognised": None, "num_share_images": 0}
        return nothing, [] if judge.abstains else [reason]
    attributed = np.array([[counted.attributed[gallery, name] for name in names] for gallery in galleries], float)
    counts = np.column_stack([attributed, in_gallery - attributed.sum(axis=1)])
    # Two runs must not use the same random numbers: the interval of their difference would be too narrow.
    seed = int(digest([settings.prevalence.seed, settings.manifest, settings.output])[:12], 16)
    num_left_out, num_draws = counted.num_images - num_assessed, settings.prevalence.num_draws
    shares, draws = estimate_shares(names, counts, judge.confusion, num_left_out, num_draws, seed)
    storage.write_array(join(settings.output, SHARE_DRAWS), draws)
    confusion = mixed_confusion(judge.confusion, in_gallery)
    right, totals = confusion.diagonal(), confusion.sum(axis=1)
    changed, warnings = _changes([*names, OTHER], draws, registry, previous, storage)
    return {
        "shares": [asdict(share) for share in shares],
        "changes": changed,
        "num_share_images": num_assessed,
        "recognised": {name: round(float(right[i] / totals[i]), 4) for i, name in enumerate(names) if totals[i]},
    }, warnings


def _changes(
    names: list[str], draws: np.ndarray, registry: Registry, previous: Identified | None, storage: Storage
) -> tuple[list[dict] | None, list[str]]:
    """Rows {name, change, low, high, changed, note} for the names of either run, and warnings.

    note: why there is no change, else None. OTHER is not compared between different registries, because it has another
    meaning in each.
    """
    if previous is None or previous.record["shares"] is None:
        return None, []
    earlier, warnings = [share["name"] for share in previous.record["shares"]], []
    earlier_draws = storage.read_array(join(previous.uri, SHARE_DRAWS))
    rows = {row["name"]: row | {"note": None} for row in changes(names, draws, earlier, earlier_draws)}
    new, vanished = [n for n in names if n not in earlier], [n for n in earlier if n not in names]
    notes = dict.fromkeys(new, "new") | dict.fromkeys(vanished, "vanished")
    if previous.record["inputs"]["registry"] != registry.digest:
        notes[OTHER] = "another registry"
        warnings.append(
            f"{previous.uri} was made with another registry: the share of unknown generators is not compared, and the "
            "other shares may have changed because the references changed (new: "
            f"{', '.join(new) or 'none'}; vanished: {', '.join(vanished) or 'none'})"
        )
    unknown = {"change": None, "low": None, "high": None, "changed": False}
    rows |= {name: {"name": name} | unknown | {"note": note} for name, note in notes.items()}
    return [rows[name] for name in [*names, *vanished]], warnings


def _candidates(settings: IdentifySettings, uris: list[str], judge: Judge, storage: Storage) -> list[dict]:
    """Rows of the record about candidate generators. Writes candidates.parquet."""
    options, family = settings.prevalence, judge.calibration.family
    untouched = [references[0] for references in judge.galleries.references]
    cut = reference_cut(
        [np.concatenate([untouched[g] for g in np.flatnonzero(family == head)]) for head in judge.heads]
    )
    found = find_candidates(
        lambda: _unknown(uris, storage),
        cut,
        max_clustered=options.max_clustered,
        min_images=options.min_candidate_images,
        num_exemplars=options.num_exemplars,
    )
    names = [f"candidate-{number:02d}" for number in range(1, len(found) + 1)]
    ids = np.concatenate([np.empty(0, np.int64), *(candidate.ids for candidate in found)])
    owners = np.repeat(names, [len(candidate.ids) for candidate in found]).tolist()
    members = pa.table({"candidate": pa.array(owners, pa.string()), "id": pa.array(ids, pa.int64())})
    storage.write_table(join(settings.output, CANDIDATES), members)
    if not found:
        return []
    shown = pc.field("id").isin(pa.array(np.concatenate([candidate.exemplars for candidate in found])))
    places = storage.dataset(uris, format="parquet").to_table(columns=["id", "key", "uri"], filter=shown)
    place_of = {row["id"]: row for row in places.to_pylist()}
    described = []
    for name, candidate in zip(names, found):
        means = judge.galleries.scores(candidate.clustered)[:, 0].mean(axis=0, dtype=np.float64)
        nearest = int(means.argmax())
        described.append(
            {
                "name": name,
                "num_images": len(candidate.ids),
                "num_distinct": candidate.num_distinct,
                "cohesion": round(candidate.cohesion, 4),
                "cut": round(cut, 4),
                "nearest": judge.calibration.names[nearest],
                "nearest_score": round(float(means[nearest]), 4),
                "exemplars": [place_of[i] for i in candidate.exemplars.tolist()],
            }
        )
    return described


def _unknown(uris: list[str], storage: Storage) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield ids int64 [n] and fingerprints float32 [n, d] of the unknown images in batches."""
    for uri in uris:
        part = storage.read_table(uri, columns=["id", "fingerprint"], filter=pc.field("verdict") == UNKNOWN)
        for start in range(0, len(part), BATCH_ROWS):
            some = part.slice(start, BATCH_ROWS)
            yield some["id"].to_numpy(), read_fingerprints(some)


def _sets(settings: IdentifySettings, manifest: Manifest, uris: dict[int, str], judge: Judge, storage: Storage) -> dict:
    """The record's figures about sets. Writes sets.parquet."""
    options = settings.prevalence
    kept = _vectors_by_set(options.set_column, options.max_set_images, manifest, uris, judge, storage)
    judged: list[SetVerdict] = [
        judge_set(name, vectors, judge, options)
        for name, vectors in sorted(kept.items())
        if len(vectors) >= options.min_set_images
    ]
    rows = pa.Table.from_pylist([asdict(verdict) for verdict in judged], schema=SET_SCHEMA)
    storage.write_table(join(settings.output, SETS), rows)
    counts = Counter(verdict.verdict for verdict in judged)
    return {
        "num_sets": len(judged),
        "num_too_small": len(kept) - len(judged),
        "verdicts": {kind: counts[kind] for kind in KINDS},
        "least_p_value": max((verdict.floor for verdict in judged), default=None),
        "listed": rows.sort_by([("p_value", "ascending"), ("name", "ascending")]).slice(0, MAX_SETS_LISTED).to_pylist(),
    }


def _vectors_by_set(
    column: str, max_images: int, manifest: Manifest, uris: dict[int, str], judge: Judge, storage: Storage
) -> dict[str, np.ndarray]:
    """{set: fingerprints float32 [m, d]} of the first max_images images of each set, by a hash of their ids.

    All images of assessable galleries are used, whatever their verdicts. Attributed images alone would be a selection
    of high scores, but the negatives that they are compared with are not selected.
    """
    counted = pa.array([judge.calibration.degradations[g] for g in np.flatnonzero(judge.assessable)], pa.string())
    kept: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for part, uri in uris.items():
        found = storage.read_table(uri, columns=["id", "gallery", "fingerprint"])
        found = found.filter(pc.is_in(found["gallery"], counted))
        if not len(found):
            continue
        ids, vectors = found["id"].to_numpy(), read_fingerprints(found)
        names = storage.read_table(manifest.checked_uri(part, storage), columns=["id", column]).sort_by("id")
        at = pa.array(np.searchsorted(names["id"].to_numpy(), ids))
        rows_of: dict[str, list[int]] = defaultdict(list)
        for row, name in enumerate(names[column].cast(pa.string()).take(at).to_pylist()):
            if name is not None:
                rows_of[name].append(row)
        for name, rows in rows_of.items():
            some = ids[rows], vectors[rows]
            together = tuple(map(np.concatenate, zip(kept[name], some))) if name in kept else some
            first = np.argsort(sampling_rank(together[0]), kind="stable")[:max_images]
            kept[name] = together[0][first], together[1][first]
    return {name: vectors for name, (_, vectors) in kept.items()}


def check_set_column(settings: IdentifySettings, manifest: Manifest) -> None:
    """Raises AttribError if the manifest lacks the set column."""
    column = settings.prevalence.set_column
    if column is not None and column not in manifest.metadata_columns:
        raise AttribError(
            f"prevalence.set_column: the manifest has no metadata column {column!r}; it has "
            f"{', '.join(manifest.metadata_columns) or 'none'}; choose one of its columns or null"
        )
