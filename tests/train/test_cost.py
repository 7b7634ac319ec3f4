"""Cost of a step: operation counts against torch's counter, and what is logged."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from common.models import LipschitzTransformer, ModelConfig
from train.cost import PEAK_FLOPS, Cost, flops_per_token, peak_flops, peak_of
from train.probes import activation_maxima
from train.progress import Progress

# A shifted clock is read a few microseconds late.
CLOCK_S = 0.05


def written_out(layer, q, k, v):
    """Attention as plain matrix products, which the counter sees; without a mask."""
    weights = (q @ k.transpose(-1, -2)).softmax(-1)
    return weights @ v


@pytest.mark.parametrize("changes", [{}, {"vocab_multiple": 64, "rope_dims": 2}])
def test_count_equals_the_counter_of_torch(changes):
    """Oracle: every matrix product of one forward and backward pass, counted while it runs."""
    config = ModelConfig(
        vocab_size=50, width=16, layers=2, heads=2, context=12, mlp_width=24, **changes
    )
    model = LipschitzTransformer(config)
    tokens = torch.randint(50, (3, 12))
    with FlopCounterMode(display=False) as counter:
        model(tokens, attend=written_out).sum().backward()
    assert counter.get_total_flops() == 3 * 12 * flops_per_token(model, 12)


def test_positional_heads_have_no_content_logits():
    """Oracle: the difference is their 6 T D and their query and key weights."""
    shape = {"vocab_size": 50, "width": 16, "layers": 1, "heads": 4, "context": 8}
    full = LipschitzTransformer(ModelConfig(**shape))
    some = LipschitzTransformer(ModelConfig(**shape, content_heads=1, position_bias=True))
    saved = flops_per_token(full, 8) - flops_per_token(some, 8)
    assert saved == 3 * 6 * 8 * 4 + 6 * 2 * 3 * 4 * 16


def test_known_devices():
    """Oracle: names as drivers report them; the longer entry wins; others are unknown."""
    assert peak_of("NVIDIA H100 80GB HBM3") == PEAK_FLOPS["H100"]
    assert peak_of("NVIDIA H100 PCIe") == PEAK_FLOPS["H100 PCIe"]
    assert peak_of("NVIDIA H200") == PEAK_FLOPS["H200"]
    assert peak_of("NVIDIA A100-SXM4-80GB") == PEAK_FLOPS["A100"]
    assert peak_of("NVIDIA L40S") == PEAK_FLOPS["L40S"]
    assert peak_of("Some other device") is None
    assert peak_flops(torch.device("cpu"), "bf16-mixed") is None


def make_trainer(rows, optimizer):
    """Return what ``Cost`` reads of a trainer; logged rows go to ``rows``."""
    logger = SimpleNamespace(log_metrics=lambda metrics, step: rows.append((step, metrics)))
    return SimpleNamespace(
        global_step=0, world_size=2, precision="32-true", optimizers=[optimizer],
        loggers=[logger], callbacks=(), strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )  # fmt: skip


def test_figures_follow_their_formulas(monkeypatch):
    """Oracle: a clock under control: 4 steps of 10 s, the last update takes 2 s of it."""
    clock = [0.0]
    monkeypatch.setattr("train.cost.time.perf_counter", lambda: clock[0])
    progress, rows = Progress(4), []

    class Slow(torch.optim.SGD):
        def step(self, closure=None):
            clock[0] += 2.0
            return super().step(closure)

    optimizer = Slow([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    trainer = make_trainer(rows, optimizer)
    cost = Cost(4, progress, flops=100.0, peak=1000.0)
    cost.on_train_start(trainer, None)
    for step in range(1, 5):
        clock[0] += 8.0
        cost.on_before_optimizer_step(trainer, None, optimizer)
        optimizer.step()
        trainer.global_step = step
        progress._tokens, progress._seconds = 200.0 * step, 10.0 * step
        cost.on_train_batch_end(trainer, None, {}, None, step)
    ((at, metrics),) = rows
    assert at == 4
    assert metrics["train/update_share"] == pytest.approx(0.2, abs=CLOCK_S)
    # 800 tokens * 100 operations in 40 s on two devices of 1000 operations per second.
    assert metrics["train/mfu"] == pytest.approx(800 * 100 / 40 / 2000)


def test_unknown_device_logs_no_utilisation():
    """Oracle: no peak, no figure; nothing is guessed."""
    rows, progress = [], Progress(1)
    trainer = make_trainer(rows, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1))
    cost = Cost(1, progress, flops=1.0)
    cost.on_train_start(trainer, None)
    trainer.global_step, progress._seconds, progress._tokens = 1, 1.0, 1.0
    cost.on_step(trainer, None)
    assert "train/mfu" not in rows[0][1]


@torch.no_grad()
def test_activation_maxima_name_every_place():
    """Oracle: the stream written out; multiplying the head by 3 triples the logits alone."""
    config = ModelConfig(vocab_size=50, width=16, layers=2, heads=2, context=12)
    model = LipschitzTransformer(config)
    tokens = torch.randint(50, (2, 12))
    maxima = activation_maxima(model, tokens)
    assert len(maxima) == 2 + 2 * config.layers
    assert maxima["train/act_max/embedding"] == float(model.embed(tokens).abs().max())
    stream = model.stream(model.embed(tokens))
    assert maxima["train/act_max/1.mlp"] == pytest.approx(float(stream.abs().max()))
    assert maxima["train/act_max/logits"] == pytest.approx(float(model(tokens).abs().max()))
    model.head.weight.mul_(3)
    larger = activation_maxima(model, tokens)
    for name, value in maxima.items():
        factor = 3 if name.endswith("logits") else 1
        assert math.isclose(larger[name], factor * value, rel_tol=1e-5)
