"""What a model costs before pruning, and how long one of its blocks takes at other widths.

The seconds are measurements on the device at hand, of the stage that holds a place, cut to the
width in question, on the first calibration batch.
"""

import time
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from compress.adapters import Adapter, Stage, adapter_for
from compress.statistics.collect import batches
from compress.targets import Target, block_indices


class StageClock:
    """Costs of a dense model.

    Args:
        adapter: The model.
        inputs: Calibration inputs; one batch of them is run.
    """

    def __init__(self, adapter: Adapter, inputs: Tensor):
        self.adapter = adapter
        self.batch = batches(inputs)[0]
        self._stages: dict[tuple[str, int], Stage] = {}
        self._streams: dict[str, Any] = {}

    def total(self, kind: str) -> float:
        """Return the cost of the whole model.

        Args:
            kind: ``params``; ``flops``: operations per token or image; ``latency``: seconds of
                one batch, the median of a few runs.
        """
        if kind == "params":
            return float(sum(tensor.numel() for tensor in self.adapter.model.parameters()))
        if kind == "flops":
            one = self.batch[:1]
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                self.adapter.model(one)
            is_text = not one.is_floating_point()
            return counter.get_total_flops() / (one.numel() if is_text else 1)
        runs = sorted(self._timed(lambda: self.adapter.model(self.batch)) for _ in range(10))
        return runs[len(runs) // 2]

    def seconds(self, target: Target, kept: int) -> float:
        """Return the time of one run of a target's stage with its first components kept."""
        key = (target.name, kept)
        if key not in self._stages:
            inputs = block_indices(torch.arange(kept), target.unit)
            narrow = adapter_for(self.adapter.cut({target.name: inputs}))
            self._stages[key] = _stage_of(narrow, target)
            self._streams.setdefault(target.name, self._entering(target))
        stage, stream = self._stages[key], self._streams[target.name]
        return self._timed(lambda: stage.run(stream))

    @torch.no_grad()
    def _entering(self, target: Target) -> Any:
        stream = self.adapter.start(self.batch)
        for stage in self.adapter.stages():
            if target.name in stage.targets:
                break
            stream = stage.run(stream)
        return stream

    @torch.no_grad()
    def _timed(self, work: Any) -> float:
        is_cuda = next(self.adapter.model.parameters()).is_cuda
        if is_cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began


def _stage_of(adapter: Adapter, target: Target) -> Stage:
    return next(stage for stage in adapter.stages() if target.name in stage.targets)
