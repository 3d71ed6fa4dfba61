"""No damaged model or pool is read: each of their files, damaged in several ways, is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.damage import damages
from support.extractor import network_of, settings
from support.files import LOCAL
from support.pool import write_tiny_pool
from support.training import model_of, train_settings

from attrib.common.errors import AttribError
from attrib.common.json_records import CHECKSUM, with_checksum
from attrib.generators.extractor.network import RECORD, extractor_digest, load_extractor, save_extractor
from attrib.generators.fingerprints.discriminant import Discriminant, load_discriminant, save_discriminant
from attrib.generators.synthesis.pool import open_pool
from attrib.models.encoder import load_network
from attrib.models.model import TRAIN_RECORD, TRAINED_MODEL, model_digest, save_model
from attrib.models.settings import BackboneSettings


def read_pool(folder: Path) -> list[np.ndarray]:
    pool = open_pool(str(folder / "pool"), LOCAL)
    return [pool.photographs(LOCAL).numpy(), pool.samples("m001", LOCAL).numpy()]


def read_extractor(folder: Path) -> list[np.ndarray]:
    state = load_extractor(str(folder / "extractor"), LOCAL).network.state_dict()
    return [value.numpy() for _, value in sorted(state.items())]


def read_discriminant(folder: Path) -> list[np.ndarray]:
    found, declared = load_discriminant(str(folder / "lda.safetensors"), LOCAL)
    return [found.mean, found.projection, np.array(found.shrinkage), np.array(declared["bins"])]


def read_model(folder: Path) -> list[np.ndarray]:
    backbone = BackboneSettings(name="test_resnet", weights=str(folder / "trained" / TRAINED_MODEL))
    return [value.numpy() for _, value in sorted(load_network(backbone, LOCAL).model.state_dict().items())]


READERS: dict[str, Callable[[Path], list[np.ndarray]]] = {
    "pool/pool.json": read_pool,
    "pool/photographs.npy": read_pool,
    "pool/samples/m001.npy": read_pool,
    f"extractor/{RECORD}": read_extractor,
    "extractor/extractor.safetensors": read_extractor,
    "lda.safetensors": read_discriminant,
    f"trained/{TRAIN_RECORD}": read_model,
    f"trained/{TRAINED_MODEL}": read_model,
}
OPTIONAL = {f"trained/{TRAIN_RECORD}"}  # a model may be moved without its record


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, bytes]:
    """The content of a pool, an extractor, a discriminant and a trained model."""
    folder = tmp_path_factory.mktemp("written")
    write_tiny_pool(str(folder / "pool"), LOCAL, num_models=2, num_images=4, px=16)
    network = network_of(settings())
    save_extractor(network, str(folder / "extractor"), LOCAL)
    LOCAL.write_json(str(folder / "extractor" / RECORD), with_checksum({"digest": extractor_digest(network)}))
    rows = np.random.default_rng(0).standard_normal((8, 3))
    save_discriminant(Discriminant(rows[:, 0], rows[:, 1:], 0.5), {"bins": 8}, str(folder / "lda.safetensors"), LOCAL)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_of(train_settings(), 160)
    save_model(model, "test_resnet", str(folder / "trained" / TRAINED_MODEL), LOCAL)
    record = with_checksum({"model_digest": model_digest("test_resnet", model)})
    LOCAL.write_json(str(folder / "trained" / TRAIN_RECORD), record)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_refused_by_name(name, written, tmp_path):
    for path, content in written.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    answer, file = READERS[name](tmp_path), tmp_path / name
    for damage, content in damages(written[name]).items():
        file.write_bytes(content)
        try:
            read = READERS[name](tmp_path)
        except AttribError as error:
            assert file.name in str(error), damage
        else:  # a byte that holds nothing, such as the padding of a header
            assert all(map(np.array_equal, read, answer)), damage
    file.unlink()
    if name not in OPTIONAL:
        with pytest.raises(AttribError, match=file.name):
            READERS[name](tmp_path)


def test_records_are_refused_for_every_flipped_bit(written, tmp_path):
    place = tmp_path / "record.json"
    for name in (name for name in READERS if name.endswith(".json")):
        for byte in range(len(written[name])):
            content = bytearray(written[name])
            content[byte] ^= 1
            place.write_bytes(bytes(content))
            try:
                found = LOCAL.require(str(place), "the job")
            except AttribError:
                continue
            # A record without a checksum is of an earlier version, and so is one whose name of it is damaged.
            expected = json.loads(written[name])
            assert {key: found[key] for key in found if key in expected} | {CHECKSUM: expected[CHECKSUM]} == expected
