"""Charts drawn with matplotlib: functions from plain numbers to a Figure, and `svg` from a Figure to text.

They need no display and no downloaded font. Text stays text, and equal numbers give equal bytes.
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

# Okabe and Ito (2008): distinguishable with colour blindness.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
LINE_STYLES = ("-", "--", ":", "-.")
CLEAR, WEAK, PLAIN, MARKER = "#1b66c9", "#a9c4e8", "#8a94a6", "#b4481e"
SOFT, GRID = "#5a6270", "#e1e4ea"
MAX_NAME_CHARS = 60
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # the date would change the bytes

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
    """One panel of `steps_figure`. lines: the values of each line at the labelled steps, None where not measured."""

    title: str
    labels: Sequence[str]
    lines: dict[str, Sequence[float | None]]
    chance: float | None = None


@_style
def svg(figure: Figure, label: str) -> str:
    """Draw the figure as one SVG element with escaped text. label: a description for screen readers."""
    text = io.StringIO()
    with warnings.catch_warnings():
        # Names may be in any script. The browser's fonts have the glyphs that matplotlib's font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
        figure.savefig(text, format="svg", transparent=True, metadata=NO_METADATA)
    # Ids must be unique on a page, but every chart has a figure_1 and an axes_1. Nothing refers to the ids of groups.
    drawn = re.sub(r'<g id="[^"]*"', "<g", text.getvalue())
    return f'<svg role="img" aria-label="{escape(label)}" ' + drawn[drawn.index("<svg ") + 5 :].rstrip()


@_style
def calibration_figure(bins: dict[str, Sequence[tuple[float, float, int]]], captions: dict[str, str]) -> Figure:
    """Reliability diagram: observed share of true sources against the predicted share, one dot per bin.

    bins: by name, [(mean predicted share, observed share, number of candidates)]; captions: legend text by name. Raises
    AttribError if bins is empty.
    """
    if not bins:
        raise AttribError("there is no reliability to plot; give one per calibrator")
    figure, (axes,) = _figure([480], 400 + 20 * len(bins))
    axes.plot([0, 1], [0, 1], color=PLAIN, linestyle="--", linewidth=1)
    for i, (name, rows) in enumerate(bins.items()):
        predicted, observed, counts = map(np.array, zip(*rows))
        # Logarithmic: there are a hundred times more candidates of share 0 than of all other bins.
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
    """Two panels: canonical correlations by direction, and whiteness against alignment, one line or mark per method.

    correlations: by name, of each direction in the order of the fit; marks: (alignment, whiteness) by name. Raises
    AttribError if correlations is empty.
    """
    if not correlations:
        raise AttribError("there is no summary to plot; give one per method, such as raw, aligned and disentangled")
    figure, (left, right) = _figure([440, 440], 320 + 20 * len(correlations))
    for i, (name, line) in enumerate(correlations.items()):
        values = [round(float(value), 3) + 0.0 for value in (np.mean(line), *marks[name])]  # never -0.000
        form = "{}: mean canonical correlation {:.3f}, alignment {:.3f}, whiteness {:.3f}"
        left.plot(range(1, len(line) + 1), line, label=form.format(_name(name), *values), **_line(i))
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
            # nan interrupts the line where a step was not measured.
            heights = [np.nan if value is None else value for value in values]
            drawn.plot(heights, marker="o", markersize=4, label=_name(name), **_line(names.index(name)))
    _legend(figure)
    return figure


@_style
def forest_figure(
    rows: dict[str, tuple[float, float, float]], x_label: str, reference: float | None = None, form: str = "{:.3f}"
) -> Figure:
    """Means with intervals, one row per name. rows: (mean, low, high); reference: a value to mark with a line."""
    figure, (axes,) = _figure([700], 30 * len(rows) + 50)
    if reference is not None:
        axes.axvline(reference, color=MARKER, linestyle="--", linewidth=1)
    for place, (mean, low, high) in enumerate(rows.values()):
        axes.hlines(place, low, high, color=CLEAR, linewidth=2, zorder=3)
        axes.plot(mean, place, "o", color=CLEAR, markersize=6, zorder=3)
        text = f"{form} ({form} to {form})".format(mean, low, high).replace("-", "\N{MINUS SIGN}")
        axes.text(1.02, place, text, transform=axes.get_yaxis_transform(), va="center", color=SOFT)
    axes.set_yticks(range(len(rows)), [_name(name) for name in rows], color="#171a20")
    axes.set(ylim=(len(rows) - 0.4, -0.6), xlabel=x_label)
    axes.xaxis.set_major_locator(MaxNLocator(7))
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    return figure


@_style
def histogram_figure(edges: np.ndarray, counts: np.ndarray, x_label: str, marker: float | None = None) -> Figure:
    """Bars of queries: counts [n] between edges [n + 1]. marker: the edge where bars of clear queries start."""
    colours = [PLAIN if marker is None else CLEAR if low >= marker else WEAK for low in edges[:-1]]
    figure, (axes,) = _figure([440], 230)
    # A nonzero bar is at least one percent of the highest, so that it stays visible.
    heights = np.where(counts > 0, np.maximum(counts, 0.01 * counts.max()), 0)
    axes.bar(edges[:-1], heights, np.diff(edges), align="edge", color=colours, ec="white", linewidth=0.5, zorder=2)
    axes.set(xlabel=x_label, ylabel="queries", xlim=(edges[0], edges[-1]))
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
    """A figure with panels side by side, one per width. An inch is 96 px in a browser."""
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
    """Style of the line at this place; the dashes change when all colours are used."""
    dash = LINE_STYLES[place // len(COLOURS) % len(LINE_STYLES)]
    return {"color": COLOURS[place % len(COLOURS)], "linestyle": dash, "linewidth": 1.5}


def _name(text: str) -> str:
    return text if len(text) <= MAX_NAME_CHARS else text[: MAX_NAME_CHARS - 1] + "…"
