"""The train command in-process: figures, resume, precision, bad settings."""

import logging
import os
import signal

import pytest
import torch

from common.bundle import load_bundle
from common.errors import ConfigError, DataError
from common.metrics_file import read_metrics
from common.norms import spectral_norm
from train import progress
from train.app import train
from train.groups import role

# float32 rounding on top of a cap.
CAP_SLACK = 1e-5


def weights(outcome):
    """The stored weights of a run."""
    return load_bundle(outcome.artifacts["bundle"]).model.state_dict()


def assert_identical(first, second):
    """Bitwise equality of two state dictionaries."""
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_train_learns_and_keeps_every_cap(make_run):
    """Oracle: the unigram entropy as the floor of a model without context; SVD for the caps."""
    cfg, run = make_run("trainer.max_steps=40", "trainer.val_every=20", "schedule.warmup=0.1")
    outcome = train(cfg, run)
    metrics = outcome.metrics
    assert metrics["train/val_bits_per_byte"] < metrics["data/unigram_entropy_bits"] - 0.3
    assert outcome.objective == metrics["train/val_bits_per_byte"]
    assert 0 < metrics["train/val_acc_full"] <= 1
    assert 0 < metrics["cert/naive"] < 100
    for name, w in weights(outcome).items():
        kind = role(name)
        if kind == "embedding":
            assert w.square().mean(1).sqrt().max() <= 1 + CAP_SLACK
        elif kind != "vector":
            norm = (w.shape[1] / w.shape[0]) ** 0.5 * spectral_norm(w)
            assert norm <= (8 if kind == "head" else 1) * (1 + CAP_SLACK)


def test_train_logs_bound_norms_speed_and_text(make_run):
    """Every logged column is on the step it belongs to; a sample starts with its prompt."""
    cfg, run = make_run(
        "trainer.max_steps=6",
        "trainer.val_every=3",
        "callbacks.log_every=2",
        "callbacks.certificate_every=3",
        "callbacks.sample_every=6",
        "callbacks.sample_prompt=the proof",
        "callbacks.sample_tokens=5",
    )
    outcome = train(cfg, run)
    rows = {int(row["step"]): row for row in read_metrics(run.directory / "metrics.csv")}
    assert [step for step, row in rows.items() if "train/loss" in row] == [2, 4, 6]
    for step in (3, 6):
        row = rows[step]
        assert row["train/bound_naive"] > 0
        assert row["train/max_activation"] > 0
        assert row["train/norm/layers.0.attention.query"] <= 1 + CAP_SLACK
        assert row["train/val_bits_per_byte"] > 0
    assert rows[4]["train/tokens_per_s"] > 0
    assert rows[6]["cert/naive"] == pytest.approx(rows[6]["train/bound_naive"])
    sample = outcome.artifacts["samples"].read_text()
    assert sample.startswith("=== step 6 ===\nthe proof")


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        (
            "trainer.accumulate_grad_batches=2",
            "trainer.gradient_clip_val=0.5",
            "trainer.precision=bf16-mixed",
            "constraint=spectral_normalize",
        ),
    ],
    ids=["plain", "accumulate-clip-bf16-normalize"],
)
def test_interrupted_run_resumes_bit_for_bit(make_run, monkeypatch, overrides):
    """Oracle: the uninterrupted run. Ctrl-C arrives mid-run, between two periodic checkpoints."""
    settings = ("trainer.max_steps=9", "callbacks.checkpoint_every=4", *overrides)
    whole = train(*make_run(*settings, directory="whole"))

    def interrupt(self, trainer, pl_module):
        if trainer.global_step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(progress.Progress, "on_step", interrupt)
    monkeypatch.setattr(progress.Progress, "every", 1, raising=False)
    cfg, run = make_run(*settings, "callbacks.log_every=1", directory="half")
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        train(cfg, run)
    signal.signal(signal.SIGINT, handler)
    monkeypatch.undo()
    stored = torch.load(run.directory / "checkpoints" / "last.ckpt", weights_only=True)
    assert stored["global_step"] == 5
    run.resumed = True
    resumed = train(cfg, run)
    assert_identical(weights(whole), weights(resumed))
    assert resumed.metrics["train/tokens_seen"] == whole.metrics["train/tokens_seen"]


def test_checkpoint_alone_resumes_after_the_end(make_run):
    """A run that died after training only validates again: same weights, same figures."""
    cfg, run = make_run("trainer.max_steps=3")
    first = train(cfg, run)
    run.resumed = True
    again = train(cfg, run)
    assert_identical(weights(first), weights(again))
    assert again.metrics["train/val_bits_per_byte"] == first.metrics["train/val_bits_per_byte"]


def test_accumulation_counts_optimizer_steps(make_run):
    """Twice the micro-batches per step: same number of steps, twice the tokens."""
    plain = train(*make_run("trainer.max_steps=2", directory="plain"))
    doubled = train(
        *make_run("trainer.max_steps=2", "trainer.accumulate_grad_batches=2", directory="doubled")
    )
    assert plain.metrics["train/steps"] == doubled.metrics["train/steps"] == 2
    assert doubled.metrics["train/tokens_seen"] == 2 * plain.metrics["train/tokens_seen"]


@pytest.mark.parametrize(
    "overrides",
    [
        ("optim=adamw", "constraint=exact_cap"),
        ("optim=paper", "optim.lr=0.3"),
        ("constraint=none",),
        ("constraint.per_head=true",),
        ("data.tokenizer=char",),
        ("schedule=cosine", "model.activation=gelu", "model.kv_heads=2"),
    ],
    ids=lambda overrides: overrides[0],
)
def test_every_combination_trains(make_run, overrides):
    """Other optimizers, constraints, tokenizers and shapes pass through the whole command."""
    metrics = train(*make_run("trainer.max_steps=2", *overrides)).metrics
    assert 0 < metrics["train/val_bits_per_byte"] < 10
    assert metrics["cert/naive"] > 0


@pytest.mark.parametrize(
    ("override", "error", "match"),
    [
        ("constraint.w_max=-1", ConfigError, "w_max=-1"),
        ("trainer.max_steps=0", ConfigError, "max_steps=0"),
        ("trainer.max_steps=many", ConfigError, "max_steps='many'"),
        ("optim.table=seven_step", ConfigError, "six_step"),
        ("+constraint.caps.haed=1", ConfigError, "haed"),
        ("model.heads=3", ConfigError, "heads"),
        ("device=tpu", ConfigError, "device=tpu"),
        ("trainer.strategy=foo", ConfigError, "strategy='foo'"),
        ("trainer.precision=foo", ConfigError, "precision='foo'"),
        ("optim.betas=[0.9,1.0]", ConfigError, "betas"),
        ("model.context=100000", DataError, "context"),
    ],
)
def test_bad_settings_stop_before_any_work(make_run, override, error, match):
    """One line naming the value; no checkpoint, no bundle, nothing in the run directory."""
    cfg, run = make_run(override)
    with pytest.raises(error, match=match) as caught:
        train(cfg, run)
    assert "\n" not in str(caught.value)
    assert list(run.directory.iterdir()) == []


def test_quiet_restores_the_framework_logger(make_run):
    """The command leaves the process' logging as it was."""
    framework = logging.getLogger("lightning.pytorch")
    level = framework.level
    train(*make_run("trainer.max_steps=1"))
    assert framework.level == level
