"""Key norm: short keys tend to receive much attention."""

# Legend: R rows, K key/value heads, S slots.

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from serve.kv.policy import Policy, register
from serve.kv.view import CacheView


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class KnormPolicy(Policy):
    """Keep the keys with the smallest norm.

    Source:
        arXiv 2406.11430; deviation: none.
    """

    name: ClassVar[str] = "knorm"

    def score(self, view: CacheView) -> Tensor:
        """Return -|k| (R, K, S), float32 at least."""
        k_RKSD = view.keys()
        return -k_RKSD.to(torch.promote_types(k_RKSD.dtype, torch.float32)).norm(dim=-1)
