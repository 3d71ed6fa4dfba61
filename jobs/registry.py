"""Register, list or remove generators and the background cohort (negatives): python -m jobs.registry --config FILE"""

from attrib.common.config import parse_arguments
from attrib.generators.registry.settings import RegistrySettings
from jobs.exit import reported


def main() -> None:
    settings = parse_arguments(RegistrySettings, __doc__)
    with reported():
        from attrib.generators.registry.registration import run

        print("\n".join(run(settings)))


if __name__ == "__main__":
    main()
