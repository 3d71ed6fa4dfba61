"""Embed every image of a manifest: python -m jobs.embed --config FILE"""

from attrib.common.config import parse_arguments
from attrib.embed.settings import EmbedSettings
from jobs.exit import note_if_finished, reported


def main() -> None:
    settings = parse_arguments(EmbedSettings, __doc__)
    with reported():
        from attrib.embed import job

        record = job.run(settings)
        print(
            f"{record['num_images'] - record['num_failed']:,} vectors, {record['num_failed']:,} failures "
            f"in {settings.output}"
        )
        note_if_finished(record)


if __name__ == "__main__":
    main()
