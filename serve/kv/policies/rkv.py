"""R-KV: attention of the last queries, less what other keys already say."""

# Legend: R rows, K key/value heads, G query heads of one, S slots (i, j: of two keys), D head
# width, N = R * K.

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from common.config import within
from serve.kv.attention import largest_temporary
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
    # In order of position, unfilled slots first: the newest twin is the one of largest index.
    order_RKS = positions_RKS.argsort(dim=-1, stable=True)
    k_RKSD = k_RKSD.to(torch.promote_types(k_RKSD.dtype, torch.float32))
    k_RKSD = F.normalize(k_RKSD, dim=-1).gather(2, order_RKS[..., None].expand_as(k_RKSD))
    twin_RKS, cosine_RKS = _newest_twins(k_RKSD, threshold)
    # All cosines with one key are one product with the sum of all, its own taken out.
    total_RKS = (k_RKSD @ k_RKSD.sum(2)[..., None])[..., 0] - k_RKSD.square().sum(-1)
    total_RKS.scatter_add_(2, twin_RKS, -cosine_RKS)
    total_RKS = torch.empty_like(total_RKS).scatter_(2, order_RKS, total_RKS)
    is_filled = positions_RKS >= 0
    mean_RKS = total_RKS / is_filled.sum(2, keepdim=True)
    return mean_RKS.masked_fill(~is_filled, -torch.inf).softmax(-1)


def _newest_twins(k_RKSD: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Return each unit key's last near-duplicate and their cosine, 0 where there is none."""
    k_NSD = k_RKSD.flatten(0, 1)
    slots = k_NSD.shape[1]
    index_S = torch.arange(slots, device=k_NSD.device, dtype=k_NSD.dtype)
    most = largest_temporary(k_NSD.device)
    heads, step = max(1, most // slots**2), max(1, min(slots, most // slots))
    twins, cosines = [], []
    # All pairs, a few rows of the matrix at a time.
    for part_NSD in k_NSD.split(heads):
        for start in range(0, slots, step):
            cosine_Nij = part_NSD[:, start : start + step] @ part_NSD.mT
            cosine_Nij.diagonal(offset=start, dim1=1, dim2=2).fill_(-torch.inf)
            newest_Ni = torch.where(cosine_Nij > threshold, index_S, -1).amax(-1)
            twin_Ni = newest_Ni.clamp(min=0).long()
            value_Ni = cosine_Nij.gather(2, twin_Ni[..., None])[..., 0]
            twins.append(twin_Ni.flatten())
            cosines.append(value_Ni.masked_fill(newest_Ni < 0, 0).flatten())
    return torch.cat(twins).view(k_RKSD.shape[:3]), torch.cat(cosines).view(k_RKSD.shape[:3])


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
