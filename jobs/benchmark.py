"""Measure the speed of every stage against other libraries: python -m jobs.benchmark --config FILE"""

from attrib.benchmark.settings import BenchmarkSettings
from attrib.common.config import parse_arguments
from jobs.exit import reported


def main() -> None:
    settings = parse_arguments(BenchmarkSettings, __doc__)
    with reported():
        from attrib.benchmark import job

        print(job.run(settings)["table"])


if __name__ == "__main__":
    main()
