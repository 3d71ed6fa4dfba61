"""Initial model from features: fitted projections, controls, and the inputs of the training."""

import numpy as np
import torch

from attrib.common.errors import AttribError
from attrib.common.storage import Storage
from attrib.data.collections import open_sidecar
from attrib.data.ids import image_ids
from attrib.data.manifest import Manifest
from attrib.models.encoder import Network
from attrib.models.heads import Head
from attrib.models.model import AttributionModel, build_model, features_data_config
from attrib.models.settings import FeatureSettings, HeadSettings, PartSettings
from attrib.train.batches import Inputs
from attrib.train.settings import TrainSettings
from attrib.train.view_features import NO_DONOR, ViewFeatures
from attrib.train.whitening import centre_projections, fit_projections, projected_sizes

INPUT_ROWS = 1024  # features that are float32 at a time


def with_control(settings: TrainSettings) -> TrainSettings:
    """Settings of a control. `whitened` and `domain_whitened` keep features and parts, and train nothing."""
    plain = {"all": PartSettings(blocks=("pooled",))}
    changes: dict = {}
    if settings.control == "raw":
        changes = {"features": FeatureSettings(), "head": HeadSettings(projection="identity", net="none", parts=plain)}
    elif settings.control == "centred":
        changes = {"features": FeatureSettings(), "head": HeadSettings(projection="centre", net="none", parts=plain)}
    elif settings.control == "whitened":
        changes = {"head": settings.head.model_copy(update={"net": "none"})}
    elif settings.control == "domain_whitened":
        changes = {
            "head": settings.head.model_copy(update={"net": "none", "separate_domains": True, "num_directions": None})
        }
    elif settings.control == "supervised":
        # AbC's baseline: two square linear maps with bias, started at the identity, on the frozen backbone's output.
        head = HeadSettings(projection="identity", net="linear", separate_domains=True, parts=plain)
        changes = {"features": FeatureSettings(), "head": head}
    return settings.model_copy(update=changes)


def fitted_model(
    settings: TrainSettings, network: Network, real: ViewFeatures, synthetic: ViewFeatures | None
) -> AttributionModel:
    """A model with its projections fitted on the images themselves, and its nets as they start.

    With a head for each domain, a control is fitted on each domain's images, and raises AttribError if there are none;
    nets that are to be trained start from one projection, which unpaired synthetic images, where they are given, centre
    for their own domain.
    """
    originals = np.flatnonzero(real.is_original)
    fits = {"real": (real, originals)}
    if settings.head.separate_domains:
        fits["synthetic"] = fits["real"]  # nets that are trained start from one projection of both domains
        if settings.head.net == "none":
            if synthetic is None:
                raise AttribError("heads by domain without a net need unpaired synthetic images; give `synthetic`")
            fits["synthetic"] = (synthetic, np.flatnonzero(synthetic.is_original))
    data_config = features_data_config(network.data_config, settings.features)
    num_images = min(len(rows) for _, rows in fits.values())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        probe = build_model(network.model, data_config, settings.features, settings.head, {})
        sizes = projected_sizes(probe.extractor.sizes, num_images, settings.head)
        model = build_model(network.model, data_config, settings.features, settings.head, sizes)
    for domain, (found, rows) in fits.items():
        for part in model.heads[domain].parts.values():
            fit_projections(part, _blocks(model.heads[domain], found, rows), settings.head)
    if settings.head.separate_domains and synthetic is not None:
        blocks = _blocks(model.heads["synthetic"], synthetic, np.flatnonzero(synthetic.is_original))
        for part in model.heads["synthetic"].parts.values():
            centre_projections(part, blocks)
    return model


def training_inputs(model: AttributionModel, real: ViewFeatures) -> Inputs:
    """Inputs of the nets for every image and view, computed once, float16."""
    originals, views = _originals_by_id(real), np.flatnonzero(~real.is_original)
    return Inputs(
        head_inputs(model.head("real"), real.features, originals),
        torch.from_numpy(real.content[originals]),
        head_inputs(model.head("synthetic"), real.features, views),
        torch.from_numpy(real.sources(views)),
    )


def paired_inputs(
    model: AttributionModel, real: ViewFeatures, synthetic: ViewFeatures, pairs: dict[int, list[int]]
) -> Inputs:
    """For the supervised baseline: synthetic images in the place of views. pairs: {id of a synthetic image: ids of its
    sources}.

    Raises AttribError if no pair has both of its images.
    """
    originals = _originals_by_id(real)
    known = set(real.content[originals].tolist())
    rows, sources = [], []
    for row, image_id in enumerate(synthetic.content.tolist()):
        found = [source for source in pairs.get(image_id, []) if source in known]
        for start in range(0, len(found), 2):  # two to a row, so that one is not the other's negative
            rows.append(row)
            sources.append([*found[start : start + 2], NO_DONOR][:2])
    if not rows:
        raise AttribError(
            "no pair has features of both of its images; look at pairs.key_column and pairs_source_column"
        )
    return Inputs(
        head_inputs(model.head("real"), real.features, originals),
        torch.from_numpy(real.content[originals]),
        head_inputs(model.head("synthetic"), synthetic.features, np.array(rows)),
        torch.tensor(sources),
    )


@torch.no_grad()
def head_inputs(head: Head, features: np.ndarray, rows: np.ndarray) -> torch.Tensor:
    """float16 [m, p] of some rows of float16 [n, D]."""
    batches = (rows[start : start + INPUT_ROWS] for start in range(0, len(rows), INPUT_ROWS))
    return torch.cat([head.inputs(torch.from_numpy(features[batch]).float()).half() for batch in batches])


def _originals_by_id(found: ViewFeatures) -> np.ndarray:
    originals = np.flatnonzero(found.is_original)
    return originals[np.argsort(found.content[originals])]


def _blocks(head: Head, found: ViewFeatures, rows: np.ndarray) -> dict[str, np.ndarray]:
    ends = np.cumsum(list(head.block_sizes.values()))
    return dict(zip(head.block_sizes, np.split(found.features[rows], ends[:-1], axis=1)))


def read_pairs(
    settings: TrainSettings, manifest: Manifest, synthetic: Manifest, storage: Storage
) -> dict[int, list[int]]:
    """{id of a synthetic image: ids of its sources} from the pairs table.

    Raises AttribError if there is no pair, or a column is missing.
    """
    if settings.pairs is None:
        raise AttribError("control 'supervised' needs `pairs`, a table of synthetic images and their sources")
    table = open_sidecar(settings.pairs, storage).to_table()
    for column in (settings.pairs.key_column, settings.pairs_source_column):
        if column not in table.schema.names:
            raise AttribError(f"{settings.pairs.uri} has no column {column!r}; it has {', '.join(table.schema.names)}")
    pairs: dict[int, list[int]] = {}
    names = [key.removeprefix(settings.pairs.key_prefix) for key in table[settings.pairs.key_column].to_pylist()]
    generated = image_ids(synthetic.collection.name, names).tolist()
    sources = image_ids(manifest.collection.name, table[settings.pairs_source_column].to_pylist()).tolist()
    for image_id, source in zip(generated, sources):
        pairs.setdefault(image_id, []).append(source)
    return pairs
