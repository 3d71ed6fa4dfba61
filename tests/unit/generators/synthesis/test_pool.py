"""A pool on disk: models are read as they were written, and a model's weights reproduce its samples."""

import pytest
import torch
from safetensors.torch import load

from attrib.common.errors import AttribError
from attrib.common.storage import join
from attrib.generators.synthesis.architectures import Autoencoder, build_autoencoder, sample_specs
from attrib.generators.synthesis.autoencoder import Trained, render
from attrib.generators.synthesis.pool import (
    PHOTOGRAPHS,
    RECORD,
    PlannedModel,
    PoolModel,
    model_uri,
    open_pool,
    pool_digest,
    read_card,
    samples_uri,
    write_model,
)


@pytest.fixture
def photographs():
    return torch.randint(0, 256, (5, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def write(storage, uri, model_id, spec, model, photographs):
    model = model.to(memory_format=torch.channels_last).eval()
    samples = render(model, photographs)
    planned = PlannedModel(model_id=model_id, spec=spec, seed=7)
    return write_model(uri, planned, Trained(model, 0.25, 3), samples, storage), samples


def test_a_model_and_its_samples_are_read_as_written(photographs, tmp_path, local):
    storage, uri = local, str(tmp_path / "store")
    spec = next(spec for spec in sample_specs(20, 0, width=8) if spec.norm == "batch")
    card, samples = write(storage, uri, f"{spec.name}-7", spec, build_autoencoder(spec, 7), photographs)
    assert read_card(uri, card.model_id, storage) == card
    assert (card.spec, card.seed, card.loss, card.num_steps) == (spec, 7, 0.25, 3)
    storage.write_array(join(uri, PHOTOGRAPHS), photographs.numpy())
    record = {"models": [card.model_dump(mode="json")], "digest": "d", "settings": {"px": 16, "num_photographs": 5}}
    storage.write_json(join(uri, RECORD), record)
    pool = open_pool(uri, storage)
    assert pool.models == [card] and (pool.px, pool.num_photographs, pool.digest) == (16, 5, "d")
    assert torch.equal(pool.photographs(storage), photographs)
    assert torch.equal(pool.samples(card.model_id, storage), samples)
    model = Autoencoder(card.spec)
    model.load_state_dict(load(storage.read_bytes(model_uri(uri, card.model_id))))
    # In the memory format of training: another one adds in another order, and some samples would round differently.
    assert torch.equal(render(model.to(memory_format=torch.channels_last).eval(), photographs), samples)


def test_the_digest_depends_on_models_samples_and_photographs():
    spec = sample_specs(1, 0)[0]
    card = PoolModel(model_id="a", spec=spec, seed=0, loss=0.1, num_steps=1, samples_sha256="x")
    digests = {
        pool_digest([card], "p"),
        pool_digest([card], "q"),
        pool_digest([card.model_copy(update={"samples_sha256": "y"})], "p"),
        pool_digest([card, card], "p"),
    }
    assert len(digests) == 4


def test_unreadable_pools_and_models_are_refused(local, tmp_path, photographs):
    with pytest.raises(AttribError, match=r"jobs\.synthesize"):
        open_pool(str(tmp_path), local)
    spec = sample_specs(1, 0, width=4)[0]
    write(local, str(tmp_path), "a", spec, build_autoencoder(spec, 0), photographs)
    local.write_bytes(
        model_uri(str(tmp_path), "b"),
        local.read_bytes(model_uri(str(tmp_path), "a"))
        .replace(b'"model_id', b'"model_ie', 1)
        .replace(b'\\"model_id', b'\\"model_ie', 1),
    )
    with pytest.raises(AttribError, match="cannot read the synthetic generator"):
        read_card(str(tmp_path), "b", local)
    for damaged in (b"", b"\xff" * 100, local.read_bytes(model_uri(str(tmp_path), "a"))[:200]):
        local.write_bytes(model_uri(str(tmp_path), "b"), damaged)
        with pytest.raises(AttribError, match=r"cannot read the synthetic generator .*b\.safetensors"):
            read_card(str(tmp_path), "b", local)
    assert local.exists(samples_uri(str(tmp_path), "a"))
