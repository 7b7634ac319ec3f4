"""One pass over the dense model that collects the second moments of every target.

The pass can be shared out to processes, and be interrupted and go on.
"""

# Legend: N calibration inputs (sequences or images).

import contextlib
import hashlib
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from common.certificate import tensor_sha256, tensors_sha256
from common.errors import DataError
from compress.adapters import Adapter, captured
from compress.statistics.grams import Moments
from compress.statistics.grams import Statistics as Statistics
from compress.statistics.storage import Progress, read_statistics, save_statistics
from compress.targets import Target

log = logging.getLogger(__name__)

BATCH_NUMBERS = 16384
"""Input numbers (tokens, pixels) processed at a time."""
ROWS_PER_INPUT = 2
SAVE_SECONDS = 60.0
"""Between two savings, at least."""
SAVE_SHARE = 0.1
"""Largest share of the time that goes into saving."""


@torch.no_grad()
def collect(
    adapter: Adapter,
    inputs: Tensor,
    targets: Sequence[Target],
    *,
    holdout: float = 0.1,
    path: str | Path | None = None,
) -> Statistics:
    """Run the dense model once and collect the statistics of all targets together.

    Where ``torch.distributed`` is initialised, all processes call this with the same arguments;
    each takes its share of the batches and gets the sums of all.

    Args:
        adapter: The model.
        inputs: Tokens (N, T) or images (N, ...).
        targets: Where to listen.
        holdout: Fraction of the inputs to hold out, see ``split_held``.
        path: File that gets the sums now and then and at the end; a later call with the same
            arguments goes on after the last batch in it. Each of several processes has its own,
            with its rank in the name.

    Raises:
        DataError: when there are no inputs, or the file is damaged or of another pass.
    """
    rank, world = 0, 1
    if dist.is_available() and dist.is_initialized():
        rank, world = dist.get_rank(), dist.get_world_size()
    fitted, apart = split_held(inputs, holdout)
    jobs = [("fitted", batch) for batch in batches(fitted)]
    jobs = (jobs + [("apart", batch) for batch in batches(apart)])[rank::world]
    device = next(adapter.model.parameters()).device
    statistics = _empty(targets, device, has_apart=len(apart) > 0)
    file = None
    if path is not None:
        key = fingerprint(adapter, inputs, targets, holdout, (rank, world))
        file = _File(Path(path), (rank, world), key, len(jobs))
        statistics = file.restore(statistics, device)
    done = file.done if file is not None else 0
    with _bar(len(jobs), done) as advance:
        for part, batch in jobs[done:]:
            _add(adapter, batch, targets, getattr(statistics, part))
            if file is not None:
                file.finished_batch(statistics)
            advance()
    if world > 1:
        statistics.all_reduce()
    for target in targets:
        warn_if_few(statistics.fitted[target.name].count, target)
    return statistics


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


def warn_if_few(rows: int, target: Target) -> None:
    """Warn when the Gram matrix of so many rows cannot have full rank with some reserve."""
    if rows < ROWS_PER_INPUT * target.inputs:
        log.warning(
            "%s: %d calibration rows for %d inputs: the fit is unreliable below %d; "
            "calibrate with more text or images",
            target.name,
            rows,
            target.inputs,
            ROWS_PER_INPUT * target.inputs,
        )


def fingerprint(
    adapter: Adapter,
    inputs: Tensor,
    targets: Sequence[Target],
    holdout: float,
    share: tuple[int, int],
) -> str:
    """Return a hash of everything that decides the sums: sha256, in hex.

    Args:
        adapter: The model; its structure, configuration, weights and their types count.
        inputs: As in ``collect``, like what follows.
        targets: Where to listen.
        holdout: Fraction held out.
        share: Rank of the process and number of processes.
    """
    state = adapter.model.state_dict()
    content = [
        repr(adapter.model),
        repr(getattr(adapter.model, "config", None)),
        tensors_sha256(state),
        sorted({str(tensor.dtype) for tensor in state.values()}),
        tensor_sha256(inputs),
        [(target.name, target.inputs) for target in targets],
        [holdout, BATCH_NUMBERS, *share],
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class _Enough(Exception):
    """Ends a batch as soon as every target has been reached."""


def _add(
    adapter: Adapter, batch: Tensor, targets: Sequence[Target], into: Mapping[str, Moments]
) -> None:
    """Add what enters the targets; what comes after the last one is not computed."""
    missing = {target.name for target in targets}

    def receive(target: Target, rows: Tensor) -> None:
        into[target.name].update(rows)
        missing.discard(target.name)
        if not missing:
            raise _Enough

    with captured(adapter, targets, receive), contextlib.suppress(_Enough):
        run(adapter, batch)


def _empty(targets: Sequence[Target], device: torch.device, *, has_apart: bool) -> Statistics:
    """Return zero sums, and say how much memory they take."""
    bytes_each = {target.name: 8 * target.inputs**2 for target in targets}
    largest = max(bytes_each, key=lambda name: bytes_each[name], default="none")
    log.info(
        "activation statistics of %d targets: %.3f MB, the largest %s with %.3f MB",
        len(targets) * (1 + has_apart),
        sum(bytes_each.values()) * (1 + has_apart) / 1e6,
        largest,
        bytes_each.get(largest, 0) / 1e6,
    )
    parts = (targets, targets if has_apart else ())
    sums = ({target.name: Moments(target.inputs, device) for target in part} for part in parts)
    return Statistics(fitted=next(sums), apart=next(sums))


class _File:
    """Where a pass keeps its sums."""

    def __init__(self, path: Path, share: tuple[int, int], key: str, total: int):
        rank, world = share
        own = path.with_name(f"{path.stem}-{rank}-of-{world}{path.suffix}")
        self.path = own if world > 1 else path
        self.key, self.total = key, total
        self.done = 0
        self._next = time.monotonic() + SAVE_SECONDS

    def restore(self, empty: Statistics, device: torch.device) -> Statistics:
        """Return the sums in the file, or the empty ones where there is no file."""
        if not self.path.exists():
            return empty
        statistics, progress = read_statistics(self.path, device)
        if progress.fingerprint != self.key:
            raise DataError(
                f"{self.path}: statistics of another model, calibration set or setting; expected "
                "those of this pass: remove the file or name another"
            )
        self.done = progress.done
        if 0 < self.done < self.total:
            log.info("continuing after %d of %d batches", self.done, self.total)
        return statistics

    def finished_batch(self, statistics: Statistics) -> None:
        """Count a batch; save when it is the last one, or time."""
        self.done += 1
        began = time.monotonic()
        if began < self._next and self.done < self.total:
            return
        progress = Progress(fingerprint=self.key, done=self.done, batches=self.total)
        save_statistics(self.path, statistics, progress)
        now = time.monotonic()
        self._next = now + max(SAVE_SECONDS, (now - began) / SAVE_SHARE)


@contextlib.contextmanager
def _bar(total: int, done: int) -> Iterator[Callable[[], None]]:
    """Yield what to call after each batch; a terminal shows a bar."""
    from rich.progress import Progress as Bar

    with Bar(transient=True, disable=not sys.stdout.isatty()) as shown:
        task = shown.add_task("activation statistics", total=total, completed=done)
        yield lambda: shown.advance(task)
