"""What a training step costs: floating-point operations, how well the device is used, updates.

Model FLOP utilisation is ``tokens per second * FLOPs per token / peak FLOP/s of all devices``. The
numerator counts what the model needs, not what was computed: no recomputation, no padding.
"""

import time
from typing import Any

import lightning as L
import torch

from common.models import LipschitzTransformer
from train.groups import role
from train.progress import EachStep, Progress, log_metrics

# Dense bfloat16 tensor-core peaks (float32 accumulation, no sparsity) from the makers' data sheets,
# FLOP/s; the longest name that the device's name contains wins.
PEAK_FLOPS = {
    "A100": 312e12,
    "H100": 989e12,
    "H100 PCIe": 756e12,
    "H200": 989e12,
    "L40S": 362e12,
    "L4": 121e12,
}


def flops_per_token(model: LipschitzTransformer, length: int) -> float:
    """Return the floating-point operations of one trained token, forward and backward.

    Six per weight of a matrix product (the embedding is looked up, not multiplied), and for
    attention over ``length`` positions 6 T D per head for the logits and as many for the values;
    positional heads have no content logits. Causality is not discounted.

    Args:
        model: Any shapes.
        length: Sequence length T in tokens.

    Source:
        PaLM, arXiv 2204.02311, appendix B (6 N + 12 L H Q T); deviation: positional heads.
    """
    matrices = [p for n, p in model.named_parameters() if role(n) not in ("vector", "embedding")]
    products = 6.0 * sum(p.numel() for p in matrices)
    layers = [model.config.layer(index) for index in range(model.config.layers)]
    attention = sum(6.0 * length * x.head_dim * (x.content_heads + x.heads) for x in layers)
    return products + attention


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Return the peak FLOP/s of one device in bfloat16, None where it is not known."""
    if device.type != "cuda" or precision != "bf16-mixed":
        return None
    return peak_of(torch.cuda.get_device_name(device))


def peak_of(name: str) -> float | None:
    """Return the peak FLOP/s in bfloat16 of the device called ``name``, None if unknown."""
    known = [key for key in PEAK_FLOPS if all(word in name for word in key.split())]
    return PEAK_FLOPS[max(known, key=len)] if known else None


class Cost(EachStep):
    """Logs model FLOP utilisation and the share of a step that updates and constraints take.

    The share is measured on the steps that are logged: time between the end of the backward pass
    and the end of the optimizer's step (update, orthogonalisation, constraint, exchange between
    ranks), over the mean time of the steps since the last log. The device is waited for twice
    then. Comes behind ``Progress`` in the list of callbacks.

    Args:
        every: Period in steps.
        progress: Counts tokens and seconds.
        flops: Operations per trained token, see ``flops_per_token``.
        peak: Peak FLOP/s of one device; None to look it up, no utilisation where it is unknown.
    """

    def __init__(self, every: int, progress: Progress, flops: float, peak: float | None = None):
        super().__init__(every)
        self.progress, self.flops, self.peak = progress, flops, peak
        self.update_s: float | None = None
        self._began: float | None = None
        self._window = (0.0, 0.0, 0)

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Look up the device and ask to be told when the optimizer has stepped."""
        super().on_train_start(trainer, pl_module)
        self._window = (self.progress.tokens, self.progress.seconds, trainer.global_step)
        if self.peak is None:
            self.peak = peak_flops(trainer.strategy.root_device, str(trainer.precision))
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(lambda *_: self._end(trainer))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        """Start the clock where the step in progress will be logged."""
        self._began = None
        if self.every and (trainer.global_step + 1) % self.every == 0:
            self._began = _now(trainer.strategy.root_device)

    def on_step(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Log the figures of the steps since the last log."""
        tokens, seconds, step = self._window
        self._window = (self.progress.tokens, self.progress.seconds, trainer.global_step)
        tokens, seconds = self._window[0] - tokens, self._window[1] - seconds
        metrics = {}
        if self.update_s is not None and seconds > 0:
            mean = seconds / (trainer.global_step - step)
            metrics["train/update_share"] = self.update_s / mean
        if self.peak and seconds > 0:
            metrics["train/mfu"] = tokens * self.flops / seconds / (self.peak * trainer.world_size)
        log_metrics(trainer, metrics)

    def _end(self, trainer: L.Trainer) -> None:
        if self._began is not None:
            self.update_s = _now(trainer.strategy.root_device) - self._began
            self._began = None


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
