"""What callers get: completions of a prompt, whole or piece by piece.

The engine side reads what is new about a sequence (``Reader``), the text side turns that into
pieces of a completion (``Writer``); only plain values pass between them, so that they may live in
different threads.
"""

import dataclasses
import itertools
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Any

from common.tokenizer import Tokenizer
from serve.engine.detokenizer import Detokenizer
from serve.engine.request import FinishReason, Request, Sequence


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """One continuation of a prompt, or the newest piece of it.

    Attributes:
        index: Which of the ``n`` choices, from 0.
        text: New text; ends before a stop string or stop token.
        token_ids: New tokens, a stop token included.
        finish_reason: "stop", "length", "abort" or "error"; None while it goes on.
        stop_reason: The stop string or stop token that ended it, None for another end.
        seed: Seed in force; giving it again repeats the text.
        kv_kept_fraction: Mean over the new tokens of cached / seen tokens; 1 for a full cache.
        kv_evicted: Cache slots given up so far, per layer and head.
        logprobs: Per new token, natural log-probabilities by token id, the chosen one first.
        certified_deviation: Per token, a bound on how far its logits are from those of the
            full cache on the same tokens: RMS over the vocabulary, largest up to that token. None
            without a certificate. In a stream this and the next two come in order but may be some
            tokens late; the last piece has the rest.
        certified_top1: Per token, whether the full cache provably has the same most probable
            token. None without a certificate.
        certified_radius: Per token, how far the input may move before the full cache's most
            probable token can be another one: l2 of an embedded token, 0 where it is not proved.
            None without a certificate.
        error: What went wrong, for ``finish_reason`` "error".
    """

    index: int = 0
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    stop_reason: str | int | None = None
    seed: int
    kv_kept_fraction: float = 1.0
    kv_evicted: int = 0
    logprobs: list[dict[int, float]] | None = None
    certified_deviation: list[float] | None = None
    certified_top1: list[bool] | None = None
    certified_radius: list[float] | None = None
    error: str | None = None

    @classmethod
    def joined(cls, pieces: Rows["Completion"]) -> "Completion":
        """Return the whole of consecutive pieces of one choice, at least one."""

        def together(name: str) -> list[Any] | None:
            parts = [part for piece in pieces if (part := getattr(piece, name)) is not None]
            return list(itertools.chain.from_iterable(parts)) if parts else None

        return dataclasses.replace(
            pieces[-1],
            text="".join(piece.text for piece in pieces),
            token_ids=together("token_ids") or [],
            logprobs=together("logprobs"),
            certified_deviation=together("certified_deviation"),
            certified_top1=together("certified_top1"),
            certified_radius=together("certified_radius"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestOutput:
    """What became of one prompt; the fields of its first completion can be read here too.

    Attributes:
        request_id: Name of the request.
        prompt_token_ids: The prompt as tokens.
        outputs: The completions; in a stream only those with something new, and only that.
        finished: Nothing will follow.
        prompt_logprobs: Per prompt token but the first, natural log-probabilities by token id, the
            token itself first; None unless asked for; in a stream with the first piece.
        num_cached_tokens: Prompt tokens that came out of the prefix cache.
    """

    request_id: str
    prompt_token_ids: list[int]
    outputs: tuple[Completion, ...]
    finished: bool = True
    prompt_logprobs: list[dict[int, float]] | None = None
    num_cached_tokens: int = 0

    @classmethod
    def joined(cls, pieces: Rows["RequestOutput"]) -> "RequestOutput":
        """Return the whole of consecutive pieces of a stream, at least one."""
        by_index: dict[int, list[Completion]] = {}
        for completion in itertools.chain.from_iterable(piece.outputs for piece in pieces):
            by_index.setdefault(completion.index, []).append(completion)
        outputs = [Completion.joined(by_index[index]) for index in sorted(by_index)]
        logprobs = [p.prompt_logprobs for p in pieces if p.prompt_logprobs is not None]
        return dataclasses.replace(
            pieces[-1],
            outputs=tuple(outputs),
            prompt_logprobs=logprobs[0] if logprobs else None,
            num_cached_tokens=max(piece.num_cached_tokens for piece in pieces),
        )

    @property
    def text(self) -> str:
        """Text of the first completion."""
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        """New tokens of the first completion."""
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the first completion ended."""
        return self.outputs[0].finish_reason

    @property
    def seed(self) -> int:
        """Seed of the first completion."""
        return self.outputs[0].seed

    @property
    def kv_kept_fraction(self) -> float:
        """Cached / seen tokens of the first completion."""
        return self.outputs[0].kv_kept_fraction

    @property
    def kv_evicted(self) -> int:
        """Cache slots that the first completion has given up, per layer and head."""
        return self.outputs[0].kv_evicted

    @property
    def logprobs(self) -> list[dict[int, float]] | None:
        """Log-probabilities of the first completion."""
        return self.outputs[0].logprobs

    @property
    def certified_deviation(self) -> list[float] | None:
        """Certified deviation of the first completion."""
        return self.outputs[0].certified_deviation

    @property
    def certified_top1(self) -> list[bool] | None:
        """Certified tokens of the first completion."""
        return self.outputs[0].certified_top1

    @property
    def certified_radius(self) -> list[float] | None:
        """Certified radius of the first completion."""
        return self.outputs[0].certified_radius

    @property
    def error(self) -> str | None:
        """What went wrong with the first completion."""
        return self.outputs[0].error


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """What is new about one sequence; plain values of its own.

    Attributes:
        request: Its request.
        tokens: New tokens.
        logprobs: Their log-probabilities, None unless asked for.
        deviations: New certified deviations, maybe of earlier tokens; None without a proof.
        keeps_top1: Whether those tokens are proved to be the full cache's.
        radii: How far the input may move before that changes.
        finish_reason: Why it ended, None while it goes on.
        error: What went wrong.
        kept_fraction: Mean of cached / seen tokens.
        evicted: Cache slots given up so far.
        prompt_logprobs: Of the prompt, with the first tokens.
        num_cached: Prompt tokens that came out of the prefix cache.
    """

    request: Request
    tokens: list[int]
    logprobs: list[dict[int, float]] | None
    deviations: list[float] | None
    keeps_top1: list[bool] | None
    radii: list[float] | None
    finish_reason: FinishReason | None
    error: str | None
    kept_fraction: float
    evicted: int
    prompt_logprobs: list[dict[int, float]] | None
    num_cached: int


class Reader:
    """Reads what is new about a sequence, in the thread that runs the engine.

    Args:
        sequence: Live or finished sequence.
        is_proved: Its engine bounds what eviction does.
    """

    def __init__(self, sequence: Sequence, *, is_proved: bool) -> None:
        self.sequence = sequence
        self._is_proved = is_proved and sequence.request.params.certified
        self._count = self._proofs = 0

    def read(self) -> Update:
        """Return what came since the last call."""
        sequence, request = self.sequence, self.sequence.request
        new = slice(self._count, sequence.num_output)
        is_first, self._count = self._count == 0, sequence.num_output
        proofs = slice(self._proofs, len(sequence.radii))
        self._proofs = proofs.stop
        params = request.params
        is_scored = is_first and request.choice == 0 and params.prompt_logprobs is not None
        return Update(
            request=request,
            tokens=sequence.tokens[len(request.prompt) + new.start :],
            logprobs=sequence.logprobs[new] if params.logprobs is not None else None,
            deviations=sequence.deviations[proofs] if self._is_proved else None,
            keeps_top1=sequence.keeps_top1[proofs] if self._is_proved else None,
            radii=sequence.radii[proofs] if self._is_proved else None,
            finish_reason=sequence.finish_reason,
            error=sequence.error,
            kept_fraction=sequence.kept_fraction,
            evicted=sequence.num_tokens - sequence.kv_len,
            prompt_logprobs=list(sequence.prompt_logprobs) if is_scored else None,
            num_cached=min(sequence.num_hit, len(request.prompt)),
        )


class Writer:
    """Writes one prompt's completions, piece by piece.

    Args:
        tokenizer: Decodes.
        requests: The request of each choice, in order.
    """

    def __init__(self, tokenizer: Tokenizer, requests: Rows[Request]) -> None:
        self._prompt = list(requests[0].prompt)
        self._texts = [Detokenizer(tokenizer, r.params, r.stop_ids) for r in requests]
        self._open = set(range(len(self._texts)))
        self._unproved = [0] * len(self._texts)

    @property
    def is_finished(self) -> bool:
        """True once every choice has ended."""
        return not self._open

    def write(self, update: Update) -> RequestOutput | None:
        """Return the newest piece; None for a choice that has ended already.

        A stop string ends a choice before the engine knows: the caller has to tell it.
        """
        choice = update.request.choice
        if choice not in self._open:
            return None
        text = self._texts[choice]
        shown, used = text.push(update.tokens, is_last=update.finish_reason is not None)
        reason = "stop" if text.stop is not None else update.finish_reason
        if reason is not None:
            self._open.remove(choice)
        last = update.tokens[used - 1] if used else None
        # Proofs may be late, and belong to tokens that were shown.
        shown_proofs = self._unproved[choice] + used
        self._unproved[choice] = max(0, shown_proofs - len(update.radii or ()))
        completion = Completion(
            index=choice,
            text=shown,
            token_ids=update.tokens[:used],
            finish_reason=reason,
            stop_reason=last if reason == "stop" and text.stop is None else text.stop,
            seed=update.request.seed,
            kv_kept_fraction=update.kept_fraction,
            kv_evicted=update.evicted,
            logprobs=_first(update.logprobs, used),
            certified_deviation=_first(update.deviations, shown_proofs),
            certified_top1=_first(update.keeps_top1, shown_proofs),
            certified_radius=_first(update.radii, shown_proofs),
            error=update.error,
        )
        return RequestOutput(
            request_id=update.request.request_id,
            prompt_token_ids=self._prompt,
            outputs=(completion,),
            finished=self.is_finished,
            prompt_logprobs=update.prompt_logprobs,
            num_cached_tokens=update.num_cached,
        )


def _first(values: list[Any] | None, count: int) -> list[Any] | None:
    return None if values is None else values[:count]
