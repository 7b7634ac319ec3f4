"""Where attacks start: at random, where attention logits swing, from shorter sequences."""

# Shape letters: B starts, T token, C width, D head width, H heads.

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from common.models.layers import Layer
from common.models.rope import rotate, rotation
from solvers.bounds.attack_ascent import Found


def random_starts(
    width: int, count: int, tokens: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return inputs and directions (B, T, C), float64, with tokens of norm about 1."""
    shape = (2, count, tokens, width)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64) / math.sqrt(width)
    return noise[0], noise[1]


def lengthened(found: Found, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return every sequence at twice its length: each token repeated, and random tokens before it.

    Repeating keeps the shares of the softmax (content heads); prepending keeps every distance
    (positional heads).
    """
    _, tokens, width = found.x.shape
    x_BTC, direction_BTC = random_starts(width, len(found.x), tokens, generator)
    repeated = found.x.repeat_interleave(2, 1), found.direction.repeat_interleave(2, 1)
    before = torch.cat((0.3 * x_BTC, found.x), 1), torch.cat((direction_BTC, found.direction), 1)
    return torch.cat((repeated[0], before[0])), torch.cat((repeated[1], before[1]))


@torch.no_grad()
def structured_starts(layer: Layer, tokens: int) -> list[tuple[Tensor, Tensor]]:
    """Return one pair (sequence, direction) per content head that makes its logits most sensitive.

    Keys lie along the direction that the last token's query change sees, half of them on each
    side, so that the attention weights swing between two far values.

    Args:
        layer: Float64 layer with content heads.
        tokens: Length T.

    Returns:
        Tuples of a sequence (T, C) and a change (T, C), both with tokens of norm at most 1.
    """
    attention, config = layer.attention, layer.layer
    if attention.query is None or attention.key is None:
        return []
    dim = config.head_dim
    q_HDC = attention.query.weight.detach().unflatten(0, (-1, dim))
    k_HDC = attention.key.weight.detach().unflatten(0, (-1, dim))
    k_HDC = k_HDC.repeat_interleave(config.group, 0)
    v_HDC = attention.value.weight.detach().unflatten(0, (-1, dim))
    v_HDC = v_HDC.repeat_interleave(config.group, 0)
    positions = torch.arange(tokens)[None]
    angles = rotation(positions, attention.inverse_frequency, q_HDC.dtype)
    signs_T = torch.where(torch.arange(tokens) % 2 == 0, 1.0, -1.0).to(q_HDC.dtype)
    starts = []
    for q_DC, k_DC, v_DC in zip(q_HDC, k_HDC, v_HDC[: len(q_HDC)], strict=True):
        right_CD = torch.linalg.svd(q_DC, full_matrices=False).Vh[0]
        query_TD = (q_DC @ right_CD).expand(1, 1, tokens, dim)
        # Undo each key's rotation and apply the last query's: all logits then align.
        last = rotate(query_TD, angles[:, :, :, -1:].expand_as(angles))
        seen_TC = rotate(last, torch.stack((angles[0], -angles[1])))[0, 0] @ k_DC
        seen_TC = F.normalize(seen_TC, dim=-1)
        seen_TC += 0.3 * F.normalize(v_DC.sum(0), dim=0)
        sequence_TC = signs_T[:, None] * F.normalize(seen_TC, dim=-1)
        change_TC = torch.zeros_like(sequence_TC)
        sequence_TC[-1], change_TC[-1] = 0.0, right_CD
        starts.append((sequence_TC, change_TC))
    return starts


def stacked_starts(
    layers: list[Layer], count: int, tokens: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return ``count`` structured starts (B, T, C) of several layers, with a little noise.

    Returns:
        Inputs and directions; empty when no layer has content heads.
    """
    starts = [start for layer in layers for start in structured_starts(layer, tokens)]
    if not starts:
        return torch.zeros(0, tokens, 1), torch.zeros(0, tokens, 1)
    # Few starts are spread over all layers, many go round.
    spread = max(1, len(starts) // count)
    chosen = [starts[i * spread % len(starts)] for i in range(count)]
    width = chosen[0][0].shape[-1]
    x_BTC, direction_BTC = random_starts(width, len(chosen), tokens, generator)
    # The first round keeps the published start, repetitions get more noise.
    sizes = [0.0 if i < len(starts) else 0.3 for i in range(len(chosen))]
    size_B11 = torch.tensor(sizes, dtype=torch.float64)[:, None, None]
    x_BTC = torch.stack([x for x, _ in chosen]) + size_B11 * x_BTC
    return x_BTC, torch.stack([change for _, change in chosen]) + 0.01 * direction_BTC


def mixed_starts(
    layers: list[Layer], width: int, count: int, tokens: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return structured starts of the layers for half of the places, as far as there are any."""
    x_BTC, direction_BTC = random_starts(width, count, tokens, generator)
    some = stacked_starts(layers, -(-count // 2), tokens, generator)
    taken = len(some[0])
    if not taken:
        return x_BTC, direction_BTC
    return torch.cat((some[0], x_BTC[taken:])), torch.cat((some[1], direction_BTC[taken:]))
