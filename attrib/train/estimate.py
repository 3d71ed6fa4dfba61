"""Estimate of the memory, output size and time of the train job."""

from attrib.common.storage import Storage
from attrib.data.manifest import Manifest
from attrib.embed.estimate import probe_encoder
from attrib.embed.settings import EmbedSettings
from attrib.models.encoder import load_encoder
from attrib.models.features import FeatureExtractor
from attrib.runtime.estimate import Estimate
from attrib.runtime.machine import measure_machine
from attrib.train.settings import TrainSettings
from attrib.train.whitening import projected_sizes


def estimate_train(settings: TrainSettings, manifest: Manifest, num_workers: int, storage: Storage) -> Estimate:
    """Return the estimate of feature extraction by num_workers and of training, from a probe of the encoder.

    Unpaired generated images are not counted: they have no views.
    """
    encoder = load_encoder(settings.backbone, storage)
    same = ("manifest", "output", "backbone", "chunk_rows", "storage")
    embed = EmbedSettings(**{name: getattr(settings, name) for name in same})
    probe = probe_encoder(encoder, manifest, embed, storage)
    sizes = FeatureExtractor(encoder.model, settings.features, encoder.preprocessing.crop_px).sizes
    num_images, num_views = min(settings.max_images, manifest.num_images), settings.num_views
    projected = projected_sizes(sizes, num_images, settings.head)
    part_inputs = [sum(projected[block] for block in part.blocks) for part in settings.head.parts.values()]
    num_parameters = sum(size * size for size in part_inputs) if settings.head.net != "none" else 0

    rows, feature_bytes, weights = num_images * (1 + num_views), 2 * sum(sizes.values()), 4 * num_parameters
    features, inputs = rows * feature_bytes, 2 * rows * sum(part_inputs)
    network = probe.baseline_bytes + probe.network_bytes
    # Whitening holds the features of the originals and square float64 matrices of the largest block.
    whitening = 4 * 8 * max(sizes.values()) ** 2 + 2 * num_images * feature_bytes
    # The largest of: the chunks with their concatenation, whitening, and the inputs twice, while they are joined.
    driver = network + max(2 * features, features + max(whitening, 2 * inputs)) + 2 * weights
    # A worker reads all inputs, as the bytes of the file and as tensors; AdamW holds two moments and a gradient.
    training = network + 2 * inputs + 6 * weights
    image = probe.image_bytes * 4 + (1 + num_views) * feature_bytes
    extracting = network + probe.growth_bytes + settings.chunk_rows * image
    training_flops = 6 * num_parameters * rows * settings.optimiser.num_epochs
    rates = measure_machine(256, 1)
    return Estimate(
        num_workers=num_workers,
        worker_bytes=max(training, extracting),
        driver_bytes=driver,
        output_bytes=features + inputs + probe.network_bytes + weights,
        seconds=rows * probe.seconds_per_image / num_workers + training_flops / rates.flops_per_second,
    )
