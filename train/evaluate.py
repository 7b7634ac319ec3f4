"""Validation figures of a model: loss, bits per byte, share of right answers."""

# Legend: N examples (windows or images), B batch, T token position, V classes or vocabulary.

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Protocol of the reference accuracy: overlapping windows that start at 0, 1, 2, ...
REFERENCE_WINDOWS = 20 * 64


def inputs_and_targets(windows_NT: Tensor) -> tuple[Tensor, Tensor]:
    """Return inputs (N, T) and their next tokens (N, T) of windows (N, T + 1), as views."""
    return windows_NT[:, :-1], windows_NT[:, 1:]


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy (nats) of logits (..., V) for targets (...), in float32."""
    return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten())


def loss_and_hits(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean loss (nats) and the share of right top-1 predictions.

    Args:
        logits: Floating (..., V).
        targets: Right answers (...), int64.
    """
    logits = logits.float()
    return mean_loss(logits, targets), (logits.argmax(dim=-1) == targets).float().mean()


@torch.no_grad()
def evaluate(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    batch_size: int,
    *,
    autocast: bool = False,
) -> tuple[float, float]:
    """Return the mean loss (nats per target) and the share of right answers.

    Args:
        model: Inputs (B, ...) to logits (..., V); its mode is left alone.
        inputs: Tokens (N, T) or pixels (N, I).
        targets: Next tokens (N, T) or labels (N,).
        batch_size: Examples per forward pass.
        autocast: Run the forward pass in bfloat16.
    """
    device = next(model.parameters()).device
    precision: AbstractContextManager = nullcontext()
    if autocast:
        precision = torch.autocast(device.type, dtype=torch.bfloat16)
    nats = hits = 0.0
    with precision:
        for start in range(0, len(inputs), batch_size):
            batch = slice(start, start + batch_size)
            expected = targets[batch].to(device)
            loss, share = loss_and_hits(model(inputs[batch].to(device)), expected)
            nats += loss.item() * len(expected)
            hits += share.item() * len(expected)
    return nats / len(inputs), hits / len(inputs)


def reference_windows(ids: Tensor, context: int) -> Tensor:
    """Return the windows (N, T + 1) of the published accuracy: starts 0, 1, ..., at most 1,279.

    Args:
        ids: Validation ids (at least ``context + 1``), one-dimensional.
        context: Inputs per window (T).

    Source:
        arXiv 2507.13338's trainer at batch 64: twenty unshuffled batches of overlapping windows,
        so that only the first characters of the split count.
    """
    return ids.unfold(0, context + 1, 1)[:REFERENCE_WINDOWS]


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """Convert a loss in nats per token to bits per byte, comparable between tokenizers."""
    return nats_per_token / math.log(2) / bytes_per_token
