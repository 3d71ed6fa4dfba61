"""The page of an evaluation: the selected method with the reason, and a table, charts and images per generator set."""

import base64
import io
from typing import get_args

from PIL import Image

from attrib.evaluate.scores import BOOTSTRAP_DRAWS
from attrib.generators.evaluation.generator_sets import GeneratorSet
from attrib.generators.evaluation.measures import MIN_RESAMPLED, VALUES
from attrib.generators.evaluation.protocol import CURVE_DEGRADATIONS, MIN_QUERIES
from attrib.generators.evaluation.selection import DECIDING, MAX_LOSS
from attrib.generators.evaluation.settings import LOSS_DEGRADATION
from attrib.generators.evaluation.summary import TOO_SMALL, shown_values
from attrib.generators.settings import ScoringName
from attrib.generators.signals.degradations import to_pillow
from attrib.pages.charts import Steps, steps_figure, svg
from attrib.pages.render import render

SHOWN_IMAGES = 12  # of each generator
SHOWN_GENERATORS = 12  # of each generator set
SHOWN_PX = 64  # larger images are shrunk
STRIP_GAP_PX = 2


def render_page(summary: dict, sets: list[GeneratorSet], title: str, record: dict) -> str:
    """One self-contained HTML page. summary: result of `summary.summarise`; record: settings and versions to show."""
    return render(
        "generators/evaluation/evaluation.html.jinja",
        title=title,
        summary=summary,
        tiers={own.name: _shown(summary, own, record["settings"]) for own in sets},
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


def _shown(summary: dict, generators: GeneratorSet, settings: dict) -> dict:
    found, names = summary["tiers"][generators.name], generators.names
    shipped = summary["shipped"] and summary["shipped"]["method"]
    drawn = _drawn(found["methods"], shipped)
    chance = 1 / len(names)
    confusion = None  # too large to read for many generators
    if shipped and len(names) <= SHOWN_GENERATORS:
        confusion = {"names": found["generators"], "rows": found["methods"][shipped]["confusion"]}
    return {
        "values": shown_values(found),
        "has_families": generators.has_families,
        "strips": {name: _image_strip(generators, g) for g, name in enumerate(names[:SHOWN_GENERATORS])},
        "curves": [
            *_curve(drawn, "references", "Identified, by references", settings["reference_counts"], chance),
            *_curve(drawn, "sets", "Identified, by images per set", settings["set_sizes"], chance),
        ],
        "degradations": _degradations(drawn, chance),
        "verdicts": [
            (method, degradation, side, shares)
            for method, values in found["methods"].items()
            for degradation, sides in (values.get("verdicts") or {}).items()
            for side, shares in sides.items()
        ],
        "too_small": _too_small(found["methods"]),
        "smallest_px": min(sample.side_px for sample in generators.samples),
        "confusion": confusion,
    }


def _embedding(name: str) -> str:
    """The name of a method without its scoring."""
    return next((name.removesuffix(f"-{one}") for one in get_args(ScoringName) if name.endswith(f"-{one}")), name)


def _drawn(methods: dict[str, dict], shipped: str | None) -> dict[str, dict]:
    """One method per embedding: the shipped one, else the one with the highest identification.

    More lines in a chart could not be told apart.
    """
    rank = {name: (name == shipped, method["values"]["identification"]["mean"]) for name, method in methods.items()}
    best: dict[str, str] = {}
    for name in methods:
        rival = best.get(_embedding(name), name)
        best[_embedding(name)] = max(rival, name, key=rank.__getitem__)
    return {name: methods[name] for name in best.values()}


def _curve(drawn: dict[str, dict], key: str, title: str, wanted: list[int], chance: float) -> list[dict]:
    """[{svg, key, left_out: steps with too few images}], original and degraded images; [] for less than two steps."""
    curves = {name: method[key] for name, method in drawn.items()}
    steps = {step for of_method in curves.values() for curve in of_method.values() for step in curve or ()}
    labels = [str(step) for step in wanted if str(step) in steps]
    if len(labels) < 2:
        return []
    panels = []
    for degradation in CURVE_DEGRADATIONS:
        lines = {name: [_mean(own[degradation], label) for label in labels] for name, own in curves.items()}
        head = f"The same, both sides {degradation}" if panels else title
        panels.append(Steps(head, labels, lines, chance))
    left_out = [step for step in wanted if str(step) not in steps]
    return [{"svg": svg(steps_figure(panels), title), "key": key, "left_out": left_out}]


def _degradations(drawn: dict[str, dict], chance: float) -> str | None:
    """SVG of identification by degradation; None if only LOSS_DEGRADATION was measured."""
    labels = list(dict.fromkeys(label for method in drawn.values() for label in method["degradations"]))
    if len(labels) < 2:
        return None
    panels = []
    for gallery in ("clean", "matched"):
        lines = {
            name: [_mean((method["degradations"][label] or {}).get(gallery), "identification") for label in labels]
            for name, method in drawn.items()
        }
        panels.append(Steps(f"Identified, {gallery} gallery", labels, lines, chance))
    return svg(steps_figure(panels, step_px=34), "Identified, by degradation")


def _too_small(methods: dict[str, dict]) -> dict[str, list[str]]:
    """{degradation: methods that need larger images, with their min_side_px}."""
    missing: dict[str, dict[str, None]] = {}  # ordered sets
    for name, method in methods.items():
        for degradation, held in method["degradations"].items():
            if held is None:
                missing.setdefault(degradation, {})[f"{_embedding(name)} ({method['min_side_px']} px)"] = None
    return {degradation: list(names) for degradation, names in missing.items()}


def _image_strip(generators: GeneratorSet, generator: int) -> dict[str, object]:
    """The first images of a generator in a row, {data_uri, width_px}; small images are shown at twice their size."""
    images = [to_pillow(generators.samples[row].image) for row in generators.rows_of(generator)[:SHOWN_IMAGES]]
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


def _mean(intervals: dict | None, name: str) -> float | None:
    interval = (intervals or {}).get(name)
    return interval["mean"] if interval else None
