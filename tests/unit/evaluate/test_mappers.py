"""AbC's mappers: read from files of torch and safetensors, equal to torch's linear layer, and never executed."""

import pickle

import numpy as np
import pytest
import safetensors.torch
import torch

from attrib.common.errors import AttribError
from attrib.evaluate.mappers import load_mappers


def layers(dimension: int = 6, out: int = 6) -> dict[str, torch.nn.Linear]:
    torch.manual_seed(0)
    return {name: torch.nn.Linear(dimension, out) for name in ("real_mapper", "synth_mapper")}


def flat(prefix: str = "") -> dict:
    return {f"{prefix}{n}.{key}": v for n, layer in layers().items() for key, v in layer.state_dict().items()}


FORMS = {
    "released.pth": lambda: {name: layer.state_dict() for name, layer in layers().items()},
    "flat.pt": flat,
    "parallel.ckpt": lambda: {"epoch": 3, "state_dict": flat("module.")},
    "tensors.safetensors": flat,
}


def save(value, path) -> str:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file({k: v.detach().clone() for k, v in value.items()}, path)
    else:
        torch.save(value, path)
    return str(path)


@pytest.mark.parametrize("name", FORMS)
def test_a_mapper_equals_torchs_linear_layer(name, tmp_path, local):
    mappers = load_mappers(save(FORMS[name](), tmp_path / name), local)
    x = np.random.default_rng(0).standard_normal((9, 6))
    for domain, mapper in (("real_mapper", mappers.real), ("synth_mapper", mappers.synth)):
        expected = layers()[domain].double()(torch.from_numpy(x)).detach().numpy()
        assert np.allclose(mapper(x), expected, atol=1e-12)
    assert not np.allclose(mappers.real(x), mappers.synth(x))
    with pytest.raises(AttribError, match="the mapper takes 6 numbers and these vectors have 5"):
        mappers.real(x[:, :5])


class Hostile:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("how", ["torch.save", "a bare pickle"])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(how, tmp_path, local):
    mark = tmp_path / "executed"
    value = {"real_mapper": Hostile(mark)}
    path = tmp_path / "mapper.pth"
    if how == "torch.save":
        torch.save(value, path)
    else:
        path.write_bytes(pickle.dumps(value, protocol=2))
    with pytest.raises(AttribError, match="was refused: it holds more than tensors and could run code"):
        load_mappers(str(path), local)
    assert not mark.exists()


def without(name: str) -> dict:
    return {key: value for key, value in flat().items() if key != name}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (without("synth_mapper.bias"), "synth_mapper must be one linear layer, .* the file holds real_mapper.bias"),
        (flat() | {"real_mapper.0.weight": torch.zeros(2)}, "real_mapper must be one linear layer"),
        (flat() | {"real_mapper.weight": torch.zeros(6)}, r"real_mapper has weight \[6\] and bias \[6\]"),
        (flat() | {"real_mapper.bias": torch.zeros(5)}, r"weight \[6, 6\] and bias \[5\]"),
        (flat() | {"real_mapper.bias": torch.full((6,), torch.nan)}, "values that are not finite"),
        (flat() | {"real_mapper.bias": 3}, "must be tensors"),
        (
            flat() | {"synth_mapper.weight": torch.zeros(4, 6), "synth_mapper.bias": torch.zeros(4)},
            "both must have one shape",
        ),
        ([1, 2], "holds a list; save the state dict"),
        ({}, "the file holds nothing"),
    ],
)
def test_the_error_names_invalid_contents_of_a_mapper_file(value, expected, tmp_path, local):
    with pytest.raises(AttribError, match=expected):
        load_mappers(save(value, tmp_path / "mapper.pth"), local)


def test_the_error_names_a_file_that_is_not_a_mapper(tmp_path, local):
    with pytest.raises(AttribError, match=r"neither .safetensors nor one of .pth"):
        load_mappers(str(tmp_path / "mapper.npz"), local)
    with pytest.raises(AttribError, match="does not exist"):
        load_mappers(str(tmp_path / "mapper.pth"), local)
    for name in ("mapper.pth", "mapper.safetensors"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 no archive")
        with pytest.raises(AttribError, match=name):
            load_mappers(str(tmp_path / name), local)
