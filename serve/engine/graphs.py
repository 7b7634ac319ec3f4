"""Decode steps recorded once per size and replayed: no Python and one launch instead of hundreds.

A step of R rows runs in the smallest recorded size that holds it. Rows of padding have no cache
(length 0) and write nothing (slot -1). Steps with prompt chunks, or to which companions listen, are
not recorded.
"""

# Legend: R rows, W table width (blocks), V vocabulary.

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from serve.engine.batch import Batch, Tables

log = logging.getLogger(__name__)

SMALL = (1, 2, 4)
STEP = 8  # sizes above SMALL are its multiples
PADDING = -1


def sizes_up_to(rows: int) -> list[int]:
    """Return the recorded sizes: 1, 2, 4, 8, 16, 24, ... and ``rows`` itself."""
    sizes = {size for size in (*SMALL, *range(STEP, rows, STEP)) if size < rows}
    return sorted(sizes | {rows})


class Recorder(ABC):
    """Records a computation on fixed tensors."""

    @abstractmethod
    def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Return what repeats ``run`` on whatever its input tensors then hold."""


class CudaRecorder(Recorder):
    """CUDA graphs that share one memory pool; the largest is to be recorded first."""

    def __init__(self) -> None:
        self._pool: tuple[int, int] | None = None

    def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Compile and warm up, then capture."""
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = run()
        self._pool = graph.pool()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


class DecodeGraphs:
    """Recorded decode steps.

    Args:
        run: Runs a batch of decode rows and returns their logits (R, V).
        rows: Most rows of a step.
        width: Blocks of the longest table.
        device: Where the batch lives.
        recorder: How to record.
    """

    def __init__(
        self,
        run: Callable[[Batch], Tensor],
        rows: int,
        width: int,
        device: torch.device,
        recorder: Recorder,
    ) -> None:
        self.sizes = sizes_up_to(rows)
        start = time.perf_counter()
        integers = torch.zeros(3, rows, dtype=torch.int64, device=device)
        self._tokens_R, self._positions_R, self._slots_R = integers
        self._slots_R.fill_(PADDING)
        self._lengths_R = torch.zeros(rows, dtype=torch.int32, device=device)
        self._tables_RW = torch.zeros(rows, width, dtype=torch.int32, device=device)
        self._held: Tables | None = None
        self._replays = {size: self._record(run, size, recorder) for size in reversed(self.sizes)}
        seconds = time.perf_counter() - start
        log.info("recorded decode steps of %s rows in %.1f s", self.sizes, seconds)

    def fits(self, batch: Batch) -> bool:
        """Return True if the batch is one of decode rows alone, and not too many."""
        fits = batch.tables.padded_RW.shape[1] <= self._tables_RW.shape[1]
        return fits and not batch.chunks and 0 < batch.decodes <= self.sizes[-1]

    def run(self, batch: Batch) -> Tensor:
        """Return the logits (R, V) of a batch that fits."""
        rows = batch.decodes
        size = next(size for size in self.sizes if size >= rows)
        if batch.tables is not self._held:
            self._held = batch.tables
            self._tables_RW[:rows, : batch.tables.padded_RW.shape[1]] = batch.tables.padded_RW
        into = (self._tokens_R, self._positions_R, self._slots_R, self._lengths_R)
        news = (batch.tokens_N, batch.positions_N, batch.slots_N, batch.lengths_R)
        for static_R, new_R in zip(into, news, strict=True):
            static_R[:rows] = new_R
        self._slots_R[rows:size] = PADDING
        self._lengths_R[rows:size] = 0
        # The next replay writes over its result.
        return self._replays[size]()[:rows].clone()

    def _record(
        self, run: Callable[[Batch], Tensor], size: int, recorder: Recorder
    ) -> Callable[[], Tensor]:
        tables_RW = self._tables_RW[:size]
        batch = Batch(
            tokens_N=self._tokens_R[:size],
            positions_N=self._positions_R[:size],
            slots_N=self._slots_R[:size],
            lengths_R=self._lengths_R[:size],
            tables=Tables([[]] * size, tables_RW),
            sequences=[],
            chunks=[],
            last_M=None,
            opened=[],
        )
        return recorder.record(lambda: run(batch))
