"""Attribute a batch of generated images to their sources: python -m jobs.attribute --config FILE"""

from attrib.config import parse_arguments
from attrib.settings import AttributeSettings
from jobs.exit import reported


def main() -> None:
    settings = parse_arguments(AttributeSettings, __doc__)
    with reported():
        from attrib.distributed import attribute

        record = attribute.run(settings)
        print(
            f"{record['num_rows']:,} rows for {record['num_queries']:,} queries ({record['num_failed']:,} failed) in {settings.output}"
        )


if __name__ == "__main__":
    main()
