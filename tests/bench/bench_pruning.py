"""Pruning: statistics against a forward pass, and the ranking of one wide layer."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from compress.adapters import adapter_for
from compress.scoring.fidelity import rank
from compress.statistics.collect import collect
from compress.targets import Problem

GRAM_PASS = 1.5
INPUTS, OUTPUTS = 1024, 256
TOKENS = 32768  # at least; half of the default calibration set
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "paper": ("paper", {}),
    "default": ("default", {}),
    "wide": ("default", {"width": 256, "layers": 4}),
}


@pytest.mark.parametrize("name", MODELS)
def test_gram_pass(bench: Any, timed: Callable, make_model: Callable, name: str) -> None:
    """Collecting the second moments of all heads and MLPs, in forward passes over the tokens."""
    model = make_model(MODELS[name][0], **MODELS[name][1])
    length = min(bench.length, model.config.context)
    count = max(bench.batch, TOKENS // length)
    tokens_BT = torch.randint(model.config.vocab_size, (count, length))

    @torch.no_grad()
    def forward() -> None:
        for part in tokens_BT.split(max(1, 16384 // length)):
            model(part)

    adapter = adapter_for(model)

    def grams() -> None:
        collect(adapter, tokens_BT, adapter.targets())

    times = timed({"forward": forward, "grams": grams}, bench.rounds)
    sizes = {"model": name, "batch": count, "length": length}
    bench.add(f"prune: forward pass ({name})", times["forward"].cpu, "s", **sizes)
    ratios = [a / b for a, b in zip(times["grams"].cpu, times["forward"].cpu, strict=True)]
    bench.add(f"prune: Gram pass / forward ({name})", ratios, "ratio", most=GRAM_PASS, **sizes)


@pytest.mark.parametrize("unit", [1, 2])
def test_ranking(bench: Any, timed: Callable, unit: int) -> None:
    """Backward elimination of half the inputs, pooled, and the published one-pass score."""
    x_MI = torch.randn(4 * INPUTS, INPUTS, dtype=torch.float64)
    weight_IO = torch.randn(INPUTS, OUTPUTS, dtype=torch.float64) / OUTPUTS**0.5
    problem = Problem(gram_II=x_MI.T @ x_MI / len(x_MI), weight_IO=weight_IO, unit=unit)
    keep = problem.components // 2
    variants = {score: _ranker(problem, score, keep) for score in ("obs", "singleton")}
    for score, times in timed(variants, bench.rounds).items():
        sizes = {"inputs": INPUTS, "outputs": OUTPUTS, "component": unit, "keep": keep}
        bench.add(f"prune: rank {score}, n={INPUTS}, {unit} per component", times.cpu, "s", **sizes)


def _ranker(problem: Problem, score: str, keep: int) -> Callable[[], Any]:
    return lambda: rank(problem, score, keep=keep)
