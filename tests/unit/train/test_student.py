"""Students: trained and frozen weights, the last blocks of a network, batch norm, and separate domains."""

import re

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from support import training
from support.files import LOCAL
from support.training import train_settings

from attrib.common.errors import AttribError
from attrib.models.encoder import load_network
from attrib.models.model import AttributionModel
from attrib.train.settings import TrainSettings
from attrib.train.student import HeadTrunk, PixelTrunk, student_of, trained_groups, unfreeze_last_blocks

PX, VIT_PX = 32, 160  # the position embedding of a ViT fixes its size
# Groups of layers as timm names them, the last first.
LAST_GROUPS = {
    "test_resnet": [r"layer4\.", r"layer3\.", r"layer2\.", r"layer1\.", r"(conv1|bn1)\."],
    "test_vit": [r"(blocks\.5|norm)\.", r"blocks\.4\.", r"blocks\.3\."],
    "test_efficientnet": [r"(blocks\.4|conv_head|bn2)\.", r"blocks\.3\.", r"blocks\.2\."],
}

pytestmark = pytest.mark.usefixtures("one_thread")


def settings_of(name: str = "test_resnet", fine_tune: dict | None = None, **changes) -> TrainSettings:
    return train_settings(name, fine_tune=fine_tune, **{"head": {"projection": "identity"}} | changes)


def model_of(settings: TrainSettings) -> AttributionModel:
    return training.model_of(settings, VIT_PX if "vit" in settings.backbone.name else PX)


def pixels(num: int, model: AttributionModel, seed: int = 0) -> torch.Tensor:
    side_px = model.data_config["input_size"][-1]
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num, 3, side_px, side_px), dtype=torch.uint8, generator=generator)


def train(student, settings, anchors, views, num_steps: int = 2) -> dict[str, torch.Tensor]:
    """Take steps on some loss and return the weights and buffers from before."""
    before = {name: value.clone() for name, value in student.state_dict().items()}
    optimiser = torch.optim.AdamW(trained_groups(student, settings), weight_decay=0.1)
    student.train()
    for _ in range(num_steps):
        optimiser.zero_grad()
        found, pool = (student.embedding(outputs) for outputs in student(anchors, views))
        F.cross_entropy(found @ pool.T, torch.arange(len(found))).backward()
        optimiser.step()
    return before


def changed(student, before) -> set[str]:
    return {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("name", LAST_GROUPS)
@pytest.mark.parametrize("num_blocks", [1, 2, 3])
def test_only_the_last_blocks_are_trainable(name, num_blocks):
    backbone = load_network(settings_of(name).backbone, LOCAL).model
    unfreeze_last_blocks(backbone, num_blocks)
    wanted = re.compile("|".join(LAST_GROUPS[name][:num_blocks]))
    for parameter, value in backbone.named_parameters():
        assert value.requires_grad == bool(wanted.match(parameter)), parameter


@pytest.mark.parametrize("name", LAST_GROUPS)
def test_all_blocks_can_be_trainable_and_more_are_an_error(name):
    backbone = load_network(settings_of(name).backbone, LOCAL).model
    unfreeze_last_blocks(backbone, "all")
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    with pytest.raises(AttribError, match=r"num_blocks is 99, but the network has \d groups of layers"):
        unfreeze_last_blocks(backbone, 99)
    # Blocks of an earlier call are frozen again.
    unfreeze_last_blocks(backbone, 1)
    assert not next(backbone.parameters()).requires_grad


@pytest.mark.parametrize("name", LAST_GROUPS)
def test_fine_tuning_changes_only_the_trainable_weights(name):
    """Batch norm keeps its statistics although the student is in training mode."""
    settings = settings_of(name, {"num_blocks": 1, "learning_rate": 1e-3})
    model = model_of(settings)
    student = student_of(model, settings)
    anchors, views = pixels(6, model), pixels(6, model, seed=1)
    before = train(student, settings, anchors, views)
    trainable = {name for name, p in student.named_parameters() if p.requires_grad}
    assert isinstance(student.trunk, PixelTrunk) and changed(student, before) <= trainable
    backbone = {name for name in changed(student, before) if ".backbone." in name}
    last = re.compile(rf"trunk\.model\.extractor\.backbone\.({LAST_GROUPS[name][0]})")
    assert backbone and all(last.match(name) for name in backbone)
    assert {n for n in trainable if ".heads." in n} <= changed(student, before)
    for parameter_name, parameter in student.named_parameters():
        assert (parameter.grad is None) == (parameter_name not in trainable), parameter_name
    assert not any(module.training for module in model.modules())


def test_training_a_head_keeps_projections_and_backbone():
    settings = settings_of(head={"net": "mlp", "hidden": 8, "projection": "centre"})
    model = model_of(settings)
    whole = {name: value.clone() for name, value in model.state_dict().items()}
    student = student_of(model, settings)
    rows = torch.randn(12, 96, generator=torch.Generator().manual_seed(0))
    before = train(student, settings, rows[:6], rows[6:], num_steps=3)
    assert isinstance(student.trunk, HeadTrunk)
    differing = {name for name, value in model.state_dict().items() if not torch.equal(value, whole[name])}
    nets = {f"heads.real.parts.all.net.{name}" for name in model.heads["real"].parts["all"].net.state_dict()}
    assert differing == nets == {name.removeprefix("trunk.") for name in changed(student, before)}
    assert all(p.grad is None for p in model.extractor.parameters())
    assert [len(group["params"]) for group in trained_groups(student, settings)] == [len(nets)]


def test_backbone_has_its_own_learning_rate():
    settings = settings_of(fine_tune={"num_blocks": 2, "learning_rate": 1e-5})
    student = student_of(model_of(settings), settings)
    outer, inner = trained_groups(student, settings)
    assert (outer["lr"], inner["lr"]) == (settings.optimiser.learning_rate, 1e-5)
    names = {id(p): name for name, p in student.named_parameters()}
    assert all(".backbone.layer" in names[id(p)] for p in inner["params"])
    assert sorted(names[id(p)] for p in outer["params"]) == [
        "trunk.model.heads.real.parts.all.net.bias",
        "trunk.model.heads.real.parts.all.net.weight",
    ]


def test_student_on_pixels_equals_the_model():
    settings = settings_of(fine_tune={"num_blocks": 1})
    model = model_of(settings)
    student = student_of(model, settings)
    images = pixels(4, model)
    with torch.no_grad():
        normalised = student.trunk.preprocessing.normalise(images, "cpu", torch.float32)
        torch.testing.assert_close(student.embedding(student.encode(images, "real")), model(normalised))


def test_bfloat16_is_close_and_returns_float32():
    settings = settings_of(fine_tune={"num_blocks": 1, "precision": "bfloat16"})
    model = model_of(settings)
    student = student_of(model, settings)
    images = pixels(4, model)
    with torch.no_grad():
        found = student.encode(images, "real")
        student.trunk.precision = "float32"
        expected = student.encode(images, "real")
    assert found.dtype == torch.float32 and not torch.equal(found, expected)
    assert F.cosine_similarity(found, expected).min() > 0.99


@pytest.mark.parametrize("fine_tune", [None, {"num_blocks": 1, "learning_rate": 1e-3}])
def test_separate_domains_are_trained_by_their_own_images(fine_tune):
    settings = settings_of(fine_tune=fine_tune, head={"projection": "identity", "separate_domains": True})
    model = model_of(settings)
    student = student_of(model, settings)
    if fine_tune:
        anchors, views = pixels(6, model), pixels(6, model, seed=1)
    else:
        anchors, views = torch.randn(2, 6, 96, generator=torch.Generator().manual_seed(0))
    nets = {domain: model.heads[domain].parts["all"].net for domain in ("real", "synthetic")}
    for place, (domain, other) in enumerate([("real", "synthetic"), ("synthetic", "real")]):
        student.zero_grad()
        student(anchors, views)[place].square().sum().backward()
        assert nets[domain].weight.grad.any() and nets[other].weight.grad is None
    train(student, settings, anchors, views)
    assert not torch.equal(nets["real"].weight, nets["synthetic"].weight)
    outputs = student(anchors, views)
    for output, rows, domain in zip(outputs, (anchors, views), ("real", "synthetic")):
        torch.testing.assert_close(output, student.encode(rows, domain))


def test_one_head_serves_both_domains_in_one_pass():
    settings = settings_of()
    student = student_of(model_of(settings), settings)
    anchors, views = torch.randn(2, 6, 96)
    outputs = student(anchors, views)
    for output, rows in zip(outputs, (anchors, views)):
        torch.testing.assert_close(output, student.encode(rows, "real"))
        assert torch.equal(student.encode(rows, "real"), student.encode(rows, "synthetic"))


def test_outputs_are_the_parts_side_by_side():
    parts = {
        "content": {"blocks": ["pooled"], "role": "content", "dimension": 7},
        "style": {"blocks": ["pooled"], "role": "style"},
    }
    settings = settings_of(head={"projection": "identity", "parts": parts})
    student = student_of(model_of(settings), settings)
    outputs = student.encode(torch.randn(4, 2 * 96), "real")
    assert outputs.shape == (4, 7 + 96) and student.roles == ["content", "style"]
    assert [part.shape[1] for part in student.parts(outputs)] == [7, 96]
    embedding = torch.cat([F.normalize(outputs[:, :7], dim=1), F.normalize(outputs[:, 7:], dim=1)], dim=1)
    torch.testing.assert_close(student.embedding(outputs), embedding)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"head": {"separate_domains": True, "net": "none", "num_directions": 5}},
            r"remove head\.num_directions: .* keeps all directions",
        ),
        (
            {"disentanglement": {"kind": "none"}, "alignment": {"kind": "moco"}, "head": {"separate_domains": True}},
            "'moco' leaves the head for real images untrained",
        ),
        (
            {"alignment": {"kind": "moco", "queue_rows": 511}, "optimiser": {"batch_size": 256}},
            "queue_rows 511 must be at least 512, the keys of each step",
        ),
        (
            {"alignment": {"kind": "moco", "queue_rows": 255}, "optimiser": {"batch_size": 256}, "fine_tune": {}},
            "queue_rows 255 must be at least 256",
        ),
        (
            {"optimiser": {"batch_size": 250}, "num_workers": 4},
            r"batch_size 250 must be a multiple of num_workers \(4\)",
        ),
        ({"control": "raw", "fine_tune": {}}, "a control has nothing to fine-tune"),
        ({"control": "domain_whitened"}, "'domain_whitened' needs `synthetic`"),
        ({"control": "supervised"}, "'supervised' needs `synthetic`"),
        ({"control": "supervised", "synthetic": "s"}, "'supervised' needs `pairs`"),
        ({"head": {"parts": {"all": {"blocks": ["layout_2"]}}}}, "uses block 'layout_2', which .* use one of pooled"),
    ],
)
def test_inconsistent_settings_are_an_error(changes, expected):
    with pytest.raises(ValidationError, match=expected):
        settings_of(**{"fine_tune": None} | changes)
