"""What an attack may spend, and what it found."""

import dataclasses
import math
import time

from common.config import check_types, positive


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AttackSettings:
    """Budget of the attacks.

    Attributes:
        steps: Ascent steps of each attack on a block; 0 switches the ascent off.
        network_steps: Ascent steps on the whole network, at each length.
        restarts: Starts of each kind of search; only the best of them are lengthened.
        tokens: Length of the attacked sequences, at most the model's context.
        rate: First step per token relative to the radius.
        budget_s: Seconds after which no further step is made; 0 for no limit. With a limit that
            is reached, what is found depends on the machine.
        seed: Seed of the random starts.
    """

    steps: int = 40
    network_steps: int = 16
    restarts: int = 4
    tokens: int = 16
    rate: float = 0.3
    budget_s: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self, prefix="attack.")
        for name in ("steps", "network_steps", "budget_s"):
            positive(f"attack.{name}", getattr(self, name), zero=True)
        for name in ("restarts", "tokens", "rate"):
            positive(f"attack.{name}", getattr(self, name))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AttackResult:
    """Largest ratios found: of the network (RMS to RMS) and of each block (l2); by kind.

    Attributes:
        value: The largest of the network.
        blocks: The largest of each block or chain.
        random: Random pairs, no search.
        power: The worst direction at random inputs and at embedded texts, by power iteration.
        gradient: Input and direction together, from random starts.
        structured: The same from starts built for the attention logits (classifiers: from
            singular vectors).
        swaps: Pairs of sequences of tokens, found by exchanging tokens.
    """

    value: float
    blocks: tuple[float, ...]
    random: float
    gradient: float
    structured: float
    power: float = 0.0
    swaps: float = 0.0


class Clock:
    """The time that is left; without a limit it never runs out."""

    def __init__(self, budget_s: float) -> None:
        self._began, self._budget = time.monotonic(), budget_s or math.inf

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self._began + self._budget - time.monotonic()

    @property
    def share(self) -> float:
        """Share of the time that is spent, 0 without a limit."""
        return (time.monotonic() - self._began) / self._budget

    def part(self, share: float) -> "Clock":
        """Return a clock with a share of the time that is left."""
        return Clock(0.0 if math.isinf(self._budget) else max(share * self.left, 1e-9))
