"""Evaluate fingerprint methods on unseen generators: python -m jobs.evaluate_generators --config FILE"""

from attrib.common.config import parse_arguments
from attrib.generators.evaluation.settings import EvaluateGeneratorsSettings
from jobs.exit import reported


def main() -> None:
    settings = parse_arguments(EvaluateGeneratorsSettings, __doc__)
    with reported():
        from attrib.generators.evaluation import job

        print(job.run(settings)["table"])
        print(f"page: {settings.output}/{job.PAGE}")


if __name__ == "__main__":
    main()
