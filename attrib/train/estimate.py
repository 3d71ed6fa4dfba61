"""What a training job needs: memory, bytes and time."""

from dataclasses import dataclass

from attrib.embed.estimate import EncoderProbe
from attrib.runtime.estimate import Estimate
from attrib.runtime.machine import MachineRates


@dataclass(frozen=True)
class TrainSizes:
    """feature_dimension: numbers of an image's features, float16; largest_block: of its blocks; input_dimension:
    numbers of an image that the nets see; images_in_flight: of one task of the feature extraction."""

    num_images: int
    views_per_image: int
    feature_dimension: int
    largest_block: int
    input_dimension: int
    num_parameters: int
    num_epochs: int
    images_in_flight: int


def estimate_train(sizes: TrainSizes, probe: EncoderProbe, rates: MachineRates, num_workers: int) -> Estimate:
    """Estimate of feature extraction by num_workers and of training."""
    rows = sizes.num_images * (1 + sizes.views_per_image)
    features, inputs = 2 * rows * sizes.feature_dimension, 2 * rows * sizes.input_dimension
    weights = 4 * sizes.num_parameters
    network = probe.baseline_bytes + probe.network_bytes
    # Whitening holds the features of the originals and square float64 matrices of the largest block.
    whitening = 4 * 8 * sizes.largest_block**2 + 2 * 2 * sizes.num_images * sizes.feature_dimension
    # First chunks and their concatenation, then whitening, then the inputs twice while they are joined.
    driver = network + max(2 * features, features + max(whitening, 2 * inputs)) + 2 * weights
    # A worker reads all inputs, as the bytes of the file and as tensors; AdamW holds two moments and a gradient.
    training = network + 2 * inputs + 6 * weights
    image = probe.image_bytes * 4 + 2 * (1 + sizes.views_per_image) * sizes.feature_dimension
    extracting = network + probe.growth_bytes + sizes.images_in_flight * image
    forward_backward = 6 * sizes.num_parameters * rows * sizes.num_epochs / rates.flops_per_second
    return Estimate(
        num_workers=num_workers,
        worker_bytes=max(training, extracting),
        driver_bytes=driver,
        output_bytes=features + inputs + probe.network_bytes + weights,
        seconds=rows * probe.seconds_per_image / num_workers + forward_backward,
    )
