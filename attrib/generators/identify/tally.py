"""Verdicts counted part by part: those of a large dump do not fit into memory."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pyarrow.compute as pc

from attrib.common.storage import Storage
from attrib.generators.identify.verdicts import UNASSESSABLE

COLUMNS = ["verdict", "generator", "gallery", "stage", "reason", "codec", "width", "height"]
MAX_REASONS = 20


@dataclass
class Tally:
    """kinds, reasons: images by verdict, and of the unassessable by what stands before the colon in their reason; examples: a whole reason of
    each; galleries: of all that have a fingerprint; attributed: of these by (gallery, generator); codecs, sides_px: of all that could be decoded."""

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
        """{reason, count, example}, the commonest first; those after MAX_REASONS in one row."""
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
    """Of all parts of verdicts."""
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
