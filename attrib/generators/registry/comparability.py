"""Warnings where file formats or image sizes alone tell generators, negatives and queries apart."""

from collections import Counter

from attrib.generators.registry.registry import Entry

MAX_FORMAT_DISTANCE = 0.5  # total variation: the share of images that would need another format
MAX_STRANGE_SHARE = 0.05  # of images in formats that no reference has
MAX_SIZE_RATIO = 1.5
MAX_NAMED = 5


def registry_warnings(entries: list[Entry]) -> list[str]:
    """Warnings for generators whose files differ from the other generators' or the negatives'. entries: active ones."""
    generators = [entry for entry in entries if entry.role == "generator"]
    negatives = [entry for entry in entries if entry.role != "generator"]
    others = [[other for other in generators if other is not entry] for entry in generators]
    return _differences(generators, others, "those of the other generators") + _differences(
        generators, [negatives] * len(generators), "those of the negatives"
    )


def query_warnings(codecs: dict[str, int], sides_px: tuple[float, float] | None, entries: list[Entry]) -> list[str]:
    """Warnings for entries whose files differ from the images to identify.

    codecs: number of those images by format. sides_px: 5th and 95th percentile of their shorter side, None without
    images. entries: active ones.
    """
    warnings = []
    total = sum(codecs.values())
    known = {codec for entry in entries for codec in entry.codecs}
    strange = {codec: count for codec, count in codecs.items() if codec not in known}
    if sum(strange.values()) > MAX_STRANGE_SHARE * total:
        warnings.append(
            f"{sum(strange.values()):,} of {total:,} images are {', '.join(sorted(strange))}, and all references are "
            f"{', '.join(sorted(known))}: register references of these formats, or read their verdicts with care"
        )
    apart = [entry for entry in entries if total and _distance(entry.codecs, codecs) > MAX_FORMAT_DISTANCE]
    if apart:
        warnings.append(_of_formats(apart, f"those of the images to identify ({_mix(codecs)})"))
    apart = [entry for entry in entries if sides_px and _sizes_differ(entry.sides_px, sides_px)]
    if apart:
        said = f"those of the images to identify ({sides_px[0]:g} to {sides_px[1]:g} px)"
        warnings.append(_of_sizes(apart, said))
    return warnings


def _differences(entries: list[Entry], others: list[list[Entry]], described: str) -> list[str]:
    formats, sizes = [], []
    for entry, compared in zip(entries, others):
        if not compared:
            continue
        codecs = sum((Counter(other.codecs) for other in compared), Counter())
        sides = min(other.sides_px[0] for other in compared), max(other.sides_px[1] for other in compared)
        formats += [entry] * (_distance(entry.codecs, codecs) > MAX_FORMAT_DISTANCE)
        sizes += [entry] * _sizes_differ(entry.sides_px, sides)
    warnings = [_of_formats(formats, described)] if formats else []
    return warnings + ([_of_sizes(sizes, described)] if sizes else [])


def _of_formats(entries: list[Entry], described: str) -> str:
    named = _named([f"{entry.name} ({_mix(entry.codecs)})" for entry in entries])
    return (
        f"the formats of {named} differ from {described}: verdicts may follow the format; register images "
        "that were saved alike"
    )


def _of_sizes(entries: list[Entry], described: str) -> str:
    named = _named([f"{entry.name} ({entry.sides_px[0]} to {entry.sides_px[1]} px)" for entry in entries])
    return (
        f"the shorter sides of {named} differ from {described}: a resized image carries the trace of the "
        "resizing; register images of like size"
    )


def _named(entries: list[str]) -> str:
    more = f" and {len(entries) - MAX_NAMED:,} more" if len(entries) > MAX_NAMED else ""
    return ", ".join(entries[:MAX_NAMED]) + more


def _mix(codecs: dict[str, int]) -> str:
    total = sum(codecs.values())
    return ", ".join(f"{count / total:.0%} {codec}" for codec, count in Counter(codecs).most_common())


def _distance(codecs: dict[str, int], others: dict[str, int]) -> float:
    """Total variation distance between two mixes of formats, 0 to 1."""
    own, other = sum(codecs.values()), sum(others.values())
    return sum(abs(codecs.get(c, 0) / own - others.get(c, 0) / other) for c in {*codecs, *others}) / 2


def _sizes_differ(sides_px: tuple[float, float], others: tuple[float, float]) -> bool:
    return sides_px[0] > MAX_SIZE_RATIO * others[1] or others[0] > MAX_SIZE_RATIO * sides_px[1]
