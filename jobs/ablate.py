"""Train and evaluate variants of the method and its controls: python -m jobs.ablate --config FILE"""

from attrib.common.config import parse_arguments
from attrib.evaluate.ablation.settings import AblateSettings
from jobs.exit import reported


def main() -> None:
    settings = parse_arguments(AblateSettings, __doc__)
    with reported():
        from attrib.evaluate.ablation import job

        print(job.run(settings))
        print(f"page: {settings.output}/comparison.html")


if __name__ == "__main__":
    main()
