"""SnapKV: what the last queries attend to, smoothed over neighbours."""

# Legend: R rows, K key/value heads, G query heads of one, S slots.

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from common.config import positive
from common.errors import ConfigError
from serve.decoder import Decoder
from serve.kv.attention import recent_attention, smooth
from serve.kv.observers import QueryWindow
from serve.kv.policy import Policy, register
from serve.kv.view import CacheView


@dataclass(frozen=True, kw_only=True, slots=True)
class RecentQueriesPolicy(Policy):
    """Base of policies that judge old keys by the most recent queries.

    The tokens of these queries are kept and take no part in the softmax: so at most ``window``.

    Attributes:
        queries: Number of queries, where the window has so many.
        kernel: Odd number of neighbours over which the weights are pooled.
        pooling: How: their mean, or the largest.
    """

    queries: int = 64
    kernel: int = 5
    pooling: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        Policy.__post_init__(self)
        positive("kv.queries", self.queries)
        if self.window == 0:
            raise ConfigError(
                f"kv.window=0: {self.name} judges by the queries of the window; expected at least 1"
            )
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ConfigError(f"kv.kernel={self.kernel}: expected an odd number; correct it")

    @property
    def num_queries(self) -> int:
        """Queries that judge."""
        return min(self.queries, self.window)

    def prefix_limit(self, prompt: int) -> int:
        """Return all but the prompt tokens whose queries judge."""
        return max(prompt - self.num_queries, 0)

    def observer(self, decoder: Decoder) -> QueryWindow:
        """Return the window of queries."""
        return QueryWindow(decoder, self.num_queries)

    def past_attention(self, view: CacheView, *, largest_of_group: bool) -> tuple[Tensor, Tensor]:
        """Return the pooled weights (R, K, G, S) and which slots are old enough (R, K, S)."""
        weights_RKGS, is_past = recent_attention(
            view, exclude=self.num_queries, largest_of_group=largest_of_group
        )
        positions_RKS = view.slot_positions()
        return smooth(weights_RKGS, positions_RKS, is_past, self.kernel, self.pooling), is_past


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class SnapKVPolicy(RecentQueriesPolicy):
    """Keep the keys that the last queries attend to most.

    Attributes:
        group: How the query heads of one key/value head are combined: ``mean`` of the pooled
            weights (published), or ``max`` of the logits before the softmax (the variant that
            arXiv 2604.04921 compares with, then with queries=8, kernel=7, pooling=max).

    Source:
        arXiv 2404.14469; deviation: applied at every compaction, neighbours among kept keys.
    """

    group: Literal["mean", "max"] = "mean"
    name: ClassVar[str] = "snapkv"

    def score(self, view: CacheView) -> Tensor:
        """Return the pooled mean weight (R, K, S), float32 at least; 1 for the last queries."""
        pooled_RKGS, is_past = self.past_attention(view, largest_of_group=self.group == "max")
        return pooled_RKGS.mean(2).masked_fill(~is_past, 1)
