"""Runs the model over the paged cache; owns the pools, knows neither scheduling nor text.

All tokens of a step form one flat axis, and the model is called only with its ``attend`` hook
(``attention.py``), so nothing here repeats a layer.
"""

# Legend: N tokens of the step (flat), R decode rows, W table width (blocks), K key/value heads,
# S cached slots, D head width, V vocabulary.

import logging
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Rows
from contextlib import contextmanager

import torch
from torch import Tensor

from serve.decoder import Decoder
from serve.engine.attention import Listener, PagedAttention, TorchAttention
from serve.engine.batch import Batch, BatchBuilder, pad_tables
from serve.engine.blocks import BlockPlan
from serve.engine.companions import Companions
from serve.engine.evidence import Evidence
from serve.engine.graphs import CudaRecorder, DecodeGraphs, Recorder
from serve.engine.kernel_attention import KernelAttention, Rotations
from serve.engine.pools import Pools
from serve.engine.request import Item, Sequence
from serve.kernels import compact_kv
from serve.kernels.backend import use_triton
from serve.kv import Policy
from serve.kv.selection import choose
from serve.kv.view import CacheView, stack_stats

log = logging.getLogger(__name__)

Stats = Rows[Mapping[str, Tensor] | None] | None

# Multiplications of a step below which a second CPU thread does not pay: about 1 ms of one core.
SMALL_WORK = 8_000_000


@contextmanager
def _few_threads(multiplications: int) -> Iterator[None]:
    """Run little work on one thread: on busy cores, waking a second one costs milliseconds."""
    threads = torch.get_num_threads()
    if threads == 1 or multiplications > SMALL_WORK:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Runner:
    """Model and cache pools on one device.

    Args:
        decoder: The model; its dtype is the cache's.
        num_blocks: Blocks in each layer's pool.
        block_size: Slots per block.
        backend: Kernel backend.
        companions: Hear of every attention and compaction.
    """

    def __init__(
        self,
        decoder: Decoder,
        num_blocks: int,
        block_size: int,
        backend: str = "auto",
        companions: Companions | None = None,
    ) -> None:
        self.decoder = decoder
        self.backend = backend
        self.companions = companions or Companions([])
        self.device, self.dtype = decoder.device, decoder.dtype
        self.pools = Pools(decoder, num_blocks, block_size)
        uses_kernels = use_triton(backend, self.pools.layers[0].keys)
        self.rotations = Rotations(decoder) if uses_kernels else None
        # In half precision torch has to copy pages anyway: it sums in float32.
        in_place = not uses_kernels and self.dtype in (torch.float32, torch.float64)
        self.builder = BatchBuilder(block_size, self.device, in_place=in_place)
        self.graphs: DecodeGraphs | None = None

    @torch.inference_mode()
    def record(self, rows: int, recorder: Recorder | None = None) -> None:
        """Record decode steps of up to ``rows`` rows, to be replayed from now on.

        The cache must be empty. Without a recorder only steps on CUDA kernels are recorded. A model
        that cannot be recorded stays as it is, with a warning that says why.
        """
        if recorder is None:
            if self.rotations is None or self.device.type != "cuda":
                return
            recorder = CudaRecorder()
        width = -(-self.decoder.context // self.pools.block_size)
        try:
            self.graphs = DecodeGraphs(self._run, rows, width, self.device, recorder)
        except RuntimeError as error:
            log.warning("decode steps run without graphs: recording failed: %s", error)

    @torch.inference_mode()
    def forward(
        self, items: list[Item], *, spans: Rows[int] | None = None, as_decodes: bool = False
    ) -> Tensor:
        """Run the next tokens of each item and write their keys and values to the cache.

        The caller has allocated the slots, and advances the sequences afterwards.

        Args:
            items: What to run; lengths of the sequences are those before the step.
            spans: Of each item, how many of its last tokens the logits are wanted; one by default.
            as_decodes: Treat every token as a decode row (same result up to rounding) and return
                the logits of all of them: teacher forcing over a compressed cache.

        Returns:
            Logits (items, V) after each item's last token, or (M, V) after those of ``spans``; all
            tokens (N, V) with ``as_decodes``.
        """
        batch = self.builder.build(items, spans=spans, as_decodes=as_decodes)
        listener = self.companions.listener(
            batch.sequences, [chunk.sequence for chunk in batch.chunks]
        )
        if self.graphs is not None and listener is None and self.graphs.fits(batch):
            logits_RV = self.graphs.run(batch)
            return logits_RV if batch.last_M is None else logits_RV[batch.last_M]
        with _few_threads(self.decoder.num_parameters * len(batch.tokens_N)):
            return self._run(batch, listener)

    def _run(self, batch: Batch, listener: Listener | None = None) -> Tensor:
        attend: PagedAttention
        if self.rotations is None:
            layers = self.decoder.layers
            attend = TorchAttention(layers, self.pools, batch, self.backend, listener)
        else:
            rest = (self.rotations, self.backend, listener)
            attend = KernelAttention(self.decoder, self.pools, batch, *rest)
        return self.decoder.forward(batch.tokens_N, batch.positions_N, attend, batch.last_M)

    @torch.inference_mode()
    def compact(
        self, rows: list[tuple[Sequence, BlockPlan]], policy: Policy, stats: Stats = None
    ) -> None:
        """Choose the slots that each sequence keeps, per layer and head, and move them.

        Args:
            rows: Sequences with the blocks their slots move to.
            policy: Chooses the slots.
            stats: Calibration statistics of each layer, for policies that need them.
        """
        by_budget: dict[int, list[tuple[Sequence, BlockPlan]]] = {}
        for sequence, plan in rows:
            compaction = sequence.request.compaction
            assert compaction is not None, "only such sequences are compacted"
            by_budget.setdefault(compaction.budget, []).append((sequence, plan))
        for budget, part in by_budget.items():
            self._compact(part, policy, stats, budget)

    def _compact(
        self, rows: list[tuple[Sequence, BlockPlan]], policy: Policy, stats: Stats, budget: int
    ) -> None:
        sequences = [sequence for sequence, _ in rows]
        if self.rotations is None:
            self.pools.wipe([block for _, plan in rows for block in plan.fresh])
        tables_RW = pad_tables([list(plan.source) for _, plan in rows], self.device)
        targets_RW = pad_tables([list(plan.target) for _, plan in rows], self.device)
        views = self._views(sequences, tables_RW, stats)
        for view, keep_RKS in zip(views, choose(policy, views, budget), strict=True):
            self.companions.compacting(view, sequences, keep_RKS)
            targets = self.pools.group_tables(view.layers, targets_RW)
            pools = (view.k_pool, view.v_pool, view.pos_pool)
            compact_kv(pools, view.tables_RN, keep_RKS, targets, backend=self.backend)

    def _views(self, sequences: list[Sequence], tables_RW: Tensor, stats: Stats) -> list[CacheView]:
        evidence = next((c for c in self.companions.companions if isinstance(c, Evidence)), None)
        rows = [] if evidence is None else evidence.rows(sequences)
        views = []
        for group, pool in zip(self.pools.groups, self.pools.group_pools, strict=True):
            specs, layers = [self.decoder.layers[layer] for layer in group], len(group)
            biases = [spec.bias_HT for spec in specs if spec.bias_HT is not None]
            view = CacheView(
                layers=group,
                spec=specs[0],
                bias_LHT=torch.stack(biases) if biases else None,
                context=self.decoder.context,
                k_pool=pool.keys,
                v_pool=pool.values,
                pos_pool=pool.positions,
                tables_RN=self.pools.group_tables(group, tables_RW),
                lengths_R=self._tensor([s.kv_len for s in sequences] * layers),
                positions_R=self._tensor([s.num_tokens for s in sequences] * layers),
                prompts_R=self._tensor([len(s.request.prompt) for s in sequences] * layers),
                seeds_R=self._tensor([s.request.seed for s in sequences] * layers),
                stats=stack_stats(stats, group),
                observed={} if evidence is None else evidence.observer.observed(group, rows),
                backend=self.backend,
            )
            views.append(view)
        return views

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)
