"""Views rendered on demand: one global batch and criterion for any number of workers, and damaged images.

Two processes under DistributedDataParallel must learn what one process learns from the joined batch.
"""

import copy

import numpy as np
import pytest
import torch
from support.files import LOCAL
from support.hostile import encode
from support.images import picture, write_folder
from support.training import collection, listed, model_of, train_settings

from attrib.common.errors import AttribError
from attrib.data.decoding import decode_image
from attrib.models.preprocessing import Preprocessing
from attrib.train import pixel_batches
from attrib.train.batches import is_validation
from attrib.train.loop import TrainRun, mean_reciprocal_rank
from attrib.train.objective import EMPTY_SLOT, TrainBatch
from attrib.train.pixel_batches import PixelBatches
from attrib.train.settings import TrainSettings
from attrib.train.student import parallel, student_of, trained_groups

CPU = torch.device("cpu")
PX = 32
NUM_IMAGES, BATCH_SIZE = 25, 8  # odd: the shares of two workers contain repetitions
BROKEN = ("cut.png", "text.jpg", "void.jpg")
MIX = {"texture": 1, "colour": 3, "bands": 2, "solo": 2}

pytestmark = pytest.mark.usefixtures("one_thread")


def settings_of(seed: int = 0, optimiser: dict | None = None, **fine_tune) -> TrainSettings:
    return train_settings(
        # The head does not read the last level, so its trainable block gets no gradient.
        features={"pooled": False, "moment_levels": [1], "layout_levels": [3], "layout_grid": 2},
        head={
            "projection": "identity",
            "parts": {
                "content": {"blocks": ["layout_3"], "role": "content", "dimension": 6},
                "style": {"blocks": ["moments"], "role": "style", "dimension": 6},
            },
        },
        views={"num_donor_patches": 40, "mix": MIX},
        alignment={"temperature": 0.1},
        disentanglement={"weight": 1.0},
        optimiser={"batch_size": BATCH_SIZE, "validation_share": 0.25, "num_epochs": 2, "learning_rate": 1e-3}
        | (optimiser or {}),
        fine_tune={"num_blocks": 2, "learning_rate": 1e-3} | fine_tune,
        seed=seed,
    )


def batches_of(rows, manifest, rank=0, num_workers=1, settings=None) -> PixelBatches:
    settings = settings or settings_of()
    preprocessing = Preprocessing.from_timm(model_of(settings, PX).data_config)
    return PixelBatches(rows, manifest, preprocessing, settings, rank, num_workers, CPU, LOCAL)


def joined(parts: list[TrainBatch]) -> TrainBatch:
    return TrainBatch(*(torch.cat([getattr(part, name) for part in parts]) for name in TrainBatch.__dataclass_fields__))


def same(first: TrainBatch, second: TrainBatch) -> bool:
    return all(torch.equal(getattr(first, name), getattr(second, name)) for name in TrainBatch.__dataclass_fields__)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    write_folder({f"{i}.jpg": encode(picture(i, 60 + i, 50), "JPEG") for i in range(NUM_IMAGES)}, str(folder), LOCAL)
    return folder


@pytest.fixture(scope="module")
def images(folder):
    return listed(folder)


@pytest.mark.parametrize("num_workers", [2, 4])
def test_joined_batches_of_workers_equal_the_batch_of_one(num_workers, images):
    alone = list(batches_of(*images).epoch(1))
    workers = [list(batches_of(*images, rank, num_workers).epoch(1)) for rank in range(num_workers)]
    assert len(alone) == batches_of(*images).num_steps >= 2
    for expected, *parts in zip(alone, *workers, strict=True):
        assert same(joined(parts), expected)
        assert {part.views.shape for part in parts} == {(BATCH_SIZE // num_workers, 3, PX, PX)}
        assert expected.views.dtype == expected.anchors.dtype == torch.uint8


def test_anchors_are_the_images_and_donors_belong_to_the_batch(images):
    batches = batches_of(*images)
    ids = images[0]["id"].to_pylist()
    shown, with_donor = [], 0
    for batch in batches.epoch(0):
        assert torch.equal(batch.anchor_ids, batch.view_sources[:, 0])
        for image_id, anchor, view in zip(batch.anchor_ids.tolist(), batch.anchors, batch.views):
            row = images[0].slice(ids.index(image_id), 1)
            original = decode_image(LOCAL.read_bytes(row["uri"][0].as_py()), max_megapixels=1).pixels
            original = batches.preprocessing.resize_and_crop(original)
            assert torch.equal(anchor, original) and not torch.equal(view, original)
        donors = batch.view_sources[:, 1]
        following = batch.anchor_ids.roll(-1)
        assert torch.equal(donors[donors >= 0], following[donors >= 0])
        with_donor += int((donors >= 0).sum())
        shown += batch.anchor_ids.tolist()
    assert 0 < with_donor < len(shown) == len(set(shown)) == BATCH_SIZE * batches.num_steps
    assert not is_validation(np.array(shown), 0.25).any()


def test_views_depend_on_seed_and_epoch_only(images):
    def views(seed, epoch) -> dict[int, tuple]:
        batches = batches_of(*images, settings=settings_of(seed, {"batch_size": 2}))
        found = list(batches.epoch(epoch))
        torch.rand(3)  # the global generator has no effect
        return {int(i): view.numpy().tobytes() for b in found for i, view in zip(b.anchor_ids, b.views)}

    first = views(0, 0)
    assert views(0, 0) == first
    for other in (views(0, 1), views(1, 0)):
        assert list(other) != list(first)
        common = first.keys() & other.keys()
        assert len(common) > 5 and not any(other[i] == first[i] for i in common)


def test_loader_processes_have_no_effect(images):
    expected = list(batches_of(*images).epoch(0))
    found = list(batches_of(*images, settings=settings_of(num_loaders=1)).epoch(0))
    assert len(found) == len(expected) and all(map(same, found, expected))


def test_too_few_images_are_an_error(images):
    rows, manifest = images
    with pytest.raises(AttribError, match=r"[3-6] to train on \(optimiser\.batch_size needs 8\)"):
        batches_of(rows.slice(0, 6), manifest)
    with pytest.raises(AttribError, match=r"0 held out for validation \(1 is needed\)"):
        batches_of(rows, manifest, settings=settings_of(optimiser={"validation_share": 1e-9}))


@pytest.fixture(scope="module")
def damaged(folder, tmp_path_factory):
    """The same images, and three files that cannot be decoded."""
    images = {path.name: path.read_bytes() for path in folder.iterdir()}
    broken = dict(zip(BROKEN, (images["0.jpg"][:150], b"no image", b"")))
    return collection(images | broken, tmp_path_factory.mktemp("damaged"))


def test_an_image_that_cannot_be_decoded_is_an_empty_slot(damaged):
    rows, manifest = damaged
    batches = batches_of(rows, manifest)
    place = {key: i for i, key in enumerate(rows["key"].to_pylist())}
    good, bad = place["3.jpg"], place["text.jpg"]
    # Once as content and once as donor.
    batch = batches.make(np.array([bad, good, good]), np.array([good, bad, place["4.jpg"]]), 0)
    assert batch.anchor_ids.tolist() == [EMPTY_SLOT, batches.ids[good], batches.ids[good]]
    assert batch.view_sources[0].tolist() == [-1, -1] and not batch.views[0].any() and not batch.anchors[0].any()
    assert batch.view_sources[1].tolist() == [batches.ids[good], -1] and batch.views[1].any()
    # Without a donor the view is solo, for any kind drawn.
    alone = batches.make(np.array([good]), np.array([good]), 0)
    assert torch.equal(alone.views[0], batch.views[1]) and alone.view_sources[0, 1] == -1


def test_training_skips_broken_images(damaged):
    settings = settings_of(optimiser={"num_epochs": 1, "batch_size": 4})
    batches = batches_of(*damaged, settings=settings)
    student = student_of(model_of(settings, PX), settings)
    run = TrainRun(student, settings, torch.optim.AdamW(trained_groups(student, settings)), batches.num_steps, CPU)
    run.train(batches, on_epoch=lambda _: None)
    assert len(run.history) == 2 and np.isfinite(run.history[1]["loss"])
    ids = {int(i) for batch in batches.epoch(0) for i in batch.anchor_ids} | set(
        batches._validation.anchor_ids.tolist()
    )
    broken = {i for i, key in zip(batches.ids.tolist(), damaged[0]["key"].to_pylist()) if key in BROKEN}
    assert len(broken) == 3 and EMPTY_SLOT in ids and not broken & ids


def test_full_cache_has_no_effect(images, monkeypatch):
    expected = list(batches_of(*images).epoch(0))
    monkeypatch.setattr(pixel_batches, "CACHED_IMAGES", 3)
    batches = batches_of(*images)
    assert all(map(same, batches.epoch(0), expected)) and len(batches.cache) == 3


def test_criterion_compares_validation_views_with_all_images(images):
    settings = settings_of()
    batches, student = batches_of(*images), student_of(model_of(settings, PX), settings)
    found = batches.criterion(student)
    assert batches.criterion(student) == found  # the same views every time
    anchors, anchor_ids, views, sources = vars(batches._validation).values()
    held_out = set(batches.ids[batches.held_out].tolist())
    assert set(sources[:, 0].tolist()) == held_out and len(views) == 2 * len(held_out)
    assert set(sources[:, 1].tolist()) <= held_out | {-1}
    assert sorted(anchor_ids.tolist()) == sorted(batches.ids.tolist())
    with torch.no_grad():
        embedded = [student.embedding(student.encode(pixels, "real")) for pixels in (views, anchors)]
    assert found == pytest.approx(mean_reciprocal_rank(*embedded, sources, anchor_ids), abs=1e-6)
    assert 1 / NUM_IMAGES < found < 1


def test_fine_tuning_raises_the_criterion(images):
    settings = settings_of(optimiser={"num_epochs": 6, "patience_epochs": 6, "learning_rate": 0.01})
    batches, student = batches_of(*images, settings=settings), student_of(model_of(settings, PX), settings)
    run = TrainRun(student, settings, torch.optim.AdamW(trained_groups(student, settings)), batches.num_steps, CPU)
    run.train(batches, on_epoch=lambda _: None)
    assert run.history[-1]["loss"] < run.history[1]["loss"]
    assert max(row["criterion"] for row in run.history) > run.history[0]["criterion"]


# Two processes


def trained(folder, rank: int, num_workers: int) -> dict:
    """Return the batches of an epoch, the criterion, and the weights before and after training."""
    settings = settings_of()
    batches = batches_of(*listed(folder), rank, num_workers)
    student = student_of(model_of(settings, PX), settings)
    epoch = list(batches.epoch(0))
    found = {"batches": [vars(batch) for batch in epoch], "criterion": batches.criterion(student)}
    wrapped = parallel(student, settings, CPU) if num_workers > 1 else student
    run = TrainRun(
        student, settings, torch.optim.SGD(trained_groups(student, settings)), batches.num_steps, CPU, wrapped
    )
    before = copy.deepcopy(student.state_dict())
    after = {}
    # Not the best weights, which may be the first.
    run.train(batches, on_epoch=lambda run: after.update(run.state()["student"]))
    return found | {"before": before, "after": after, "history": run.history}


def trained_by_two(rank: int, images: str) -> dict:
    return trained(images, rank, 2)


@pytest.fixture(scope="module")
def workers(folder, gloo_pool) -> list[dict]:
    return gloo_pool.run(trained_by_two, str(folder))


def test_two_processes_learn_the_same_as_one(workers, folder):
    alone = trained(folder, 0, 1)
    for step, expected in enumerate(alone["batches"]):
        assert same(joined([TrainBatch(**worker["batches"][step]) for worker in workers]), TrainBatch(**expected))
    moved = 0
    for worker in workers:
        assert worker["criterion"] == pytest.approx(alone["criterion"], abs=1e-6)
        for name, expected in alone["after"].items():
            difference = expected - alone["before"][name]
            torch.testing.assert_close(worker["after"][name] - alone["before"][name], difference, rtol=1e-2, atol=1e-6)
            moved += bool(difference.any())
        for row, expected in zip(worker["history"], alone["history"], strict=True):
            assert row["criterion"] == pytest.approx(expected["criterion"], abs=0.02)
        for row, expected in zip(worker["history"][1:], alone["history"][1:]):
            assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert moved > 10
    assert all(torch.equal(workers[0]["after"][name], value) for name, value in workers[1]["after"].items())
