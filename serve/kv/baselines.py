"""Policies without statistics: keep everything, or the first and the most recent tokens."""

# Legend: R request rows, K key/value heads, S slots.

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


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class WindowPolicy(Policy):
    """Keep the sinks and the most recent tokens up to the budget.

    Source:
        arXiv 2309.17453 (StreamingLLM); deviation: keys stay rotated at their original positions.
    """

    name: ClassVar[str] = "window"

    def __post_init__(self) -> None:
        Policy.__post_init__(self)
        if self.budget is None:
            raise ConfigError("kv.budget=null: the window policy expects a number of tokens")

    def score(self, view: CacheView) -> Tensor:
        """Return the positions (R, K, S) as scores, float64 (exact for any length)."""
        return view.slot_positions().double()
