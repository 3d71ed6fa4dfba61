"""The evaluate job: score every method against the true sources, measure known pairs, write tables, page and plots."""

from attrib.common.config import versions
from attrib.common.run_record import rewriting
from attrib.common.storage import Storage, join
from attrib.evaluate.page import image_folders, write_comparison
from attrib.evaluate.pair_measures import measure_pairs
from attrib.evaluate.protocol import evaluate, input_digests
from attrib.evaluate.scores import format_table
from attrib.evaluate.settings import EvaluateSettings

RECORD = "evaluation.json"


def run(settings: EvaluateSettings) -> str:
    """Write all results to the output folder, and return the table and the notes for the terminal."""
    storage = Storage(settings.storage)
    with rewriting(settings, storage):
        return _evaluate(settings, storage)


def _evaluate(settings: EvaluateSettings, storage: Storage) -> str:
    scores = evaluate(settings, storage)
    measured = measure_pairs(settings, storage)
    summary = write_comparison(
        scores,
        settings.output,
        storage,
        reference=settings.reference_name,
        title=settings.title,
        record={
            "inputs": input_digests(settings, storage),
            "settings": settings.model_dump(mode="json"),
            "versions": versions(),
        },
        images=image_folders(settings),
        num_shown=settings.num_queries_shown,
        figures=measured.figures,
        measures=measured.numbers,
    )
    measured.write_plots(settings.output, storage)
    page = f"page: {join(settings.output, 'comparison.html')}"
    return "\n".join([format_table(summary), *measured.lines(), page])
