"""Charts as inline SVG for a self-contained page: plain numbers by name in, an SVG string out.

Nothing here knows what was measured or how: attrib.evaluate.cca and attrib.shares.calibration hand over numbers, so that a page can
draw the same chart from a JSON file. All text, names above all, is escaped. Text and lines take the colour of the page
around.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from attrib.common.errors import AttribError

# Okabe and Ito: told apart by the colour-blind.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("none", "7 3", "2 3", "9 3 2 3")


def calibration_chart(bins: dict[str, Sequence[tuple[float, float, int]]], captions: dict[str, str]) -> str:
    """Observed share of truth against the share given, a dot per bin, by its count.

    bins by name: (mean share given, mean share observed, number of candidates) of each; captions: what the legend says
    about each name. Raises AttribError if there is no name.
    """
    if not bins:
        raise AttribError("there is no reliability to plot; give one per calibrator")
    panel = Panel(58, 40, 420, 340, (0, 1), (0, 1))
    drawn = panel.axes(
        "Calibration of shares (best: on the diagonal)", "share given, mean of the bin", "share of truth observed"
    )
    (x1, y1), (x2, y2) = panel.at(0, 0), panel.at(1, 1)
    drawn.append(
        f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="currentColor" stroke-dasharray="4 4" opacity="0.6"/>'
    )
    for i, (name, rows) in enumerate(bins.items()):
        colour, y = COLOURS[i % len(COLOURS)], 442 + 20 * i
        places = [panel.at(given, observed) for given, observed, _ in rows]
        path = " ".join(f"{x},{y}" for x, y in places)
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5" opacity="0.6"/>')
        most = max(count for _, _, count in rows)
        for (x, height), (given, observed, count) in zip(places, rows):
            said = f"{name}: {count:,} candidates, share given {given:.3f}, observed {observed:.3f}"
            # By the logarithm: candidates of share 0 outnumber the others a hundredfold.
            radius = round(3 + 6 * np.log1p(count) / np.log1p(most), 1)
            dot = f'<circle cx="{x}" cy="{height}" r="{radius}" fill="{colour}" fill-opacity="0.75">'
            drawn.append(f"{dot}<title>{escape(said)}</title></circle>")
        drawn.append(f'<circle cx="66" cy="{y - 4}" r="6" fill="{colour}"/>')
        drawn.append(f'<text x="80" y="{y}">{escape(f"{name}: {captions[name]}")}</text>')
    return drawing(640, 442 + 20 * len(bins), "Calibration of shares", drawn)


def correlation_chart(correlations: dict[str, Sequence[float]], marks: dict[str, tuple[float, float]]) -> str:
    """Two panels by method: canonical correlations by direction, and whiteness against alignment.

    correlations by name: of each direction, in the order of the fit; marks, of the same names: (alignment, whiteness).
    Raises AttribError if there is no name.
    """
    if not correlations:
        raise AttribError("there is no summary to plot; give one per method, such as raw, aligned and disentangled")
    longest = max(len(line) for line in correlations.values())
    heights = padded([0, 1, *(value for line in correlations.values() for value in line)], 0)
    left = Panel(58, 40, 380, 270, (1, max(longest, 2)), heights)
    ranges = [padded([0, *(mark[axis] for mark in marks.values())], 0.1) for axis in (0, 1)]
    right = Panel(528, 40, 380, 270, *ranges)
    drawn = left.axes("Canonical correlations of held-out pairs", "direction, in the order of the fit", "correlation")
    drawn += right.axes(
        "Alignment and whiteness, no fit (best: up and right)",
        "alignment: tr(Rxy) / d",
        "whiteness: log det R / d over white noise's",
    )
    for i, (name, line) in enumerate(correlations.items()):
        colour, dash, y = COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)], 372 + 20 * i
        path = " ".join("{},{}".format(*left.at(j + 1, value)) for j, value in enumerate(line))
        drawn.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>'
        )
        figures = [round(float(value), 3) + 0.0 for value in (np.mean(line), *marks[name])]  # never -0.000
        said = "{}: mean canonical correlation {:.3f}, alignment {:.3f}, whiteness {:.3f}".format(name, *figures)
        for x, height in (right.at(*marks[name]), (66, y - 4)):
            drawn.append(f'<circle cx="{x}" cy="{height}" r="6" fill="{colour}"><title>{escape(said)}</title></circle>')
        drawn.append(f'<text x="80" y="{y}">{escape(said)}</text>')
    label = "Canonical correlations, alignment and whiteness by method"
    return drawing(940, 372 + 20 * len(correlations), label, drawn)


@dataclass(frozen=True)
class Panel:
    """Axes of a plot: its box in px, and the values of x and y (low, high) at its edges."""

    left: float
    top: float
    width: float
    height: float
    x: tuple[float, float]
    y: tuple[float, float]

    def at(self, x: float, y: float) -> tuple[float, float]:
        """A value's place, in px."""
        across, up = (x - self.x[0]) / (self.x[1] - self.x[0]), (y - self.y[0]) / (self.y[1] - self.y[0])
        return round(self.left + self.width * across, 2), round(self.top + self.height * (1 - up), 2)

    def axes(self, title: str, x_label: str, y_label: str) -> list[str]:
        """Title, grid, ticks and labels as SVG elements."""
        right, bottom, middle = self.left + self.width, self.top + self.height, self.top + self.height / 2
        faint = 'stroke="currentColor" opacity="0.12"'
        drawn = [f'<text x="{self.left}" y="{self.top - 14}" font-weight="600">{escape(title)}</text>']
        for value in ticks(*self.x):
            x, _ = self.at(value, self.y[0])
            drawn.append(f'<line x1="{x}" x2="{x}" y1="{self.top}" y2="{bottom}" {faint}/>')
            drawn.append(f'<text x="{x}" y="{bottom + 17}" text-anchor="middle">{value:g}</text>')
        for value in ticks(*self.y):
            _, y = self.at(self.x[0], value)
            drawn.append(f'<line x1="{self.left}" x2="{right}" y1="{y}" y2="{y}" {faint}/>')
            drawn.append(f'<text x="{self.left - 7}" y="{y + 4}" text-anchor="end">{value:g}</text>')
        centre = self.left + self.width / 2
        drawn.append(f'<text x="{centre}" y="{bottom + 37}" text-anchor="middle">{escape(x_label)}</text>')
        turned = f'transform="translate({self.left - 44} {middle}) rotate(-90)"'
        return [*drawn, f'<text {turned} text-anchor="middle">{escape(y_label)}</text>']


def ticks(low: float, high: float) -> list[float]:
    """Round values in [low, high], three to seven of them."""
    step = 10 ** np.floor(np.log10((high - low) / 3))
    step *= next((m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 7), 10)
    first, last = np.ceil(low / step - 1e-9), np.floor(high / step + 1e-9)
    return [float(f"{step * i:.12g}") for i in range(int(first), int(last) + 1)]


def drawing(width: int, height: int, label: str, elements: list[str]) -> str:
    """A self-contained inline SVG."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img"'
    style = 'font-family="system-ui, sans-serif" font-size="12" fill="currentColor"'
    return "\n".join([f'{head} aria-label="{escape(label)}" {style}>', *elements, "</svg>"])


def padded(values: list[float], margin: float) -> tuple[float, float]:
    """The range of values, wider on both sides by a share of it."""
    low, high = min(values), max(values)
    extra = margin * ((high - low) or 1.0)
    return low - extra, high + extra
