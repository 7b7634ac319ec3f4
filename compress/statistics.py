"""One pass over the dense model that collects the second moments of every target."""

# Legend: N calibration inputs (sequences or images).

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from common.errors import DataError
from compress.adapters import Adapter, captured
from compress.grams import Moments
from compress.targets import Target

log = logging.getLogger(__name__)

BATCH_NUMBERS = 16384
"""Input numbers (tokens, pixels) processed at a time."""
ROWS_PER_INPUT = 2


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Statistics:
    """Second moments of every target's inputs.

    Attributes:
        fitted: Per target name, of the inputs that choose and fit.
        held: Of the inputs held out, which only measure the error; the same as ``fitted`` where
            nothing is held out.
    """

    fitted: dict[str, Moments]
    held: dict[str, Moments]


@torch.no_grad()
def collect(
    adapter: Adapter, inputs: Tensor, targets: Sequence[Target], *, holdout: float = 0.1
) -> Statistics:
    """Run the dense model once and collect the statistics of all targets together.

    Args:
        adapter: The model.
        inputs: Tokens (N, T) or images (N, ...).
        targets: Where to listen.
        holdout: Fraction of the inputs to hold out, see ``split_held``.
    """
    device = next(adapter.model.parameters()).device
    parts = []
    for part in split_held(inputs, holdout):
        moments = {target.name: Moments(target.inputs, device) for target in targets}

        def receive(target: Target, rows: Tensor, into: dict[str, Moments] = moments) -> None:
            into[target.name].update(rows)

        with captured(adapter, targets, receive):
            for batch in batches(part):
                run(adapter, batch)
        parts.append(moments)
    fitted, held = parts
    for target in targets:
        warn_if_few(fitted[target.name], target)
    return Statistics(fitted=fitted, held=held if len(inputs) > 1 and holdout > 0 else fitted)


def run(adapter: Adapter, batch: Tensor) -> Any:
    """Return the last stream of a batch."""
    stream = adapter.start(batch)
    for stage in adapter.stages():
        stream = stage.run(stream)
    return stream


def split_held(inputs: Tensor, holdout: float) -> tuple[Tensor, Tensor]:
    """Return the inputs to fit on and the last ones, which are held out.

    Args:
        inputs: Tokens or images (N, ...), at least one.
        holdout: Fraction to hold out; at least one input unless zero or the only one.

    Raises:
        DataError: when there is none.
    """
    count = len(inputs)
    if count < 1:
        raise DataError(f"{count} calibration sequences: expected at least 1; add text")
    held = min(count - 1, max(1, round(holdout * count))) if holdout > 0 else 0
    return inputs[: count - held], inputs[count - held :]


def batches(inputs: Tensor) -> tuple[Tensor, ...]:
    """Split inputs (N, ...) into batches of about ``BATCH_NUMBERS`` numbers."""
    if not len(inputs):
        return ()
    return inputs.split(max(1, BATCH_NUMBERS // inputs[0].numel()))


def warn_if_few(moments: Moments, target: Target) -> None:
    """Warn when the Gram matrix of a target cannot have full rank with some reserve."""
    if moments.count < ROWS_PER_INPUT * target.inputs:
        log.warning(
            "%s: %d calibration rows for %d inputs: the fit is unreliable below %d; "
            "raise compress.tokens",
            target.name,
            moments.count,
            target.inputs,
            ROWS_PER_INPUT * target.inputs,
        )
