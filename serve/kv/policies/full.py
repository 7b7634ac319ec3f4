"""No compression: every token stays."""

# Legend: R rows, K key/value heads, S slots.

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from common.errors import ConfigError
from serve.kv.policy import Policy, register
from serve.kv.view import CacheView


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class FullPolicy(Policy):
    """Keep every token; the reference of all comparisons."""

    budget: int | None = None
    name: ClassVar[str] = "full"
    needs_budget: ClassVar[bool] = False
    scores_positional: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.budget is not None:
            raise ConfigError(
                f"kv.budget={self.budget}: the full policy keeps every token and expects null;"
                " choose kv=window or kv=triattention"
            )
        Policy.__post_init__(self)

    def score(self, view: CacheView) -> Tensor:
        """Return equal scores (R, K, S), float32."""
        return torch.zeros_like(view.slot_positions(), dtype=torch.float32)
