"""The learning rate of a training step."""

import math


def rate(step: int, num_steps: int, warmup_share: float) -> float:
    """Share of the learning rate: linear warm-up, then half a cosine to zero."""
    warmup = warmup_share * num_steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return (1 + math.cos(math.pi * (step - warmup) / max(1.0, num_steps - warmup))) / 2
