"""Estimate the cost of a given number of images from measured constants: python -m jobs.scale --config FILE"""

from attrib.capacity.settings import ScaleSettings
from attrib.common.config import parse_arguments
from jobs.exit import reported


def main() -> None:
    settings = parse_arguments(ScaleSettings, __doc__)
    with reported():
        from attrib.capacity import job

        print(job.run(settings))


if __name__ == "__main__":
    main()
