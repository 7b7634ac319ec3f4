"""What a caller asks for and the state of one running request; no tensors, no torch.

A sequence keeps two lengths apart from the start: ``num_tokens`` is logical (tokens seen, the
position of the next token), ``kv_len`` is physical (slots in use). They differ after a compaction.
"""

import enum
import math
from dataclasses import dataclass, field
from typing import Literal

from serve.engine.blocks import BlockTable
from serve.engine.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Compaction:
    """When a cache is compacted: at lengths that depend on the request alone.

    Attributes:
        budget: Slots kept.
        interval: A cache of ``budget + interval`` slots is cut to ``budget``.
        in_prompt: Compact inside the prompt too; else first when the prompt is complete.
    """

    budget: int
    interval: int
    in_prompt: bool = False

    @property
    def trigger(self) -> int:
        """Physical length at which a cache is compacted."""
        return self.budget + self.interval


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One continuation of a prompt with everything that decides its tokens.

    Attributes:
        request_id: Name; the choices of one prompt share it.
        prompt: Token ids, at least one.
        params: Sampling parameters.
        seed: Seed in force (drawn at admission when the parameters name none).
        max_total: Prompt plus new tokens at most, within the model's context.
        choice: Which of the prompt's continuations this is, from 0.
        stop_ids: Tokens that end it.
        compaction: How its cache is compressed; None where that was declined or cannot happen.
        prefix_limit: Prompt tokens that may come out of the prefix cache; None allows all.
        cache_salt: Only requests with the same salt share cached prefixes.
    """

    request_id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    seed: int
    max_total: int
    choice: int = 0
    stop_ids: frozenset[int] = frozenset()
    compaction: Compaction | None = None
    prefix_limit: int | None = None
    cache_salt: str = ""

    @property
    def max_cached(self) -> int:
        """Tokens that ever enter the cache: the last one sampled is never fed back."""
        return self.max_total - 1

    @property
    def compress(self) -> bool:
        """True if its cache will be compacted once it is long enough."""
        return self.compaction is not None

    @property
    def peak_slots(self) -> int:
        """The most cache slots that can be in use at any time."""
        if self.compaction is None:
            return self.max_cached
        whole = 0 if self.compaction.in_prompt else len(self.prompt)
        return min(self.max_cached, max(whole, self.compaction.trigger))


class State(enum.Enum):
    """Where a sequence is in its life."""

    HELD = "held"  # until the prompt that it shares is in the cache
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(kw_only=True, slots=True, eq=False)
class Sequence:
    """The running state of a request.

    Attributes:
        request: What was asked for.
        tokens: Prompt and generated token ids.
        num_tokens: Logical length: tokens that went through the model, next position.
        kv_len: Physical length: cache slots in use, the same in every layer and head.
        num_hit: Tokens that came out of the prefix cache when it was last admitted.
        block_table: Blocks that hold those slots, in order.
        keys: Prefix-cache keys of its full blocks, as far as computed.
        num_keyed: Blocks that were offered to the prefix cache or came out of it.
        compressed: True after the first compaction; such a sequence cannot be recomputed.
        reserved: Blocks set aside for it at admission; 0 for optimistic allocation.
        logprobs: Log-probabilities of each generated token, if asked for.
        prompt_logprobs: Log-probabilities of each prompt token but the first, if asked for.
        deviations: Certified logits deviation (RMS over the vocabulary) at each generated token;
            it and the next two may lag some tokens behind until the sequence ends.
        keeps_top1: Whether the full cache provably has the same most probable token.
        radii: How far the input may move before the full cache's most probable token can be
            another one, l2 of an embedded token; 0 where that token is not proved.
        ledger_row: Its row of the eviction ledger, once something was evicted.
        kept_sum: Sum over generated tokens of ``kv_len / num_tokens``.
    """

    request: Request
    tokens: list[int]
    num_tokens: int = 0
    kv_len: int = 0
    num_hit: int = 0
    block_table: BlockTable = field(default_factory=BlockTable)
    keys: list[bytes] = field(default_factory=list)
    num_keyed: int = 0
    compressed: bool = False
    reserved: int = 0
    state: State = State.WAITING
    finish_reason: FinishReason | None = None
    error: str | None = None
    logprobs: list[dict[int, float]] = field(default_factory=list)
    prompt_logprobs: list[dict[int, float]] = field(default_factory=list)
    deviations: list[float] = field(default_factory=list)
    keeps_top1: list[bool] = field(default_factory=list)
    radii: list[float] = field(default_factory=list)
    ledger_row: int | None = None
    kept_sum: float = 0.0
    preemptions: int = 0
    compactions: int = 0

    @classmethod
    def start(cls, request: Request) -> "Sequence":
        """Return the waiting sequence of a request."""
        return cls(request=request, tokens=list(request.prompt))

    @property
    def output(self) -> list[int]:
        """Generated token ids."""
        return self.tokens[len(self.request.prompt) :]

    @property
    def num_output(self) -> int:
        """Number of generated tokens."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def remaining(self) -> int:
        """Known tokens that have not been through the model: 1 while decoding."""
        return len(self.tokens) - self.num_tokens

    @property
    def is_prefilling(self) -> bool:
        """True until every token known at admission is in the cache."""
        return self.remaining > 1 or self.num_tokens == 0

    @property
    def has_prompt(self) -> bool:
        """True once the whole prompt went through the model."""
        return self.num_tokens >= len(self.request.prompt)

    @property
    def is_due(self) -> bool:
        """True if the cache must be compacted before the next token."""
        compaction = self.request.compaction
        if compaction is None or not (compaction.in_prompt or self.has_prompt):
            return False
        return self.kv_len >= compaction.trigger

    @property
    def kept_fraction(self) -> float:
        """Mean over generated tokens of the share of seen tokens still cached; 1 before any."""
        count = self.num_output
        return self.kept_sum / count if count else 1.0

    @property
    def certified_deviation(self) -> float | None:
        """Largest certified logits deviation so far; None without a certificate."""
        return max(self.deviations) if self.deviations else None

    def advance(self, count: int) -> None:
        """Record that ``count`` more tokens went through the model into the cache."""
        self.num_tokens += count
        self.kv_len += count

    def append(self, token: int) -> None:
        """Append a sampled token; sets the finish reason when it is the last."""
        self.tokens.append(token)
        self.kept_sum += self.kv_len / self.num_tokens
        if token in self.request.stop_ids:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.request.max_total:
            self.finish_reason = "length"

    def reset(self) -> None:
        """Forget the cache so that the sequence is recomputed from its tokens."""
        self.num_tokens = self.kv_len = self.num_keyed = 0
        self.state = State.WAITING
        self.preemptions += 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """Part of a step: the next ``count`` tokens of one sequence."""

    sequence: Sequence
    count: int

    @property
    def is_decode(self) -> bool:
        """True for a single token on top of a cache."""
        return self.count == 1 and self.sequence.num_tokens > 0


def new_tokens_limit(prompt_length: int, context: int, max_tokens: int | None) -> int:
    """Return prompt plus new tokens at most, within ``context`` positions."""
    wanted = math.inf if max_tokens is None else prompt_length + max_tokens
    return int(min(wanted, context))
