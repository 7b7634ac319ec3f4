"""Teacher forcing through the paged cache: given tokens, compacted as generation would do it."""

# Legend: N windows, T tokens, V vocabulary.

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from common.models import LipschitzTransformer
from serve.decoder import Decoder, as_decoder
from serve.engine.blocks import BlockManager
from serve.engine.config import EngineConfig
from serve.engine.engine import accompany
from serve.engine.request import Compaction, Item, Request
from serve.engine.request import Sequence as Running
from serve.engine.runner import Runner, Stats
from serve.engine.sampling_params import SamplingParams
from serve.kv import Policy
from serve.kv.eviction import EvictionLedger

SPEED_TOKENS = 16  # single-token steps at the end of each window that measure the decode speed
PAIRS = 1 << 17  # (query, slot) pairs of a chunk: bounds the memory of gathered keys


@dataclass(frozen=True, slots=True)
class Replay:
    """A teacher-forced pass over a compressed cache.

    Attributes:
        logits_NTV: Logits after each token.
        kept_T: Cached / seen tokens when each token attends; the same for all windows.
        certified_N: Certified deviation at the end of each window; None without a ledger.
        keeps_top1_NT: Where the most probable token is proved to be the full cache's, or None.
        tokens_per_s: Decode speed over the last tokens.
    """

    logits_NTV: Tensor
    kept_T: Tensor
    certified_N: Tensor | None
    keeps_top1_NT: Tensor | None
    tokens_per_s: float


def replay(
    model: LipschitzTransformer | Decoder,
    tokens_NT: Tensor,
    policy: Policy | None = None,
    stats: Stats = None,
    ledger: EvictionLedger | None = None,
    config: EngineConfig | None = None,
) -> Replay:
    """Run given tokens through the paged cache as if they were generated one by one.

    Tokens between two compactions see the same cache, so they run as one chunk; the last ones run
    singly, for the clock. A certified figure of a chunk holds for each of its tokens.

    Args:
        model: Model in evaluation mode.
        tokens_NT: Windows of equal length, at most the context.
        policy: Cache policy; None keeps every token.
        stats: Calibration statistics of each layer.
        ledger: Bounds the deviation.
        config: Block size and backend.
    """
    config = config or EngineConfig()
    session = Session(as_decoder(model), tokens_NT, policy, stats, ledger, config)
    length, tail = tokens_NT.shape[1], min(SPEED_TOKENS, tokens_NT.shape[1] // 2)
    session.advance(length - tail)
    start = time.perf_counter()
    session.advance(length, one_by_one=True)
    seconds = time.perf_counter() - start
    session.close()
    keeps = torch.cat(session.keeps, dim=1) if ledger is not None else None
    return Replay(
        torch.cat(session.logits, dim=1),
        torch.tensor(session.kept, dtype=torch.float64),
        session.certified_N,
        keeps,
        len(tokens_NT) * tail / seconds if tail else 0.0,
    )


class Session:
    """Windows of equal length in lockstep over one pool; see ``replay`` for the arguments."""

    def __init__(
        self,
        decoder: Decoder,
        tokens_NT: Tensor,
        policy: Policy | None,
        stats: Stats,
        ledger: EvictionLedger | None,
        config: EngineConfig,
    ) -> None:
        self.policy, self.stats, self.ledger = policy, stats, ledger
        self.trigger = math.inf if policy is None or policy.trigger is None else policy.trigger
        slots = int(min(tokens_NT.shape[1], self.trigger))
        per_window = -(-slots // config.block_size)
        self.blocks = BlockManager(per_window * len(tokens_NT), config.block_size)
        self.companions = accompany(decoder, policy, ledger)
        self.runner = Runner(
            decoder, self.blocks.num_blocks, config.block_size, config.backend, self.companions
        )
        self.sequences = [
            _running(index, row, policy) for index, row in enumerate(tokens_NT.tolist())
        ]
        self.chunk = max(1, PAIRS // (slots * len(tokens_NT)))
        self.logits: list[Tensor] = []
        self.keeps: list[Tensor] = []
        self.kept: list[float] = []
        self.certified_N: Tensor | None = None

    def advance(self, length: int, *, one_by_one: bool = False) -> None:
        """Run all windows up to a logical length."""
        first = self.sequences[0]
        while first.num_tokens < length:
            room = min(self.trigger - first.kv_len, 1 if one_by_one else self.chunk)
            self._run(int(min(length - first.num_tokens, room)))
            if first.kv_len >= self.trigger:
                self._compact()

    def close(self) -> None:
        """Give back the ledger rows."""
        for sequence in self.sequences:
            self.companions.close(sequence)

    def _run(self, count: int) -> None:
        items = [Item(sequence=sequence, count=count) for sequence in self.sequences]
        for sequence in self.sequences:
            self.blocks.grow(sequence.block_table, sequence.kv_len + count)
        logits = self.runner.forward(items, as_decodes=True)
        logits_NTV = logits.unflatten(0, (len(items), count))
        self.logits.append(logits_NTV)
        first = self.sequences[0]
        self.kept += [(first.kv_len + i) / (first.num_tokens + i) for i in range(1, count + 1)]
        for sequence in self.sequences:
            sequence.advance(count)
        self._record(logits_NTV)

    def _record(self, logits_NTV: Tensor) -> None:
        if self.ledger is None:
            return
        rows = [row for s in self.sequences if (row := s.ledger_row) is not None]
        if not rows:
            self.certified_N = torch.zeros(len(self.sequences), dtype=torch.float64)
            self.keeps.append(torch.ones(logits_NTV.shape[:2], dtype=torch.bool))
            return
        deviation = self.ledger.deviation(rows)
        self.certified_N = deviation.logits_R.cpu()
        steps = [deviation.keeps_top1(logits_NV) for logits_NV in logits_NTV.unbind(1)]
        self.keeps.append(torch.stack(steps, dim=1).cpu())

    def _compact(self) -> None:
        assert self.policy is not None
        budget = self.policy.budget or 0
        rows = [(s, self.blocks.plan_compaction(s.block_table, budget)) for s in self.sequences]
        self.runner.compact(rows, self.policy, self.stats)
        for sequence, plan in rows:
            self.blocks.commit_compaction(sequence.block_table, plan)
            sequence.kv_len, sequence.compressed = budget, True


def _running(index: int, tokens: list[int], policy: Policy | None) -> Running:
    compaction = None
    if policy is not None and policy.budget is not None:
        budget = policy.budget_for(len(tokens))
        compaction = Compaction(budget=budget, interval=policy.interval)
    request = Request(
        request_id=str(index),
        prompt=tuple(tokens),
        params=SamplingParams(),
        seed=0,
        max_total=len(tokens) + 1,
        compaction=compaction,
    )
    return Running.start(request)
