"""The page of an evaluation: the shipped method and why, and a table, charts and first images per generator set."""

import base64
import io
from typing import get_args

import numpy as np
from PIL import Image

from attrib.evaluate.scores import BOOTSTRAP_DRAWS
from attrib.generators.evaluation.generator_sets import Tier
from attrib.generators.evaluation.measures import MIN_RESAMPLED, VALUES
from attrib.generators.evaluation.protocol import CURVE_DEGRADATIONS, MIN_QUERIES
from attrib.generators.evaluation.selection import DECIDING, MAX_LOSS
from attrib.generators.evaluation.settings import LOSS_DEGRADATION
from attrib.generators.evaluation.summary import TOO_SMALL, shown_values
from attrib.generators.settings import ScoringName
from attrib.pages.charts import Steps, steps_figure, svg
from attrib.pages.render import render

SHOWN_IMAGES = 12  # of each generator
SHOWN_GENERATORS = 12  # of each generator set
SHOWN_PX = 64  # larger images are shrunk to it
STRIP_GAP_PX = 2


def render_page(summary: dict, tiers: list[Tier], title: str, record: dict) -> str:
    """One self-contained HTML page. summary: of `summary.summarise`; tiers: generator sets with their images.

    record: settings and versions to show.
    """
    return render(
        "generators/evaluation/evaluation.html.jinja",
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
        "strips": {tier.names[g]: _image_strip(tier, g) for g in range(min(tier.num_generators, SHOWN_GENERATORS))},
        "curves": [
            *_curve(drawn, "references", "Identified, by references", settings["reference_counts"]),
            *_curve(drawn, "sets", "Identified, by images per set", settings["set_sizes"]),
        ],
        "degradations": _degradations(drawn),
        "verdicts": [
            (method, degradation, side, shares)
            for method, values in found["methods"].items()
            for degradation, sides in (values.get("verdicts") or {}).items()
            for side, shares in sides.items()
        ],
        "too_small": _too_small(found),
        "smallest_px": min(sample.side_px for sample in tier.samples),
        "confusion": _confusion(found, shipped),
    }


def _embedding(name: str) -> str:
    """The name of a method without that of its scoring."""
    return next((name.removesuffix(f"-{one}") for one in get_args(ScoringName) if name.endswith(f"-{one}")), name)


def _drawn(found: dict, shipped: str | None) -> dict:
    """The generator set with one method per embedding: the shipped one, otherwise the one that identifies best here.

    More lines in a chart could not be told apart.
    """
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


def _curve(found: dict, key: str, title: str, wanted: list[int]) -> list[dict]:
    """[{svg, key, left_out: steps with too few images}], original beside degraded images; [] for less than two steps."""
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
    return [{"svg": svg(steps_figure(panels), title), "key": key, "left_out": left_out}]


def _degradations(found: dict) -> str | None:
    """SVG; None if only the degradation of the table's loss was measured."""
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
    return svg(steps_figure(panels, step_px=34), "Identified, by degradation")


def _too_small(found: dict) -> dict[str, list[str]]:
    """{degradation: methods without a value there, with the pixels that they need}."""
    missing: dict[str, list[str]] = {}
    for name, method in found["methods"].items():
        for degradation, held in method["degradations"].items():
            if held is None:
                missing.setdefault(degradation, []).append(f"{_embedding(name)} ({method['min_side_px']} px)")
    return {degradation: list(dict.fromkeys(names)) for degradation, names in missing.items()}


def _confusion(found: dict, shipped: str | None) -> dict | None:
    """{names, rows: shares} of the shipped method; None if it would be too large to read."""
    if shipped is None or len(found["generators"]) > SHOWN_GENERATORS:
        return None
    return {"names": found["generators"], "rows": found["methods"][shipped]["confusion"]}


def _image_strip(tier: Tier, generator: int) -> dict[str, object]:
    """The first images of a generator side by side: {data_uri, width_px}; small ones are shown at twice their size."""
    samples = [tier.samples[row].image for row in tier.rows_of(generator)[:SHOWN_IMAGES]]
    images = [Image.fromarray(np.ascontiguousarray(sample.permute(1, 2, 0).numpy())) for sample in samples]
    for image in images:
        image.thumbnail((SHOWN_PX, SHOWN_PX))
    step = max(image.width for image in images) + STRIP_GAP_PX
    strip = Image.new("RGB", (step * len(images) - STRIP_GAP_PX, max(image.height for image in images)), "white")
    for place, image in enumerate(images):
        strip.paste(image, (step * place, 0))
    file = io.BytesIO()
    strip.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode("ascii")
    scale = 2 if strip.height <= SHOWN_PX // 2 else 1
    return {"data_uri": f"data:image/png;base64,{data}", "width_px": scale * strip.width}


def _mean(interval: dict | None) -> float | None:
    return interval["mean"] if interval else None
