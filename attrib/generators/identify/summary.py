"""Summary of an identify run: counts, prevalence, its change, candidate generators, and sets."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

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
from attrib.generators.identify.sets import SetVerdict, describe_sets, judge_set
from attrib.generators.identify.settings import IdentifySettings
from attrib.generators.identify.verdicts import FAMILY, KNOWN, UNASSESSABLE, UNKNOWN, Judge
from attrib.generators.registry.comparability import query_warnings, registry_warnings
from attrib.generators.registry.registry import Registry

BATCH_ROWS = 2_048  # of fingerprints that are compared with clusters at a time
COLUMNS = ["verdict", "generator", "gallery", "stage", "reason", "codec", "width", "height"]
MAX_REASONS = 20
MAX_SETS_LISTED = 50  # in the record and on the page; sets.parquet has all

SET_SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("num_images", pa.int64()),
        ("num_distinct", pa.int64()),
        ("verdict", pa.string()),
        ("generator", pa.string()),
        ("nearest", pa.string()),
        ("score", pa.float64()),
        ("margin", pa.float64()),
        ("p_value", pa.float64()),
        ("own_p_value", pa.float64()),
        ("floor", pa.float64()),
        ("reason", pa.string()),
    ]
)


@dataclass
class Tally:
    """Counts over all verdict parts.

    kinds, reasons: images by verdict, and unassessable ones by the reason's text before the colon. examples: a full
    reason of each. galleries: images with a fingerprint, by gallery. attributed: those by (gallery, generator). codecs,
    sides_px: of all decoded images.
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

    @property
    def side_range_px(self) -> tuple[float, float] | None:
        """5th and 95th percentile of the shorter side."""
        sides = np.concatenate([np.empty(0, np.int32), *self.sides_px])
        return tuple(np.percentile(sides, [5, 95]).tolist()) if len(sides) else None

    def described_reasons(self) -> list[dict]:
        """{reason, count, example} by falling count; reasons after MAX_REASONS share one row."""
        rows = [
            {"reason": reason, "count": count, "example": self.examples[reason]}
            for reason, count in sorted(self.reasons.items(), key=lambda item: (-item[1], item[0]))
        ]
        shown, rest = rows[:MAX_REASONS], rows[MAX_REASONS:]
        if rest:
            count = sum(row["count"] for row in rest)
            shown.append({"reason": f"{len(rest):,} other reasons", "count": count, "example": rest[0]["example"]})
        return shown


def tally(uris: list[str], storage: Storage) -> Tally:
    """Counts over all verdict parts, one part in memory at a time."""
    found = Tally()
    for uri in uris:
        part = storage.read_table(uri, columns=COLUMNS)
        found.num_images += len(part)
        found.num_failed += len(part) - part["stage"].null_count
        found.kinds.update(part["verdict"].to_pylist())
        absent = pc.equal(part["verdict"], UNASSESSABLE)
        for reason in part.filter(absent)["reason"].to_pylist():
            kind = reason.partition(":")[0]
            found.reasons[kind] += 1
            found.examples.setdefault(kind, reason)
        named = part.filter(pc.is_valid(part["generator"]))
        found.attributed.update(zip(named["gallery"].to_pylist(), named["generator"].to_pylist()))
        found.galleries.update(part["gallery"].drop_null().to_pylist())
        readable = part.filter(pc.is_valid(part["width"]))
        found.codecs.update(readable["codec"].to_pylist())
        found.sides_px.append(pc.min_element_wise(readable["width"], readable["height"]).to_numpy())
    return found


def summarise(
    settings: IdentifySettings,
    manifest: Manifest,
    registry: Registry,
    judge: Judge,
    previous: Identified | None,
    storage: Storage,
) -> dict:
    """The record's figures from the verdict parts. Writes share_draws.npy and, with a set_column, sets.parquet."""
    parts = [p for p, num_rows in enumerate(manifest.num_rows) if num_rows]
    identified = Identified(settings.output, {})
    uris = [identified.part_uri(part) for part in parts]
    counted = tally(uris, storage)
    shares, warnings = _shares(counted, settings, registry, judge, previous, storage)
    return {
        "num_images": counted.num_images,
        "num_failed": counted.num_failed,
        "verdicts": {kind: counted.kinds[kind] for kind in (KNOWN, FAMILY, UNKNOWN, UNASSESSABLE)},
        "unassessable_reasons": counted.described_reasons(),
        "families": [name for name, size in zip(judge.families, judge.family_sizes) if size > 1],
        "floor": judge.floor,
        "negatives": judge.calibration.units(),
        "left_out_rates": {name: round(rate, 4) for name, rate in judge.left_out_rates.items()},
        "abstains": judge.abstains,
        "warnings": [
            *warnings,
            *judge.warnings,
            *query_warnings(counted.codecs, counted.side_range_px, registry.active),
            *registry_warnings(registry.active),
        ],
        "candidates": _candidates(settings, uris, judge, storage),
        "sets": _sets(settings, manifest, parts, identified, judge, storage),
    } | shares


def _shares(
    counted: Tally,
    settings: IdentifySettings,
    registry: Registry,
    judge: Judge,
    previous: Identified | None,
    storage: Storage,
) -> tuple[dict, list[str]]:
    """{shares, changes, recognised, num_share_images}, None and 0 without an estimate, and warnings.

    Counts all images in assessable galleries, also those left open because few references are recognised there: that
    error rate is known and corrected.
    """
    nothing = {"shares": None, "changes": None, "recognised": None, "num_share_images": 0}
    if judge.abstains:
        return nothing, []
    in_gallery = np.array([counted.galleries[name] for name in judge.calibration.degradations], float)
    in_gallery[~judge.assessable] = 0
    num_assessed = int(in_gallery.sum())
    if not num_assessed:
        return nothing, ["no image could be assessed, so that shares are not known"]
    attributed = [
        [counted.attributed[gallery, name] for name in judge.families] for gallery in judge.calibration.degradations
    ]
    attributed = np.array(attributed, float)
    shares, draws = estimate_shares(
        judge.families,
        np.column_stack([attributed, in_gallery - attributed.sum(axis=1)]),
        judge.confusion,
        counted.num_images - num_assessed,
        settings.prevalence.num_draws,
        # Two runs must not use the same random numbers: the interval of their difference would become too narrow.
        int(digest([settings.prevalence.seed, settings.manifest, settings.output])[:12], 16),
    )
    storage.write_array(join(settings.output, SHARE_DRAWS), draws)
    confusion = mixed_confusion(judge.confusion, in_gallery)
    totals = confusion.sum(axis=1)
    changed, warnings = _changes([*judge.families, OTHER], draws, registry, previous, storage)
    return {
        "shares": [asdict(share) for share in shares],
        "changes": changed,
        "num_share_images": num_assessed,
        "recognised": {
            name: round(float(confusion[i, i] / totals[i]), 4) for i, name in enumerate(judge.families) if totals[i]
        },
    }, warnings


def _changes(
    names: list[str], draws: np.ndarray, registry: Registry, previous: Identified | None, storage: Storage
) -> tuple[list[dict] | None, list[str]]:
    """Rows {name, change, low, high, changed, note} for the names of both runs, and warnings; a note explains a missing
    change.

    OTHER means another set of generators with another registry, so it is then not compared.
    """
    if previous is None or previous.record["shares"] is None:
        return None, []
    earlier = [share["name"] for share in previous.record["shares"]]
    rows = {
        row["name"]: row for row in changes(names, draws, earlier, storage.read_array(join(previous.uri, SHARE_DRAWS)))
    }
    new, vanished = [n for n in names if n not in earlier], [n for n in earlier if n not in names]
    notes = dict.fromkeys(new, "new") | dict.fromkeys(vanished, "vanished")
    warnings = []
    if previous.record["inputs"]["registry"] != registry.digest:
        notes[OTHER] = "another registry"
        warnings.append(
            f"{previous.uri} was made with another registry: the share of images of no registered generator is "
            "not compared, and other shares "
            f"also change with the references (new: {', '.join(new) or 'none'}; vanished: "
            f"{', '.join(vanished) or 'none'})"
        )
    unknown = {"change": None, "low": None, "high": None, "changed": False}
    found = [
        {"name": name} | unknown | {"note": notes[name]} if name in notes else rows[name] | {"note": None}
        for name in [*names, *vanished]
    ]
    return found, warnings


def _candidates(settings: IdentifySettings, uris: list[str], judge: Judge, storage: Storage) -> list[dict]:
    references = [
        np.concatenate([judge.galleries.references[g][0] for g in np.flatnonzero(judge.calibration.family == head)])
        for head in judge.heads
    ]
    cut = reference_cut(references)
    found = find_candidates(
        lambda: _unknown(uris, storage),
        cut,
        max_clustered=settings.prevalence.max_clustered,
        min_images=settings.prevalence.min_candidate_images,
        num_exemplars=settings.prevalence.num_exemplars,
    )
    names = [f"candidate-{number:02d}" for number in range(1, len(found) + 1)]
    sizes = [len(candidate.ids) for candidate in found]
    members = {
        "candidate": pa.array(np.repeat(names, sizes).tolist(), pa.string()),
        "id": pa.array(np.concatenate([np.empty(0, np.int64), *(candidate.ids for candidate in found)]), pa.int64()),
    }
    storage.write_table(join(settings.output, CANDIDATES), pa.table(members))
    if not found:
        return []
    shown = pa.array(np.concatenate([candidate.exemplars for candidate in found]))
    places = storage.dataset(uris, format="parquet").to_table(
        columns=["id", "key", "uri"], filter=pc.field("id").isin(shown)
    )
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
    """ids int64 [n] and fingerprints float32 [n, d] of the unknown images, one batch at a time."""
    for uri in uris:
        part = storage.read_table(uri, columns=["id", "fingerprint"], filter=pc.field("verdict") == UNKNOWN)
        for start in range(0, len(part), BATCH_ROWS):
            some = part.slice(start, BATCH_ROWS)
            yield some["id"].to_numpy(), read_fingerprints(some)


def _sets(
    settings: IdentifySettings,
    manifest: Manifest,
    parts: list[int],
    identified: Identified,
    judge: Judge,
    storage: Storage,
) -> dict | None:
    column = settings.prevalence.set_column
    if column is None:
        return None
    check_set_column(settings, manifest)
    # All images of a gallery, whatever their verdicts: attributed ones alone would be a selection, the negatives
    # are not.
    there = np.flatnonzero(judge.assessable)
    counted = pa.array([judge.calibration.degradations[gallery] for gallery in there], pa.string())
    kept: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for part in parts:
        found = storage.read_table(identified.part_uri(part), columns=["id", "gallery", "fingerprint"])
        found = found.filter(pc.is_in(found["gallery"], counted))
        names = storage.read_table(manifest.partition_uri(part), columns=["id", column]).sort_by("id")
        at = np.searchsorted(names["id"].to_numpy(), found["id"].to_numpy())
        of_set = names[column].cast(pa.string()).take(pa.array(at)).to_pylist()
        vectors = read_fingerprints(found) if len(found) else np.empty((0, 1), np.float32)
        ids = found["id"].to_numpy()
        rows_of: dict[str, list[int]] = {}
        for row, name in enumerate(of_set):
            if name is not None:
                rows_of.setdefault(name, []).append(row)
        for name, rows in rows_of.items():
            before = kept.get(name, (np.empty(0, np.int64), np.empty((0, vectors.shape[1]), np.float32)))
            together = np.concatenate([before[0], ids[rows]])
            first = np.argsort(sampling_rank(together), kind="stable")[: settings.prevalence.max_set_images]
            kept[name] = together[first], np.concatenate([before[1], vectors[rows]])[first]
    judged: list[SetVerdict] = [
        judge_set(name, kept[name][1], judge, settings.prevalence)
        for name in sorted(kept)
        if len(kept[name][0]) >= settings.prevalence.min_set_images
    ]
    rows = pa.Table.from_pylist([asdict(verdict) for verdict in judged], schema=SET_SCHEMA)
    storage.write_table(join(settings.output, SETS), rows)
    return {
        "num_sets": len(judged),
        "num_too_small": len(kept) - len(judged),
        "verdicts": describe_sets(judged),
        "least_p_value": max((verdict.floor for verdict in judged), default=None),
        "listed": rows.sort_by([("p_value", "ascending"), ("name", "ascending")]).slice(0, MAX_SETS_LISTED).to_pylist(),
    }


def check_set_column(settings: IdentifySettings, manifest: Manifest) -> None:
    """Raises AttribError if the manifest lacks the set column."""
    column = settings.prevalence.set_column
    if column is not None and column not in manifest.metadata_columns:
        raise AttribError(
            f"dump.set_column: the manifest has no metadata column {column!r}; it has "
            f"{', '.join(manifest.metadata_columns) or 'none'}"
        )
