"""Averaged weights, accumulation and compilation, each against the written-out oracle."""

import pytest
import torch

from common.bundle import load_bundle
from common.errors import ConfigError
from common.metrics_file import read_metrics
from common.norms import spectral_norm
from train import data
from train.app import train
from train.groups import role
from train.module import LipschitzModule
from train.settings import TrainerConfig

# Sums in another order: the polar factor magnifies the rounding of small singular values, and the
# head moves by 0.56 per step. Another batch would change weights by a hundred times as much.
ROUNDING = 1e-3
LOSS_ROUNDING = 1e-6  # float32 means over the same windows


def weights(outcome):
    """The stored weights of a run."""
    return load_bundle(outcome.artifacts["bundle"]).model.state_dict()


def test_average_follows_its_recursion_and_is_what_is_stored(make_run, monkeypatch):
    """Oracle: the recursion in float64 over the weights after every step; SVD for the caps."""
    seen, begun = [], []
    step, build = LipschitzModule.optimizer_step, LipschitzModule.__init__

    def values(model):
        return {k: v.double().clone() for k, v in model.state_dict().items()}

    def recorded(self, *arguments):
        step(self, *arguments)
        seen.append(values(self.model))

    def remembered(self, model, *arguments, **options):
        begun.append(values(model))
        build(self, model, *arguments, **options)

    monkeypatch.setattr(LipschitzModule, "optimizer_step", recorded)
    monkeypatch.setattr(LipschitzModule, "__init__", remembered)
    outcome = train(*make_run("trainer.max_steps=12", "trainer.ema=0.5"))
    (mean,) = begun
    for n, current in enumerate(seen):
        keep = min(0.5, (1 + n) / (10 + n))
        mean = {k: keep * mean[k] + (1 - keep) * current[k] for k in mean}
    stored = weights(outcome)
    for name, value in mean.items():
        torch.testing.assert_close(stored[name].double(), value, rtol=ROUNDING, atol=ROUNDING)
        assert not torch.equal(stored[name].double(), seen[-1][name])
        if role(name) not in ("embedding", "vector"):
            norm = (value.shape[1] / value.shape[0]) ** 0.5 * spectral_norm(stored[name])
            assert norm <= (8 if role(name) == "head" else 1) * (1 + ROUNDING)


def test_accumulation_equals_a_large_batch(make_run, monkeypatch):
    """Oracle: one batch that holds the windows of both micro-batches; also the logged loss."""
    cut = data.window_batch

    def joined(ids, context, batch_size, *, seed, index):
        if batch_size != 6:
            return cut(ids, context, batch_size, seed=seed, index=index)
        numbers = (2 * index, 2 * index + 1)
        return torch.cat([cut(ids, context, 3, seed=seed, index=number) for number in numbers])

    monkeypatch.setattr(data, "window_batch", joined)
    # AdamW turns the rounding of a vanishing gradient into a step: keep those steps small.
    common = ("trainer.max_steps=4", "callbacks.log_every=1", "optim.embedding_lr=0.001")
    common += ("optim.vector_lr=0.001",)
    large = train(*make_run(*common, "trainer.batch_size=6", directory="large"))
    micro = ("trainer.batch_size=3", "trainer.accumulate_grad_batches=2")
    small = train(*make_run(*common, *micro, directory="small"))
    for name, value in weights(large).items():
        torch.testing.assert_close(weights(small)[name], value, rtol=ROUNDING, atol=ROUNDING)
    first = [
        read_metrics(outcome.artifacts["bundle"].parent / "metrics.csv")[0]["train/loss"]
        for outcome in (large, small)
    ]
    assert first[1] == pytest.approx(first[0], rel=LOSS_ROUNDING)


def test_compiled_training_is_training(make_run):
    """Oracle: the same run without compilation, in a backend that changes no arithmetic."""
    common = ("trainer.max_steps=3",)
    plain = weights(train(*make_run(*common, directory="plain")))
    extra = ("trainer.compile=true", "trainer.compile_backend=eager")
    compiled = weights(train(*make_run(*common, *extra, directory="compiled")))
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=ROUNDING, atol=ROUNDING)


def test_unknown_compile_backend_stops_before_training(make_run):
    """Oracle: torch's own list; torch itself says so at the first step, in a traceback."""
    cfg, run = make_run("trainer.compile=true", "trainer.compile_backend=inductr")
    with pytest.raises(ConfigError, match=r"compile_backend='inductr'.*inductor") as caught:
        train(cfg, run)
    assert "\n" not in str(caught.value)
    assert not (run.directory / "bundle").exists()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"ema": 1.0}, "trainer.ema=1.0"),
        ({"ema": -0.1}, "trainer.ema=-0.1"),
        ({"strategy": "fsdp2", "compile": True}, "trainer.compile=true"),
    ],
)
def test_impossible_settings_name_the_value(settings, match):
    """One line."""
    with pytest.raises(ConfigError, match=match) as caught:
        TrainerConfig(**settings)
    assert "\n" not in str(caught.value)
