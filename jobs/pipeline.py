"""Run the whole flow, from two image collections to a report: python -m jobs.pipeline --config FILE"""

from attrib.common.config import parse_arguments
from attrib.pipeline.settings import PipelineSettings
from jobs.exit import reported


def main() -> None:
    settings = parse_arguments(PipelineSettings, __doc__)
    with reported():
        from attrib.pipeline import job

        summary = job.run(settings)
        print("\n".join(f"{name}: {value}" for name, value in summary.items()))


if __name__ == "__main__":
    main()
