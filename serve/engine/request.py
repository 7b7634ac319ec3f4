"""What a caller asks for and the state of one running request; no tensors, no torch.

A sequence keeps two lengths apart from the start: ``num_tokens`` is logical (tokens seen, the
position of the next token), ``kv_len`` is physical (slots in use). They differ after a compaction.
"""

import enum
import math
from dataclasses import dataclass, field
from typing import Literal

from common.config import check_types, positive, within
from common.errors import ConfigError
from serve.engine.blocks import BlockTable

FinishReason = Literal["stop", "length", "abort", "error"]

# Below this a temperature only serves to overflow the division; the request is greedy.
GREEDY_TEMPERATURE = 1e-5
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How to choose the next token, and when to stop.

    Attributes:
        temperature: Divides the logits; 0 is greedy; at most 2.
        top_k: Keep the k most probable tokens; 0 keeps all.
        top_p: Keep the most probable tokens that together reach this mass, in (0, 1].
        seed: Signed 64-bit seed; the same seed gives the same tokens in any batch. None draws one.
        max_tokens: New tokens at most; None generates until the context is full.
        stop: Strings that end the text; the text before the first of them is returned.
        stop_token_ids: Tokens that end the request; the token itself is returned last.
        logprobs: Natural log-probabilities of that many tokens beside the chosen one, from the
            unmodified logits; None returns none.

    Raises:
        ConfigError: for a value outside its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 64
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        check_types(self)
        within("temperature", self.temperature, 0.0, 2.0)
        positive("top_k", self.top_k, zero=True)
        positive("top_p", self.top_p)
        within("top_p", self.top_p, 0.0, 1.0)
        if self.seed is not None:
            within("seed", self.seed, -(2**63), 2**63 - 1)
        if self.max_tokens is not None:
            positive("max_tokens", self.max_tokens)
        if self.logprobs is not None:
            within("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        self._check_stop()

    def _check_stop(self) -> None:
        if len(self.stop) > MAX_STOP_STRINGS:
            raise ConfigError(
                f"stop has {len(self.stop)} strings: expected at most {MAX_STOP_STRINGS}; "
                "remove some"
            )
        for text in self.stop:
            if not 1 <= len(text) <= MAX_STOP_CHARACTERS:
                raise ConfigError(
                    f"stop string of {len(text)} characters: expected 1 to "
                    f"{MAX_STOP_CHARACTERS}; correct it"
                )
        for token in self.stop_token_ids:
            positive("stop_token_ids", token, zero=True)

    @property
    def is_greedy(self) -> bool:
        """True when the most probable token is always taken."""
        return self.temperature < GREEDY_TEMPERATURE or self.top_k == 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One prompt with everything that decides its tokens.

    Attributes:
        request_id: Unique name.
        prompt: Token ids, at least one.
        params: Sampling parameters.
        seed: Seed in force (drawn at admission when the parameters name none).
        max_total: Prompt plus new tokens at most, within the model's context.
        compress: False opts this request out of cache compression.
    """

    request_id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    seed: int
    max_total: int
    compress: bool = True

    @property
    def max_cached(self) -> int:
        """Tokens that ever enter the cache: the last one sampled is never fed back."""
        return self.max_total - 1


class State(enum.Enum):
    """Where a sequence is in its life."""

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
        block_table: Blocks that hold those slots, in order.
        compressed: True after the first compaction; such a sequence cannot be recomputed.
        reserved: Blocks set aside for it at admission; 0 for optimistic allocation.
        logprobs: Log-probabilities of each generated token, if asked for.
        deviations: Certified logits deviation (RMS over the vocabulary) at each generated token.
        keeps_top1: Whether the full cache provably has the same most probable token.
        ledger_row: Its row of the eviction ledger, once something was evicted.
        kept_sum: Sum over generated tokens of ``kv_len / num_tokens``.
    """

    request: Request
    tokens: list[int]
    num_tokens: int = 0
    kv_len: int = 0
    block_table: BlockTable = field(default_factory=BlockTable)
    compressed: bool = False
    reserved: int = 0
    state: State = State.WAITING
    finish_reason: FinishReason | None = None
    error: str | None = None
    logprobs: list[dict[int, float]] = field(default_factory=list)
    deviations: list[float] = field(default_factory=list)
    keeps_top1: list[bool] = field(default_factory=list)
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
    def remaining(self) -> int:
        """Known tokens that have not been through the model: 1 while decoding."""
        return len(self.tokens) - self.num_tokens

    @property
    def is_prefilling(self) -> bool:
        """True until every token known at admission is in the cache."""
        return self.remaining > 1 or self.num_tokens == 0

    @property
    def kept_fraction(self) -> float:
        """Mean over generated tokens of the share of seen tokens still cached; 1 before any."""
        count = len(self.output)
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
        if token in self.request.params.stop_token_ids:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.request.max_total:
            self.finish_reason = "length"

    def reset(self) -> None:
        """Forget the cache so that the sequence is recomputed from its tokens."""
        self.num_tokens = self.kv_len = 0
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
