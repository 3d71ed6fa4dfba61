"""What an identify run says of all images together: counts, shares, their change, candidate generators, and sets."""

from collections import Counter
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from attrib.config import digest
from attrib.errors import AttribError
from attrib.generators.candidates import find_candidates, reference_cut
from attrib.generators.dump import OTHER, changes, estimate_shares, mixed_confusion
from attrib.generators.identification import codec_warnings
from attrib.generators.registry import Registry
from attrib.generators.registry_settings import IdentifySettings
from attrib.generators.sets import SetVerdict, describe_sets, judge_set
from attrib.generators.verdict_files import SETS, SHARE_DRAWS, Identified, read_fingerprints
from attrib.generators.verdicts import FAMILY, KNOWN, UNASSESSABLE, UNKNOWN, Judge
from attrib.identity import sampling_rank
from attrib.manifest import Manifest
from attrib.storage import Storage, join

SET_SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("num_images", pa.int64()),
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


def summarise(
    settings: IdentifySettings,
    manifest: Manifest,
    registry: Registry,
    judge: Judge,
    previous: Identified | None,
    storage: Storage,
) -> dict:
    """The figures of the record, from the verdict parts; writes share_draws.npy and, with a set_column, sets.parquet."""
    parts = [p for p, num_rows in enumerate(manifest.num_rows) if num_rows]
    identified = Identified(settings.output, {})
    uris = [identified.part_uri(part) for part in parts]
    columns = ["verdict", "generator", "gallery", "stage", "reason", "codec", "width", "height"]
    verdicts = storage.dataset(uris, format="parquet").to_table(columns=columns)
    kinds = Counter(verdicts["verdict"].to_pylist())
    shares = _shares(verdicts, settings, judge, previous, storage)
    readable = verdicts.filter(pc.is_valid(verdicts["width"]))
    sides = pc.min_element_wise(readable["width"], readable["height"]).to_numpy()
    reasons = Counter(verdicts.filter(pc.equal(verdicts["verdict"], UNASSESSABLE))["reason"].to_pylist())
    results = {
        "num_images": len(verdicts),
        "num_failed": len(verdicts) - verdicts["stage"].null_count,
        "verdicts": {kind: kinds.get(kind, 0) for kind in (KNOWN, FAMILY, UNKNOWN, UNASSESSABLE)},
        "unassessable_reasons": [{"reason": reason, "count": count} for reason, count in reasons.most_common(20)],
        "families": [name for name, size in zip(judge.families, judge.family_sizes) if size > 1],
        "floor": judge.floor,
        "negatives": judge.calibration.units(),
        "abstains": judge.abstains,
        "warnings": codec_warnings(
            Counter(readable["codec"].to_pylist()),
            tuple(np.percentile(sides, [5, 95]).tolist()) if len(sides) else None,
            registry.generators,
        ),
        "candidates": _candidates(settings, uris, judge, storage),
        "sets": _sets(settings, manifest, parts, identified, judge, storage),
    }
    return results | shares


def _shares(
    verdicts: pa.Table, settings: IdentifySettings, judge: Judge, previous: Identified | None, storage: Storage
) -> dict:
    if judge.abstains:
        return {"shares": None, "changes": None, "recognised": None}
    assessed = verdicts.filter(pc.not_equal(verdicts["verdict"], UNASSESSABLE))
    place = {name: i for i, name in enumerate(judge.families)}
    labels = [place.get(name, len(place)) for name in assessed["generator"].to_pylist()]
    galleries = Counter(assessed["gallery"].to_pylist())
    confusion = mixed_confusion(
        judge.confusion, np.array([galleries.get(name, 0) for name in judge.calibration.degradations], float)
    )
    shares, draws = estimate_shares(
        judge.families,
        np.bincount(np.array(labels, np.int64), minlength=len(place) + 1).astype(float),
        confusion,
        len(verdicts) - len(assessed),
        settings.dump.num_draws,
        # Two dumps must not be drawn alike: their difference would then look surer than it is.
        int(digest([settings.dump.seed, settings.manifest, settings.output])[:12], 16),
    )
    storage.write_array(join(settings.output, SHARE_DRAWS), draws)
    totals = confusion.sum(axis=1)
    return {
        "shares": [asdict(share) for share in shares],
        "changes": _changes(judge, draws, previous, storage),
        "recognised": {
            name: round(float(confusion[i, i] / totals[i]), 4) for i, name in enumerate(judge.families) if totals[i]
        },
    }


def _changes(judge: Judge, draws: np.ndarray, previous: Identified | None, storage: Storage) -> list[dict] | None:
    if previous is None or previous.record["shares"] is None:
        return None
    earlier = [share["name"] for share in previous.record["shares"]]
    return changes([*judge.families, OTHER], draws, earlier, storage.read_array(join(previous.uri, SHARE_DRAWS)))


def _candidates(settings: IdentifySettings, uris: list[str], judge: Judge, storage: Storage) -> list[dict]:
    unknown = storage.dataset(uris, format="parquet").to_table(
        columns=["id", "key", "uri", "fingerprint"], filter=pc.field("verdict") == UNKNOWN
    )
    if not len(unknown):
        return []
    references = [
        np.concatenate([judge.galleries.references[g][0] for g in np.flatnonzero(judge.calibration.family == head)])
        for head in judge.heads
    ]
    ids, vectors = unknown["id"].to_numpy(), read_fingerprints(unknown)
    cut = reference_cut(references)
    dump = settings.dump
    found = find_candidates(
        ids,
        vectors,
        cut,
        max_clustered=dump.max_clustered,
        min_images=dump.min_candidate_images,
        num_exemplars=dump.num_exemplars,
    )
    order = np.argsort(ids)
    keys, places = unknown["key"], unknown["uri"]
    described = []
    for number, candidate in enumerate(found, start=1):
        members = order[np.searchsorted(ids[order], candidate.ids)]
        means = judge.galleries.scores(vectors[members])[:, 0].mean(axis=0, dtype=np.float64)
        nearest = int(means.argmax())
        at = order[np.searchsorted(ids[order], candidate.exemplars)]
        described.append(
            {
                "name": f"candidate-{number:02d}",
                "num_images": len(candidate.ids),
                "cohesion": round(candidate.cohesion, 4),
                "cut": round(cut, 4),
                "nearest": judge.calibration.names[nearest],
                "nearest_score": round(float(means[nearest]), 4),
                "exemplars": [
                    {"id": int(ids[i]), "key": keys[int(i)].as_py(), "uri": places[int(i)].as_py()} for i in at
                ],
            }
        )
    return described


def _sets(
    settings: IdentifySettings,
    manifest: Manifest,
    parts: list[int],
    identified: Identified,
    judge: Judge,
    storage: Storage,
) -> dict | None:
    column = settings.dump.set_column
    if column is None:
        return None
    check_set_column(settings, manifest)
    kept: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for part in parts:
        found = storage.read_table(identified.part_uri(part), columns=["id", "verdict", "fingerprint"])
        found = found.filter(pc.is_in(found["verdict"], pa.array([KNOWN, FAMILY, UNKNOWN])))
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
            first = np.argsort(sampling_rank(together), kind="stable")[: settings.dump.max_set_images]
            kept[name] = together[first], np.concatenate([before[1], vectors[rows]])[first]
    judged: list[SetVerdict] = [
        judge_set(name, kept[name][1], judge, settings.dump)
        for name in sorted(kept)
        if len(kept[name][0]) >= settings.dump.min_set_images
    ]
    rows = pa.Table.from_pylist([asdict(verdict) for verdict in judged], schema=SET_SCHEMA)
    storage.write_table(join(settings.output, SETS), rows)
    return {
        "num_sets": len(judged),
        "num_too_small": len(kept) - len(judged),
        "verdicts": describe_sets(judged),
        "least_p_value": max((verdict.floor for verdict in judged), default=None),
    }


def check_set_column(settings: IdentifySettings, manifest: Manifest) -> None:
    """Raises AttribError if the manifest has no such column."""
    column = settings.dump.set_column
    if column is not None and column not in manifest.metadata_columns:
        raise AttribError(
            f"dump.set_column: the manifest has no metadata column {column!r}; it has {', '.join(manifest.metadata_columns) or 'none'}"
        )
