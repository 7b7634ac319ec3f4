"""What is watched while a model trains: certificate and norms, text, checkpoints."""

# Legend: T token position.

import logging
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from torch import Tensor

from common.files import replace_bytes
from common.tokenizer import Tokenizer
from train.probes import continuation, matrix_norms, naive_certificate
from train.progress import EachStep, log_metrics

log = logging.getLogger(__name__)

CHECKPOINT = "last.ckpt"
# Ranks ask each other about Ctrl-C only so often: the answer makes a GPU wait.
AGREE_EVERY = 10
_SAMPLE = re.compile(r"^=== step (\d+) ===$", re.MULTILINE)


class Certify(EachStep):
    """Logs the naive certificate, the norm of every matrix and the largest activations.

    Args:
        every: Period in steps.
        maxima: Function of the model: its largest activations, under declared metric names.
    """

    def __init__(self, every: int, maxima: Callable[[Any], dict[str, float]]):
        super().__init__(every)
        self.maxima = maxima

    def on_step(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Measure on the leading rank; every rank helps to bring the weights together."""
        model = pl_module.whole()
        if trainer.is_global_zero:
            certificate, norms = naive_certificate(model), matrix_norms(model)
            maxima = self.maxima(model)
            log_metrics(
                trainer,
                {
                    "train/bound_naive": certificate.naive,
                    "train/log10_bound_naive": certificate.log10_naive,
                    "train/max_norm": max(norms.values()),
                    "train/max_activation": max(maxima.values()),
                    **norms,
                    **maxima,
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

    def on_step(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Sample on the leading rank, with a seed of its own."""
        model = pl_module.whole()
        if trainer.is_global_zero:
            ids = continuation(model, self.prompt_T, self.num_tokens)
            text = self.tokenizer.decode(ids.tolist())
            with self.path.open("a", encoding="utf-8", newline="") as file:
                file.write(f"=== step {trainer.global_step} ===\n{text}\n\n")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Drop samples of steps that an interrupted run did and that happen again now."""
        super().on_train_start(trainer, pl_module)
        if trainer.is_global_zero and self.path.is_file():
            text = self.path.read_bytes().decode()
            for found in _SAMPLE.finditer(text):
                if int(found[1]) > trainer.global_step:
                    replace_bytes(self.path, text[: found.start()].encode())
                    break


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
        self._interrupted = self._stop = False
        self._previous: Any = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take over Ctrl-C (only possible in the main thread)."""
        super().on_train_start(trainer, pl_module)
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._interrupt)

    def is_due(self, trainer: L.Trainer) -> bool:
        """Return whether to save now; all ranks decide alike."""
        self._stop = self._interrupted
        if trainer.world_size > 1:
            agrees = trainer.global_step % AGREE_EVERY == 0
            decide = trainer.strategy.reduce_boolean_decision
            self._stop = agrees and decide(self._interrupted, all=False)
        return self._stop or bool(self.period and trainer.global_step % self.period == 0)

    def on_step(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Save, and stop after Ctrl-C."""
        self.save(trainer)
        if self._stop:
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
