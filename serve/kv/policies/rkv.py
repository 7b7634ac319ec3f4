"""R-KV: attention of the last queries, less what other keys already say."""

# Legend: R rows, K key/value heads, G query heads of one, S slots (i, j: of two keys), D head
# width, N = R * K.

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from common.config import within
from serve.kv.attention import LARGEST
from serve.kv.policies.snapkv import RecentQueriesPolicy
from serve.kv.policy import register
from serve.kv.view import CacheView


def redundancy(k_RKSD: Tensor, positions_RKS: Tensor, threshold: float) -> Tensor:
    """Return how alike each key is to the others of its head.

    The mean over all keys i of the cosine with key j, where i's most recent near-duplicate (cosine
    above the threshold) counts 0, then a softmax over j. So of duplicates the newest is spared.

    Args:
        k_RKSD: Keys, zero in unfilled slots.
        positions_RKS: Original positions, -1 in unfilled slots.
        threshold: Cosine above which two keys are duplicates.

    Returns:
        (R, K, S), float32 at least, sums to 1 over the filled slots; zero in the others.
    """
    k_RKSD = k_RKSD.to(torch.promote_types(k_RKSD.dtype, torch.float32))
    k_NSD, positions_NS = F.normalize(k_RKSD, dim=-1).flatten(0, 1), positions_RKS.flatten(0, 1)
    # One matrix per head is quadratic in the length: few at a time.
    part = max(1, LARGEST // max(1, k_NSD.shape[1] ** 2))
    pairs = zip(k_NSD.split(part), positions_NS.split(part), strict=True)
    return torch.cat([_redundancy(k, pos, threshold) for k, pos in pairs]).view(positions_RKS.shape)


def _redundancy(k_NSD: Tensor, positions_NS: Tensor, threshold: float) -> Tensor:
    cosine_Nij = k_NSD @ k_NSD.mT
    cosine_Nij.diagonal(dim1=1, dim2=2).zero_()
    is_twin = cosine_Nij > threshold
    newest_Ni1 = positions_NS[:, None].masked_fill(~is_twin, -1).argmax(-1, keepdim=True)
    spared = torch.zeros_like(is_twin).scatter_(2, newest_Ni1, True) & is_twin
    is_filled = positions_NS >= 0
    mean_Nj = cosine_Nij.masked_fill_(spared, 0).sum(1) / is_filled.sum(1, keepdim=True)
    return mean_Nj.masked_fill(~is_filled, -torch.inf).softmax(-1)


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class RKVPolicy(RecentQueriesPolicy):
    """Keep keys that the last queries attend to and that no later key repeats.

    Attributes:
        attention: Weight of the attention; redundancy has the rest.
        threshold: Cosine above which two keys are duplicates.

    Source:
        arXiv 2505.24133 with the defaults that arXiv 2604.04921 compares with; deviation: a key
        without duplicates spares nothing, where the released code spares its first slot.
    """

    queries: int = 8
    kernel: int = 7
    pooling: Literal["mean", "max"] = "max"
    attention: float = 0.1
    threshold: float = 0.5
    name: ClassVar[str] = "rkv"

    def __post_init__(self) -> None:
        RecentQueriesPolicy.__post_init__(self)
        within("kv.attention", self.attention, 0.0, 1.0)
        within("kv.threshold", self.threshold, -1.0, 1.0)

    def score(self, view: CacheView) -> Tensor:
        """Return attention less redundancy (R, K, S), float32 at least; 1 for the last queries."""
        weights_RKGS, is_past = self.past_attention(view, largest_of_group=True)
        repeated_RKS = redundancy(view.keys(), view.slot_positions(), self.threshold)
        mixed = self.attention * weights_RKGS[:, :, 0] - (1 - self.attention) * repeated_RKS
        return mixed.masked_fill(~is_past, 1)
