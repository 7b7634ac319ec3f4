"""Image training through the whole command: learning, noise, resume, mistakes."""

import os
import signal
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_module

from common.bundle import load_bundle
from common.errors import ConfigError
from common.images import ImageConfig, Images, load_images
from common.metrics_file import read_metrics
from common.norms import rms_norm_factor, spectral_norm
from common.runs import Run, plain
from solvers.bounds import certify, verify
from train import callbacks
from train.app import train
from train.evaluate import evaluate
from train.image_data import ImageDataModule, image_indices

# float32 rounding on top of a cap.
CAP_SLACK = 1e-5
SMALL = (
    "experiment=digits",
    "device=cpu",
    "model.hidden=[16,16]",
    "trainer.val_every=0",
    "callbacks.certificate_every=0",
)


@pytest.fixture
def make_image_run(tmp_path):
    """Return a function from overrides to (configuration, run) of a small classifier."""

    def build(*overrides, directory="run"):
        with initialize_config_module("conf", version_base="1.3"):
            cfg = compose("train", overrides=[*SMALL, *overrides])
        path = tmp_path / directory
        path.mkdir(exist_ok=True)
        run = Run(command="train", directory=path, config=plain(cfg), config_hash="0")
        return cfg, run

    return build


def test_digits_are_learnt_under_the_cap(make_image_run):
    """Oracle: chance is 0.1; SVD for the caps; the bundle repeats the stored accuracy."""
    cfg, run = make_image_run(
        "trainer.max_steps=60", "trainer.val_every=30", "callbacks.certificate_every=30"
    )
    outcome = train(cfg, run)
    metrics = outcome.metrics
    assert metrics["train/val_acc_full"] > 0.8
    assert outcome.objective == 1 - metrics["train/val_acc_full"]
    assert metrics["train/images_seen"] == 60 * 256
    bundle = load_bundle(outcome.artifacts["bundle"])
    assert (bundle.kind, bundle.tokenizer) == ("classifier", None)
    for linear in bundle.model.linears:
        assert rms_norm_factor(linear.weight) * spectral_norm(linear.weight) <= 2 * (1 + CAP_SLACK)
    images = load_images(ImageConfig())
    _, accuracy = evaluate(bundle.model, images.val_NI, images.val_labels_N, 100)
    assert accuracy == pytest.approx(metrics["train/val_acc_full"])
    certificate = certify(bundle.model)
    assert certificate.naive == pytest.approx(metrics["cert/naive"])
    assert verify(bundle.model, certificate).tightened <= certificate.naive
    rows = {int(row["step"]): row for row in read_metrics(run.directory / "metrics.csv")}
    assert rows[30]["train/bound_naive"] > 0
    assert 0 < rows[30]["train/val_acc_full"] <= 1
    assert rows[60]["train/norm/linears.1"] <= 2 * (1 + CAP_SLACK)


def test_label_noise_reaches_training_only(make_image_run):
    """Oracle: with all labels wrong the true classes are avoided on the validation split."""
    metrics = train(*make_image_run("trainer.max_steps=40", "data.label_noise=1.0")).metrics
    assert metrics["train/val_acc_full"] < 0.1
    assert metrics["train/acc_train"] > metrics["train/val_acc_full"]


@pytest.mark.parametrize(
    "overrides",
    [
        ("optim=adamw", "constraint=none", "model.activation=maxmin", "model.bias=true"),
        ("constraint=spectral_normalize", "model.activation=abs"),
    ],
    ids=lambda overrides: overrides[0],
)
def test_other_settings_train(make_image_run, overrides):
    """Other optimizers, constraints and activations pass through the whole command."""
    metrics = train(*make_image_run("trainer.max_steps=3", *overrides)).metrics
    assert 0 < metrics["train/val_loss_nats"] < 100
    assert metrics["cert/naive"] > 0


def test_interrupted_run_resumes_bit_for_bit(make_image_run, monkeypatch):
    """Oracle: the uninterrupted run; Ctrl-C arrives between two periodic checkpoints."""
    settings = ("trainer.max_steps=9", "callbacks.checkpoint_every=4", "callbacks.log_every=1")
    whole = train(*make_image_run(*settings, directory="whole"))

    monkeypatch.setattr(callbacks.Checkpoint, "on_train_batch_start", _at(6), raising=False)
    cfg, run = make_image_run(*settings, directory="half")
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        train(cfg, run)
    signal.signal(signal.SIGINT, handler)
    monkeypatch.undo()
    stored = torch.load(run.directory / "checkpoints" / "last.ckpt", weights_only=True)
    assert stored["global_step"] == 7
    run.resumed = True
    resumed = train(cfg, run)
    first, second = (
        load_bundle(o.artifacts["bundle"]).model.state_dict() for o in (whole, resumed)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert resumed.metrics["train/images_seen"] == whole.metrics["train/images_seen"]


def _at(step):
    def interrupt(self, trainer, *_):
        if trainer.global_step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return interrupt


def test_a_tightened_certificate_is_stored_with_the_classifier(make_image_run):
    """Oracle: the checker proves the stored bound again; it is not above the naive one."""
    outcome = train(*make_image_run("trainer.max_steps=3", "trainer.certify=tightened"))
    bundle = load_bundle(outcome.artifacts["bundle"])
    tightened = outcome.metrics["cert/tightened"]
    assert bundle.certificate.tightened == pytest.approx(tightened)
    assert tightened <= outcome.metrics["cert/naive"]
    assert verify(bundle.model, bundle.certificate).tightened == pytest.approx(tightened)


def test_the_pattern_head_means_the_last_matrix(make_image_run):
    """Oracle: SVD: orthogonal blocks, a soft cap of its own for the last matrix alone."""
    run = make_image_run("trainer.max_steps=3", "constraint=orthogonal", "constraint.caps.head=9")
    model = load_bundle(train(*run).artifacts["bundle"]).model
    for linear in model.linears[:-1]:
        values = rms_norm_factor(linear.weight) * torch.linalg.svdvals(linear.weight.detach())
        assert float(values.min()) > 1.9
    last = model.linears[-1].weight.detach()
    assert float(torch.linalg.svdvals(last).min()) < 0.5 * float(torch.linalg.svdvals(last).max())


def test_position_survives_another_number_of_ranks():
    """Oracle: two ranks' three batches each are six batches of one process."""
    data = ImageDataModule(load_images(ImageConfig()), 8, seed=0, val_batch_size=8)
    data.load_state_dict({"consumed": 3, "world": 2})
    assert data.state_dict() == {"consumed": 6, "world": 1}


def test_every_epoch_is_a_permutation():
    """Oracle: all images once per epoch, in another order each time."""
    epochs = [
        torch.cat([image_indices(20, 5, seed=1, index=4 * epoch + k) for k in range(4)])
        for epoch in range(2)
    ]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(20))
    assert not torch.equal(*epochs)


def test_the_incomplete_batch_of_an_epoch_is_dropped():
    """Oracle: 8 of 20 images fit twice, so that batch 2 is the first of the next epoch."""
    batches = [image_indices(20, 8, seed=1, index=index) for index in range(3)]
    assert [len(batch) for batch in batches] == [8, 8, 8]
    assert len(set(torch.cat(batches[:2]).tolist())) == 16
    again = image_indices(20, 20, seed=1, index=1)[:8]
    assert torch.equal(batches[2], again)


def test_ranks_share_out_an_epoch():
    """Oracle: one process; two ranks see the same batches in turn, and split the validation."""
    images = load_images(ImageConfig())
    alone = take(ImageDataModule(images, 8, seed=0, val_batch_size=8), 4)
    seen = 0
    for rank in (0, 1):
        data = ImageDataModule(images, 8, seed=0, val_batch_size=8)
        data.trainer = SimpleNamespace(global_rank=rank, world_size=2)
        for expected, batch in zip(alone[rank::2], take(data, 2), strict=True):
            assert all(map(torch.equal, expected, batch))
        seen += sum(len(labels_B) for _, labels_B in data.val_dataloader())
    assert seen == len(images.val_NI)


def take(data, count):
    """The first batches of a fresh loader."""
    stream = iter(data.train_dataloader())
    return [next(stream) for _ in range(count)]


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("data=stdlib", "model=mlp: expected images"),
        ("model=nano", "images need an MLP"),
        ("model.hidden=[3]", "even"),
        ("model.hidden=[0]", "hidden=0"),
        ("+constraint.caps.haed=1", "haed"),
        ("constraint.caps.up=1", "'up' matches no matrix"),
        ("trainer.budget.target=2", r"trainer\.budget\.target=2: expected null"),
    ],
)
def test_bad_settings_stop_before_any_work(make_image_run, override, match):
    """One line naming the value; nothing in the run directory."""
    extra = ("model.activation=maxmin",) if match == "even" else ()
    hidden = "~model.hidden" if override == "model=nano" else None
    with initialize_config_module("conf", version_base="1.3"):
        kept = [text for text in SMALL if not (hidden and text.startswith("model."))]
        cfg = compose("train", overrides=[*kept, override, *extra])
    _, run = make_image_run()
    with pytest.raises(ConfigError, match=match) as caught:
        train(cfg, run)
    assert "\n" not in str(caught.value)
    assert list(run.directory.iterdir()) == []


def test_a_batch_larger_than_the_split_is_refused():
    """One line with the batch, the images and the remedy, instead of a smaller batch in silence."""
    images = Images(
        train_NI=torch.zeros(5, 4),
        train_labels_N=torch.zeros(5, dtype=torch.int64),
        val_NI=torch.zeros(1, 4),
        val_labels_N=torch.zeros(1, dtype=torch.int64),
        classes=2,
    )
    with pytest.raises(ConfigError, match="batch_size=6: expected at most the 5"):
        ImageDataModule(images, 6, seed=0, val_batch_size=1)
