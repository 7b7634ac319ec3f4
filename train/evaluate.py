"""Validation figures of a language model: loss, bits per byte, next-token accuracy."""

# Legend: N windows, B batch, T token position, V vocabulary.

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Protocol of the reference accuracy: overlapping windows that start at 0, 1, 2, ...
REFERENCE_WINDOWS = 20 * 64


def next_token_loss(model: nn.Module, batch_BT: Tensor) -> Tensor:
    """Return the mean loss (nats per token) of a batch (B, T + 1) of inputs and next tokens."""
    return F.cross_entropy(model(batch_BT[:, :-1]).float().flatten(0, 1), batch_BT[:, 1:].flatten())


def loss_and_hits(model: nn.Module, batch_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean loss (nats per token) and the share of right top-1 predictions.

    Args:
        model: Tokens (B, T) to logits (B, T, V).
        batch_BT: Ids (B, T + 1): inputs and their next tokens.
    """
    logits_BTV = model(batch_BT[:, :-1]).float()
    targets_BT = batch_BT[:, 1:]
    loss = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())
    hits = (logits_BTV.argmax(dim=-1) == targets_BT).float().mean()
    return loss, hits


@torch.no_grad()
def evaluate(
    model: nn.Module, windows_NT: Tensor, batch_size: int, *, autocast: bool = False
) -> tuple[float, float]:
    """Return loss (nats per token) and top-1 accuracy over windows.

    Args:
        model: Tokens (B, T) to logits (B, T, V); its mode is left alone.
        windows_NT: Ids (N, T + 1).
        batch_size: Windows per forward pass.
        autocast: Run the forward pass in bfloat16.
    """
    device = next(model.parameters()).device
    precision: AbstractContextManager = nullcontext()
    if autocast:
        precision = torch.autocast(device.type, dtype=torch.bfloat16)
    nats = hits = 0.0
    with precision:
        for batch_BT in windows_NT.split(batch_size):
            loss, share = loss_and_hits(model, batch_BT.to(device))
            nats += loss.item() * len(batch_BT)
            hits += share.item() * len(batch_BT)
    return nats / len(windows_NT), hits / len(windows_NT)


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
