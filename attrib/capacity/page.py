"""The page of jobs.scale: the plan stage by stage, cost against size, what breaks first, the simulation, and where every constant is from."""

import json
from functools import partial
from html import escape
from importlib import resources

import jinja2
import numpy as np

from attrib.capacity.check import Check
from attrib.capacity.derive import Plan
from attrib.capacity.limits import Break
from attrib.capacity.settings import Constants, ScaleSettings, unit_of
from attrib.common.storage import Storage, join
from attrib.pages.charts import COLOURS, DASHES, Panel, drawing

PAGE = "scale.html"
SIZES = [
    10**exponent * digit for exponent in range(5, 10) for digit in (1, 3)
]  # of the plot; the target's own is added


def write_page(
    settings: ScaleSettings,
    plan: Plan,
    sized: list[Plan],
    broken: list[Break],
    checks: list[Check],
    record: dict,
    storage: Storage,
) -> str:
    """Write <output>/scale.html and return its URI. sized: plans of SIZES on the machines of `plan`; record: settings and versions to show."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    pretty = partial(json.dumps, indent=1, ensure_ascii=False)
    environment.filters |= {"amount": amount, "hours": hours, "count": count, "ratio": ratio, "pretty": pretty}
    template = resources.files("attrib.capacity").joinpath("page.html.jinja").read_text(encoding="utf-8")
    page = environment.from_string(template).render(
        settings=settings,
        target=settings.target,
        currency=settings.prices.currency,
        plan=plan,
        phases={"sources": "Sources, once", "queries": "Queries, every night"},
        chart=size_chart(sized, settings.prices.currency),
        slopes=slopes(sized),
        broken=broken,
        checks=checks,
        constants=[
            (name, getattr(settings.constants, name), unit_of(name), field.description)
            for name, field in Constants.model_fields.items()
            if getattr(settings.constants, name)
        ],
        record=record,
    )
    uri = join(settings.output, PAGE)
    storage.write_bytes(uri, page.encode())
    return uri


def size_chart(sized: list[Plan], currency: str) -> str:
    """Two panels, both axes logarithmic: hours and cost of each phase against the number of sources, on the machines of the plan."""
    sizes = [plan.target.num_sources for plan in sized]
    drawn: list[str] = []
    for left, title, label, value in (
        (62, "Hours on the machines of the plan", "hours", Plan.hours),
        (522, f"Cost, {currency}", currency, Plan.cost),
    ):
        values = {phase: [value(plan, phase) for plan in sized] for phase in ("sources", "queries")}
        everything = [v for line in values.values() for v in line]
        panel = _LogPanel(left, 40, 380, 290, _decades(sizes), _decades(everything))
        drawn += panel.axes(title, "number of sources", label)
        for i, (phase, line) in enumerate(values.items()):
            points = [panel.at(np.log10(size), np.log10(v)) for size, v in zip(sizes, line)]
            path = " ".join(f"{x},{y}" for x, y in points)
            style = f'stroke="{COLOURS[i]}" stroke-width="2" stroke-dasharray="{DASHES[i]}"'
            drawn.append(f'<polyline points="{path}" fill="none" {style}/>')
            for (x, y), size, v in zip(points, sizes, line):
                said = f"{phase}: {size:,} sources, {v:,.3g} {label}"
                drawn.append(
                    f'<circle cx="{x}" cy="{y}" r="4" fill="{COLOURS[i]}"><title>{escape(said)}</title></circle>'
                )
    for i, name in enumerate(
        ("sources: listed, embedded and indexed once", "queries: listed, embedded and attributed in a night")
    ):
        y = 396 + 20 * i
        drawn.append(
            f'<circle cx="66" cy="{y - 4}" r="6" fill="{COLOURS[i]}"/><text x="80" y="{y}">{escape(name)}</text>'
        )
    return drawing(930, 430, "Hours and cost against the number of sources", drawn)


def slopes(sized: list[Plan]) -> dict[str, float]:
    """Log-log slope of each phase's machine cost between the two largest sizes a decade apart: 1 is linear."""
    last = sized[-1]
    tenth = min(sized, key=lambda plan: abs(np.log10(last.target.num_sources / plan.target.num_sources) - 1))
    decades = np.log10(last.target.num_sources / tenth.target.num_sources)
    return {phase: float(np.log10(last.cost(phase) / tenth.cost(phase)) / decades) for phase in last.num_machines}


class _LogPanel(Panel):
    """Axes whose values are powers of ten by their exponent."""

    def axes(self, title: str, x_label: str, y_label: str) -> list[str]:
        bottom, faint = self.top + self.height, 'stroke="currentColor" opacity="0.12"'
        drawn = [f'<text x="{self.left}" y="{self.top - 14}" font-weight="600">{escape(title)}</text>']
        for exponent in range(round(self.x[0]), round(self.x[1]) + 1):
            x, _ = self.at(exponent, self.y[0])
            drawn.append(f'<line x1="{x}" x2="{x}" y1="{self.top}" y2="{bottom}" {faint}/>')
            drawn.append(f'<text x="{x}" y="{bottom + 17}" text-anchor="middle">{_power(exponent)}</text>')
        for exponent in range(round(self.y[0]), round(self.y[1]) + 1):
            _, y = self.at(self.x[0], exponent)
            drawn.append(f'<line x1="{self.left}" x2="{self.left + self.width}" y1="{y}" y2="{y}" {faint}/>')
            drawn.append(f'<text x="{self.left - 7}" y="{y + 4}" text-anchor="end">{_power(exponent)}</text>')
        middle = self.left + self.width / 2
        return [*drawn, f'<text x="{middle}" y="{bottom + 37}" text-anchor="middle">{escape(x_label)}</text>']


def _power(exponent: int) -> str:
    return f"{10.0**exponent:,.0f}" if 0 <= exponent <= 3 else ("0.1" if exponent == -1 else f"1e{exponent}")


def _decades(values: list[float]) -> tuple[float, float]:
    low, high = np.floor(np.log10(min(values))), np.ceil(np.log10(max(values)))
    return float(low), float(max(high, low + 1))


def count(value: float) -> str:
    """1,234 up to a million, then 1.23 million, billion or trillion."""
    for size, name in ((1e12, " trillion"), (1e9, " billion"), (1e6, " million")):
        if value >= size:
            return f"{value / size:,.3g}{name}"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def amount(value: float, unit: str) -> str:
    """A value with its unit, bytes as KiB to PiB and seconds as hours where they are many."""
    if unit == "bytes":
        for power, name in ((5, "PiB"), (4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
            if value >= 1024**power:
                return (
                    f"{value / 1024**power:,.3g} {name}"
                    if value < 1000 * 1024**power
                    else f"{value / 1024**power:,.0f} {name}"
                )
        return f"{value:,.0f} bytes"
    if unit in ("seconds", "core seconds") and value >= 3600:
        return f"{count(value / 3600)} {unit.replace('seconds', 'hours')}"
    return f"{count(value)} {unit}"


def hours(value: float) -> str:
    if value < 1 / 60:
        return f"{value * 3600:.1f} s"
    return f"{value * 60:.1f} min" if value < 1 else f"{value:,.1f} h"


def ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
