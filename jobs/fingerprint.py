"""Train a fingerprint extractor on a pool of synthetic generators: python -m jobs.fingerprint --config FILE"""

from attrib.common.config import parse_arguments
from attrib.generators.extractor.settings import FingerprintSettings
from jobs.exit import note_if_finished, reported


def main() -> None:
    settings = parse_arguments(FingerprintSettings, __doc__)
    with reported():
        from attrib.generators.extractor import job

        record = job.run(settings)
        first, best = record["history"][0], max(record["history"], key=lambda row: row["criterion"])
        print(
            f"extractor of {record['num_parameters']:,} parameters from "
            f"{record['num_training_models']:,} synthetic models in {record['seconds']:,.0f} s, in {settings.output}"
        )
        print(
            f"criterion ({record['criterion']}): {first['criterion']:.4f} before training, "
            f"{best['criterion']:.4f} at its best"
        )
        note_if_finished(record)


if __name__ == "__main__":
    main()
