"""Geometry of the report's bar charts, in the units of an SVG view box."""

from dataclasses import dataclass

import numpy as np

WIDTH, HEIGHT = 420, 190
LEFT, RIGHT, TOP, BOTTOM = 8, 8, 26, 24  # around the plot
MAX_BARS = 40
SIMILARITY_STEPS = (0.01, 0.02, 0.05, 0.1)
MAX_TICKS = 9


@dataclass(frozen=True)
class Bar:
    """Covers values [low, high); emphasised bars stand out."""

    low: float
    high: float
    count: int
    emphasised: bool
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Chart:
    """ticks: (x, label) along the axis; marker: x of a threshold, or None; largest: the count of the highest bar."""

    bars: list[Bar]
    ticks: list[tuple[float, str]]
    marker: float | None
    largest: int
    width: int = WIDTH
    height: int = HEIGHT
    baseline: int = HEIGHT - BOTTOM
    top: int = TOP
    left: int = LEFT
    right: int = WIDTH - RIGHT


def similarity_chart(similarity: np.ndarray, clear_similarity: float) -> Chart | None:
    """Histogram of float [n] in steps counted from clear_similarity, so that no bar straddles it. None without values."""
    if not len(similarity):
        return None
    distance = similarity.astype(np.float64) - clear_similarity
    low, high = min(distance.min(), 0.0), max(distance.max(), 0.0)
    step = next((s for s in SIMILARITY_STEPS if (high - low) / s <= MAX_BARS), SIMILARITY_STEPS[-1])
    place = np.floor(distance / step).astype(np.int64)
    first, last = min(int(place.min()), -1), max(int(place.max()), 0)
    edges = clear_similarity + step * np.arange(first, last + 2)
    emphasised = np.arange(first, last + 1) >= 0
    tick = next((t for t in (0.05, 0.1, 0.2) if (edges[-1] - edges[0]) / t <= MAX_TICKS), 0.5)
    ticks = tick * np.arange(np.ceil(edges[0] / tick - 1e-9), np.floor(edges[-1] / tick + 1e-9) + 1)
    labels = [f"{value + 0.0:.2f}" if tick < 0.1 else f"{value + 0.0:.1f}" for value in ticks]
    return _chart(edges, np.bincount(place - first, minlength=len(edges) - 1), emphasised, ticks, labels, clear_similarity)


def count_chart(values: np.ndarray) -> Chart | None:
    """Histogram of positive integers [n]. None without values."""
    if not len(values):
        return None
    largest = int(values.max())
    step = -(-largest // MAX_BARS)
    counts = np.bincount((values - 1) // step)
    edges = 0.5 + step * np.arange(len(counts) + 1)
    tick = max(step, -(-largest // MAX_TICKS))
    ticks = np.arange(tick if tick > 1 else 1, largest + 1, tick)
    return _chart(edges, counts, np.zeros(len(counts), bool), ticks, [str(value) for value in ticks], None)


def _chart(edges, counts, emphasised, ticks, labels, marker) -> Chart:
    def x(value: float) -> float:
        return round(float(LEFT + (value - edges[0]) / (edges[-1] - edges[0]) * (WIDTH - LEFT - RIGHT)), 2)

    largest = int(counts.max())
    bars = []
    for low, high, count, stands_out in zip(edges[:-1], edges[1:], counts, emphasised):
        # A bar of few among many stays visible: rare is not never.
        height = round(max(count / largest * (HEIGHT - TOP - BOTTOM), 1.0), 2) if count else 0.0
        gap = min(1.5, 0.2 * (x(high) - x(low)))
        bars.append(
            Bar(float(low), float(high), int(count), bool(stands_out), x(low), HEIGHT - BOTTOM - height, round(x(high) - x(low) - gap, 2), height)
        )
    return Chart(bars, [(x(tick), label) for tick, label in zip(ticks, labels)], None if marker is None else x(marker), largest)
