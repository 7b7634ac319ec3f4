"""Clock, bar and samples, on a trainer that is written out."""

from types import SimpleNamespace

import pytest
import torch

from common.errors import ConvergenceError
from train import progress
from train.callbacks import Checkpoint, Sample
from train.progress import Bar, EachStep, Progress

LOSS = {"loss": torch.tensor(1.0)}
# As much of a LightningModule as the log of a step reads.
MODULE = SimpleNamespace(
    schedule=SimpleNamespace(factor=lambda *a: 1.0),
    optim=SimpleNamespace(lr=1.0),
    total_steps=9,
    device=torch.device("cpu"),
)


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now.seconds)
    return now


def trainer(*callbacks, **changes):
    """A trainer of one CPU rank at step 0."""
    settings = {"callbacks": callbacks, "global_step": 0, "max_steps": 9, "world_size": 1}
    settings |= {"loggers": [], "callback_metrics": {}, "accumulate_grad_batches": 1}
    settings |= {"is_global_zero": True, "progress_bar_callback": None}
    strategy = SimpleNamespace(root_device=torch.device("cpu"), reduce=lambda x, reduce_op: x)
    return SimpleNamespace(strategy=strategy, **(settings | changes))


def test_only_training_counts_as_training_time(clock):
    """Oracle: 2 s per batch; what the other callback and validation take is left out."""

    class Slow(EachStep):
        def on_step(self, trainer, pl_module):
            clock.seconds += 100

    watch, slow = Progress(10), Slow(2)
    state = trainer(watch, slow)
    for callback in (watch, slow):
        callback.on_train_start(state, MODULE)
    for step in range(1, 5):
        clock.seconds += 2
        state.global_step = step
        for callback in (watch, slow):
            callback.on_train_batch_end(state, MODULE, LOSS, torch.zeros(3, 11), 0)
    watch.on_validation_start(state, MODULE)
    clock.seconds += 1000
    state.callback_metrics["train/val_bits_per_byte"] = 1.0
    watch.on_validation_end(state, MODULE)
    watch.stop_clock(torch.device("cpu"))
    assert watch.tokens_per_s == pytest.approx(4 * 3 * 10 / 8)


def test_bar_counts_optimizer_steps_from_where_a_run_resumes(capsys):
    """Oracle: written out; a micro-batch without a step does not move it."""
    watch, bar = Progress(1), Bar()
    watch.loss = 1.25
    state = trainer(watch, bar, global_step=4)
    bar.on_train_start(state, None)
    assert (bar._bar.n, bar._bar.total) == (4, 9)
    for step in (4, 5, 5, 6):
        state.global_step = step
        bar.on_train_batch_end(state, None, {}, None, 0)
    assert bar._bar.n == 6
    assert "loss=1.250" in bar._bar.postfix
    bar.on_train_end(state, None)
    assert "6/9" in capsys.readouterr().out


def test_samples_of_repeated_steps_are_written_once(tmp_path):
    """Oracle: the bytes up to the first sample that happens again; nothing to drop: untouched."""
    path = tmp_path / "samples.txt"
    kept = "=== step 2 ===\na\r\nb\n\n=== step 4 ===\n=== step four\n\n"
    path.write_bytes((kept + "=== step 6 ===\nhalf").encode())
    callback = Sample(2, path, None, None, 1)
    for _ in range(2):
        callback.on_train_start(trainer(callback, global_step=4), None)
        assert path.read_bytes() == kept.encode()
    callback.on_train_start(trainer(callback, global_step=0), None)
    assert path.read_bytes() == b""


def test_ranks_agree_on_stopping_only_now_and_then(tmp_path):
    """Property: no rank asks the others between two agreements; the period needs no question."""
    asked = []

    def decide(stop, all):
        asked.append(state.global_step)
        return True

    callback = Checkpoint(7, tmp_path)
    state = trainer(callback, world_size=2)
    state.strategy.reduce_boolean_decision = decide
    due = []
    for step in range(1, 21):
        state.global_step = step
        if callback.is_due(state):
            due.append(step)
    assert due == [7, 10, 14, 20]
    assert asked == [10, 20]


def test_the_logged_loss_is_that_of_the_whole_step():
    """Oracle: the mean over the step's two micro-batches, of which Lightning hands back halves."""
    watch, state = Progress(2), trainer(accumulate_grad_batches=2)
    watch.on_train_start(state, MODULE)
    for batch, loss in enumerate([7.0, 9.0, 1.0, 3.0, 2.0]):
        state.global_step = (batch + 1) // 2
        outputs = {"loss": torch.tensor(loss) / 2}
        watch.on_train_batch_end(state, MODULE, outputs, torch.zeros(3, 11), batch)
    assert watch.loss == 2.0


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_diverged_run_stops_with_one_line(loss):
    """The step, the value and what to lower; nothing is trained on a lost model."""
    watch, state = Progress(1), trainer()
    watch.on_train_start(state, MODULE)
    state.global_step = 1
    with pytest.raises(ConvergenceError, match=r"at step 1.*lower optim\.lr") as caught:
        watch.on_train_batch_end(state, MODULE, {"loss": torch.tensor(loss)}, torch.zeros(3, 11), 0)
    assert "\n" not in str(caught.value)
