"""What Lightning and our callbacks add to a plain PyTorch loop: same model, optimizer and data."""

import resource
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from common.metrics_logger import MetricsLogger
from train.batch_stream import StreamDataModule
from train.callbacks import Certify
from train.data import window_batch
from train.groups import Constraint, OptimConfig, optimizer_defaults, parameter_groups
from train.loop import build_trainer, quiet
from train.module import LipschitzModule
from train.optim import Muon
from train.probes import activation_maxima
from train.progress import Progress
from train.schedules import Schedule
from train.settings import TrainerConfig

OVERHEAD = 0.05
# Steps before the clock starts, and steps that are measured: of a model, and of a tiny one.
WARMUP, STEPS, TINY_STEPS = 2, 4, 200
CERTIFICATE_EVERY = 20  # steps, as in conf/callbacks


class Data(StreamDataModule):
    """Random windows of random characters."""

    def __init__(self, ids: np.ndarray, context: int, batch_size: int) -> None:
        super().__init__()
        self.ids, self.context, self.batch_size = ids, context, batch_size

    def batch(self, index: int) -> torch.Tensor:
        """Return the windows of a batch."""
        return window_batch(self.ids, self.context, self.batch_size, seed=0, index=index)

    val_dataloader = StreamDataModule.train_dataloader  # never read: val_every=0


class Stopwatch(L.Callback):
    """Reads the clock after the warm-up and at the end."""

    def __init__(self) -> None:
        self.start = self.end = 0.0

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Read the clock where it is due."""
        if trainer.global_step == WARMUP:
            self.start = cpu_seconds()
        self.end = cpu_seconds() if trainer.global_step == trainer.max_steps else self.end


def cpu_seconds() -> float:
    """Processor time of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def plain_loop(model: Any, data: Data, steps: int) -> float:
    """Return processor seconds per step of a loop that does nothing but train."""
    settings = OptimConfig(), Constraint()
    optimizer = Muon(parameter_groups(model, *settings), **optimizer_defaults(*settings))
    scheduler = LambdaLR(optimizer, lambda step: Schedule().factor(step, WARMUP + steps))
    model.train()
    start = 0.0
    for done, batch_BT in enumerate(data.train_dataloader()):
        if done == WARMUP:
            start = cpu_seconds()
        if done == WARMUP + steps:
            break
        optimizer.zero_grad()
        logits_BTV = model(batch_BT[:, :-1])
        F.cross_entropy(logits_BTV.flatten(0, 1), batch_BT[:, 1:].flatten()).backward()
        optimizer.step()
        scheduler.step()
    return (cpu_seconds() - start) / steps


def our_loop(model: Any, data: Data, steps: int, folder: Any, *callbacks: L.Callback) -> float:
    """Return processor seconds per step of ``lipllm train`` with its loss and speed log."""
    module = LipschitzModule(
        model, OptimConfig(), Constraint(), Schedule(), total_steps=WARMUP + steps
    )
    watch, loop = Stopwatch(), TrainerConfig(max_steps=WARMUP + steps, val_every=0)
    everything = [Progress(10), *callbacks, watch]
    with quiet():
        trainer = build_trainer(loop, "cpu", everything, [MetricsLogger(folder)])
        trainer.fit(module, datamodule=data)
    return (watch.end - watch.start) / steps


def test_loop_overhead(bench: Any, make_model: Callable, tmp_path: Any) -> None:
    """Overhead = (our step - plain step) / plain step; the fixed part by itself on a tiny model.

    The fixed part is measured where it is large, and related to the plain step of the same round:
    directly it would drown in the noise of a step that takes a hundred times as long.
    """
    ids = np.random.default_rng(0).integers(0, 65, 50000).astype(np.uint8)
    tiny, model = make_model("nano"), make_model(context=bench.length)
    sizes = SimpleNamespace(tiny=Data(ids, 16, 8), model=Data(ids, bench.length, bench.batch))
    rows: dict[str, list[float]] = {"plain": [], "ours": [], "fixed": [], "certificate": []}
    for turn in range(bench.rounds):
        runs: dict[str, Callable[[], float]] = {
            "plain": lambda: plain_loop(model, sizes.model, STEPS),
            "ours": lambda: our_loop(model, sizes.model, STEPS, tmp_path),
            "tiny plain": lambda: plain_loop(tiny, sizes.tiny, TINY_STEPS),
            "tiny ours": lambda: our_loop(tiny, sizes.tiny, TINY_STEPS, tmp_path),
        }
        names = list(runs) if turn % 2 else list(reversed(runs))
        seconds = {name: runs[name]() for name in names}
        rows["plain"].append(seconds["plain"])
        rows["ours"].append(seconds["ours"])
        rows["fixed"].append(seconds["tiny ours"] - seconds["tiny plain"])
        rows["certificate"].append(_certificate_seconds(model, bench.length, tmp_path))
    report(bench, rows, batch=bench.batch, length=bench.length, parameters=model.num_parameters)


def report(bench: Any, rows: dict[str, list[float]], **sizes: int) -> None:
    """Add a row per figure."""
    tokens = sizes["batch"] * sizes["length"]
    bench.add("loop: plain", [tokens / s for s in rows["plain"]], "tokens/s", **sizes)
    bench.add("loop: lipllm train", [tokens / s for s in rows["ours"]], "tokens/s", **sizes)
    pairs = list(zip(rows["ours"], rows["plain"], rows["fixed"], rows["certificate"], strict=True))
    bench.add("loop: overhead, direct", [ours / plain - 1 for ours, plain, *_ in pairs], "ratio")
    bench.add("loop: fixed cost of a step", rows["fixed"], "s")
    fixed = [cost / plain for _, plain, cost, _ in pairs]
    bench.add("loop: overhead", fixed, "ratio", most=OVERHEAD, **sizes)
    certified = [cost / CERTIFICATE_EVERY / plain for _, plain, _, cost in pairs]
    bench.add("loop: certificate every 20 steps", certified, "ratio", most=OVERHEAD, **sizes)


def _certificate_seconds(model: Any, length: int, folder: Any) -> float:
    probe_BT = torch.zeros((4, length), dtype=torch.long)
    trainer: Any = SimpleNamespace(
        is_global_zero=True, loggers=[MetricsLogger(folder)], global_step=1
    )
    start = cpu_seconds()
    watch = Certify(1, partial(activation_maxima, tokens_BT=probe_BT))
    watch.on_step(trainer, SimpleNamespace(whole=lambda: model))
    return cpu_seconds() - start
