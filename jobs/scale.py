"""Derive what a size costs, and hold the formulas against a simulation: python -m jobs.scale --config FILE"""

from attrib.config import parse_arguments
from attrib.scale.settings import ScaleSettings
from jobs.exit import reported


def main() -> None:
    settings = parse_arguments(ScaleSettings, __doc__)
    with reported():
        from attrib.distributed import scale

        print(scale.run(settings))


if __name__ == "__main__":
    main()
