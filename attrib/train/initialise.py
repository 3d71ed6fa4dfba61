"""Build the model that training starts from: fitted projections, controls (baselines), and the inputs of the heads."""

import numpy as np
import torch

from attrib.common.errors import AttribError
from attrib.common.storage import Storage
from attrib.data.ids import image_ids
from attrib.data.manifest import Manifest
from attrib.data.sidecar import open_sidecar
from attrib.models.encoder import Network
from attrib.models.heads import Head
from attrib.models.model import AttributionModel, build_model, features_data_config
from attrib.models.settings import FeatureSettings, HeadSettings, PartSettings
from attrib.train.batches import Inputs
from attrib.train.settings import TrainSettings
from attrib.train.view_features import NO_DONOR, ViewFeatures
from attrib.train.whitening import centre_projections, fit_projections, projected_sizes

INPUT_ROWS = 1024  # features converted to float32 at a time


def with_control(settings: TrainSettings) -> TrainSettings:
    """Return the settings that define the control, if any. Whitened controls keep the features and parts, untrained."""
    if settings.control in ("raw", "centred", "supervised"):
        # supervised: AbC's baseline, two square linear maps with bias, started at the identity, on the frozen backbone.
        trains = settings.control == "supervised"
        head = HeadSettings(
            projection="centre" if settings.control == "centred" else "identity",
            net="linear" if trains else "none",
            separate_domains=trains,
            parts={"all": PartSettings(blocks=("pooled",))},
        )
        return settings.model_copy(update={"features": FeatureSettings(), "head": head})
    if settings.control is None:
        return settings
    changes: dict = {"net": "none"}
    if settings.control == "domain_whitened":
        changes |= {"separate_domains": True, "num_directions": None}
    return settings.model_copy(update={"head": settings.head.model_copy(update=changes)})


def fitted_model(
    settings: TrainSettings, network: Network, real: ViewFeatures, synthetic: ViewFeatures | None
) -> AttributionModel:
    """Return a model with projections fitted on the images themselves, not on views, and untrained nets.

    With separate domains, a control fits each domain on its own images and raises AttribError if there are none. Nets
    that are trained start from one projection; unpaired synthetic images, if given, centre it for their domain.
    """
    head = settings.head
    fits = {"real": real}
    if head.separate_domains:
        if head.net == "none" and synthetic is None:
            raise AttribError("head.separate_domains with head.net 'none' needs generated images: set `synthetic`")
        fits["synthetic"] = synthetic if head.net == "none" else real
    data_config = features_data_config(network.data_config, settings.features)
    num_images = min(int(found.is_original.sum()) for found in fits.values())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        probe = build_model(network.model, data_config, settings.features, head, {})
        sizes = projected_sizes(probe.extractor.sizes, num_images, head)
        model = build_model(network.model, data_config, settings.features, head, sizes)
    for domain, found in fits.items():
        blocks = _blocks(model.heads[domain], found)
        for part in model.heads[domain].parts.values():
            fit_projections(part, blocks, head)
    if head.separate_domains and synthetic is not None:
        blocks = _blocks(model.heads["synthetic"], synthetic)
        for part in model.heads["synthetic"].parts.values():
            centre_projections(part, blocks)
    return model


def training_inputs(model: AttributionModel, real: ViewFeatures) -> Inputs:
    """Return the inputs of the nets, float16, for every image and view."""
    views = np.flatnonzero(~real.is_original)
    sources = np.stack([real.content[views], real.donor[views]], axis=1)
    return _inputs(model, real, real, views, sources)


def paired_inputs(
    model: AttributionModel, real: ViewFeatures, synthetic: ViewFeatures, pairs: dict[int, list[int]]
) -> Inputs:
    """Return the inputs of the supervised baseline, with synthetic images in place of views.

    pairs: {id of a synthetic image: ids of its sources}. Raises AttribError if no pair has features of both images.
    """
    known = set(real.content[real.is_original].tolist())
    rows, sources = [], []
    for row, image_id in enumerate(synthetic.content.tolist()):
        found = [source for source in pairs.get(image_id, []) if source in known]
        for start in range(0, len(found), 2):  # two per row, so that one is not a negative of the other
            rows.append(row)
            sources.append([*found[start : start + 2], NO_DONOR][:2])
    if not rows:
        raise AttribError(
            "no row of pairs.uri names a generated image and a source that both have features; check pairs.uri, "
            "pairs.key_column, pairs.key_prefix and pairs_source_column"
        )
    return _inputs(model, real, synthetic, np.array(rows), np.array(sources))


def _inputs(
    model: AttributionModel, real: ViewFeatures, synthetic: ViewFeatures, rows: np.ndarray, sources: np.ndarray
) -> Inputs:
    originals = np.flatnonzero(real.is_original)
    originals = originals[np.argsort(real.content[originals])]
    return Inputs(
        head_inputs(model.head("real"), real.features, originals),
        torch.from_numpy(real.content[originals]),
        head_inputs(model.head("synthetic"), synthetic.features, rows),
        torch.from_numpy(sources),
    )


@torch.no_grad()
def head_inputs(head: Head, features: np.ndarray, rows: np.ndarray) -> torch.Tensor:
    """Return float16 [m, p], the head's inputs, for some rows of float16 [n, D]."""
    batches = (rows[start : start + INPUT_ROWS] for start in range(0, len(rows), INPUT_ROWS))
    return torch.cat([head.inputs(torch.from_numpy(features[batch]).float()).half() for batch in batches])


def _blocks(head: Head, found: ViewFeatures) -> dict[str, np.ndarray]:
    ends = np.cumsum(list(head.block_sizes.values()))
    return dict(zip(head.block_sizes, np.split(found.features[found.is_original], ends[:-1], axis=1)))


def read_pairs(
    settings: TrainSettings, manifest: Manifest, synthetic: Manifest, storage: Storage
) -> dict[int, list[int]]:
    """Return {id of a synthetic image: ids of its sources} from the table settings.pairs.

    Raises AttribError if the table or one of its columns is missing.
    """
    table = open_sidecar(settings.pairs, storage).to_table()
    for column in (settings.pairs.key_column, settings.pairs_source_column):
        if column not in table.schema.names:
            raise AttribError(f"{settings.pairs.uri} has no column {column!r}; it has {', '.join(table.schema.names)}")
    names = [key.removeprefix(settings.pairs.key_prefix) for key in table[settings.pairs.key_column].to_pylist()]
    generated = image_ids(synthetic.collection.name, names).tolist()
    sources = image_ids(manifest.collection.name, table[settings.pairs_source_column].to_pylist()).tolist()
    pairs: dict[int, list[int]] = {}
    for image_id, source in zip(generated, sources):
        pairs.setdefault(image_id, []).append(source)
    return pairs
