"""Random eviction: the floor that every other policy has to beat."""

# Legend: R rows, K key/value heads, S slots.

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from serve.kv.policy import Policy, register
from serve.kv.view import CacheView

# Odd constants of splitmix64 (public domain), as signed 64-bit integers.
STEP = 0x9E3779B97F4A7C15 - 2**64
MIX = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))


def mix_bits(x: Tensor) -> Tensor:
    """Hash 64-bit integers elementwise (splitmix64's finalizer), int64 with wrap-around."""
    x = x + STEP
    for shift, factor in MIX:
        x = (x ^ _shift_right(x, shift)) * factor
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift in zeros; torch's own shift repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class RandomPolicy(Policy):
    """Keep a uniformly random set of tokens.

    A token's score is a hash of the request's seed, layer, head and position: the same in any
    batch and any slot, and for as long as the token lives.
    """

    name: ClassVar[str] = "random"
    scores_positional: ClassVar[bool] = True

    def score(self, view: CacheView) -> Tensor:
        """Return uniform numbers in [0, 1) (R, K, S), float64."""
        pos_RKS = view.slot_positions()
        layer_R = view.rows_of(torch.tensor(view.layers, device=pos_RKS.device))
        head_K1 = torch.arange(pos_RKS.shape[1], device=pos_RKS.device)[:, None]
        hash_R = mix_bits(mix_bits(view.seeds_R) ^ layer_R)
        hash_RK1 = mix_bits(hash_R[:, None, None] ^ head_K1)
        return _shift_right(mix_bits(hash_RK1 ^ pos_RKS), 11).double() / 2**53
