"""Encoders: weights that fit or are an error, digests of the weights, vectors equal to timm's."""

import io
import json
import os
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.files import LOCAL
from support.images import picture
from timm import create_model
from timm.data import create_transform, resolve_data_config

from attrib.common.errors import AttribError
from attrib.data.decoding import decode_image
from attrib.embed.settings import EmbedSettings
from attrib.models.encoder import CHECKPOINT_KEY, KEEP_FREED_MEMORY, ImageEncoder, load_encoder
from attrib.models.preprocessing import Preprocessing
from attrib.models.settings import BackboneSettings

NAME = "test_resnet"

pytestmark = pytest.mark.usefixtures("one_thread")


def load(weights="random", name=NAME, storage=LOCAL, **options) -> ImageEncoder:
    return load_encoder(BackboneSettings(name=name, weights=str(weights)), storage, batch_size=4, **options)


@pytest.fixture(scope="module")
def encoder() -> ImageEncoder:
    return load()


@pytest.fixture(scope="module")
def state(encoder) -> dict[str, torch.Tensor]:
    return {key: value.clone().contiguous() for key, value in encoder.model.state_dict().items()}


def save(state, path, **metadata):
    save_file(state, path, metadata=metadata or None)
    return path


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (11, 3, 160, 160), dtype=np.uint8)


def test_local_weights_give_the_saved_network(encoder, state, pixels, tmp_path):
    loaded = load(save(state, tmp_path / "w.safetensors"))
    assert loaded.identity == encoder.identity and np.array_equal(loaded.encode(pixels), encoder.encode(pixels))
    assert encoder.identity.dimension == 96 and encoder.identity.preprocessing["crop_px"] == 160


def test_classifier_of_a_full_checkpoint_is_ignored(state, tmp_path):
    full = create_model(NAME)
    assert len(full.state_dict()) > len(state)  # it has a classifier
    loaded = load(save(full.state_dict(), tmp_path / "full.safetensors"))
    batch = torch.zeros(2, 3, 160, 160)
    expected = full.eval().forward_head(full.forward_features(batch), pre_logits=True)
    assert torch.allclose(loaded.model(batch), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda state: state.pop("conv1.0.weight"), r"Missing key.*conv1\.0\.weight"),
        (lambda state: state.update({"conv9.weight": torch.zeros(1)}), r"Unexpected key.*conv9\.weight"),
        (
            lambda state: state.update({"conv1.0.weight": torch.zeros(1, 3, 3, 3)}),
            r"size mismatch for conv1\.0\.weight",
        ),
    ],
)
def test_wrong_weights_are_an_error(change, expected, state, tmp_path):
    changed = dict(state)
    change(changed)
    with pytest.raises(
        AttribError, match=f"w.safetensors holds weights of another network than .*'test_resnet'; .*{expected}"
    ):
        load(save(changed, tmp_path / "w.safetensors"))


def test_other_file_type_is_an_error(tmp_path):
    for name, data in (("empty", b""), ("text", b"not weights" * 50), ("cut", (8).to_bytes(8, "little") + b"{")):
        (tmp_path / f"{name}.safetensors").write_bytes(data)
        with pytest.raises(AttribError, match=rf"{name}\.safetensors is not a readable \.safetensors file"):
            load(tmp_path / f"{name}.safetensors")
    with pytest.raises(AttribError, match=r"file .*absent\.safetensors does not exist; correct backbone\.weights"):
        load(tmp_path / "absent.safetensors")


def test_attrib_checkpoint_defines_preprocessing_and_name(encoder, state, tmp_path):
    config = resolve_data_config(model=encoder.model) | {"crop_pct": 0.5, "mean": (0.1, 0.2, 0.3)}
    declared = {CHECKPOINT_KEY: json.dumps({"name": NAME, "data_config": config})}
    loaded = load(save(state, tmp_path / "ours.safetensors", **declared))
    assert loaded.preprocessing == Preprocessing.from_timm(config) != encoder.preprocessing
    assert loaded.identity.model_digest == encoder.identity.model_digest
    with pytest.raises(AttribError, match=r"is a checkpoint of 'test_resnet', not of backbone.name = 'test_vit'"):
        load(tmp_path / "ours.safetensors", name="test_vit")


@pytest.mark.parametrize("text", ["[]", "null", "7", '"x"', '[{"name": "test_resnet"}]'])
def test_checkpoint_metadata_must_be_an_object(text, state, tmp_path):
    with pytest.raises(
        AttribError, match=r"w\.safetensors is not a checkpoint .*attrib\.backbone is not a JSON object"
    ):
        load(save(state, tmp_path / "w.safetensors", **{CHECKPOINT_KEY: text}))


@pytest.mark.parametrize("text", ["", "not JSON", "{", "[" * 100_000])
def test_checkpoint_metadata_must_be_json(text, state, tmp_path):
    with pytest.raises(AttribError, match=r"w\.safetensors is not a readable \.safetensors file"):
        load(save(state, tmp_path / "w.safetensors", **{CHECKPOINT_KEY: text}))


@pytest.mark.parametrize(
    "change",
    [
        {"crop_pct": 0},
        {"crop_pct": None},
        {"input_size": 160},
        {"input_size": [3, 160]},
        {"mean": None},
        {"std": ["a", "b", "c"]},
        {"crop_mode": "border"},
        {"interpolation": ["bicubic"]},
    ],
)
def test_invalid_preprocessing_is_an_error(change, encoder, state, tmp_path):
    config = resolve_data_config(model=encoder.model) | change
    declared = {CHECKPOINT_KEY: json.dumps({"name": NAME, "data_config": config})}
    with pytest.raises(AttribError, match="the preprocessing of 'test_resnet' is not supported"):
        load(save(state, tmp_path / "w.safetensors", **declared))


def test_unknown_network_suggests_similar_names():
    with pytest.raises(AttribError, match=r"timm has no network 'test_resnet99' \(similar names: .*test_resnet"):
        load(name="test_resnet99")
    with pytest.raises(AttribError, match=r"timm has no network 'xyzzy'; correct backbone\.name"):
        load(name="xyzzy")


def test_unreachable_hub_is_an_error_with_a_remedy():
    with pytest.raises(
        AttribError, match=r"could not provide 'test_vit' with its hub weights \(.+\); .*backbone\.weights=/path"
    ):
        load("hub", name="test_vit")  # tests/conftest.py sets HF_HUB_OFFLINE


def test_digest_depends_on_name_and_weights_only(encoder, state, tmp_path):
    digest = encoder.identity.model_digest
    assert load().identity.model_digest == digest
    reordered = dict(reversed(state.items()))
    full = dict(state) | {"fc.weight": torch.zeros(10, 96), "fc.bias": torch.zeros(10)}
    assert load(save(reordered, tmp_path / "a.safetensors", note="x")).identity.model_digest == digest
    assert load(save(full, tmp_path / "b.safetensors")).identity.model_digest == digest
    layout = create_model(NAME, num_classes=0)
    layout.load_state_dict(state)
    same = ImageEncoder(layout.to(memory_format=torch.contiguous_format), NAME, encoder.preprocessing, "cpu", 4)
    assert same.identity.model_digest == digest
    for key in ("conv1.0.weight", next(key for key in state if key.endswith("running_var"))):
        changed = {k: v.clone() for k, v in state.items()}
        changed[key].view(-1)[0] = torch.nextafter(changed[key].view(-1)[0], torch.tensor(9e9))
        assert load(save(changed, tmp_path / "c.safetensors")).identity.model_digest != digest
    seeded = load_encoder(BackboneSettings(name=NAME, weights="random", seed=1), LOCAL)
    assert seeded.identity.model_digest != digest


def test_random_weights_keep_the_global_random_state():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    load()
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("name", [NAME, "test_vit"])
def test_vector_does_not_depend_on_the_batch(name, pixels):
    encoder = load(name=name)
    assert encoder.preprocessing.crop_px == 160
    together = encoder.encode(pixels)  # 4 + 4 + 3: the last batch is padded
    for start, stop in ((0, 1), (1, 4), (3, 8), (10, 11)):
        assert np.array_equal(encoder.encode(pixels[start:stop]), together[start:stop])
    assert np.array_equal(encoder.encode(pixels[::-1].copy()), together[::-1])
    assert encoder.encode(pixels[:0]).shape == (0, encoder.identity.dimension)


def check_equals_timm(encoder: ImageEncoder, files: list[bytes]) -> None:
    transform = create_transform(**resolve_data_config(model=encoder.model), is_training=False)
    with torch.inference_mode():
        batch = torch.stack([transform(Image.open(io.BytesIO(data)).convert("RGB")) for data in files])
        expected = encoder.model(batch).numpy()
    decoded = [decode_image(data, max_megapixels=100).pixels for data in files]
    found = encoder.encode(np.stack([encoder.preprocessing.resize_and_crop(pixels).numpy() for pixels in decoded]))
    norms = np.linalg.norm(expected, axis=1) * np.linalg.norm(found, axis=1)
    assert ((expected * found).sum(axis=1) / norms).min() > 0.999


def test_vectors_equal_timm_on_synthetic_images(encoder):
    files = []
    for seed, size in enumerate([(300, 200), (200, 300), (160, 160), (40, 50)]):
        buffer = io.BytesIO()
        picture(seed, *size).save(buffer, "JPEG", quality=95)
        files.append(buffer.getvalue())
    check_equals_timm(encoder, files)


def test_vectors_equal_timm_on_real_images_and_weights(data_folder, real_images):
    weights = data_folder / "weights" / "mobilenetv2_100.safetensors"
    check_equals_timm(load(weights, name="mobilenetv2_100"), real_images[:12])
    assert len(load_file(weights)) > 100


ALLOCATE_IN_A_THREAD = """
import resource, sys, threading
import numpy as np

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def work():
    for _ in range(3):
        np.ones(1 << 25, np.uint8)
    before = faults()
    for _ in range(10):
        np.ones(1 << 25, np.uint8)
    print(faults() - before)

for target in (lambda: np.ones(1000), work):  # threads of Ray take arenas before an encoder is made
    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
"""


def page_faults(**environment) -> int:
    done = subprocess.run(
        [sys.executable, "-c", ALLOCATE_IN_A_THREAD], env=os.environ | environment, capture_output=True, check=True
    )
    return int(done.stdout)


def test_worker_thread_keeps_freed_memory():
    """Ten times 32 MiB in pages of 4 KiB: 81,920 page faults if every block is mapped again."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("the environment is that of glibc")
    assert page_faults(**KEEP_FREED_MEMORY) < 100
    assert page_faults() > 100  # fewer than 81,920 where the system makes huge pages


def test_scaled_decoding_keeps_the_vectors_of_real_images(data_folder, real_images):
    """With the default jpeg_margin. Images are enlarged by mirrored edges; upscaling would leave no detail to lose."""
    margin = EmbedSettings.model_fields["jpeg_margin"].default
    settings = BackboneSettings(
        name="mobilenetv2_100", weights=str(data_folder / "weights" / "mobilenetv2_100.safetensors")
    )
    full = load_encoder(settings, LOCAL)
    scaled = load_encoder(settings, LOCAL, jpeg_margin=margin)
    assert scaled.identity != full.identity and scaled.identity.model_digest == full.identity.model_digest
    vectors = {full: [], scaled: []}
    for number, data in enumerate(real_images[:12]):
        pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        sides = (1537 + 7 * number, 1591)
        reach = [(0, side - length) for side, length in zip(sides, pixels.shape)]
        buffer = io.BytesIO()
        Image.fromarray(np.pad(pixels, [*reach, (0, 0)], mode="symmetric")).save(buffer, "JPEG", quality=90)
        for encoder, found in vectors.items():
            decoded = encoder.preprocessing.decode(buffer.getvalue(), max_megapixels=100)
            assert decoded.shrink == (1 if encoder is full else 2)
            found.append(encoder.preprocessing.resize_and_crop(decoded).numpy())
    full_vectors, scaled_vectors = (encoder.encode(np.stack(found)) for encoder, found in vectors.items())
    norms = np.linalg.norm(full_vectors, axis=1) * np.linalg.norm(scaled_vectors, axis=1)
    assert ((full_vectors * scaled_vectors).sum(axis=1) / norms).min() > 0.999


def test_network_without_square_rgb_input_is_an_error(state, tmp_path):
    config = {"input_size": (1, 28, 28), "crop_pct": 1.0, "crop_mode": "center", "interpolation": "bicubic"}
    declared = {CHECKPOINT_KEY: json.dumps({"name": NAME, "data_config": config})}
    with pytest.raises(AttribError, match=r"the preprocessing of 'test_resnet' is not supported \(input_size"):
        load(save(state, tmp_path / "w.safetensors", **declared))
