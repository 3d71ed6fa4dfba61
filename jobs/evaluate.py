"""Score embeddings against known true sources: python -m jobs.evaluate --config FILE"""

from attrib.config import parse_arguments, versions
from attrib.settings import EvaluateSettings
from jobs.exit import reported


def main() -> None:
    settings = parse_arguments(EvaluateSettings, __doc__)
    with reported():
        from attrib.evaluation import evaluate, format_table, summarise
        from attrib.storage import Storage

        storage = Storage(settings.storage)
        summary = summarise(evaluate(settings, storage))
        storage.write_json(
            settings.output, summary | {"settings": settings.model_dump(mode="json"), "versions": versions()}
        )
        print(format_table(summary))


if __name__ == "__main__":
    main()
