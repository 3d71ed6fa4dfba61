"""The page of an evaluation: what is shipped and why, a table and plots per tier, and a look at what was told apart."""

import base64
import io
import json
import re
from functools import partial
from importlib import resources
from typing import get_args

import jinja2
import numpy as np
from PIL import Image

from attrib.evaluate.scores import BOOTSTRAP_DRAWS
from attrib.generators.evaluation.charts import Steps, step_chart
from attrib.generators.evaluation.generator_sets import Tier
from attrib.generators.evaluation.measures import MIN_RESAMPLED, VALUES
from attrib.generators.evaluation.protocol import CURVE_DEGRADATIONS, MIN_QUERIES
from attrib.generators.evaluation.selection import DECIDING, MAX_LOSS
from attrib.generators.evaluation.settings import LOSS_DEGRADATION
from attrib.generators.evaluation.summary import TOO_SMALL, shown_values
from attrib.generators.settings import ScoringName

SHOWN_IMAGES = 12  # of each generator
SHOWN_GENERATORS = 12  # of each tier
SHOWN_PX = 64  # larger pictures are shrunk to it
STRIP_GAP_PX = 2


def render_page(summary: dict, tiers: list[Tier], title: str, record: dict) -> str:
    """One self-contained HTML page. summary: of `evaluation_summary.summarise`; tiers: their images; record: settings and versions."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {
        "score": _score,
        "short": lambda value, sign=False: f"{value:+.2f}" if sign else f"{value:.2f}",
        "pretty": partial(json.dumps, indent=1, ensure_ascii=False),
    }
    template = (
        resources.files("attrib.generators.evaluation").joinpath("evaluation.html.jinja").read_text(encoding="utf-8")
    )
    return environment.from_string(template).render(
        title=title,
        summary=summary,
        tiers={tier.name: _shown_tier(summary, tier, record["settings"]) for tier in tiers},
        values=VALUES,
        deciding=DECIDING,
        max_loss=MAX_LOSS,
        loss_degradation=LOSS_DEGRADATION,
        min_queries=MIN_QUERIES,
        min_resampled=MIN_RESAMPLED,
        too_small=TOO_SMALL,
        settings=record["settings"],
        record=record,
        bootstrap_draws=BOOTSTRAP_DRAWS,
    )


def _shown_tier(summary: dict, tier: Tier, settings: dict) -> dict:
    found = summary["tiers"][tier.name]
    shipped = summary["shipped"] and summary["shipped"]["method"]
    drawn = _drawn(found, shipped)
    return {
        "values": shown_values(found),
        "has_families": tier.has_families,
        "strips": {tier.names[g]: picture_strip(tier, g) for g in range(min(tier.num_generators, SHOWN_GENERATORS))},
        "curves": [
            *_curve(drawn, "references", "Identified, by references", settings["reference_counts"]),
            *_curve(drawn, "sets", "Identified, by images per set", settings["set_sizes"]),
        ],
        "degradations": _degradations(drawn),
        "too_small": _too_small(found),
        "smallest_px": min(sample.side_px for sample in tier.samples),
        "confusion": _confusion(found, shipped),
    }


def _embedding(name: str) -> str:
    """What a row is one scoring of, by its name."""
    return next((name.removesuffix(f"-{one}") for one in get_args(ScoringName) if name.endswith(f"-{one}")), name)


def _drawn(found: dict, shipped: str | None) -> dict:
    """The tier with one row of each embedding, that which identifies best here, or what is shipped: more lines could not be told apart."""
    best: dict[str, str] = {}
    for name, method in found["methods"].items():
        rival = best.get(_embedding(name))
        if rival is None or (
            rival != shipped and (name == shipped or _identified(method) > _identified(found["methods"][rival]))
        ):
            best[_embedding(name)] = name
    return found | {"methods": {name: found["methods"][name] for name in best.values()}}


def _identified(method: dict) -> float:
    return method["values"]["identification"]["mean"]


def _chart(svg: str) -> dict[str, object]:
    """{svg, width_px}: shown at its own size, or smaller."""
    return {"svg": svg, "width_px": int(re.search(r'viewBox="0 0 (\d+)', svg)[1])}


def _curve(found: dict, key: str, title: str, wanted: list[int]) -> list[dict]:
    """[{svg, width_px, key, left_out: steps for which there are too few images}], untouched beside degraded alike; [] for less than two steps."""
    curves = {name: method[key] for name, method in found["methods"].items()}
    steps = {step for of_method in curves.values() for curve in of_method.values() for step in curve or ()}
    labels = [str(step) for step in wanted if str(step) in steps]
    if len(labels) < 2:
        return []
    panels = []
    for degradation in CURVE_DEGRADATIONS:
        lines = {
            name: [_mean((curve[degradation] or {}).get(label)) for label in labels] for name, curve in curves.items()
        }
        head = title if degradation == CURVE_DEGRADATIONS[0] else f"The same, both sides {degradation}"
        panels.append(Steps(head, labels, lines, 1 / len(found["generators"])))
    left_out = [step for step in wanted if str(step) not in steps]
    return [_chart(step_chart(panels)) | {"key": key, "left_out": left_out}]


def _degradations(found: dict) -> dict | None:
    """None where only the table's loss was asked about."""
    methods = {name: method["degradations"] for name, method in found["methods"].items()}
    labels = list(dict.fromkeys(label for held in methods.values() for label in held))
    if len(labels) < 2:
        return None
    panels = []
    for gallery in ("clean", "matched"):
        lines = {
            name: [_mean(held[label] and held[label][gallery]["identification"]) for label in labels]
            for name, held in methods.items()
        }
        panels.append(Steps(f"Identified, {gallery} gallery", labels, lines, 1 / len(found["generators"])))
    return _chart(step_chart(panels, step_px=34))


def _too_small(found: dict) -> dict[str, list[str]]:
    """{degradation: methods, with the pixels that they need}: what has no value there."""
    missing: dict[str, list[str]] = {}
    for name, method in found["methods"].items():
        for degradation, held in method["degradations"].items():
            if held is None:
                missing.setdefault(degradation, []).append(f"{_embedding(name)} ({method['min_side_px']} px)")
    return {degradation: list(dict.fromkeys(names)) for degradation, names in missing.items()}


def _confusion(found: dict, shipped: str | None) -> dict | None:
    """{names, rows: shares} of the shipped method; None where it would be too large to read."""
    if shipped is None or len(found["generators"]) > SHOWN_GENERATORS:
        return None
    return {"names": found["generators"], "rows": found["methods"][shipped]["confusion"]}


def picture_strip(tier: Tier, generator: int) -> dict[str, object]:
    """The first pictures of a generator side by side: {data_uri, width_px}; small ones shown at twice their size."""
    images = [tier.samples[row].image for row in tier.rows_of(generator)[:SHOWN_IMAGES]]
    pictures = [Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy())) for image in images]
    for picture in pictures:
        picture.thumbnail((SHOWN_PX, SHOWN_PX))
    step = max(picture.width for picture in pictures) + STRIP_GAP_PX
    strip = Image.new("RGB", (step * len(pictures) - STRIP_GAP_PX, max(p.height for p in pictures)), "white")
    for place, picture in enumerate(pictures):
        strip.paste(picture, (step * place, 0))
    file = io.BytesIO()
    strip.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode("ascii")
    scale = 2 if strip.height <= SHOWN_PX // 2 else 1
    return {"data_uri": f"data:image/png;base64,{data}", "width_px": scale * strip.width}


def _mean(interval: dict | None) -> float | None:
    return interval["mean"] if interval else None


def _score(value: float, sign: bool = False) -> str:
    return (f"{value:+.3f}" if sign else f"{value:.3f}").replace("-", "\N{MINUS SIGN}")
