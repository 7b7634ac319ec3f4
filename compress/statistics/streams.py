"""The activations of the calibration inputs, moved through the model stage by stage.

Only the stream of one position in depth is held, so that memory does not grow with depth.
"""

# Legend: N calibration inputs.

from typing import Any

import torch
from torch import Tensor

from compress.adapters import Adapter, Stage, rows_of
from compress.statistics.collect import batches, split_held
from compress.statistics.grams import Moments
from compress.targets import Target


class Streams:
    """Streams of all calibration batches at one depth.

    Args:
        adapter: The model that is being pruned; its present weights move the streams.
        inputs: Tokens (N, T) or images (N, ...).
        holdout: Fraction of the inputs to hold out, see ``split_held``.
    """

    @torch.no_grad()
    def __init__(self, adapter: Adapter, inputs: Tensor, holdout: float):
        self.adapter = adapter
        fitted, held = (batches(part) for part in split_held(inputs, holdout))
        self.fitted: list[Any] = [adapter.start(batch) for batch in fitted]
        self.held: list[Any] = [adapter.start(batch) for batch in held]

    def moments(self, stage: Stage, target: Target) -> tuple[Moments, Moments]:
        """Return the statistics of what enters a target: fitted part and held-out part.

        With nothing held out both are the fitted part.
        """
        fitted = self._moments(self.fitted, stage, target)
        return fitted, self._moments(self.held, stage, target) if self.held else fitted

    @torch.no_grad()
    def advance(self, stage: Stage) -> None:
        """Replace every stream by what the stage makes of it."""
        for streams in (self.fitted, self.held):
            streams[:] = [stage.run(stream) for stream in streams]

    def _moments(self, streams: list[Any], stage: Stage, target: Target) -> Moments:
        device = next(self.adapter.model.parameters()).device
        total = Moments(target.inputs, device)
        for stream in streams:
            total.update(rows_of(self.adapter, stage, target, stream))
        return total
