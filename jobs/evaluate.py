"""Compare methods by how they rank the known true sources: python -m jobs.evaluate --config FILE"""

from attrib.common.config import parse_arguments
from attrib.evaluate.settings import EvaluateSettings
from jobs.exit import reported


def main() -> None:
    settings = parse_arguments(EvaluateSettings, __doc__)
    with reported():
        from attrib.evaluate import job

        print(job.run(settings))


if __name__ == "__main__":
    main()
