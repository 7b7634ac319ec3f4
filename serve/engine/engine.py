"""The engine core: ``add``, ``abort``, ``step``; no threads, no text, no HTTP.

What is guaranteed about a request's tokens: they depend on its prompt, its parameters and its seed
alone. In the default mode the logits also carry rounding that depends on the batch and on what the
prefix cache held (matrix products of other shapes), so a token can differ where two candidates tie
to about 1e-6 in float32; ``deterministic=true`` removes that too, bit for bit, for the same engine
settings and threads.
"""

# Legend: R rows, T tokens of an item, V vocabulary.

import itertools
import logging
from collections.abc import Collection
from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from common.checkpoints import first_line
from common.errors import DataError
from common.models import LipschitzTransformer
from serve.decoder import Decoder, as_decoder
from serve.engine.admission import Admission
from serve.engine.blocks import BlockManager
from serve.engine.certified import DeviationTracker
from serve.engine.compactor import Compactor
from serve.engine.companions import Companion, Companions
from serve.engine.config import EngineConfig
from serve.engine.evidence import Evidence
from serve.engine.pools import pool_blocks
from serve.engine.request import FinishReason, Item, Sequence, State
from serve.engine.runner import Runner, Stats
from serve.engine.sampler import Choice, Sampler, top_logprobs
from serve.engine.sampling_params import SamplingParams
from serve.engine.scheduler import Scheduler
from serve.engine.stats import EngineStats
from serve.engine.summaries import Summaries
from serve.kv import Policy
from serve.kv.eviction import EvictionLedger
from serve.kv.positional_certificate import positional_certificate
from serve.kv.selection import check_sharing

log = logging.getLogger(__name__)


# What callers read when a step ran out of memory twice.
OUT_OF_MEMORY = (
    "the device ran out of memory; lower engine.max_num_seqs, engine.max_num_batched_tokens or "
    "engine.cache_bytes"
)


class EngineCore:
    """Continuous batching of requests over one model and one pool.

    Args:
        model: Model in evaluation mode on its device, ours or any as a ``Decoder``.
        config: Engine settings.
        policy: Cache policy; None or one without a budget never compacts.
        stats: Calibration statistics of each layer, for policies that need them.
        ledger: Bounds what eviction did to the logits, token by token; None bounds nothing.
        eos_ids: Tokens that end a text unless its parameters ignore them.

    Raises:
        ConfigError: for a policy whose heads cannot share sets in this model.
    """

    def __init__(
        self,
        model: LipschitzTransformer | Decoder,
        config: EngineConfig | None = None,
        policy: Policy | None = None,
        stats: Stats = None,
        ledger: EvictionLedger | None = None,
        eos_ids: Collection[int] = (),
    ) -> None:
        self.decoder, self.config = as_decoder(model), config or EngineConfig()
        self.policy, self.stats = policy, None if stats is None else list(stats)
        decoder, config = self.decoder, self.config
        if policy is not None:
            check_sharing(policy, decoder.layers)
        blocks = BlockManager(pool_blocks(decoder, config), config.block_size)
        salt = f"{decoder.fingerprint} {decoder.dtype}" if config.prefix_caching else ""
        self.scheduler = Scheduler(config, blocks, salt)
        self.admission = Admission(decoder.vocab_size, decoder.context, policy, eos_ids)
        self.ledger = ledger
        self.companions = accompany(decoder, policy, ledger)
        self.runner = Runner(
            decoder, blocks.num_blocks, blocks.block_size, config.backend, self.companions
        )
        # Companions listen to every step, and a recorded one cannot be listened to.
        if not config.enforce_eager and not self.companions.companions:
            self.runner.record(1 if config.deterministic else config.max_num_seqs)
        self.compactor = Compactor(self.scheduler, self.runner, policy, self.stats)
        self.sampler = Sampler()
        self._live: dict[str, list[Sequence]] = {}
        self._names = itertools.count()

    @property
    def has_work(self) -> bool:
        """True while any request waits or runs."""
        return self.scheduler.has_work

    @property
    def counters(self) -> EngineStats:
        """What has happened since the start."""
        return self.scheduler.stats

    def add(
        self,
        prompt: Rows[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        compress: bool = True,
        cache_salt: str = "",
    ) -> Sequence:
        """Queue a request and return its first choice; see ``add_choices``."""
        return self.add_choices(
            prompt, params, request_id=request_id, compress=compress, cache_salt=cache_salt
        )[0]

    def add_choices(
        self,
        prompt: Rows[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        compress: bool = True,
        cache_salt: str = "",
    ) -> list[Sequence]:
        """Queue a request with all of its choices; see ``prepare`` and ``submit``."""
        sequences = self.prepare(
            prompt, params, request_id=request_id, compress=compress, cache_salt=cache_salt
        )
        self.submit(sequences)
        return sequences

    def prepare(
        self,
        prompt: Rows[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        compress: bool = True,
        cache_salt: str = "",
    ) -> list[Sequence]:
        """Check a request and return its choices without queueing them; any thread may call it.

        Args:
            prompt: Token ids.
            params: Sampling parameters; ``max_tokens`` beyond the context ends in "length".
            request_id: Unique name; drawn when absent.
            compress: False keeps this request's cache whole.
            cache_salt: Only requests with the same salt share cached prefixes.

        Returns:
            The state of each choice; finished when ``finish_reason`` is set.

        Raises:
            DataError: if the prompt is empty, foreign to the vocabulary, leaves no room in the
                context, or can never fit the pool.
            ConfigError: for parameters that name tokens outside the vocabulary.
        """
        name = request_id if request_id is not None else f"request-{next(self._names)}"
        requests = self.admission.requests(
            name, prompt, params, compress=compress, cache_salt=cache_salt
        )
        self.scheduler.check_fits(requests[0])
        return [Sequence.start(request) for request in requests]

    def submit(self, sequences: Rows[Sequence]) -> None:
        """Queue the choices of one request; those after the first share its prompt's cache.

        Raises:
            DataError: if a live request has the same name.
        """
        leader = sequences[0]
        name = leader.request.request_id
        if name in self._live:
            raise DataError(f"request id {name!r} is in use; choose another")
        for sequence in sequences:
            self.scheduler.add(sequence, None if sequence is leader else leader)
        self._live[name] = list(sequences)

    def abort(self, request_id: str, reason: FinishReason = "abort") -> None:
        """End all choices of a live request and free their blocks; unknown names are ignored."""
        for sequence in list(self._live.get(request_id, ())):
            self.finish(sequence, reason)

    def finish(self, sequence: Sequence, reason: FinishReason, error: str | None = None) -> None:
        """End one live choice and free its blocks; one that ended already is left alone."""
        name = sequence.request.request_id
        if sequence not in self._live.get(name, ()):
            return
        self._live[name].remove(sequence)
        if not self._live[name]:
            del self._live[name]
        sequence.finish_reason, sequence.error = reason, error
        self.scheduler.finish(sequence, in_doubt=reason == "error")
        self.companions.close(sequence)
        self.sampler.close(sequence)

    def step(self) -> list[Sequence]:
        """Run one scheduling step.

        Returns:
            The sequences that got a token or ended. A fault of the model ends the requests of this
            step with "error"; the others go on.

        Raises:
            AssertionError: if the block accounting is wrong: the engine cannot go on.
            RuntimeError: if the device is lost.
        """
        items = self.scheduler.schedule()
        self._close_preempted()
        if not items:
            assert not self.has_work, "requests wait, yet nothing can run"
            return []
        try:
            changed = self._execute(items)
        except Exception as error:
            changed = self._fail(items, error)
        if self.config.debug:
            self._check()
        return changed

    def _execute(self, items: list[Item]) -> list[Sequence]:
        logits = self._forward_or_shed(items)
        self.scheduler.advance(items)
        ready = [index for index, item in enumerate(items) if item.sequence.remaining == 0]
        sequences = [items[index].sequence for index in ready]
        if ready:
            self._append(sequences, logits if len(ready) == len(items) else logits[ready])
        self.compactor.compact(self.scheduler.due(items))
        return sequences

    def _forward_or_shed(self, items: list[Item]) -> Tensor:
        """Return the logits; short of memory, leave the newest half of the requests for later.

        Companions hear the step again; to them that makes no difference.
        """
        try:
            return self._forward(items)
        except torch.OutOfMemoryError as error:
            log.warning("out of memory, fewer requests run now: %s", first_line(error))
        # Not in the handler: the exception holds the tensors of the failed attempt.
        self.scheduler.shed()
        self._close_preempted()
        items[:] = [item for item in items if item.sequence.state is State.RUNNING]
        if self.decoder.device.type == "cuda":
            torch.cuda.empty_cache()
        return self._forward(items)

    def _close_preempted(self) -> None:
        for sequence in self.scheduler.take_preempted():
            self.companions.close(sequence)

    def _fail(self, items: list[Item], error: Exception) -> list[Sequence]:
        is_short = isinstance(error, torch.OutOfMemoryError)
        reason = OUT_OF_MEMORY if is_short else f"{type(error).__name__}: {first_line(error)}"
        log.error(
            "engine step failed; its %d requests end with an error: %s",
            len(items),
            reason,
            exc_info=None if is_short else error,
        )
        self.counters.failed_steps += 1
        for item in items:
            self.finish(item.sequence, "error", reason)
        self._check()
        if self.decoder.device.type == "cuda":
            # After a sticky device error this raises: nothing can run any more.
            torch.cuda.synchronize(self.decoder.device)
        return [item.sequence for item in items]

    def _check(self) -> None:
        self.scheduler.blocks.check(s.block_table for s in self.scheduler.sequences)

    def _forward(self, items: list[Item]) -> Tensor:
        """Return the logits after the last token of each item (items, V)."""
        groups = [[item] for item in items] if self.config.deterministic else [items]
        if not any(map(_is_scored, items)):
            return torch.cat([self.runner.forward(group) for group in groups])
        spans = [item.count if _is_scored(item) else 1 for item in items]
        parts = [
            self.runner.forward(
                group, spans=[item.count if _is_scored(item) else 1 for item in group]
            )
            for group in groups
        ]
        rows = torch.cat(parts).split(spans)
        for item, logits_TV in zip(items, rows, strict=True):
            if _is_scored(item):
                self._prompt_logprobs(item.sequence, logits_TV)
        return torch.stack([logits_TV[-1] for logits_TV in rows])

    def _prompt_logprobs(self, sequence: Sequence, logits_TV: Tensor) -> None:
        """Note how probable the prompt's next tokens were."""
        first, prompt = sequence.num_tokens, sequence.request.prompt
        following = list(prompt[first + 1 : first + 1 + len(logits_TV)])
        tokens_T = torch.tensor(following, dtype=torch.int64, device=logits_TV.device)
        count = sequence.request.params.prompt_logprobs or 0
        found = top_logprobs(logits_TV[: len(following)], tokens_T, count)
        sequence.prompt_logprobs[first:] = found

    def _append(self, sequences: list[Sequence], logits_RV: Tensor) -> None:
        choices = self.sampler.choose(sequences, logits_RV)
        self.companions.record(sequences, logits_RV)
        for sequence, choice in zip(sequences, choices, strict=True):
            self._take(sequence, choice)

    def _take(self, sequence: Sequence, choice: Choice | None) -> None:
        if choice is None:
            self.counters.corrupted_requests += 1
            self.finish(sequence, "error", "the model's logits are not finite; check its weights")
            return
        sequence.append(choice.token)
        self.counters.generated_tokens += 1
        if choice.logprobs is not None:
            sequence.logprobs.append(choice.logprobs)
        if sequence.finish_reason is not None:
            self.finish(sequence, sequence.finish_reason)


def _is_scored(item: Item) -> bool:
    """Return True if the logits of all of the item's tokens are needed, for the prompt's sake."""
    request = item.sequence.request
    is_asked = request.params.prompt_logprobs is not None and request.choice == 0
    return is_asked and not item.sequence.has_prompt


def accompany(decoder: Decoder, policy: Policy | None, ledger: EvictionLedger | None) -> Companions:
    """Return what accompanies the sequences: the policy's evidence, mean tokens, the proof."""
    companions: list[Companion] = []
    observer = policy.observer(decoder) if policy is not None else None
    if observer is not None:
        companions.append(Evidence(observer))
    summaries = None
    if policy is not None and policy.budget is not None and policy.summary_tokens:
        summaries = Summaries(decoder, policy.summary_tokens)
    if ledger is not None and policy is not None:
        known = positional_certificate(decoder, policy)
        if known is not None:
            log.info("%s", known)
    # The proof needs the outputs before and after the mean tokens.
    last = summaries if ledger is None else DeviationTracker(ledger, summaries)
    if last is not None:
        companions.append(last)
    return Companions(companions)
