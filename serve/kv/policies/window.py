"""Recency: the first and the most recent tokens."""

# Legend: R rows, K key/value heads, S slots.

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from serve.kv.policy import Policy, register
from serve.kv.view import CacheView


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class WindowPolicy(Policy):
    """Keep the sinks and the most recent tokens up to the budget.

    Source:
        arXiv 2309.17453 (StreamingLLM); deviation: keys stay rotated at their original positions.
    """

    name: ClassVar[str] = "window"
    scores_positional: ClassVar[bool] = True

    def score(self, view: CacheView) -> Tensor:
        """Return the positions (R, K, S) as scores, float64 (exact for any length)."""
        return view.slot_positions().double()
