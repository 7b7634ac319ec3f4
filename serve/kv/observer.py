"""Evidence that some policies collect while sequences run: queries, or attention received.

An observer keeps tensors with one entry per sequence row. It is told of every query, moves its
slot-aligned tensors with the cache, and hands a policy the entries of the rows to compact.
"""

# Legend: R rows of a call, T tokens of a chunk, H query heads, K key/value heads, S slots,
# D head width.

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Attended:
    """Queries of one layer and what they attended to.

    Decode rows have one query each, at the same table width; a prompt chunk is one row of many
    queries. The query's own key is in the cache already.

    Attributes:
        layer: Layer index.
        rows: Observer row of each sequence (R).
        q_RTHD: Queries after RoPE; T is 1 for decode rows.
        positions_RT: Their original positions.
        k_pool: The layer's keys (blocks, K, block_size, D).
        pos_pool: Original positions (blocks, K, block_size), int32.
        tables_RW: Blocks of each sequence.
        lengths_R: Filled slots of each sequence.
    """

    layer: int
    rows: Sequence[int]
    q_RTHD: Tensor
    positions_RT: Tensor
    k_pool: Tensor
    pos_pool: Tensor
    tables_RW: Tensor
    lengths_R: Tensor


class Observer(ABC):
    """Collects the evidence of one policy; see the module's text."""

    @abstractmethod
    def open(self) -> int:
        """Start a sequence with nothing observed and return its row."""

    @abstractmethod
    def close(self, row: int) -> None:
        """End a sequence; its row may be given to another."""

    @abstractmethod
    def attended(self, event: Attended) -> None:
        """Take note of queries."""

    def moved(self, layers: Sequence[int], rows: Sequence[int], source_RKS: Tensor) -> None:
        """Follow a compaction: new slot s of a row and head was slot ``source_RKS`` before.

        Args:
            layers: Layers of the view.
            rows: Observer row of each sequence; rows of ``source_RKS`` are layer-major pairs.
            source_RKS: Old slot of each kept slot (layers * sequences, K, kept), int64.
        """
        return

    @abstractmethod
    def observed(self, layers: Sequence[int], rows: Sequence[int]) -> Mapping[str, Tensor]:
        """Return tensors with one entry per (layer, sequence) pair, layer-major."""
