"""Two workers train the extractor as one process does."""

import pytest
import torch
from support.extractor import settings, trained

WORLD_SIZE = 2


def trained_by_two(rank: int) -> dict:
    return trained(settings(num_workers=WORLD_SIZE), rank, WORLD_SIZE).state()


def test_two_workers_train_like_one(gloo_pool, one_thread):
    states = gloo_pool.run(trained_by_two)
    alone = trained(settings()).state()
    for name, value in alone["network"].items():
        assert torch.equal(states[0]["network"][name], states[1]["network"][name]), name
        torch.testing.assert_close(states[0]["network"][name], value, rtol=2e-2, atol=2e-4)
    losses = [row["loss"] for row in alone["history"][1:]]
    assert [row["loss"] for row in states[0]["history"][1:]] == pytest.approx(losses, rel=1e-3)
