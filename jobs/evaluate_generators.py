"""Ask every fingerprint method about generators it never saw: python -m jobs.evaluate_generators --config FILE"""

from attrib.config import parse_arguments
from attrib.generators.evaluation_settings import EvaluateGeneratorsSettings
from jobs.exit import reported


def main() -> None:
    settings = parse_arguments(EvaluateGeneratorsSettings, __doc__)
    with reported():
        from attrib.distributed.generators import evaluate

        print(evaluate.run(settings)["table"])
        print(f"page: {settings.output}/{evaluate.PAGE}")


if __name__ == "__main__":
    main()
