"""Pruned pairs of tiny transformers, and an attack on them."""

import pytest
import torch

from compress.pruner import prune_model
from compress.settings import CompressConfig
from solvers.bounds import certify

ATTACK_STEPS = 40


@pytest.fixture
def tokens():
    """Return ``(count, seed) -> tokens (count, 16)``."""

    def make(count: int = 24, seed: int = 1) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(11, (count, 16), generator=generator)

    return make


@pytest.fixture
def pruned_pair(make_model, tokens):
    """Return ``(activation, ...) -> (dense model, naive certificate, pruning)``."""

    def make(activation="gelu", comp="lsq_capped", *, keep=0.6, keep_heads=1.0, **changes):
        model = make_model(activation, **changes)
        settings = CompressConfig(keep=keep, keep_heads=keep_heads, comp=comp, tokens=1, ridge=1e-4)
        return model, certify(model, tighten=False), prune_model(model, tokens(), settings)

    return make


@pytest.fixture
def ascend():
    """Return ``(objective, start, radius) -> largest value found`` by normalised ascent."""

    def run(objective, start, radius, steps=ATTACK_STEPS):
        x = start.clone().requires_grad_()
        best = 0.0
        for step in range(steps):
            value = objective(x)
            best = max(best, float(value.detach()))
            (gradient,) = torch.autograd.grad(value, x)
            rate = radius * 0.5 * (1 - step / steps)
            with torch.no_grad():
                x += rate * gradient / gradient.norm(dim=-1, keepdim=True).clamp(min=1e-30)
                x *= (radius / x.norm(dim=-1, keepdim=True).clamp(min=1e-30)).clamp(max=1.0)
        return best

    return run


@pytest.fixture
def on_sphere():
    """Return ``(shape, radius, seed) -> points`` of that l2 norm."""

    def make(shape, radius, seed=0):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return x * (radius / x.norm(dim=-1, keepdim=True))

    return make
