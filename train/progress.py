"""How training is followed: periods in optimizer steps, loss and speed, the progress bar.

Every period counts optimizer steps, so that gradient accumulation does not change it.
"""

import logging
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ProgressBar

from common.errors import ConvergenceError

log = logging.getLogger(__name__)


class EachStep(L.Callback):
    """Calls ``on_step`` after every optimizer step (not after every micro-batch).

    The time that ``on_step`` takes is not counted as training.

    Args:
        every: Period in optimizer steps, 0 for never.
    """

    def __init__(self, every: int = 1):
        self.every = every
        self._seen = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember the step that training starts from."""
        self._seen = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Find out whether this batch ended a step that is due."""
        if trainer.global_step == self._seen:
            return
        self._seen = trainer.global_step
        if self.every and self.is_due(trainer):
            with paused(trainer):
                self.on_step(trainer, pl_module)

    def is_due(self, trainer: L.Trainer) -> bool:
        """Return whether the step just done is one of the period's."""
        return trainer.global_step % self.every == 0

    def on_step(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Act after a step that is due."""


class Progress(EachStep):
    """Logs loss, learning-rate factor and training speed; ``tokens_per_s`` is the mean so far.

    Time includes waiting for data; validation, certificates, samples and checkpoints are left out.
    A GPU is waited for only where something is logged.
    """

    speed = "train/tokens_per_s"
    headline = ("train/val_bits_per_byte", "bits per byte", "tokens/s")

    def __init__(self, every: int):
        super().__init__(every)
        self.loss = float("nan")
        self._losses: list[torch.Tensor] = []
        self._tokens = self._seconds = 0.0
        self._window = (0.0, 0.0)
        self._since: float | None = None

    @property
    def tokens_per_s(self) -> float:
        """Trained positions per second of all devices, over this process' whole run."""
        return self._tokens / self._seconds if self._seconds else 0.0

    @property
    def tokens(self) -> float:
        """Trained positions of all devices in this process' run."""
        return self._tokens

    @property
    def seconds(self) -> float:
        """Seconds of training up to where the clock last stopped."""
        return self._seconds

    def amount(self, batch: Any) -> int:
        """Return the trained positions in a batch of one rank."""
        return int(batch.shape[0] * (batch.shape[1] - 1))

    def start_clock(self) -> None:
        """Count time as training from now on."""
        self._since = time.perf_counter()

    def stop_clock(self, device: torch.device) -> bool:
        """Stop counting, once the device has done its work; return whether it was counting."""
        if self._since is None:
            return False
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self._seconds += time.perf_counter() - self._since
        self._since = None
        return True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        super().on_train_start(trainer, pl_module)
        self.start_clock()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Add the batch's tokens and its loss to those of its step."""
        self._tokens += self.amount(batch) * trainer.world_size
        # Lightning hands back what it accumulates: the loss over the number of micro-batches.
        self._losses.append(outputs["loss"].detach())
        is_end_of_step = trainer.global_step != self._seen
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if is_end_of_step:
            self._losses.clear()

    def on_step(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Log the step's loss (nats), learning-rate factor and speed since the last log."""
        tokens, seconds = self._tokens - self._window[0], self._seconds - self._window[1]
        self._window = (self._tokens, self._seconds)
        # The scheduler has moved on: this is the factor of the step just done.
        factor = pl_module.schedule.factor(trainer.global_step - 1, pl_module.total_steps)
        loss = torch.stack(self._losses).sum()
        self.loss = float(trainer.strategy.reduce(loss, reduce_op="mean"))
        if not math.isfinite(self.loss):
            raise ConvergenceError(
                f"loss={self.loss} at step {trainer.global_step}: the training has diverged; lower "
                "optim.lr, or optim.embedding_lr and optim.vector_lr"
            )
        metrics = {
            "train/loss": self.loss,
            "train/lr": pl_module.optim.lr * factor,
            self.speed: tokens / max(seconds, 1e-9),
        }
        log_metrics(trainer, metrics)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock."""
        self.stop_clock(pl_module.device)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the validation figures, and write one line where no progress bar is shown."""
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if "/val_" in k}
        log_metrics(trainer, metrics)
        if trainer.is_global_zero and trainer.progress_bar_callback is None:
            name, what, unit = self.headline
            log.info(
                "step %d/%d: %.3f %s, %.0f %s",
                trainer.global_step,
                trainer.max_steps,
                metrics[name],
                what,
                self.tokens_per_s,
                unit,
            )
        self.start_clock()


class Bar(ProgressBar):
    """One bar from the first to the last optimizer step, with the latest figures behind it."""

    def __init__(self) -> None:
        super().__init__()
        self._bar: Any = None
        self._is_enabled = True

    def disable(self) -> None:
        """Show nothing (further ranks)."""
        self._is_enabled = False

    def enable(self) -> None:
        """Show the bar."""
        self._is_enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the bar at the step that training starts from."""
        from tqdm.auto import tqdm

        self._bar = tqdm(
            total=trainer.max_steps,
            initial=trainer.global_step,
            unit="step",
            disable=not self._is_enabled,
            dynamic_ncols=True,
            file=sys.stdout,
        )

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Move to the step that is done."""
        if trainer.global_step > self._bar.n:
            self._bar.set_postfix(self._figures(trainer), refresh=False)
            self._bar.update(trainer.global_step - self._bar.n)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the finished bar behind."""
        self._close()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Leave the bar behind."""
        self._close()

    def _figures(self, trainer: L.Trainer) -> dict[str, str]:
        progress = _progress(trainer)
        if progress is None or progress.loss != progress.loss:
            return {}
        figures = {"loss": f"{progress.loss:.3f}"}
        name, what, unit = progress.headline
        if name in trainer.callback_metrics:
            figures[what] = f"{float(trainer.callback_metrics[name]):.3f}"
        return figures | {unit: f"{progress.tokens_per_s:.0f}"}

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()


@contextmanager
def paused(trainer: L.Trainer) -> Iterator[None]:
    """Do not count the time of the block as training."""
    progress = _progress(trainer)
    was_running = progress is not None and progress.stop_clock(trainer.strategy.root_device)
    yield
    if was_running and progress is not None:
        progress.start_clock()


def log_metrics(trainer: L.Trainer, metrics: dict[str, float]) -> None:
    """Hand metrics of the current step to every logger; further ranks' loggers ignore them."""
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=trainer.global_step)


def _progress(trainer: L.Trainer) -> Progress | None:
    callbacks = getattr(trainer, "callbacks", ())
    return next((c for c in callbacks if isinstance(c, Progress)), None)
