"""Measure every stage beside its ceiling and its peers: python -m jobs.benchmark --config FILE"""

from attrib.benchmark.settings import BenchmarkSettings
from attrib.config import parse_arguments
from jobs.exit import reported


def main() -> None:
    settings = parse_arguments(BenchmarkSettings, __doc__)
    with reported():
        from attrib.distributed import benchmark

        print(benchmark.run(settings)["table"])


if __name__ == "__main__":
    main()
