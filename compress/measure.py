"""What pruning does on text and on the clock: bits per byte, deviations, speed.

Everything here is a measurement; bounds are in ``deviation``.
"""

# Legend: B sequences, T tokens, C width.

import copy
import math
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BATCH_TOKENS = 8192
SPEED_TOKENS = 2048
SPEED_ROUNDS = 15


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Measured:
    """Deviations seen on a text.

    Attributes:
        deltas: Per block, largest l2 change of its output on the pruned trajectory.
        logits: Largest RMS change of a token's logits over the vocabulary.
        top1_agreement: Share of positions whose most likely token is unchanged.
        margins_M: Dense logit of the first minus that of the second token, per position.
    """

    deltas: tuple[float, ...]
    logits: float
    top1_agreement: float
    margins_M: Tensor


@torch.no_grad()
def bits_per_byte(model: Any, windows_BT: Tensor, bytes_per_token: float) -> float:
    """Return the mean cross-entropy of next tokens in bits per byte of text.

    Args:
        model: Transformer.
        windows_BT: Token ids, inputs and the final target (sequences, length + 1).
        bytes_per_token: Of the corpus.
    """
    device = next(model.parameters()).device
    total = 0.0
    for part in _batches(windows_BT):
        part = part.to(device)
        logits = model(part[:, :-1]).float()
        loss = F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum")
        total += float(loss)
    targets = windows_BT.shape[0] * (windows_BT.shape[1] - 1)
    return total / targets / math.log(2) / bytes_per_token


@torch.no_grad()
def measure_deviation(dense: Any, pruned: Any, tokens_BT: Tensor) -> Measured:
    """Return the largest deviations between two networks on the same text.

    Both run in float64, so that equal networks give exactly 0 and rounding does not count.

    Args:
        dense: Transformer before pruning.
        pruned: After pruning; attention, embedding and head are the same.
        tokens_BT: Token ids.
    """
    # Only tensors are copied: the float64 twins live for the duration of this call.
    dense, pruned = copy.deepcopy(dense).double(), copy.deepcopy(pruned).double()
    device = next(dense.parameters()).device
    deltas = [0.0] * (2 * len(dense.layers))
    logits, same, margins = 0.0, 0, []
    for part in _batches(tokens_BT):
        x_BTC = y_BTC = dense.embed(part.to(device))
        for index, (old, new) in enumerate(zip(dense.layers, pruned.layers, strict=True)):
            x_BTC = old(x_BTC)
            y_BTC = new.attend_block(y_BTC)
            same_BTC, y_BTC = old.mlp_block(y_BTC), new.mlp_block(y_BTC)
            delta = float((same_BTC - y_BTC).norm(dim=-1).max())
            deltas[2 * index + 1] = max(deltas[2 * index + 1], delta)
        old_BTV, new_BTV = dense.logits(x_BTC), pruned.logits(y_BTC)
        logits = max(logits, float((old_BTV - new_BTV).square().mean(-1).sqrt().max()))
        same += int((old_BTV.argmax(-1) == new_BTV.argmax(-1)).sum())
        top_BT2 = old_BTV.topk(2, dim=-1).values
        margins.append((top_BT2[..., 0] - top_BT2[..., 1]).flatten())
    return Measured(
        deltas=tuple(deltas),
        logits=logits,
        top1_agreement=same / tokens_BT.numel(),
        margins_M=torch.cat(margins),
    )


@torch.no_grad()
def mlp_speedup(dense: Any, pruned: Any, *, rounds: int = SPEED_ROUNDS) -> float:
    """Return how many times faster all MLPs together run after pruning.

    Args:
        dense: Transformer before pruning.
        pruned: After pruning.
        rounds: Pairs of measurements; the result is the median of the paired ratios.
    """
    weight = dense.embedding.weight
    x_TC = torch.zeros(SPEED_TOKENS, weight.shape[1], dtype=weight.dtype, device=weight.device)
    pairs = [(_mlp_seconds(dense, x_TC), _mlp_seconds(pruned, x_TC)) for _ in range(rounds + 2)]
    return statistics.median(old / new for old, new in pairs[2:])


def _mlp_seconds(model: Any, x_TC: Tensor) -> float:
    _wait(x_TC)
    began = time.perf_counter()
    for layer in model.layers:
        layer.mlp(x_TC)
    _wait(x_TC)
    return time.perf_counter() - began


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def _batches(tokens_BT: Tensor) -> tuple[Tensor, ...]:
    return tokens_BT.split(max(1, BATCH_TOKENS // tokens_BT.shape[1]))
