"""H2O: what has received most attention so far."""

# Legend: R rows, K key/value heads, S slots.

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from serve.decoder import Decoder
from serve.kv.observers import AttentionMass
from serve.kv.policy import Policy, register
from serve.kv.view import CacheView


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class H2OPolicy(Policy):
    """Keep the heavy hitters: the largest sum of attention received since a token came.

    Attributes:
        per_query: Divide by the number of queries that could see the token.

    Source:
        arXiv 2306.14048; deviation: the query heads of one key/value head are summed.
    """

    per_query: bool = False
    name: ClassVar[str] = "h2o"

    def prefix_limit(self, prompt: int) -> int:
        """Return 0: the queries of all tokens count."""
        return 0

    def observer(self, decoder: Decoder) -> AttentionMass:
        """Return the sums of attention weights."""
        return AttentionMass(decoder)

    def score(self, view: CacheView) -> Tensor:
        """Return the attention received (R, K, S), float32 at least."""
        pos_RKS, mass_RKS = view.slot_positions(), view.observed["mass"]
        slots = pos_RKS.shape[2]
        mass_RKS = F.pad(mass_RKS, (0, max(0, slots - mass_RKS.shape[2])))[..., :slots]
        if not self.per_query:
            return mass_RKS
        return mass_RKS / (view.positions_R[:, None, None] - pos_RKS)
