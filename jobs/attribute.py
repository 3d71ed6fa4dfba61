"""Attribute a batch of generated images to their sources: python -m jobs.attribute --config FILE"""

from attrib.attribute.settings import AttributeSettings
from attrib.common.config import parse_arguments
from jobs.exit import note_if_finished, reported


def main() -> None:
    settings = parse_arguments(AttributeSettings, __doc__)
    with reported():
        from attrib.attribute import job

        record = job.run(settings)
        print(
            f"{record['num_rows']:,} rows for {record['num_queries']:,} queries ({record['num_failed']:,} failed) "
            f"in {settings.output}"
        )
        note_if_finished(record)


if __name__ == "__main__":
    main()
