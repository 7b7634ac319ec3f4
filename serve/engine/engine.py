"""The engine core: ``add``, ``abort``, ``step``; no threads, no text, no HTTP.

What is guaranteed about a request's tokens: they depend on its prompt, its parameters and its seed
alone. In the default mode the logits also carry rounding that depends on the batch (matrix
products of other shapes), so a token can differ where two candidates tie to about 1e-6 in float32;
``deterministic=true`` removes that too, bit for bit, for the same engine settings and threads.
"""

import itertools
import logging
import secrets
from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from common.errors import DataError
from common.models import LipschitzTransformer
from serve.decoder import Decoder, as_decoder
from serve.engine.blocks import BlockManager
from serve.engine.certified import DeviationTracker
from serve.engine.companions import Companion, Companions
from serve.engine.evidence import Evidence
from serve.engine.pools import block_bytes
from serve.engine.request import (
    FinishReason,
    Item,
    Request,
    SamplingParams,
    Sequence,
    new_tokens_limit,
)
from serve.engine.runner import Runner, Stats
from serve.engine.sampler import Choice, sample
from serve.engine.scheduler import Compaction, EngineConfig, Scheduler
from serve.engine.summaries import Summaries
from serve.kv import Policy
from serve.kv.eviction import EvictionLedger

log = logging.getLogger(__name__)


def pool_blocks(decoder: Decoder, config: EngineConfig) -> int:
    """Return the number of blocks: as configured, or for ``max_num_seqs`` contexts within bytes."""
    if config.num_blocks is not None:
        return config.num_blocks
    per_context = -(-decoder.context // config.block_size)
    size = block_bytes(decoder.layers, config.block_size, decoder.dtype)
    return max(per_context, min(config.max_num_seqs * per_context, config.cache_bytes // size))


class EngineCore:
    """Continuous batching of requests over one model and one pool.

    Args:
        model: Model in evaluation mode on its device, ours or any as a ``Decoder``.
        config: Engine settings.
        policy: Cache policy; None or one without a budget never compacts.
        stats: Calibration statistics of each layer, for policies that need them.
        ledger: Bounds what eviction did to the logits, token by token; None bounds nothing.
    """

    def __init__(
        self,
        model: LipschitzTransformer | Decoder,
        config: EngineConfig | None = None,
        policy: Policy | None = None,
        stats: Stats = None,
        ledger: EvictionLedger | None = None,
    ) -> None:
        self.decoder, self.config = as_decoder(model), config or EngineConfig()
        self.policy, self.stats = policy, None if stats is None else list(stats)
        blocks = BlockManager(pool_blocks(self.decoder, self.config), self.config.block_size)
        compaction = None
        if policy is not None and policy.budget is not None:
            compaction = Compaction(budget=policy.budget, interval=policy.interval)
        self.scheduler = Scheduler(self.config, blocks, compaction)
        self.ledger = ledger
        self.companions = accompany(self.decoder, policy, ledger)
        self.runner = Runner(
            self.decoder,
            blocks.num_blocks,
            blocks.block_size,
            self.config.backend,
            self.companions,
        )
        self._live: dict[str, Sequence] = {}
        self._names = itertools.count()

    @property
    def has_work(self) -> bool:
        """True while any request waits or runs."""
        return self.scheduler.has_work

    def add(
        self,
        prompt: Rows[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        compress: bool = True,
    ) -> Sequence:
        """Queue a request.

        Args:
            prompt: Token ids.
            params: Sampling parameters; ``max_tokens`` beyond the context ends in "length".
            request_id: Unique name; drawn when absent.
            compress: False keeps this request's cache whole.

        Returns:
            Its live state; finished when ``finish_reason`` is set.

        Raises:
            DataError: if the prompt is empty, foreign to the vocabulary, leaves no room in the
                context, or can never fit the pool.
        """
        check_prompt(prompt, self.decoder.vocab_size, self.decoder.context)
        name = request_id if request_id is not None else f"request-{next(self._names)}"
        if name in self._live:
            raise DataError(f"request id {name!r} is in use; choose another")
        seed = secrets.randbits(63) if params.seed is None else params.seed
        limit = new_tokens_limit(len(prompt), self.decoder.context, params.max_tokens)
        request = Request(
            request_id=name,
            prompt=tuple(prompt),
            params=params,
            seed=seed,
            max_total=limit,
            compress=compress,
        )
        sequence = Sequence.start(request)
        self.scheduler.add(sequence)
        self._live[name] = sequence
        return sequence

    def abort(self, request_id: str, reason: FinishReason = "abort") -> None:
        """End a live request and free its blocks; unknown names are ignored."""
        sequence = self._live.get(request_id)
        if sequence is not None:
            self._finish(sequence, reason)

    def step(self) -> list[Sequence]:
        """Run one scheduling step.

        Returns:
            The sequences that got a token or ended. A fault of the model ends the requests of this
            step with "error"; the others go on.
        """
        items = self.scheduler.schedule()
        if not items:
            assert not self.has_work, "requests wait, yet nothing can run"
            return []
        try:
            changed = self._execute(items)
        except Exception as error:
            log.exception("engine step failed; its %d requests end with an error", len(items))
            changed = [item.sequence for item in items]
            for sequence in changed:
                if sequence.finish_reason is None:
                    self._finish(sequence, "error", f"{type(error).__name__}: {error}")
        if self.config.debug:
            self.scheduler.blocks.check(s.block_table for s in self.scheduler.sequences)
        return changed

    def _execute(self, items: list[Item]) -> list[Sequence]:
        logits = self._forward(items)
        for item in items:
            item.sequence.advance(item.count)
        ready = [index for index, item in enumerate(items) if item.sequence.remaining == 0]
        sequences = [items[index].sequence for index in ready]
        if ready:
            self._append(sequences, logits if len(ready) == len(items) else logits[ready])
        self._compact(self.scheduler.due(items))
        return sequences

    def _forward(self, items: list[Item]) -> Tensor:
        groups = [[item] for item in items] if self.config.deterministic else [items]
        return torch.cat([self.runner.forward(group) for group in groups])

    def _append(self, sequences: list[Sequence], logits_RV: Tensor) -> None:
        requests = [sequence.request for sequence in sequences]
        choices = sample(
            logits_RV,
            [request.params for request in requests],
            [request.seed for request in requests],
            [sequence.num_tokens for sequence in sequences],
        )
        self.companions.record(sequences, logits_RV)
        for sequence, choice in zip(sequences, choices, strict=True):
            self._take(sequence, choice)

    def _take(self, sequence: Sequence, choice: Choice | None) -> None:
        if choice is None:
            self._finish(sequence, "error", "the model's logits are not finite; check its weights")
            return
        sequence.append(choice.token)
        if choice.logprobs is not None:
            sequence.logprobs.append(choice.logprobs)
        if sequence.finish_reason is not None:
            self._finish(sequence, sequence.finish_reason)

    def _compact(self, due: list[Sequence]) -> None:
        groups = [[sequence] for sequence in due] if self.config.deterministic else [due]
        for group in filter(None, groups):
            assert self.policy is not None
            budget, blocks = self.policy.budget or 0, self.scheduler.blocks
            rows = [(s, blocks.plan_compaction(s.block_table, budget)) for s in group]
            try:
                self.runner.compact(rows, self.policy, self.stats)
            except BaseException:
                for _, plan in rows:
                    blocks.cancel_compaction(plan)
                raise
            for sequence, plan in rows:
                self.scheduler.compacted(sequence, plan)

    def _finish(self, sequence: Sequence, reason: FinishReason, error: str | None = None) -> None:
        sequence.finish_reason, sequence.error = reason, error
        self.scheduler.finish(sequence)
        self.companions.close(sequence)
        self._live.pop(sequence.request.request_id, None)


def accompany(decoder: Decoder, policy: Policy | None, ledger: EvictionLedger | None) -> Companions:
    """Return what accompanies the sequences: the policy's evidence, mean tokens, the proof."""
    companions: list[Companion] = []
    observer = policy.observer(decoder) if policy is not None else None
    if observer is not None:
        companions.append(Evidence(observer))
    if policy is not None and policy.budget is not None and policy.summary_tokens:
        companions.append(Summaries(decoder, policy.summary_tokens))
    if ledger is not None:
        companions.append(DeviationTracker(ledger))
    return Companions(companions)


def check_prompt(prompt: Rows[int], vocab_size: int, context: int) -> None:
    """Raise ``DataError`` unless the prompt is usable with this vocabulary and context."""
    if len(prompt) == 0:
        raise DataError("prompt is empty: expected at least one token; add text")
    if len(prompt) >= context:
        raise DataError(
            f"prompt has {len(prompt)} tokens, the model's context is {context} and must hold at"
            " least one new token; shorten the prompt"
        )
    for token in prompt:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
            raise DataError(
                f"prompt token {token!r}: expected an integer from 0 to {vocab_size - 1}; "
                "encode the text with this model's tokenizer"
            )
