"""List an image collection and give every image a stable id: python -m jobs.manifest --config FILE"""

from attrib.common.config import parse_arguments
from attrib.data.settings import ManifestSettings
from jobs.exit import note_if_finished, reported


def main() -> None:
    settings = parse_arguments(ManifestSettings, __doc__)
    with reported():
        from attrib.data import job

        record = job.run(settings)
        print(f"{record['num_images']:,} images of {record['collection']!r} in {settings.output}")
        note_if_finished(record)


if __name__ == "__main__":
    main()
