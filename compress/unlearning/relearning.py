"""Relearning: how many steps of fine-tuning bring half of a forgotten class back.

A class that a few steps restore was hidden, not erased; a model trained without it is the measure.
"""

# Legend: B samples of a batch.

import copy
from collections.abc import Sequence
from typing import Any

import torch

from compress.unlearning.measure import answers, sample_losses
from compress.unlearning.samples import Samples

BATCH_IMAGES, BATCH_TOKENS = 64, 2048
CHECK_TOKENS = 2048
"""Tokens of the class that are looked at after every step."""


def relearning_steps(
    dense: Any,
    model: Any,
    train: Samples,
    held: Samples,
    *,
    limit: int,
    lr: float = 1e-3,
    seed: int = 0,
) -> int | None:
    """Return after how many steps a model knows half as much of the class again as it forgot.

    Args:
        dense: The model before.
        model: The model that has forgotten; not modified.
        train: What is trained on, see ``relearning_curve``.
        held: Held-out samples of the class.
        limit: Steps after which it is given up.
        lr: Learning rate.
        seed: Of the batches.

    Returns:
        The number of steps, 0 if nothing was forgotten, None if ``limit`` steps do not do.
    """
    held = held.first(checked(held))
    known, left = (answers(each, held).knowledge for each in (dense, model))
    goal = (known + left) / 2
    curve = relearning_curve(
        model, train, held, start=left, goal=goal, limit=limit, lr=lr, seed=seed
    )
    return steps_to(goal, curve)


def relearning_curve(
    model: Any,
    train: Samples,
    held: Samples,
    *,
    start: float,
    goal: float,
    limit: int,
    lr: float,
    seed: int,
) -> tuple[float, ...]:
    """Return what a model knows of the class after 0, 1, 2 ... steps of fine-tuning.

    Args:
        model: The model that has forgotten; not modified.
        train: What is trained on, with AdamW: retained data, or a few samples of the class.
        held: Held-out samples of the class.
        start: What the model knows of them now, see ``Answers.knowledge``.
        goal: The curve ends where it is reached.
        limit: Steps at most.
        lr: Learning rate.
        seed: Of the batches.
    """
    if start >= goal:
        return (start,)
    tuned = copy.deepcopy(model).requires_grad_(True)
    device = next(tuned.parameters()).device
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    is_text = train.bytes_per_token is not None
    size = max(1, BATCH_TOKENS // train.inputs.shape[1]) if is_text else BATCH_IMAGES
    curve = [start]
    for _ in range(limit):
        index_B = torch.randint(len(train), (size,), generator=generator)
        logits = tuned(train.inputs[index_B].to(device))
        optimizer.zero_grad()
        sample_losses(logits, train.targets[index_B].to(device)).mean().backward()
        optimizer.step()
        curve.append(answers(tuned, held).knowledge)
        if curve[-1] >= goal:
            break
    return tuple(curve)


def steps_to(goal: float, curve: Sequence[float]) -> int | None:
    """Return at which step a curve reaches its goal; None where it does not."""
    return next((step for step, value in enumerate(curve) if value >= goal), None)


def checked(held: Samples) -> int:
    """Return how many held-out samples are looked at after every step: of text a few."""
    is_text = held.bytes_per_token is not None
    return max(1, CHECK_TOKENS // held.inputs.shape[1]) if is_text else len(held)
