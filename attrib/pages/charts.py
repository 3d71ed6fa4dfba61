"""Charts drawn with matplotlib as SVG: plain numbers by name in, a Figure out; `svg` turns a Figure into text.

No display and no downloaded font is needed, text stays text, and equal numbers give equal bytes.
"""

import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from attrib.common.errors import AttribError

# Okabe and Ito (2008): distinguishable for readers with colour blindness.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
LINE_STYLES = ("-", "--", ":", "-.")
CLEAR, WEAK, PLAIN, MARKER = "#1b66c9", "#a9c4e8", "#8a94a6", "#b4481e"
SOFT, GRID = "#5a6270", "#e1e4ea"
MAX_NAME_CHARS = 60
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # the date alone would change every file

_style = matplotlib.rc_context(
    {
        "svg.hashsalt": "attrib",  # ids do not change from run to run
        "svg.fonttype": "none",
        "text.parse_math": False,  # a dollar sign in a name is no formula
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib
        "font.size": 9,
        "text.color": "#171a20",
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelcolor": SOFT,
        "axes.edgecolor": PLAIN,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "xtick.color": SOFT,
        "ytick.color": SOFT,
        "legend.frameon": False,
        "figure.constrained_layout.use": True,
    }
)


@dataclass(frozen=True)
class Steps:
    """One panel of `steps_figure`: labels of its steps, and the values of each line at them, None where not measured."""

    title: str
    labels: Sequence[str]
    lines: dict[str, Sequence[float | None]]
    chance: float | None = None


@_style
def svg(figure: Figure, label: str) -> str:
    """The figure as one SVG element. label: what it shows, for screen readers. All text is escaped."""
    text = io.StringIO()
    with warnings.catch_warnings():
        # Names may be in any script. A browser has the glyphs that the font of the layout lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
        figure.savefig(text, format="svg", transparent=True, metadata=NO_METADATA)
    # Every chart has a figure_1 and an axes_1, but the ids of one page must differ. Nothing refers to those of groups.
    drawn = re.sub(r'<g id="[^"]*"', "<g", text.getvalue())
    return f'<svg role="img" aria-label="{escape(label)}" ' + drawn[drawn.index("<svg ") + 5 :].rstrip()


@_style
def calibration_figure(bins: dict[str, Sequence[tuple[float, float, int]]], captions: dict[str, str]) -> Figure:
    """Reliability diagram: observed share of true sources against the predicted share, one dot per bin.

    bins by name: (mean predicted share, observed share, number of candidates) of each; captions: legend text by name.
    Raises AttribError if there is no name.
    """
    if not bins:
        raise AttribError("there is no reliability to plot; give one per calibrator")
    figure, (axes,) = _figure([480], 400 + 20 * len(bins))
    axes.plot([0, 1], [0, 1], color=PLAIN, linestyle="--", linewidth=1)
    for i, (name, rows) in enumerate(bins.items()):
        predicted, observed, counts = map(np.array, zip(*rows))
        # By the logarithm: candidates of share 0 outnumber the others a hundredfold.
        sizes = (3 + 6 * np.log1p(counts) / np.log1p(counts.max())) ** 2
        line = {"color": COLOURS[i % len(COLOURS)], "zorder": 3}
        axes.plot(predicted, observed, linewidth=1.2, alpha=0.6, **line)
        axes.scatter(predicted, observed, sizes, alpha=0.75, label=f"{_name(name)}: {captions[name]}", **line)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), title="Calibration of shares (best: on the diagonal)")
    axes.set(xlabel="predicted share, mean of the bin", ylabel="observed share of true sources")
    _legend(figure)
    return figure


@_style
def correlation_figure(correlations: dict[str, Sequence[float]], marks: dict[str, tuple[float, float]]) -> Figure:
    """Two panels by method: canonical correlations by direction, and whiteness against alignment.

    correlations by name: of each direction, in the order of the fit; marks, of the same names: (alignment, whiteness).
    Raises AttribError if there is no name.
    """
    if not correlations:
        raise AttribError("there is no summary to plot; give one per method, such as raw, aligned and disentangled")
    figure, (left, right) = _figure([440, 440], 320 + 20 * len(correlations))
    for i, (name, line) in enumerate(correlations.items()):
        values = [round(float(value), 3) + 0.0 for value in (np.mean(line), *marks[name])]  # never -0.000
        caption = "{}: mean canonical correlation {:.3f}, alignment {:.3f}, whiteness {:.3f}".format(
            _name(name), *values
        )
        left.plot(range(1, len(line) + 1), line, label=caption, **_line(i))
        right.plot(*marks[name], marker="o", markersize=7, **_line(i))
    left.set(title="Canonical correlations of held-out pairs", xlabel="direction, in the order of the fit")
    left.set(ylabel="correlation", ylim=(min(0.0, left.get_ylim()[0]), max(1.02, left.get_ylim()[1])))
    left.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    right.set(title="Alignment and whiteness, no fit (best: up and right)", xlabel="alignment: tr(Rxy) / d")
    right.set_ylabel("whiteness: log det R / d over white noise's")
    right.margins(0.15)
    _legend(figure)
    return figure


@_style
def steps_figure(panels: Sequence[Steps], step_px: int = 62) -> Figure:
    """Panels side by side with one legend: a line per method over named steps, all on the vertical range 0 to 1."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    widths = [max(step_px * len(panel.labels), 260) for panel in panels]
    figure, axes = _figure(widths, 330 + 18 * len(names), sharey=True)
    for panel, drawn in zip(panels, axes):
        turned = any(len(label) > 4 for label in panel.labels)
        drawn.set_xticks(range(len(panel.labels)), panel.labels, **({"rotation": 40, "ha": "right"} if turned else {}))
        drawn.set(title=panel.title, xlim=(-0.5, len(panel.labels) - 0.5), ylim=(-0.02, 1.02))
        if panel.chance is not None:
            drawn.axhline(panel.chance, color=PLAIN, linestyle="--", linewidth=1)
        for name, values in panel.lines.items():
            # nan cuts the line: it does not bridge what was not measured.
            heights = [np.nan if value is None else value for value in values]
            drawn.plot(heights, marker="o", markersize=4, label=_name(name), **_line(names.index(name)))
    _legend(figure)
    return figure


@_style
def forest_figure(
    rows: dict[str, tuple[float, float, float]], x_label: str, reference: float | None = None, form: str = "{:.3f}"
) -> Figure:
    """Means with their intervals, one row per name. rows: (mean, low, high); reference: a value to mark by a line."""
    figure, (axes,) = _figure([700], 30 * len(rows) + 50)
    if reference is not None:
        axes.axvline(reference, color=MARKER, linestyle="--", linewidth=1)
    for place, values in enumerate(rows.values()):
        mean, low, high = values
        axes.hlines(place, low, high, color=CLEAR, linewidth=2, zorder=3)
        axes.plot(mean, place, "o", color=CLEAR, markersize=6, zorder=3)
        text = "{} ({} to {})".format(*(form.format(value).replace("-", "\N{MINUS SIGN}") for value in values))
        axes.text(1.02, place, text, transform=axes.get_yaxis_transform(), va="center", color=SOFT)
    axes.set_yticks(range(len(rows)), [_name(name) for name in rows], color="#171a20")
    axes.set(ylim=(len(rows) - 0.4, -0.6), xlabel=x_label)
    axes.xaxis.set_major_locator(MaxNLocator(7))
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    return figure


@_style
def histogram_figure(bars: Sequence[dict], x_label: str, y_label: str, marker: float | None = None) -> Figure:
    """Bars [{low, high, count, is_clear}] from low to high. marker: the threshold that clear bars start at."""
    lows, highs, counts = (np.array([bar[key] for bar in bars]) for key in ("low", "high", "count"))
    colours = [PLAIN if marker is None else CLEAR if bar["is_clear"] else WEAK for bar in bars]
    figure, (axes,) = _figure([440], 230)
    # A bar of few among many stays visible: rare is not never.
    heights = np.where(counts > 0, np.maximum(counts, 0.01 * counts.max()), 0)
    axes.bar(lows, heights, highs - lows, align="edge", color=colours, edgecolor="white", linewidth=0.5, zorder=2)
    axes.set(xlabel=x_label, ylabel=y_label, xlim=(lows[0], highs[-1]))
    axes.grid(axis="x", visible=False)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    if marker is None:
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    else:
        axes.axvline(marker, color=MARKER, linestyle="--", linewidth=1)
        axes.set_title(f"clear source from {marker:g}", color=MARKER, size=9)
    return figure


def _figure(widths_px: Sequence[int], height_px: int, sharey: bool = False) -> tuple[Figure, np.ndarray]:
    """A figure with one panel per width, side by side. An SVG has 72 units an inch, a browser 96 px."""
    figure = Figure((sum(widths_px) / 96 + 0.6, height_px / 96))
    axes = figure.subplots(1, len(widths_px), sharey=sharey, squeeze=False, width_ratios=widths_px)
    return figure, axes[0]


def _legend(figure: Figure) -> None:
    """One legend below all panels, each name once."""
    handles = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside lower left")


def _line(place: int) -> dict:
    """Colour and dashes of the line at this place; with all colours in use, the dashes change."""
    dash = LINE_STYLES[place // len(COLOURS) % len(LINE_STYLES)]
    return {"color": COLOURS[place % len(COLOURS)], "linestyle": dash, "linewidth": 1.5}


def _name(text: str) -> str:
    return text if len(text) <= MAX_NAME_CHARS else text[: MAX_NAME_CHARS - 1] + "…"


# For attrib.capacity.page only, until it is deleted.
DASHES = ("none", "7 3", "2 3", "9 3 2 3")


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
