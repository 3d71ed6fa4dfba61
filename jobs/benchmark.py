"""Measure the jobs against their parts, as ratios: python -m jobs.benchmark --config FILE"""

from attrib.config import parse_arguments, versions
from attrib.settings import BenchmarkSettings
from jobs.exit import reported


def main() -> None:
    settings = parse_arguments(BenchmarkSettings, __doc__)
    with reported():
        from attrib.distributed import benchmark
        from attrib.storage import Storage, join

        rows = benchmark.run(settings)
        result = {"rows": rows, "settings": settings.model_dump(mode="json"), "versions": versions()}
        Storage(settings.storage).write_json(join(settings.output, "benchmark.json"), result)
        print(benchmark.format_table(rows))


if __name__ == "__main__":
    main()
