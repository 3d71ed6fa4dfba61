"""Charts of an evaluation: one line per method over steps that have a name, such as numbers of references or degradations."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from attrib.pages.charts import COLOURS, DASHES, Panel, drawing, ticks

LEFT, TOP, HEIGHT, GAP, MIN_WIDTH = 58, 40, 230, 76, 240
LEGEND_ROW = 18


@dataclass(frozen=True)
class Steps:
    """One panel: labels of its steps, and the values of each line at them, None where there is none."""

    title: str
    labels: Sequence[str]
    lines: dict[str, Sequence[float | None]]
    chance: float | None = None


def step_chart(panels: Sequence[Steps], step_px: int = 62) -> str:
    """Panels side by side with one legend, as inline SVG; all share the vertical range 0 to 1."""
    drawn, left = [], LEFT
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    turned = any(len(label) > 4 for panel in panels for label in panel.labels)
    bottom = TOP + HEIGHT + (66 if turned else 42)
    for steps in panels:
        width = max(step_px * len(steps.labels), MIN_WIDTH)
        drawn += _panel(steps, names, left, width, turned)
        left += width + GAP
    right = left - GAP + 20
    for i, name in enumerate(names):
        y = bottom + 14 + LEGEND_ROW * i
        drawn.append(f'<line x1="{LEFT}" x2="{LEFT + 30}" y1="{y - 4}" y2="{y - 4}" {_stroke(i)}/>')
        drawn.append(f'<text x="{LEFT + 40}" y="{y}">{escape(name)}</text>')
    label = "; ".join(steps.title for steps in panels)
    return drawing(right, bottom + 14 + LEGEND_ROW * len(names), label, drawn)


def _panel(steps: Steps, names: list[str], left: int, width: int, turned: bool) -> list[str]:
    panel = Panel(left, TOP, width, HEIGHT, (-0.5, len(steps.labels) - 0.5), (0.0, 1.0))
    bottom = TOP + HEIGHT
    drawn = [f'<text x="{left}" y="{TOP - 14}" font-weight="600">{escape(steps.title)}</text>']
    for value in ticks(*panel.y):
        _, y = panel.at(0, value)
        drawn.append(f'<line x1="{left}" x2="{left + width}" y1="{y}" y2="{y}" stroke="currentColor" opacity="0.12"/>')
        drawn.append(f'<text x="{left - 7}" y="{y + 4}" text-anchor="end">{value:g}</text>')
    for i, label in enumerate(steps.labels):
        x, _ = panel.at(i, 0.0)
        place = f'transform="translate({x + 4} {bottom + 14}) rotate(-40)" text-anchor="end"'
        place = place if turned else f'x="{x}" y="{bottom + 17}" text-anchor="middle"'
        drawn.append(f"<text {place}>{escape(label)}</text>")
    if steps.chance is not None:
        _, y = panel.at(0, steps.chance)
        drawn.append(
            f'<line x1="{left}" x2="{left + width}" y1="{y}" y2="{y}" stroke="currentColor" stroke-dasharray="4 4" opacity="0.6"/>'
        )
    for name, values in steps.lines.items():
        place = names.index(name)
        for run in _runs(values):
            points = [panel.at(i, values[i]) for i in run]
            path = " ".join(f"{x},{y}" for x, y in points)
            drawn.append(f'<polyline points="{path}" fill="none" {_stroke(place)}/>')
            for i, (x, y) in zip(run, points):
                said = f"{name}, {steps.labels[i]}: {values[i]:.3f}"
                dot = f'<circle cx="{x}" cy="{y}" r="3.5" fill="{COLOURS[place % len(COLOURS)]}">'
                drawn.append(f"{dot}<title>{escape(said)}</title></circle>")
    return drawn


def _runs(values: Sequence[float | None]) -> list[list[int]]:
    """Positions of values, cut where one is missing: a line does not bridge what was not measured."""
    runs: list[list[int]] = [[]]
    for i, value in enumerate(values):
        if value is None:
            runs.append([])
        else:
            runs[-1].append(i)
    return [run for run in runs if run]


def _stroke(place: int) -> str:
    dash = DASHES[place // len(COLOURS) % len(DASHES)]
    return f'stroke="{COLOURS[place % len(COLOURS)]}" stroke-width="2" stroke-dasharray="{dash}"'
