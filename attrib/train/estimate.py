"""What a training job needs: memory, bytes and time."""

from attrib.embed.estimate import EncoderProbe
from attrib.runtime.estimate import Estimate
from attrib.runtime.machine import MachineRates


def estimate_train(
    num_images: int,
    views_per_image: int,
    feature_dimension: int,
    largest_block: int,
    input_dimension: int,
    num_parameters: int,
    num_epochs: int,
    images_in_flight: int,
    probe: EncoderProbe,
    rates: MachineRates,
    num_workers: int,
) -> Estimate:
    """Of features and training. feature_dimension: of an image's features, float16; largest_block: of its blocks, whose whitening holds square
    matrices in float64; input_dimension: what the nets see of an image; num_workers: of the extraction of features.
    """
    rows = num_images * (1 + views_per_image)
    features = 2 * rows * feature_dimension
    inputs = 2 * rows * input_dimension
    # Chunks and their concatenation are there together; then the originals, the square matrices, and the inputs twice while they are joined.
    whitening = 4 * 8 * largest_block**2 + 2 * 2 * num_images * feature_dimension
    weights = 4 * num_parameters
    reading = 2 * features
    driver = (
        probe.baseline_bytes + probe.network_bytes + max(reading, features + max(whitening, 2 * inputs)) + 2 * weights
    )
    # Each training worker reads all inputs, as the file's bytes and as tensors; the optimiser holds two moments and a gradient.
    training = probe.baseline_bytes + probe.network_bytes + 2 * inputs + 6 * weights
    extracting = (
        probe.baseline_bytes + probe.network_bytes + probe.growth_bytes
        + images_in_flight * (probe.image_bytes * 4 + 2 * (1 + views_per_image) * feature_dimension)
    )  # fmt: skip
    forward_backward = 6 * num_parameters * rows * num_epochs / rates.flops_per_second
    return Estimate(
        num_workers=num_workers,
        worker_bytes=max(training, extracting),
        driver_bytes=driver,
        output_bytes=features + inputs + probe.network_bytes + weights,
        seconds=rows * probe.seconds_per_image / num_workers + forward_backward,
    )
