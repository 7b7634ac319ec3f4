"""Relearning: how many steps of fine-tuning bring half of a forgotten class back.

A class that a few steps restore was hidden, not erased; a model trained without it is the measure.
"""

# Legend: B samples of a batch.

import copy
from typing import Any

import torch

from compress.unlearning.measure import knowledge, sample_losses
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
        train: What is trained on, with AdamW: retained data, or a few samples of the class.
        held: Held-out samples of the class.
        limit: Steps after which it is given up.
        lr: Learning rate.
        seed: Of the batches.

    Returns:
        The number of steps, 0 if nothing was forgotten, None if ``limit`` steps do not do.
    """
    if held.bytes_per_token is not None:
        held = held.first(max(1, CHECK_TOKENS // held.inputs.shape[1]))
    known, left = knowledge(dense, held), knowledge(model, held)
    if left >= known:
        return 0
    goal = (known + left) / 2
    tuned = copy.deepcopy(model).requires_grad_(True)
    device = next(tuned.parameters()).device
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    is_text = train.bytes_per_token is not None
    size = max(1, BATCH_TOKENS // train.inputs.shape[1]) if is_text else BATCH_IMAGES
    for step in range(1, limit + 1):
        index_B = torch.randint(len(train), (size,), generator=generator)
        logits = tuned(train.inputs[index_B].to(device))
        optimizer.zero_grad()
        sample_losses(logits, train.targets[index_B].to(device)).mean().backward()
        optimizer.step()
        if knowledge(tuned, held) >= goal:
            return step
    return None
