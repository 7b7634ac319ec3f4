"""Key difference: keep what is least like the others."""

# Legend: R rows, K key/value heads, S slots, D head width.

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from serve.kv.policy import Policy, register
from serve.kv.view import CacheView

TINY = 1e-12  # norms below count as this


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class KeyDiffPolicy(Policy):
    """Keep the keys least similar to the mean of all normalised cached keys.

    Source:
        arXiv 2504.15364; deviation: once per compaction instead of per block of the prompt.
    """

    name: ClassVar[str] = "keydiff"

    def score(self, view: CacheView) -> Tensor:
        """Return minus the cosine with the mean direction (R, K, S), float32 at least."""
        k_RKSD = view.keys()
        k_RKSD = k_RKSD.to(torch.promote_types(k_RKSD.dtype, torch.float32))
        # Norms are divided out of the products: normalised keys would be one more copy of all.
        scale_RKS = 1 / k_RKSD.norm(dim=-1).clamp(min=TINY)
        # Unfilled slots are zero and add nothing; the cosine does not depend on the length.
        anchor_RK1D = F.normalize(scale_RKS[:, :, None] @ k_RKSD, dim=-1)
        return -scale_RKS * (k_RKSD @ anchor_RK1D.mT)[..., 0]
