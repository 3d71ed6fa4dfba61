"""Batches of precomputed inputs: one global batch for any number of workers, validation images not trained on."""

import numpy as np
import pytest
import torch

from attrib.common.errors import AttribError
from attrib.data.ids import image_ids
from attrib.train.batches import InputBatches, Inputs, is_validation
from attrib.train.loop import mean_reciprocal_rank
from attrib.train.objective import EMPTY_SLOT, TrainBatch
from attrib.train.settings import OptimiserSettings

NUM_IMAGES, VIEWS_EACH, DIM = 60, 4, 5
SHARE = 0.2
OPTIMISER = OptimiserSettings(batch_size=8, validation_share=SHARE)


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    """Values of an anchor are its position and values of a view its row, so that a batch shows its origin."""
    ids = np.sort(image_ids("c", [f"{i}.jpg" for i in range(NUM_IMAGES)]))
    content = np.repeat(np.arange(NUM_IMAGES), VIEWS_EACH)
    donor = np.random.default_rng(0).integers(0, NUM_IMAGES, len(content))
    donors = np.where((donor == content) | (np.arange(len(content)) % VIEWS_EACH == 0), -1, ids[donor])
    return Inputs(
        torch.arange(NUM_IMAGES).half()[:, None].expand(-1, DIM).contiguous(),
        torch.from_numpy(ids),
        torch.arange(len(content)).half()[:, None].expand(-1, DIM).contiguous(),
        torch.from_numpy(np.stack([ids[content], donors], axis=1)),
    )


def batches_of(inputs, rank=0, num_workers=1, seed=0, **changes) -> InputBatches:
    return InputBatches(inputs, OPTIMISER.model_copy(update=changes), seed, rank, num_workers)


def anchors_of(batches: list[TrainBatch]) -> list[tuple]:
    """Return (id, inputs) of every anchor that is not ignored, ordered by id."""
    return sorted(
        (int(image_id), *anchor.tolist())
        for batch in batches
        for image_id, anchor in zip(batch.anchor_ids, batch.anchors)
        if image_id != EMPTY_SLOT
    )


@pytest.mark.parametrize("num_workers", [2, 4])
@pytest.mark.parametrize("epoch", [0, 3])
def test_joined_batches_of_workers_equal_the_batch_of_one(num_workers, epoch, inputs):
    alone = list(batches_of(inputs).epoch(epoch))
    workers = [list(batches_of(inputs, rank, num_workers).epoch(epoch)) for rank in range(num_workers)]
    assert len(alone) == batches_of(inputs).num_steps > 10
    for expected, *parts in zip(alone, *workers, strict=True):
        assert torch.equal(torch.cat([part.views for part in parts]), expected.views)
        assert torch.equal(torch.cat([part.view_sources for part in parts]), expected.view_sources)
        assert anchors_of(parts) == anchors_of([expected])
        # Collectives need the same shapes on every worker.
        assert {(part.views.shape, part.anchors.shape) for part in parts} == {
            ((8 // num_workers, DIM), (16 // num_workers, DIM))
        }


def test_inputs_belong_to_their_ids(inputs):
    place = {int(image_id): i for i, image_id in enumerate(inputs.anchor_ids)}
    for batch in batches_of(inputs).epoch(0):
        assert batch.anchors.dtype == batch.views.dtype == torch.float32
        for view, sources in zip(batch.views, batch.view_sources):
            assert torch.equal(sources, inputs.view_sources[int(view[0])])
        used = batch.anchor_ids != EMPTY_SLOT
        assert batch.anchors[used, 0].tolist() == [place[int(i)] for i in batch.anchor_ids[used]]
        # The anchors are exactly the sources of the views.
        assert set(batch.anchor_ids.tolist()) == set(batch.view_sources.flatten().tolist())


def test_a_source_without_features_is_an_empty_slot(inputs):
    """For example a paired source that could not be decoded."""
    sources = inputs.view_sources.clone()
    sources[:, 1] = torch.tensor([3, 2**62, int(inputs.anchor_ids.max()) + 1, -1]).repeat(NUM_IMAGES)
    unknown = batches_of(Inputs(inputs.anchors, inputs.anchor_ids, inputs.views, sources), validation_share=0.01)
    for batch in unknown.epoch(0):
        assert torch.equal(batch.anchor_ids[:8], batch.view_sources[:, 0])
        assert (batch.anchor_ids[8:] == EMPTY_SLOT).all()


def test_validation_images_are_never_trained_on(inputs):
    batches = batches_of(inputs)
    held_out = set(inputs.anchor_ids.numpy()[is_validation(inputs.anchor_ids.numpy(), SHARE)].tolist())
    assert 3 < len(held_out) < 30
    for epoch in range(3):
        seen = [torch.cat([b.anchor_ids, b.view_sources.flatten()]) for b in batches.epoch(epoch)]
        assert not held_out & set(torch.cat(seen).tolist())
    trained, validated = (inputs.view_sources[rows] for rows in (batches.training_rows, batches.validation_rows))
    assert set(validated[:, 0].tolist()) == held_out
    # Unused: views of training images with a validation image as donor.
    unused = [row for row in inputs.view_sources.tolist() if row[0] not in held_out and row[1] in held_out]
    assert unused and len(trained) + len(validated) + len(unused) == len(inputs.view_sources)


class Recording(torch.nn.Linear):
    """A student that records its inputs."""

    def __init__(self):
        super().__init__(DIM, 3)
        self.shown = {}

    def encode(self, rows, domain):
        self.shown[domain] = rows
        return self(rows)

    def embedding(self, outputs):
        return outputs


def test_criterion_compares_validation_views_with_all_anchors(inputs):
    batches, student = batches_of(inputs), Recording()
    inputs = Inputs(
        torch.randn(inputs.anchors.shape), inputs.anchor_ids, torch.randn(inputs.views.shape), inputs.view_sources
    )
    batches.inputs = inputs
    found = batches.criterion(student)
    held_out = np.flatnonzero(is_validation(inputs.view_sources[:, 0].numpy(), SHARE))
    assert torch.equal(student.shown["real"], inputs.anchors)
    assert torch.equal(student.shown["synthetic"], inputs.views[held_out])
    with torch.no_grad():
        expected = mean_reciprocal_rank(
            student(inputs.views[held_out]), student(inputs.anchors), inputs.view_sources[held_out], inputs.anchor_ids
        )
    assert found == expected and 0 < found < 1


def test_an_epoch_uses_each_view_at_most_once_in_a_new_order(inputs):
    def rows(seed, epoch) -> list[int]:
        return [int(view) for batch in batches_of(inputs, seed=seed).epoch(epoch) for view in batch.views[:, 0]]

    first = rows(0, 0)
    torch.manual_seed(9)  # the global generator has no effect
    assert rows(0, 0) == first and len(set(first)) == len(first) == 8 * batches_of(inputs).num_steps
    assert rows(0, 1) != first and rows(1, 0) != first
    assert set(first) <= set(batches_of(inputs).training_rows.tolist())
    assert len(batches_of(inputs).training_rows) - len(first) < 8
    # Views of an incomplete batch in one epoch are used in another.
    assert {row for epoch in range(8) for row in rows(0, epoch)} == set(batches_of(inputs).training_rows.tolist())


def test_validation_images_are_a_share_chosen_by_id():
    ids = image_ids("c", [str(i) for i in range(20_000)])
    previous = np.zeros(len(ids), bool)
    for share in (1e-6, 0.1, 0.5, 0.999999):
        held_out = is_validation(ids, share)
        assert abs(held_out.mean() - share) < 0.01 and (held_out | ~previous).all()
        previous = held_out
    assert np.array_equal(is_validation(ids[::-1], 0.1)[::-1], is_validation(ids, 0.1))
    assert np.array_equal(is_validation(ids.reshape(-1, 2), 0.1).ravel(), is_validation(ids, 0.1))


def test_invalid_batch_sizes_are_an_error(inputs):
    num = len(batches_of(inputs).training_rows)
    assert batches_of(inputs, batch_size=num).num_steps == 1
    with pytest.raises(AttribError, match=rf"{num} views to train on are too few for optimiser\.batch_size {num + 1}"):
        batches_of(inputs, batch_size=num + 1)
    with pytest.raises(AttribError, match=r"no image is held out for validation; raise optimiser\.validation_share"):
        batches_of(inputs, validation_share=1e-9)
