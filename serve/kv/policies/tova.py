"""TOVA: what the newest query attends to."""

# Legend: R rows, K key/value heads, G query heads of one, H query heads, S slots.

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from serve.decoder import Decoder
from serve.kv.attention import recent_attention
from serve.kv.observers import QueryWindow
from serve.kv.policy import Policy, register
from serve.kv.view import CacheView


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class TovaPolicy(Policy):
    """Keep what the last query attends to, averaged over all content heads of the layer.

    The heads of a layer share one set. The newest token is always kept.

    Source:
        arXiv 2401.06104; deviation: many tokens per compaction; heads without queries left out.
    """

    name: ClassVar[str] = "tova"

    def prefix_limit(self, prompt: int) -> int:
        """Return all but the last prompt token."""
        return max(prompt - 1, 0)

    def observer(self, decoder: Decoder) -> QueryWindow:
        """Return a window of one query."""
        return QueryWindow(decoder, 1)

    def score(self, view: CacheView) -> Tensor:
        """Return the mean weight (R, K, S), float32 at least; 1 for the newest token."""
        weights_RKGS, _ = recent_attention(view, exclude=0)
        # Slots of content heads hold the same tokens, since all of them always kept the same.
        mean_RS = weights_RKGS.flatten(1, 2)[:, : view.spec.content_heads].mean(1)
        pos_RKS = view.slot_positions()
        is_newest = pos_RKS == (view.positions_R - 1)[:, None, None]
        return mean_RS[:, None].expand(pos_RKS.shape).masked_fill(is_newest, 1)
