"""Settings, collections and models for tests of training on small images."""

import pyarrow as pa

from attrib.data.collections import list_images, list_units
from attrib.data.manifest import Manifest
from attrib.data.settings import CollectionSettings
from attrib.models.encoder import load_network
from attrib.models.model import AttributionModel, build_model
from attrib.train.settings import TrainSettings
from support.files import LOCAL
from support.images import write_folder


def train_settings(name: str = "test_resnet", **values) -> TrainSettings:
    return TrainSettings(manifest="m", output="o", backbone={"name": name, "weights": "random"}, **values)


def collection(images: dict[str, bytes], folder) -> tuple[pa.Table, Manifest]:
    """Write images to a folder and return its rows and its manifest."""
    write_folder(images, str(folder), LOCAL)
    return listed(folder)


def listed(folder) -> tuple[pa.Table, Manifest]:
    """Return the rows and the manifest of a folder."""
    settings = CollectionSettings(name="c", uri=str(folder))
    rows = pa.concat_tables([list_images(unit, settings, LOCAL) for unit in list_units(settings, LOCAL)]).sort_by("id")
    return rows, Manifest("m", settings, "d", "o", "r", [len(rows)], [])


def model_of(settings: TrainSettings, image_px: int) -> AttributionModel:
    """Return the untrained model for square images of a side."""
    network = load_network(settings.backbone, LOCAL)
    data_config = network.data_config | {"input_size": (3, image_px, image_px)}
    return build_model(network.model.eval(), data_config, settings.features, settings.head, {})
