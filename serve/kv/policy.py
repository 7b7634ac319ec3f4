"""Cache policies: what to keep when a sequence has outgrown its budget.

A policy is a frozen dataclass: its fields are its options, ``score`` is its method. Everything
else (protection of sinks and recent tokens, ties, which slots survive) is decided here, alike for
all. Each layer and key/value head keeps its own set.
"""

# Legend: R request rows, N table width (blocks), K key/value heads, H query heads, S slots,
# F rotary bands, T relative distances.

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from common.config import check_types, one_of, positive
from common.errors import ConfigError, ShapeError
from common.models import LayerConfig, LipschitzTransformer
from serve.kernels import gather_pages


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerView:
    """What a policy may see: one layer of the cache for R rows.

    Attributes:
        index: Layer.
        config: Shapes and constants of the layer.
        context: The model's context, in tokens.
        inverse_frequency: RoPE frequencies (F,), float64.
        bias_HT: Relative-position bias (H, context) or None.
        k_pool: Keys after RoPE (blocks, K, block_size, D).
        v_pool: Values, same shape.
        pos_pool: Original positions (blocks, K, block_size), int32.
        tables_RN: Block indices (R, N).
        lengths_R: Filled slots of each row.
        positions_R: Position of each row's next query, int64.
        stats: Calibration statistics of the layer (``serve.kv.calibrate.layer_stats``) or None.
        backend: Kernel backend.
    """

    index: int
    config: LayerConfig
    context: int
    inverse_frequency: Tensor
    bias_HT: Tensor | None
    k_pool: Tensor
    v_pool: Tensor
    pos_pool: Tensor
    tables_RN: Tensor
    lengths_R: Tensor
    positions_R: Tensor
    stats: Mapping[str, Tensor] | None = None
    backend: str = "auto"

    @classmethod
    def of(cls, model: LipschitzTransformer, index: int, **cache: Any) -> "LayerView":
        """Build the view of one layer of ``model``; ``cache`` holds the remaining fields."""
        attention = model.layers[index].attention
        bias = attention.position_bias
        return cls(
            index=index,
            config=attention.layer,
            context=model.config.context,
            inverse_frequency=attention.inverse_frequency,
            bias_HT=None if bias is None else bias.detach(),
            **cache,
        )

    def slot_positions(self) -> Tensor:
        """Return the original position of every slot (R, K, S), int64; -1 in unfilled slots."""
        pos_RKS = gather_pages(self.pos_pool, self.tables_RN).long()
        slot_S = torch.arange(pos_RKS.shape[2], device=pos_RKS.device)
        return pos_RKS.masked_fill((slot_S >= self.lengths_R[:, None])[:, None], -1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy(ABC):
    """Base of all policies; subclasses define ``name``, ``needs_stats`` and ``score``.

    Attributes:
        budget: Slots that survive a compaction, per layer and key/value head, in tokens,
            protected ones included; None never compacts.
        interval: The cache grows to ``budget + interval`` tokens before it is compacted.
        sinks: First positions of a sequence, never evicted.
        window: Most recent positions, never evicted.
    """

    budget: int | None = 64
    interval: int = 16
    sinks: int = 4
    window: int = 16
    name: ClassVar[str] = ""
    needs_stats: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_types(self)
        positive("kv.interval", self.interval)
        positive("kv.sinks", self.sinks, zero=True)
        positive("kv.window", self.window, zero=True)
        if self.budget is None:
            return
        positive("kv.budget", self.budget)
        if self.sinks + self.window > self.budget:
            raise ConfigError(
                f"kv.budget={self.budget}: expected at least kv.sinks + kv.window ="
                f" {self.sinks} + {self.window}; raise the budget or protect fewer tokens"
            )

    @property
    def trigger(self) -> int | None:
        """Physical length, in tokens, at which a sequence is compacted to ``budget``."""
        return None if self.budget is None else self.budget + self.interval

    @abstractmethod
    def score(self, view: LayerView) -> Tensor:
        """Return the score of every slot (R, K, S), float; higher is kept.

        Values of protected and unfilled slots do not matter.
        """

    def protected(self, positions_RKS: Tensor) -> Tensor:
        """Return which slots are sinks or recent (R, K, S), bool.

        Args:
            positions_RKS: Original positions, -1 in unfilled slots; the newest token, whose
                position is the largest, is always in the cache when this is called.
        """
        newest_RKS = positions_RKS.amax(-1, keepdim=True)
        is_recent = positions_RKS > newest_RKS - self.window
        return (positions_RKS >= 0) & (is_recent | (positions_RKS < self.sinks))


def select(policy: Policy, scores_RKS: Tensor, positions_RKS: Tensor) -> Tensor:
    """Return the slots that survive: the protected ones, then the highest scores.

    Args:
        policy: Its budget, sinks and window apply.
        scores_RKS: Score of each slot, higher is kept.
        positions_RKS: Original positions, -1 in unfilled slots.

    Returns:
        Slot indices (R, K, budget), int64, ascending; exact ties go to the larger position. A row
        shorter than the budget keeps all its slots, followed by unfilled ones.

    Raises:
        ShapeError: if the policy has no budget or the shapes differ.
    """
    if policy.budget is None or scores_RKS.shape != positions_RKS.shape:
        raise ShapeError(
            f"select: scores {tuple(scores_RKS.shape)}, positions {tuple(positions_RKS.shape)},"
            f" budget {policy.budget}; expected equal shapes and a budget"
        )
    scores = scores_RKS.masked_fill(policy.protected(positions_RKS), torch.inf)
    scores = scores.masked_fill(positions_RKS < 0, -torch.inf)
    # Two stable sorts are a lexicographic one: by score, then by position, both descending.
    by_position = positions_RKS.argsort(dim=-1, descending=True, stable=True)
    ranked = scores.gather(-1, by_position).argsort(dim=-1, descending=True, stable=True)
    return by_position.gather(-1, ranked[..., : policy.budget]).sort(dim=-1).values


def choose(policy: Policy, view: LayerView) -> Tensor:
    """Score one layer and return the surviving slots (R, K, budget), int64, ascending."""
    return select(policy, policy.score(view), view.slot_positions())


POLICIES: dict[str, type[Policy]] = {}


def register(policy: type[Policy]) -> type[Policy]:
    """Class decorator: make a policy available by its name."""
    POLICIES[policy.name] = policy
    return policy


def policy_by_name(name: str, **options: Any) -> Policy:
    """Build a registered policy.

    Raises:
        ConfigError: for an unknown name or option, or an impossible value.
    """
    one_of("kv.policy", name, POLICIES)
    build: Callable[..., Policy] = POLICIES[name]
    try:
        return build(**options)
    except TypeError as error:
        raise ConfigError(f"kv policy {name}: {error}; remove the option") from error
