"""Train a model from source images alone, or fit a control: python -m jobs.train --config FILE"""

from attrib.common.config import parse_arguments
from attrib.train.settings import TrainSettings
from jobs.exit import note_if_finished, reported


def main() -> None:
    settings = parse_arguments(TrainSettings, __doc__)
    with reported():
        from attrib.train import job

        record = job.run(settings)
        print(
            f"{record['dimension']}-d model from {record['num_images']:,} images and {record['num_views']:,} views "
            f"({record['num_failed']:,} images failed), in {settings.output}/model.safetensors"
        )
        if record["history"]:
            first, best = record["history"][0]["criterion"], max(row["criterion"] for row in record["history"])
            print(f"criterion ({record['criterion']}): {first:.4f} before training, {best:.4f} at its best")
        if record["shares"]:
            scalars = {name: round(record["shares"][name], 2) for name in ("inverse_temperature", "offset")}
            print(f"shares for jobs.attribute, from {record['shares']['construction']}: {scalars}")
        note_if_finished(record)


if __name__ == "__main__":
    main()
