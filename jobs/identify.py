"""Attribute images to registered generators, with open-set identification: python -m jobs.identify --config FILE"""

from attrib.common.config import parse_arguments
from attrib.generators.identify.settings import IdentifySettings
from jobs.exit import note_if_finished, reported


def main() -> None:
    settings = parse_arguments(IdentifySettings, __doc__)
    with reported():
        from attrib.generators.identify import job

        record = job.run(settings)
        print(
            f"{record['num_images']:,} images: " + ", ".join(f"{n:,} {kind}" for kind, n in record["verdicts"].items())
        )
        if record["shares"]:
            counted = f"{record['num_share_images']:,} of {record['num_images']:,} images"
            print(f"  prevalence over {counted}; the other images may have any origin")
        for share in record["shares"] or []:
            print(f"  {share['name']}: {share['share']:.1%} ({share['low']:.1%} to {share['high']:.1%})")
        if record["shares"] is None:
            print(f"  no prevalence: {record['abstains'] or 'no image could be assessed'}")
        for candidate in record["candidates"]:
            images = f"{candidate['num_images']:,} unknown images ({candidate['num_distinct']:,} distinct)"
            print(f"  {candidate['name']}: {images}, cohesion {candidate['cohesion']:.2f}")
        print(f"in {settings.output}")
        note_if_finished(record)


if __name__ == "__main__":
    main()
