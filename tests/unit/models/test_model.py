"""Models with heads: exact checkpoints, digests, and errors of damaged checkpoints."""

import json
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.files import LOCAL
from support.images import picture
from torch import nn

from attrib.common.errors import AttribError
from attrib.data.decoding import decode_image
from attrib.models.encoder import ImageEncoder, Network, load_encoder, load_network
from attrib.models.model import CHECKPOINT_KEY, AttributionModel, build_model, features_data_config, save_model
from attrib.models.settings import BackboneSettings, FeatureSettings, HeadSettings
from attrib.train.whitening import projected_sizes

NAME = "test_resnet"
FEATURES = {"moment_levels": (0, 1), "layout_levels": (2,), "layout_grid": 2, "whole_image": True}
HEAD = {
    "net": "mlp",
    "hidden": 4,
    "parts": {
        "content": {"blocks": ["layout_2"], "role": "content", "dimension": 5},
        "style": {"blocks": ["moments", "pooled"], "role": "style"},
    },
}

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Recipe:
    """A model with seeded random weights in its heads."""

    features: dict = field(default_factory=lambda: FEATURES)
    head: dict = field(default_factory=lambda: HEAD)
    name: str = NAME
    seed: int = 0

    def build(self, domain="real") -> tuple[AttributionModel, dict]:
        """The model and its preprocessing."""
        features, head = FeatureSettings(**self.features), HeadSettings(**self.head)
        network = load_network(BackboneSettings(name=self.name, weights="random"), LOCAL)
        backbone, data_config = network.model.eval(), features_data_config(network.data_config, features)
        probe = build_model(backbone, data_config, features, HeadSettings(projection="identity"), {})
        sizes = projected_sizes(probe.extractor.sizes, 8, head)
        model = build_model(backbone, data_config, features, head, sizes, domain).eval()
        generator = torch.Generator().manual_seed(self.seed)
        for _, weight in sorted(model.heads.named_parameters()):
            nn.init.normal_(weight, std=0.3, generator=generator)
        return model, data_config

    def save(self, path) -> AttributionModel:
        model, _ = self.build()
        save_model(model, self.name, str(path), LOCAL)
        return model


def settings_of(path, name=NAME, domain="real") -> BackboneSettings:
    return BackboneSettings(name=name, weights=str(path), domain=domain)


def load(path, **values) -> Network:
    return load_network(settings_of(path, **values), LOCAL)


def encoder(path, **values) -> ImageEncoder:
    return load_encoder(settings_of(path, **values), LOCAL, batch_size=4)


def digest_of(recipe: Recipe, folder) -> str:
    recipe.save(folder / "digest.safetensors")
    return encoder(folder / "digest.safetensors", name=recipe.name).identity.model_digest


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    pixels = np.stack([np.array(picture(seed, 160, 160)) for seed in range(3)])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 128 - 1


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    Recipe().save(path)
    return path


@pytest.mark.parametrize("net", ["none", "linear", "mlp"])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
def test_checkpoint_round_trip_is_exact(name, net, images, tmp_path):
    model = Recipe(name=name, head=HEAD | {"net": net}).save(tmp_path / "m.safetensors")
    loaded = load(tmp_path / "m.safetensors", name=name)
    assert loaded.has_head and isinstance(loaded.model, AttributionModel)
    assert loaded.model.description() == model.description()
    with torch.inference_mode():
        expected, found = model(images), loaded.model.eval()(images)
    assert torch.equal(found, expected) and not torch.allclose(found[0], found[1], atol=1e-3)
    assert list(loaded.model.state_dict()) == list(model.state_dict())


def description_of(path) -> dict:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()[CHECKPOINT_KEY])


def save_changed(checkpoint, folder, change=lambda declared: None, change_weights=lambda state: None):
    """Write a copy of a checkpoint with another description or other weights; returns its path."""
    declared, state = description_of(checkpoint), load_file(checkpoint)
    change(declared)
    change_weights(state)
    save_file(state, folder / "w.safetensors", metadata={CHECKPOINT_KEY: json.dumps(declared)})
    return folder / "w.safetensors"


def test_checkpoint_contains_its_description(checkpoint):
    declared = description_of(checkpoint)
    assert declared.keys() == {"name", "data_config", "features", "head", "projected_sizes"}
    assert declared["name"] == NAME and declared["projected_sizes"] == {"pooled": 7, "moments": 7, "layout_2": 7}
    assert FeatureSettings.model_validate(declared["features"]) == FeatureSettings(**FEATURES)
    assert HeadSettings.model_validate(declared["head"]) == HeadSettings(**HEAD)


def test_digest_is_the_same_after_saving_again(checkpoint, tmp_path):
    loaded = load(checkpoint)
    save_model(loaded.model, NAME, str(tmp_path / "again.safetensors"), LOCAL)
    assert encoder(tmp_path / "again.safetensors").identity == encoder(checkpoint).identity
    model, data_config = Recipe().build()
    before = ImageEncoder(model, NAME, encoder(checkpoint).preprocessing, "cpu", 4)
    assert before.identity == encoder(checkpoint).identity and data_config["crop_mode"] == "squash"


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 1},
        {"features": FEATURES | {"moment_levels": (1, 0)}},  # of the same size in another order
        {"features": FEATURES | {"whole_image": False}},
        {"head": HEAD | {"net": "linear"}},
        {"head": HEAD | {"shrinkage": 0.5}},
        {"head": HEAD | {"parts": HEAD["parts"] | {"style": HEAD["parts"]["style"] | {"role": None}}}},
        {"head": HEAD | {"parts": dict(reversed(HEAD["parts"].items()))}},  # the dimensions in another order
        {"head": HEAD | {"separate_domains": True}},
        {"name": "test_efficientnet"},
    ],
)
def test_digest_depends_on_the_description(changed, checkpoint, tmp_path):
    expected = encoder(checkpoint).identity.model_digest
    assert digest_of(Recipe(), tmp_path) == expected
    assert digest_of(Recipe(**changed), tmp_path) != expected


def test_digest_depends_on_every_weight(checkpoint, tmp_path):
    digests = {encoder(checkpoint).identity.model_digest}
    keys = [
        "extractor.backbone.conv1.0.weight",
        "heads.real.parts.content.project.layout_2.bias",
        "heads.real.parts.style.net.outer.weight",
    ]
    for key in keys:
        path = save_changed(
            checkpoint, tmp_path, change_weights=lambda state, key=key: state[key].view(-1)[0].add_(1e-3)
        )
        digests.add(encoder(path).identity.model_digest)
    assert len(digests) == 1 + len(keys)


def test_domain_selects_the_head_and_keeps_the_digest(images, tmp_path):
    model = Recipe(head=HEAD | {"separate_domains": True}).save(tmp_path / "two.safetensors")
    real, synthetic = (encoder(tmp_path / "two.safetensors", domain=domain) for domain in ("real", "synthetic"))
    assert real.identity == synthetic.identity
    pixels = ((images + 1) * 128).to(torch.uint8).numpy()
    assert np.abs(real.encode(pixels) - synthetic.encode(pixels)).max() > 0.1
    with torch.inference_mode():
        for domain, loaded in (("real", real), ("synthetic", synthetic)):
            assert torch.equal(loaded.model(images), model.heads[domain](model.extractor(images)))
            assert (
                not torch.equal(model.heads["real"](model.extractor(images)), loaded.model(images)) or domain == "real"
            )


def test_one_head_serves_both_domains(checkpoint, images):
    pixels = ((images + 1) * 128).to(torch.uint8).numpy()
    real, synthetic = (encoder(checkpoint, domain=domain) for domain in ("real", "synthetic"))
    assert real.identity == synthetic.identity and np.array_equal(real.encode(pixels), synthetic.encode(pixels))


def test_encoder_equals_the_steps_of_the_model(checkpoint, real_images):
    loaded, (model, _) = encoder(checkpoint), Recipe().build()
    assert loaded.preprocessing.crop_mode == "squash" and loaded.preprocessing.resize_px == loaded.preprocessing.crop_px
    decoded = [decode_image(data, max_megapixels=100).pixels for data in real_images[:5]]
    pixels = torch.stack([loaded.preprocessing.resize_and_crop(image) for image in decoded])
    found = loaded.encode(pixels.numpy())
    assert found.shape == (5, 5 + 14) and loaded.identity.dimension == 19 == model.head("real").dimension
    np.testing.assert_allclose(np.linalg.norm(found[:, :5], axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found[:, 5:], axis=1), 1, atol=1e-5)
    with torch.inference_mode():
        expected = model.head("real")(model.extractor(loaded.preprocessing.normalise(pixels, "cpu", torch.float32)))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.array_equal(loaded.encode(pixels[:1].numpy()), found[:1])


def test_whole_image_changes_timms_preprocessing():
    backbone = load_network(BackboneSettings(name=NAME, weights="random"), LOCAL)
    assert features_data_config(backbone.data_config, FeatureSettings()) == backbone.data_config
    whole = features_data_config(backbone.data_config, FeatureSettings(whole_image=True))
    assert whole == backbone.data_config | {"crop_mode": "squash", "crop_pct": 1.0}


def changed(path: str, value):
    """Change one key of a description, e.g. "head.net"; DELETE removes it."""

    def change(declared: dict) -> None:
        *parents, last = path.split(".")
        for parent in parents:
            declared = declared[parent]
        if value is DELETE:
            del declared[last]
        else:
            declared[last] = value

    return pytest.param(change, id=f"{path}={'DELETE' if value is DELETE else json.dumps(value)[:40]}")


DELETE = object()


@pytest.mark.parametrize(
    "change",
    [
        *(changed(key, DELETE) for key in ("features", "head", "projected_sizes", "data_config")),
        changed("projected_sizes.pooled", DELETE),
        *(changed("features", value) for value in (None, [], "x", 3, {}, {"pooled": False})),
        changed("features.layout_levels", [99]),
        changed("features.layout_levels", [-1]),
        changed("features.layout_levels", []),
        changed("features.moment_levels", "0"),
        changed("features.layout_grid", 0),
        changed("features.layout_grid", 3),
        changed("features.code", "x"),
        *(changed("head", value) for value in (None, [], "x", 3, {})),
        changed("head.code", "x"),
        changed("head.net", "exec"),
        changed("head.net", "linear"),
        changed("head.projection", ["whiten"]),
        changed("head.hidden", 5),
        changed("head.shrinkage", float("nan")),
        changed("head.separate_domains", True),
        changed("head.parts", {}),
        changed("head.parts", []),
        changed("head.parts.style", None),
        changed("head.parts.style.blocks", ["layout_9"]),
        changed("head.parts.style.blocks", []),
        changed("head.parts.style.code", 1),
        changed("head.parts.type", {"blocks": ["pooled"]}),
        *(changed("projected_sizes", value) for value in (None, [], "x", 3, {})),
        *(changed("projected_sizes.pooled", value) for value in (None, "7", -1, 0, 1.5, 8, 10**30, [7], True)),
        *(changed("data_config", value) for value in (None, [], "x", 3, {})),
        *(changed("data_config.input_size", value) for value in (None, [], 160, "x", [3, 160, 0], [3, 160, "x"])),
        *(changed("data_config.crop_pct", value) for value in (0, None, "x", 2)),
        changed("data_config.mean", None),
        changed("data_config.crop_mode", "border"),
        *(changed("name", value) for value in (None, 7, "test_vit")),
    ],
)  # fmt: skip
def test_invalid_description_is_an_error(change, checkpoint, tmp_path):
    path = save_changed(checkpoint, tmp_path, change)
    with pytest.raises(AttribError):
        encoder(path)


def test_invalid_part_name_is_an_error(checkpoint, tmp_path):
    part = {"a.b": {"blocks": ["pooled"]}}
    path = save_changed(checkpoint, tmp_path, lambda declared: declared["head"]["parts"].update(part))
    with pytest.raises(
        AttribError, match=r"w\.safetensors is not a checkpoint that this version can read .*a\.b.*; download it again"
    ):
        encoder(path)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda state: state.pop("heads.real.parts.style.net.inner.bias"), r"Missing key.*style\.net\.inner\.bias"),
        (lambda state: state.update({"heads.synthetic.x": torch.zeros(1)}), r"Unexpected key.*heads\.synthetic\.x"),
        (
            lambda state: state.update({"heads.real.parts.style.net.inner.bias": torch.zeros(5)}),
            r"size mismatch for heads\.real\.parts\.style\.net\.inner\.bias",
        ),
        (lambda state: state.clear(), "Missing key"),
    ],
)
def test_weights_must_fit_the_description(change, expected, checkpoint, tmp_path):
    path = save_changed(checkpoint, tmp_path, change_weights=change)
    with pytest.raises(AttribError, match=rf"w\.safetensors is not a checkpoint that this version .*{expected}"):
        encoder(path)


def test_missing_level_is_an_error():
    with pytest.raises(AttribError, match="features use level 7; use levels of the network, 0 to 4"):
        Recipe(features={"moment_levels": (7,)}).build()
