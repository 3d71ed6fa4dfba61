"""Train and score variants of the method beside its controls: python -m jobs.ablate --config FILE"""

from attrib.ablate_settings import AblateSettings
from attrib.config import parse_arguments
from jobs.exit import reported


def main() -> None:
    settings = parse_arguments(AblateSettings, __doc__)
    with reported():
        from attrib.distributed import ablate

        print(ablate.run(settings))
        print(f"page: {settings.output}/comparison.html")


if __name__ == "__main__":
    main()
