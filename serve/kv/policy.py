"""Cache policies: what to keep when a sequence has outgrown its budget.

A policy is a frozen dataclass: its fields are its options, ``score`` is its method. Everything
else (protection of prompt, sinks and recent tokens, ties, sharing of sets between heads and
layers) is decided in ``selection.py``, alike for all.
"""

# Legend: R rows (layer-major), K key/value heads, S slots.

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from common.config import check_types, one_of, positive
from common.errors import ConfigError
from serve.decoder import Decoder
from serve.kv.observer import Observer
from serve.kv.view import CacheView

Selection = Literal["per_layer_per_head", "per_head", "union"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy(ABC):
    """Base of all policies; subclasses define ``name`` and ``score``.

    Attributes:
        budget: Slots that survive a compaction, per layer and key/value head, in tokens,
            protected ones included; None never compacts.
        interval: The cache grows to ``budget + interval`` tokens before it is compacted.
        sinks: First positions of a sequence, never evicted.
        window: Most recent positions, never evicted.
        protect_prompt: Never evict the prompt, unless it is longer than half the budget.
        selection: Which heads share one set of kept tokens: none; the heads of one index in all
            layers (mean score); all of all layers (largest score).
        summary_tokens: Evicted tokens leave this many mean tokens per layer and head behind, one
            per segment of positions; 0 leaves none.
        compress_prefill: Compact inside long prompts too; otherwise first at the prompt's end.

    Class attributes: ``needs_stats``: it reads calibration statistics; ``needs_budget``: a budget
    of None is a mistake; ``scores_positional``: its scores hold for purely positional heads too.
    """

    budget: int | None = 64
    interval: int = 16
    sinks: int = 4
    window: int = 16
    protect_prompt: bool = True
    selection: Selection = "per_layer_per_head"
    summary_tokens: int = 0
    compress_prefill: bool = False
    name: ClassVar[str] = ""
    needs_stats: ClassVar[bool] = False
    needs_budget: ClassVar[bool] = True
    scores_positional: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_types(self)
        positive("kv.interval", self.interval)
        positive("kv.sinks", self.sinks, zero=True)
        positive("kv.window", self.window, zero=True)
        positive("kv.summary_tokens", self.summary_tokens, zero=True)
        if self.budget is None:
            if self.needs_budget:
                raise ConfigError(
                    f"kv.budget=null: {self.name or 'the'} policy expects a number of tokens;"
                    " give one, or choose kv=full"
                )
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

    @property
    def is_standardized(self) -> bool:
        """True if its scores of different heads and layers can be compared as they are."""
        return False

    def pinned(self, prompt: int) -> int:
        """Return how many first positions are never evicted, for a prompt of that many tokens."""
        assert self.budget is not None
        is_pinned = self.protect_prompt and 2 * prompt <= self.budget
        return max(self.sinks, prompt) if is_pinned else self.sinks

    def budget_for(self, prompt: int) -> int:
        """Return the slots that a request with such a prompt keeps.

        More than ``budget`` only where the protected tokens alone would fill it.
        """
        assert self.budget is not None
        protected = self.pinned(prompt) + self.window
        return self.budget if protected <= self.budget else protected + self.interval

    def prefix_limit(self, prompt: int) -> int | None:
        """Return how many prompt tokens may come from the prefix cache; None for all of them.

        A policy that observes queries must see them: they would depend on other requests.
        """
        return None

    def observer(self, decoder: Decoder) -> Observer | None:
        """Return what collects the policy's own evidence while sequences run, None if nothing."""
        return None

    @abstractmethod
    def score(self, view: CacheView) -> Tensor:
        """Return the score of every slot (R, K, S), float; higher is kept.

        Values of protected and unfilled slots do not matter.
        """


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
