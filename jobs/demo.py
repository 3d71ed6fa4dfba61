"""Run the whole flow on generated example images: python -m jobs.demo"""

from attrib.common.config import parse_arguments
from attrib.demo.settings import DemoSettings
from jobs.exit import reported


def main() -> None:
    settings = parse_arguments(DemoSettings, __doc__, needs_config=False)
    with reported():
        from attrib.demo import job

        print(job.run(settings))


if __name__ == "__main__":
    main()
