"""Pruned digit classifiers: every score with every compensation, BatchNorm kept or re-estimated.

Errors are relative squared errors of the logits on held-out images; a row's value is that of the
default score, its settings hold the figures of all scores.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.images import Images, load_digits
from compress.adapters import Adapter, SequentialAdapter
from compress.compensate import METHODS
from compress.pruner import prune_model
from compress.scoring.fidelity import SCORES
from compress.settings import CompressConfig

KEEPS = (0.5, 0.25, 0.125, 0.0625)
EPOCHS, BATCH, RATE = 15, 64, 2e-3
HEADLINE = 0.25
LEAST_ACCURACY = 0.95  # of the dense networks


@pytest.fixture(scope="module")
def digits() -> Images:
    """Return the digits, a fifth held out."""
    return load_digits()


@pytest.fixture(scope="module")
def trained(digits: Images) -> Callable[[str], nn.Module]:
    """Return ``name -> trained network``, each trained once."""
    found: dict[str, nn.Module] = {}

    def get(name: str) -> nn.Module:
        if name not in found:
            torch.manual_seed(0)
            found[name] = train(NETWORKS[name](), digits)
        return found[name]

    return get


def mlp() -> nn.Module:
    """Return the 64-128-128-10 network of the specification's unlearning table."""
    layers = (nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    return nn.Sequential(*layers)


def cnn() -> nn.Module:
    """Return three convolutions with BatchNorm and a linear head; takes flat images."""

    def block(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        return convolution, nn.BatchNorm2d(outputs), nn.ReLU()

    body = (*block(1, 16), *block(16, 32), nn.MaxPool2d(2), *block(32, 32), nn.AvgPool2d(2))
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *body, nn.Flatten(), nn.Linear(128, 10))


NETWORKS = {"mlp": mlp, "cnn": cnn}


def train(model: nn.Module, images: Images) -> nn.Module:
    """Train with Adam under a falling rate; a few seconds."""
    optimiser = torch.optim.Adam(model.parameters(), lr=RATE)
    steps = EPOCHS * (len(images.train_NI) // BATCH + 1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images.train_NI)).split(BATCH):
            loss = F.cross_entropy(model(images.train_NI[batch]), images.train_labels_N[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def outcome(dense: nn.Module, pruned: nn.Module, images: Images) -> tuple[float, float]:
    """Return relative squared logit error and accuracy on held-out images."""
    old_NV, new_NV = dense(images.val_NI), pruned(images.val_NI)
    error = float((old_NV - new_NV).square().sum() / old_NV.square().sum())
    return error, accuracy(new_NV, images.val_labels_N)


def accuracy(logits_NV: Tensor, labels_N: Tensor) -> float:
    """Return the share of right answers."""
    return float((logits_NV.argmax(1) == labels_N).double().mean())


@pytest.mark.parametrize(("name", "norms"), [("mlp", "none"), ("cnn", "kept"), ("cnn", "new")])
def test_digits(
    bench: Any,
    digits: Images,
    trained: Callable[[str], nn.Module],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    name: str,
    norms: str,
) -> None:
    """All scores, compensations and budgets on one network."""
    dense = trained(name)
    if norms == "kept":
        monkeypatch.setattr(SequentialAdapter, "recalibrate", Adapter.recalibrate)
    before = outcome(dense, dense, digits)[1]
    assert before >= LEAST_ACCURACY
    grid = {
        comp: {
            score: {keep: _pruned(dense, digits, keep, score, comp) for keep in KEEPS}
            for score in SCORES
        }
        for comp in METHODS
    }
    for comp, scores in grid.items():
        bench.add(
            f"digits: {name}, BatchNorm {norms}, {comp}, error at keep {HEADLINE:g}",
            [scores["obs"][HEADLINE][0]],
            "relative",
            network=name,
            norms=norms,
            comp=comp,
            dense_accuracy=before,
            scores=scores,
        )
    with capsys.disabled():
        print(f"\n{name}, BatchNorm {norms}, dense accuracy {before:.4f}: error (accuracy)")
        print("\n".join(_table(grid)))


def _pruned(
    dense: nn.Module, images: Images, keep: float, score: str, comp: str
) -> tuple[float, float]:
    settings = CompressConfig(keep=keep, score=score, comp=comp, min_keep=keep)
    pruning = prune_model(dense, images.train_NI, settings)
    return outcome(dense, pruning.model, images)


def _table(grid: dict[str, dict[str, dict[float, tuple[float, float]]]]) -> list[str]:
    """Return one line per budget and score, one column per compensation."""
    lines = [f"{'keep':>6} {'score':<10}" + "".join(f"{comp:>18}" for comp in grid)]
    for keep in KEEPS:
        for score in SCORES:
            cells = (scores[score][keep] for scores in grid.values())
            text = "".join(f"{error:>10.5f} ({right:.3f})" for error, right in cells)
            lines.append(f"{keep:>6g} {score:<10}" + text)
    return lines
