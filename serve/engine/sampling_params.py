"""How a caller wants tokens to be chosen and when to stop; no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from common.config import check_types, positive, within
from common.errors import ConfigError

# Below this a temperature only serves to overflow the division; the request is greedy.
GREEDY_TEMPERATURE = 1e-5
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 256
MAX_CHOICES = 16
MAX_BIASES = 1024
MAX_BIAS = 100.0
MAX_PENALTY = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How to choose the next token, and when to stop.

    The logits pass, in this order: ``logit_bias``, ``repetition_penalty``,
    ``frequency_penalty`` and ``presence_penalty``, ``min_tokens``, temperature, ``top_k``,
    ``min_p``, ``top_p``.

    Attributes:
        n: Choices: independent continuations of the prompt, 1 to 16.
        temperature: Divides the logits; 0 is greedy; at most 2.
        top_k: Keep the k most probable tokens; 0 or -1 keeps all.
        top_p: Keep the most probable tokens that together reach this mass, in (0, 1].
        min_p: Keep tokens at least this share of the most probable one's probability, in [0, 1].
        presence_penalty: Subtracted from the logit of every generated token, in [-2, 2].
        frequency_penalty: Subtracted once per occurrence among the generated tokens, in [-2, 2].
        repetition_penalty: Divides positive and multiplies negative logits of the tokens in the
            prompt and the text, above 0; 1 does nothing.
        logit_bias: Added to the logits of tokens, by id, in [-100, 100]; at most 1024.
        seed: Signed 64-bit seed; the same seed gives the same tokens in any batch. None draws one.
        max_tokens: New tokens at most; None generates until the context is full.
        min_tokens: New tokens before anything may stop the text but ``max_tokens``.
        ignore_eos: Go on after the tokenizer's end-of-text token.
        stop: Strings that end the text; the text before the first of them is returned.
        stop_token_ids: Tokens that end the request; the token itself is returned last.
        logprobs: Natural log-probabilities of that many tokens beside the chosen one, from the
            unmodified logits; None returns none.
        prompt_logprobs: The same for every prompt token but the first. Such a request neither
            reads the prefix cache nor compresses its own; None returns none.
        certified: Bound what compression did to each token, where the model has a certificate.

    Raises:
        ConfigError: for a value outside its range.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    seed: int | None = None
    max_tokens: int | None = 64
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    certified: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        if self.logit_bias is None:  # as a configuration says it
            object.__setattr__(self, "logit_bias", {})
        check_types(self)
        within("n", self.n, 1, MAX_CHOICES)
        within("temperature", self.temperature, 0.0, 2.0)
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        positive("top_k", self.top_k, zero=True)
        positive("top_p", self.top_p)
        within("top_p", self.top_p, 0.0, 1.0)
        within("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            within("seed", self.seed, -(2**63), 2**63 - 1)
        for name in ("logprobs", "prompt_logprobs"):
            if (count := getattr(self, name)) is not None:
                within(name, count, 0, MAX_LOGPROBS)
        self._check_penalties()
        self._check_length()
        self._check_stop()

    def _check_penalties(self) -> None:
        for name in ("presence_penalty", "frequency_penalty"):
            within(name, getattr(self, name), -MAX_PENALTY, MAX_PENALTY)
        positive("repetition_penalty", self.repetition_penalty)
        if len(self.logit_bias) > MAX_BIASES:
            raise ConfigError(
                f"logit_bias has {len(self.logit_bias)} entries: expected at most {MAX_BIASES}; "
                "remove some"
            )
        for token, bias in self.logit_bias.items():
            is_number = isinstance(bias, int | float) and not isinstance(bias, bool)
            if not isinstance(token, int) or isinstance(token, bool) or not is_number:
                raise ConfigError(
                    f"logit_bias has {token!r}: {bias!r}: expected token ids and numbers; correct "
                    "it"
                )
            positive("logit_bias token", token, zero=True)
            within(f"logit_bias of token {token}", bias, -MAX_BIAS, MAX_BIAS)
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))

    def _check_length(self) -> None:
        positive("min_tokens", self.min_tokens, zero=True)
        if self.max_tokens is None:
            return
        positive("max_tokens", self.max_tokens)
        if self.min_tokens > self.max_tokens:
            raise ConfigError(
                f"min_tokens={self.min_tokens}: expected at most max_tokens={self.max_tokens}; "
                "lower it"
            )

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

    @property
    def has_filter(self) -> bool:
        """True when some tokens are left out before drawing."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def has_penalty(self) -> bool:
        """True when the choice depends on which tokens occurred before."""
        return (
            self.presence_penalty != 0
            or self.frequency_penalty != 0
            or self.repetition_penalty != 1
        )
