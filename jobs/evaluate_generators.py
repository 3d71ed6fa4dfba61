"""Evaluate fingerprint methods on unseen generators: python -m jobs.evaluate_generators --config FILE"""

from attrib.common.config import parse_arguments
from attrib.generators.evaluation.settings import EvaluateGeneratorsSettings
from jobs.exit import note_if_finished, reported


def main() -> None:
    settings = parse_arguments(EvaluateGeneratorsSettings, __doc__)
    with reported():
        from attrib.generators.evaluation import job

        record = job.run(settings)
        print(record["table"])
        print(f"page: {settings.output}/{job.PAGE}")
        note_if_finished(record)


if __name__ == "__main__":
    main()
