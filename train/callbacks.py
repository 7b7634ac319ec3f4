"""What is watched while a model trains: loss and speed, certificate and norms, text, checkpoints.

Every period counts optimizer steps, so that gradient accumulation does not change it.
"""

# Legend: B batch, T token position.

import logging
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from torch import Tensor

from common.tokenizer import Tokenizer
from train.probes import continuation, matrix_norms, max_activation, naive_certificate

log = logging.getLogger(__name__)

CHECKPOINT = "last.ckpt"


class EachStep(L.Callback):
    """Calls ``on_step`` after every optimizer step (not after every micro-batch).

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
        batch: Tensor,
        batch_idx: int,
    ) -> None:
        """Find out whether this batch ended a step that is due."""
        if trainer.global_step == self._seen:
            return
        self._seen = trainer.global_step
        if self.every and self._seen % self.every == 0:
            self.on_step(trainer, pl_module, outputs)

    def on_step(self, trainer: L.Trainer, pl_module: Any, outputs: Any) -> None:
        """Act after a step that is due."""


class Progress(EachStep):
    """Logs loss, learning-rate factor and training speed; ``tokens_per_s`` is the mean so far.

    Time is that of training batches alone: validation, certificates and samples are left out.
    """

    speed = "train/tokens_per_s"
    headline = ("train/val_bits_per_byte", "bits per byte", "tokens/s")

    def __init__(self, every: int):
        super().__init__(every)
        self._tokens = self._seconds = 0.0
        self._window = (0.0, 0.0)
        self._clock = 0.0

    @property
    def tokens_per_s(self) -> float:
        """Trained positions per second of all devices, over this process' whole run."""
        return self._tokens / self._seconds if self._seconds else 0.0

    def amount(self, batch: Any) -> int:
        """Return the trained positions in a batch of one rank."""
        return int(batch.shape[0] * (batch.shape[1] - 1))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Tensor, batch_idx: int
    ) -> None:
        """Start the clock."""
        self._clock = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Tensor,
        batch_idx: int,
    ) -> None:
        """Add the batch's tokens and time; a GPU is waited for, since it lags behind."""
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self._seconds += time.perf_counter() - self._clock
        self._tokens += self.amount(batch) * trainer.world_size
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_step(self, trainer: L.Trainer, pl_module: Any, outputs: Any) -> None:
        """Log loss (nats), learning-rate factor and speed since the last log."""
        tokens, seconds = self._tokens - self._window[0], self._seconds - self._window[1]
        self._window = (self._tokens, self._seconds)
        # The scheduler has moved on: this is the factor of the step just done.
        factor = pl_module.schedule.factor(trainer.global_step - 1, pl_module.total_steps)
        loss = trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean")
        metrics = {
            "train/loss": float(loss),
            "train/lr": pl_module.optim.lr * factor,
            self.speed: tokens / max(seconds, 1e-9),
        }
        log_metrics(trainer, metrics)

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


class Certify(EachStep):
    """Logs the naive certificate, the norm of every matrix and the largest activation.

    Args:
        every: Period in steps.
        probe_BT: Tokens (B, T) on which the largest activation is measured.
    """

    def __init__(self, every: int, probe_BT: Tensor):
        super().__init__(every)
        self.probe_BT = probe_BT

    def on_step(self, trainer: L.Trainer, pl_module: Any, outputs: Any) -> None:
        """Measure on the leading rank; weights are the same on all."""
        if trainer.is_global_zero:
            model = pl_module.model
            certificate, norms = naive_certificate(model), matrix_norms(model)
            log_metrics(
                trainer,
                {
                    "train/bound_naive": certificate.naive,
                    "train/log10_bound_naive": certificate.log10_naive,
                    "train/max_norm": max(norms.values()),
                    "train/max_activation": max_activation(model, self.probe_BT),
                    **norms,
                },
            )


class Sample(EachStep):
    """Appends a continuation of a prompt to a text file.

    Args:
        every: Period in steps.
        path: The file.
        tokenizer: Of the model.
        prompt_T: Prompt ids (T,), at least one.
        num_tokens: Tokens to add.
    """

    def __init__(
        self, every: int, path: Path, tokenizer: Tokenizer, prompt_T: Tensor, num_tokens: int
    ):
        super().__init__(every)
        self.path, self.tokenizer = path, tokenizer
        self.prompt_T, self.num_tokens = prompt_T, num_tokens

    def on_step(self, trainer: L.Trainer, pl_module: Any, outputs: Any) -> None:
        """Sample on the leading rank, with a seed of its own."""
        if trainer.is_global_zero:
            ids = continuation(pl_module.model, self.prompt_T, self.num_tokens)
            text = self.tokenizer.decode(ids.tolist())
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"=== step {trainer.global_step} ===\n{text}\n\n")


class Checkpoint(EachStep):
    """Keeps ``last.ckpt`` up to date, never half-written; Ctrl-C writes one and then stops.

    A second Ctrl-C stops at once.

    Args:
        every: Period in steps, 0 for the end and Ctrl-C only.
        directory: Where; made when first needed.
    """

    def __init__(self, every: int, directory: Path):
        super().__init__(1)
        self.period, self.directory = every, directory
        self._interrupted = False
        self._previous: Any = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take over Ctrl-C (only possible in the main thread)."""
        super().on_train_start(trainer, pl_module)
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._interrupt)

    def on_step(self, trainer: L.Trainer, pl_module: Any, outputs: Any) -> None:
        """Save when due or interrupted; all ranks decide alike."""
        stop = self._interrupted
        if trainer.world_size > 1:
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        if stop or (self.period and trainer.global_step % self.period == 0):
            self.save(trainer)
        if stop:
            log.info("interrupted at step %d; the same command resumes", trainer.global_step)
            raise KeyboardInterrupt

    def save(self, trainer: L.Trainer) -> None:
        """Write the checkpoint beside its place, then swap it in."""
        fresh = self.directory / f"next-{CHECKPOINT}"
        try:
            trainer.save_checkpoint(fresh)
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise
        if trainer.is_global_zero:
            fresh.replace(self.directory / CHECKPOINT)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the end, so that a later failure costs no training."""
        self.save(trainer)
        self._release()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Give Ctrl-C back."""
        self._release()

    def _interrupt(self, signum: int, frame: FrameType | None) -> None:
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True

    def _release(self) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None


def log_metrics(trainer: L.Trainer, metrics: dict[str, float]) -> None:
    """Hand metrics of the current step to every logger; further ranks' loggers ignore them."""
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=trainer.global_step)
