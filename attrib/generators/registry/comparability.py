"""Warnings if file formats or image sizes alone could tell generators, negatives and queries apart."""

from collections import Counter
from collections.abc import Mapping

from attrib.generators.registry.registry import Entry

MAX_FORMAT_DISTANCE = 0.5  # total variation: the share of images that would need another format for equal mixes
MAX_UNSEEN_SHARE = 0.05  # of images in formats that no reference has
MAX_SIZE_RATIO = 1.5
MAX_NAMED = 5


def registry_warnings(entries: list[Entry]) -> list[str]:
    """Warnings for generators whose files differ from those of other generators or of negatives, of active entries."""
    generators = [entry for entry in entries if entry.role == "generator"]
    negatives = [entry for entry in entries if entry.role != "generator"]
    compared = {
        "those of the other generators": [[e for e in generators if e is not entry] for entry in generators],
        "those of the negatives": [negatives] * len(generators),
    }
    warnings = []
    for described, others in compared.items():
        formats, sizes = [], []
        for entry, given in zip(generators, others):
            if given:
                codecs = sum((Counter(other.codecs) for other in given), Counter())
                sides = min(other.sides_px[0] for other in given), max(other.sides_px[1] for other in given)
                formats += [entry] * (_distance(entry.codecs, codecs) > MAX_FORMAT_DISTANCE)
                sizes += [entry] * _sizes_differ(entry.sides_px, sides)
        warnings += _differences(formats, sizes, described, described)
    return warnings


def query_warnings(codecs: dict[str, int], sides_px: tuple[float, float] | None, entries: list[Entry]) -> list[str]:
    """Warnings for entries whose files differ from the images to identify.

    codecs: number of images to identify by format. sides_px: 5th and 95th percentile of their shorter sides, None
    without images. entries: active ones.
    """
    if not codecs or sides_px is None:
        return []
    warnings, total = [], sum(codecs.values())
    known = {codec for entry in entries for codec in entry.codecs}
    unseen = {codec: count for codec, count in codecs.items() if codec not in known}
    if sum(unseen.values()) > MAX_UNSEEN_SHARE * total:
        warnings.append(
            f"{sum(unseen.values()):,} of {total:,} images are {', '.join(sorted(unseen))}, and all references are "
            f"{', '.join(sorted(known))}: the verdicts on these images are less reliable; register references of these "
            "formats"
        )
    formats = [entry for entry in entries if _distance(entry.codecs, codecs) > MAX_FORMAT_DISTANCE]
    sizes = [entry for entry in entries if _sizes_differ(entry.sides_px, sides_px)]
    queries = "those of the images to identify"
    return warnings + _differences(
        formats, sizes, f"{queries} ({_mix(codecs)})", f"{queries} ({sides_px[0]:g} to {sides_px[1]:g} px)"
    )


def _differences(formats: list[Entry], sizes: list[Entry], other_formats: str, other_sizes: str) -> list[str]:
    warnings = []
    if formats:
        named = _named([f"{entry.name} ({_mix(entry.codecs)})" for entry in formats])
        warnings.append(
            f"the formats of {named} differ from {other_formats}: verdicts may depend on the format and not on the "
            "generator; register images that were saved in the same way"
        )
    if sizes:
        named = _named([f"{entry.name} ({entry.sides_px[0]} to {entry.sides_px[1]} px)" for entry in sizes])
        warnings.append(
            f"the shorter sides of {named} differ from {other_sizes}: resizing changes the trace of a generator; "
            "register images of similar size"
        )
    return warnings


def _named(entries: list[str]) -> str:
    more = f" and {len(entries) - MAX_NAMED:,} more" if len(entries) > MAX_NAMED else ""
    return ", ".join(entries[:MAX_NAMED]) + more


def _mix(codecs: Mapping[str, int]) -> str:
    total = sum(codecs.values())
    return ", ".join(f"{count / total:.0%} {codec}" for codec, count in Counter(codecs).most_common())


def _distance(codecs: Mapping[str, int], others: Mapping[str, int]) -> float:
    """Total variation distance between two mixes of formats, 0 to 1."""
    own, other = sum(codecs.values()), sum(others.values())
    return sum(abs(codecs.get(c, 0) / own - others.get(c, 0) / other) for c in {*codecs, *others}) / 2


def _sizes_differ(sides_px: tuple[float, float], others: tuple[float, float]) -> bool:
    return sides_px[0] > MAX_SIZE_RATIO * others[1] or others[0] > MAX_SIZE_RATIO * sides_px[1]
