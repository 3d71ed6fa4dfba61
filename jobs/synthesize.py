"""Train a pool of small synthetic generators to learn fingerprints from: python -m jobs.synthesize --config FILE"""

from attrib.common.config import parse_arguments
from attrib.generators.synthesis.settings import SynthesizeSettings
from jobs.exit import note_if_finished, reported


def main() -> None:
    settings = parse_arguments(SynthesizeSettings, __doc__)
    with reported():
        from attrib.generators.synthesis import job

        record = job.run(settings)
        print(
            f"{len(record['models']):,} generators of {settings.px} px, {record['share_at_target']:.0%} at the "
            f"target MSE (median {record['median_loss']:.4f}), in {settings.output}"
        )
        diversity = record["measures"]["diversity"]
        print(
            f"diversity: separation {diversity['separation']:.2f}, "
            f"effective models {diversity['effective_models']:.1f} of {diversity['num_models']}"
        )
        if "frechet_frequency_distance" in record["measures"]:
            distance = record["measures"]["frechet_frequency_distance"]
            print(
                f"Frechet Frequency Distance to {len(distance['real_generators'])} real generators: "
                f"{distance['pool']:.3f} (photographs alone: {distance['photographs_alone']:.3f})"
            )
        note_if_finished(record)


if __name__ == "__main__":
    main()
