"""What a model costs before pruning, and how long its stages take at other widths.

The seconds are measurements on the device at hand, of the stages whose maps narrow with a place,
cut to the width in question, on the first calibration batch.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from compress.adapters import Adapter, Stage, adapter_for, evaluating
from compress.statistics.collect import batches
from compress.targets import Target, block_indices

RUNS = 10
"""Runs of the whole model, whose median counts."""


class StageClock:
    """Costs of a dense model.

    Args:
        adapter: The model.
        inputs: Calibration inputs; one batch of them is run.
    """

    def __init__(self, adapter: Adapter, inputs: Tensor):
        self.adapter, self._inputs = adapter, inputs
        self._stages: dict[tuple[str, int], Sequence[Stage]] = {}
        self._streams: dict[str, Any] = {}

    @cached_property
    def batch(self) -> Tensor:
        """The first calibration batch, as the model takes it."""
        return self.adapter.inputs(batches(self._inputs)[0])

    def total(self, kind: str) -> float:
        """Return the cost of the whole model.

        Args:
            kind: ``params``; ``flops``: operations per token or image; ``latency``: seconds of
                one batch, the median of a few runs.
        """
        if kind == "params":
            return float(sum(tensor.numel() for tensor in self.adapter.model.parameters()))
        if kind == "flops":
            return self.adapter.flops(self.batch)
        with evaluating(self.adapter.model):
            return statistics.median(
                self._timed(lambda: self.adapter.model(self.batch)) for _ in range(RUNS)
            )

    def seconds(self, target: Target, kept: int) -> float:
        """Return the time of one run of a target's stages with its first components kept."""
        key = (target.name, kept)
        if key not in self._stages:
            inputs = block_indices(torch.arange(kept), target.unit)
            narrow = adapter_for(self.adapter.cut({target.name: inputs}), self.batch)
            before = self._before(target)
            self._stages[key] = narrow.stages()[before : before + self.adapter.reach]
            if target.name not in self._streams:
                self._streams[target.name] = self._entering(before)
        stages, stream = self._stages[key], self._streams[target.name]
        return self._timed(lambda: _through(stages, stream))

    def _before(self, target: Target) -> int:
        """Return the number of stages before those that narrow with a target."""
        stages = self.adapter.stages()
        own = next(i for i, stage in enumerate(stages) if target.name in stage.targets)
        return own + 1 - self.adapter.reach

    @torch.no_grad()
    def _entering(self, before: int) -> Any:
        return _through(self.adapter.stages()[:before], self.adapter.start(self.batch))

    @torch.no_grad()
    def _timed(self, work: Callable[[], Any]) -> float:
        is_cuda = next(self.adapter.model.parameters()).is_cuda
        if is_cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began


def _through(stages: Sequence[Stage], stream: Any) -> Any:
    for stage in stages:
        stream = stage.run(stream)
    return stream
