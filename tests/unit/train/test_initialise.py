"""Models from features: controls, whitening compared with an independent one, and the inputs of the nets."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from support.files import LOCAL
from support.training import train_settings

from attrib.common.errors import AttribError
from attrib.data.ids import image_ids
from attrib.data.manifest import Manifest
from attrib.data.settings import CollectionSettings
from attrib.models.encoder import Network, load_network
from attrib.models.model import AttributionModel, build_model
from attrib.train.initialise import fitted_model, paired_inputs, read_pairs, training_inputs, with_control
from attrib.train.settings import TrainSettings
from attrib.train.view_features import NO_DONOR, ORIGINAL, ViewFeatures

NUM_IMAGES, VIEWS_EACH = 150, 2
PX = 32
TRAINED = {
    "features": {"moment_levels": [0], "layout_levels": [2], "layout_grid": 1},
    "head": {
        "shrinkage": 0.1,
        "parts": {
            "content": {"blocks": ["pooled"], "role": "content"},
            "style": {"blocks": ["moments", "layout_2"], "role": "style"},
        },
    },
}
SIZES = {"pooled": 96, "moments": 64, "layout_2": 48}

pytestmark = pytest.mark.usefixtures("one_thread")


def settings_of(control: str | None = None, **changes) -> TrainSettings:
    values = TRAINED | changes
    return train_settings(control=control, synthetic="s", **{"pairs": {"uri": "pairs.csv"}} | values)


@pytest.fixture(scope="module")
def network() -> Network:
    found = load_network(settings_of().backbone, LOCAL)
    return Network(found.model.eval(), found.data_config | {"input_size": (3, PX, PX)})


def drawn(seed: int, width: int, num_views: int = VIEWS_EACH, name: str = "real") -> ViewFeatures:
    """Return correlated features of images, each followed by its views, not ordered by id."""
    rng = np.random.default_rng(seed)
    ids = image_ids(name, [f"{i}.jpg" for i in range(NUM_IMAGES)])
    per_image = 1 + num_views
    content = np.repeat(ids, per_image)
    mixing = rng.normal(size=(width, width)) * rng.uniform(0.2, 2, size=width)
    features = rng.normal(size=(len(content), width)) @ mixing / np.sqrt(width) + rng.normal(size=width)
    view = np.tile(np.arange(-1, num_views), NUM_IMAGES)
    donor = np.where(view == ORIGINAL, NO_DONOR, rng.choice(ids, len(content)))
    kind = np.where(view == ORIGINAL, ORIGINAL, 0)
    return ViewFeatures(features.astype(np.float16), content, donor, view, kind, [])


def fit(settings: TrainSettings, network, real, synthetic=None) -> AttributionModel:
    return fitted_model(with_control(settings), network, real, synthetic)


@torch.no_grad()
def embed(model: AttributionModel, features: np.ndarray, domain: str = "real") -> np.ndarray:
    return model.head(domain)(torch.from_numpy(features).float()).double().numpy()


def unit_rows(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def whitened(rows: np.ndarray, fitted_on: np.ndarray, shrinkage: float, standardise: bool) -> np.ndarray:
    """Return unit rows whitened by ZCA from a singular value decomposition; the library uses eigenvectors."""
    mean = fitted_on.mean(axis=0)
    scale = fitted_on.std(axis=0) if standardise else 1.0
    _, singular, directions = np.linalg.svd((fitted_on - mean) / scale, full_matrices=False)
    variance = singular**2 / len(fitted_on)
    transform = directions.T / np.sqrt(variance + shrinkage * variance[0]) @ directions
    return unit_rows((rows - mean) / scale @ transform)


def blocks(features: np.ndarray) -> dict[str, np.ndarray]:
    ends = np.cumsum(list(SIZES.values()))[:-1]
    return dict(zip(SIZES, np.split(features.astype(np.float64), ends, axis=1)))


# The controls


@pytest.mark.parametrize(
    ("control", "projection", "net", "separate", "keeps_parts"),
    [
        (None, "standardise_whiten", "linear", False, True),
        ("raw", "identity", "none", False, False),
        ("centred", "centre", "none", False, False),
        ("whitened", "standardise_whiten", "none", False, True),
        ("domain_whitened", "standardise_whiten", "none", True, True),
        ("supervised", "identity", "linear", True, False),
    ],
)
def test_a_control_changes_the_settings(control, projection, net, separate, keeps_parts):
    given = settings_of(control)
    found = with_control(given)
    assert (found.head.projection, found.head.net, found.head.separate_domains) == (projection, net, separate)
    if keeps_parts:
        assert (found.features, found.head.parts, found.head.shrinkage) == (given.features, given.head.parts, 0.1)
    else:
        assert found.features.block_names == ("pooled",) and found.head.parts["all"].blocks == ("pooled",)
    rest = {"features": given.features, "head": given.head}
    assert found.model_copy(update=rest) == given
    assert with_control(found) == found


def test_raw_and_centred_equal_the_output_of_the_backbone(network):
    real = drawn(0, SIZES["pooled"], num_views=0)
    rows = real.features.astype(np.float64)
    for control, expected in (("raw", rows), ("centred", rows - rows.mean(axis=0))):
        model = fit(settings_of(control), network, real)
        np.testing.assert_allclose(embed(model, real.features), unit_rows(expected), atol=1e-4)


def test_raw_equals_the_network_on_images(network):
    model = fit(settings_of("raw"), network, drawn(0, SIZES["pooled"], num_views=0))
    images = torch.randn(3, 3, PX, PX, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = torch.nn.functional.normalize(network.model(images), dim=1)
        torch.testing.assert_close(model(images), expected)


@pytest.mark.parametrize("projection", ["whiten", "standardise_whiten"])
@pytest.mark.parametrize("shrinkage", [0.05, 1.0])
def test_whitened_control_has_the_cosines_of_an_independent_whitening(projection, shrinkage, network):
    real = drawn(1, sum(SIZES.values()))
    head = TRAINED["head"] | {"projection": projection, "shrinkage": shrinkage}
    model = fit(settings_of("whitened", head=head), network, real)
    # Fitted on images, not on views.
    fitted_on, rows = blocks(real.features[real.is_original]), blocks(real.features)
    standardise = projection.startswith("standardise")
    pieces = {block: whitened(rows[block], fitted_on[block], shrinkage, standardise) for block in SIZES}
    content = pieces["pooled"]
    style = np.concatenate([pieces["moments"], pieces["layout_2"]], axis=1) / np.sqrt(2)
    expected = content @ content.T + style @ style.T
    found = embed(model, real.features)
    np.testing.assert_allclose(found @ found.T, expected, atol=2e-4)
    assert np.abs(expected - np.diag(np.diag(expected))).max() > 0.3


def test_directions_of_largest_variance_are_kept(network):
    real = drawn(2, sum(SIZES.values()))
    head = TRAINED["head"] | {"projection": "whiten", "num_directions": 5}
    model = fit(settings_of("whitened", head=head), network, real)
    assert model.head("real").dimension == 15
    rows = blocks(real.features)["pooled"]
    fitted_on = blocks(real.features[real.is_original])["pooled"]
    mean = fitted_on.mean(axis=0)
    _, singular, directions = np.linalg.svd(fitted_on - mean, full_matrices=False)
    variance = singular[:5] ** 2 / len(fitted_on)
    expected = unit_rows((rows - mean) @ directions[:5].T / np.sqrt(variance + 0.1 * variance[0]))
    found = embed(model, real.features)[:, :5]
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=2e-4)


def test_each_domain_is_whitened_by_its_own_statistics(network):
    real, synthetic = drawn(3, sum(SIZES.values())), drawn(4, sum(SIZES.values()), 0, "synthetic")
    model = fit(settings_of("domain_whitened"), network, real, synthetic)
    for domain, fitted_on in (("real", real.features[real.is_original]), ("synthetic", synthetic.features)):
        found = embed(model, real.features[:40], domain)[:, :96]
        expected = whitened(blocks(real.features[:40])["pooled"], blocks(fitted_on)["pooled"], 0.1, True)
        np.testing.assert_allclose(found, expected, atol=2e-4)  # no rotation: cosines compare the domains
    difference = embed(model, real.features, "real") - embed(model, real.features, "synthetic")
    assert np.abs(difference).max() > 0.1


def test_few_synthetic_images_keep_all_directions_of_real_ones(network):
    """With fewer synthetic images than dimensions."""
    real, synthetic = drawn(3, sum(SIZES.values())), drawn(4, sum(SIZES.values()), 0, "synthetic")
    model = fit(settings_of("domain_whitened"), network, real, synthetic.take(np.arange(20)))
    whole = fit(settings_of("domain_whitened"), network, real, synthetic)
    assert model.head("real").dimension == model.head("synthetic").dimension == sum(SIZES.values())
    np.testing.assert_array_equal(embed(model, real.features), embed(whole, real.features))


def test_domain_whitening_needs_images_of_both_domains(network):
    with pytest.raises(AttribError, match="needs generated images: set `synthetic`"):
        fit(settings_of("domain_whitened"), network, drawn(3, sum(SIZES.values()), 0))


def test_training_starts_from_the_whitened_control(network):
    real = drawn(5, sum(SIZES.values()))
    start, control = (fit(settings_of(control), network, real) for control in (None, "whitened"))
    np.testing.assert_allclose(embed(start, real.features), embed(control, real.features), atol=1e-6)
    assert start.head("real").parts["style"].net.weight.shape == (64 + 48, 64 + 48)


def projections(model: AttributionModel, domain: str) -> dict[str, torch.nn.Linear]:
    return {block: layer for part in model.heads[domain].parts.values() for block, layer in part.project.items()}


def by_domain(net: str = "linear") -> TrainSettings:
    return settings_of(head=TRAINED["head"] | {"separate_domains": True, "net": net, "hidden": 4})


@pytest.mark.parametrize("net", ["linear", "mlp"])
@pytest.mark.parametrize("num_synthetic", [NUM_IMAGES, 30])
@torch.no_grad()
def test_trained_heads_by_domain_share_a_projection_with_separate_centres(net, num_synthetic, network):
    real, synthetic = drawn(3, sum(SIZES.values())), drawn(4, sum(SIZES.values()), 1, "synthetic")
    synthetic = synthetic.take(np.arange(2 * num_synthetic))  # each image has a view, which is ignored
    model = fit(by_domain(net), network, real, synthetic)
    control = projections(fit(settings_of("whitened"), network, real), "real")
    found = {domain: projections(model, domain) for domain in ("real", "synthetic")}
    rows = blocks(synthetic.features[synthetic.is_original])
    for block, expected in control.items():
        for layers in found.values():
            assert torch.equal(layers[block].weight, expected.weight)
        assert torch.equal(found["real"][block].bias, expected.bias)
        outputs = found["synthetic"][block](torch.from_numpy(rows[block]).float())
        centred = torch.from_numpy(rows[block] - rows[block].mean(axis=0)).float() @ expected.weight.T
        torch.testing.assert_close(outputs, centred, atol=1e-4, rtol=0)
        assert (found["synthetic"][block].bias - expected.bias).abs().max() > 0.1


def test_trained_heads_by_domain_without_synthetic_images_start_the_same(network):
    real = drawn(3, sum(SIZES.values()))
    model = fit(by_domain(), network, real)
    expected = embed(fit(settings_of(), network, real), real.features)
    for domain in ("real", "synthetic"):
        np.testing.assert_array_equal(embed(model, real.features, domain), expected)
    assert model.head("real") is not model.head("synthetic")


def test_a_model_does_not_depend_on_the_global_generator(network):
    real = drawn(5, sum(SIZES.values()))
    head = TRAINED["head"] | {"net": "mlp", "hidden": 4}
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append(fit(settings_of(head=head), network, real).state_dict())
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())


# Inputs of the nets


def test_training_inputs_equal_the_inputs_of_the_heads(network):
    real = drawn(6, sum(SIZES.values()))
    model = fit(settings_of(), network, real)
    inputs = training_inputs(model, real)
    assert inputs.anchor_ids.tolist() == sorted(set(real.content.tolist()))
    views = np.flatnonzero(~real.is_original)
    assert inputs.view_sources.tolist() == [[real.content[row], real.donor[row]] for row in views]
    assert inputs.anchors.dtype == inputs.views.dtype == torch.float16
    place = {int(image_id): row for row, image_id in enumerate(real.content) if real.view[row] == ORIGINAL}
    rows = [place[int(image_id)] for image_id in inputs.anchor_ids]
    head = model.head("real")
    with torch.no_grad():
        for found, wanted in ((inputs.anchors, rows), (inputs.views, views)):
            expected = head.inputs(torch.from_numpy(real.features[wanted]).float())
            torch.testing.assert_close(found.float(), expected, atol=1e-3, rtol=0)
            # The nets on these inputs equal the whole head.
            whole = head(torch.from_numpy(real.features[wanted]).float())
            parts = [torch.nn.functional.normalize(part, dim=1) for part in head.part_outputs(found.float())]
            torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=2e-3, rtol=0)


def supervised(network) -> tuple[AttributionModel, ViewFeatures, ViewFeatures]:
    real, synthetic = drawn(7, SIZES["pooled"], 0), drawn(8, SIZES["pooled"], 0, "synthetic")
    return fit(settings_of("supervised"), network, real, synthetic), real, synthetic


def test_two_sources_of_an_image_share_a_row(network):
    model, real, synthetic = supervised(network)
    sources, queries = real.content.tolist(), synthetic.content.tolist()
    pairs = {
        queries[4]: [sources[9]],
        queries[2]: [sources[1], sources[0]],
        queries[7]: [sources[3], 12345, sources[5]],  # one of them has no features
        queries[8]: sources[20:25],
        queries[9]: [12345],
        99999: [sources[0]],  # no features of its own
    }
    inputs = paired_inputs(model, real, synthetic, pairs)
    s = sources
    assert inputs.view_sources.tolist() == [
        [s[1], s[0]], [s[9], -1], [s[3], s[5]], [s[20], s[21]], [s[22], s[23]], [s[24], -1],
    ]  # fmt: skip
    assert inputs.view_sources.dtype == torch.int64
    rows = [2, 4, 7, 8, 8, 8]
    torch.testing.assert_close(inputs.views.float(), unit_tensor(synthetic.features[rows]), atol=1e-3, rtol=0)
    order = np.argsort(real.content)
    assert inputs.anchor_ids.tolist() == real.content[order].tolist()
    torch.testing.assert_close(inputs.anchors.float(), unit_tensor(real.features[order]), atol=1e-3, rtol=0)


def unit_tensor(rows: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(unit_rows(rows.astype(np.float32)))


def test_supervised_baseline_starts_as_the_raw_network(network):
    model, real, synthetic = supervised(network)
    for found, domain in ((real, "real"), (synthetic, "synthetic")):
        expected = unit_rows(found.features.astype(np.float64))
        np.testing.assert_allclose(embed(model, found.features, domain), expected, atol=1e-4)
        assert model.heads[domain].parts["all"].net.weight.shape == (96, 96)


def test_pairs_without_any_features_are_an_error(network):
    model, real, synthetic = supervised(network)
    for pairs in ({}, {1: [2]}, {int(synthetic.content[0]): [2]}, {1: [int(real.content[0])]}):
        with pytest.raises(
            AttribError, match=r"no row of pairs\.uri names a generated image and a source that both have features"
        ):
            paired_inputs(model, real, synthetic, pairs)


# The table of pairs


def manifest_of(name: str) -> Manifest:
    return Manifest("m", CollectionSettings(name=name, uri="u"), "d", "o", "r", [1], [])


def test_pairs_are_read_by_key(tmp_path):
    (tmp_path / "pairs.csv").write_text("made,from,model\nout/a.png,x.jpg,m1\nout/a.png,y.jpg,m1\nb.png,x.jpg,m2\n")
    table = {"uri": str(tmp_path / "pairs.csv"), "key_column": "made", "key_prefix": "out/"}
    settings = settings_of("supervised", pairs=table, pairs_source_column="from")
    a, b = image_ids("generated", ["a.png", "b.png"]).tolist()
    x, y = image_ids("sources", ["x.jpg", "y.jpg"]).tolist()
    assert read_pairs(settings, manifest_of("sources"), manifest_of("generated"), LOCAL) == {a: [x, y], b: [x]}


def test_a_parquet_table_of_pairs_is_read(tmp_path):
    LOCAL.write_table(str(tmp_path / "pairs.parquet"), pa.table({"key": ["a.png"], "source": ["x.jpg"]}))
    settings = settings_of("supervised", pairs={"uri": str(tmp_path / "pairs.parquet")})
    found = read_pairs(settings, manifest_of("sources"), manifest_of("generated"), LOCAL)
    assert found == {int(image_ids("generated", ["a.png"])[0]): [int(image_ids("sources", ["x.jpg"])[0])]}


@pytest.mark.parametrize("missing", ["key", "source"])
def test_the_error_names_a_missing_column_of_the_pairs(missing, tmp_path):
    columns = {"key": ["a"], "source": ["x"], "other": ["o"]}
    del columns[missing]
    LOCAL.write_table(str(tmp_path / "pairs.parquet"), pa.table(columns))
    settings = settings_of("supervised", pairs={"uri": str(tmp_path / "pairs.parquet")})
    with pytest.raises(AttribError, match=rf"pairs\.parquet has no column '{missing}'.*; it has {', '.join(columns)}"):
        read_pairs(settings, manifest_of("sources"), manifest_of("generated"), LOCAL)


def test_missing_table_of_pairs_is_an_error(tmp_path):
    manifests = manifest_of("sources"), manifest_of("generated")
    absent = settings_of("supervised", pairs={"uri": str(tmp_path / "absent.csv")})
    with pytest.raises(AttribError, match=r"absent\.csv"):
        read_pairs(absent, *manifests, LOCAL)


def test_missing_levels_are_an_error(network):
    settings = settings_of(features=TRAINED["features"] | {"moment_levels": [9]})
    with pytest.raises(AttribError, match="features use level 9"):
        fit(settings, network, drawn(0, sum(SIZES.values())))


def test_block_sizes_equal_those_of_the_extractor(network):
    settings = settings_of()
    model = build_model(network.model, network.data_config, settings.features, settings.head, {})
    assert model.extractor.sizes == SIZES
