"""See the whole flow work on images that it draws itself: python -m jobs.demo"""

import os

from attrib.common.config import parse_arguments
from attrib.demo.settings import DemoSettings
from jobs.exit import reported

DEFAULT_CONFIG = os.path.join(os.path.dirname(__file__), "..", "configs", "demo.yaml")


def main() -> None:
    settings = parse_arguments(DemoSettings, __doc__, default=DEFAULT_CONFIG)
    with reported():
        from attrib.demo import job

        print(job.run(settings))


if __name__ == "__main__":
    main()
