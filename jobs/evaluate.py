"""Compare methods by how they rank the known true sources: python -m jobs.evaluate --config FILE"""

from attrib.common.config import parse_arguments, versions
from attrib.evaluate.settings import EvaluateSettings
from jobs.exit import reported


def main() -> None:
    settings = parse_arguments(EvaluateSettings, __doc__)
    with reported():
        from attrib.common.storage import Storage, join
        from attrib.evaluate.page import image_folders, write_comparison
        from attrib.evaluate.pair_measures import measure_pairs
        from attrib.evaluate.protocol import evaluate, input_digests
        from attrib.evaluate.scores import format_table

        storage = Storage(settings.storage)
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
        print("\n".join([format_table(summary), *measured.lines()]))
        print(f"page: {join(settings.output, 'comparison.html')}")


if __name__ == "__main__":
    main()
