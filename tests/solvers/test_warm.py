"""Warm multipliers: the survivors' values, and fewer evaluations after pruning."""

import pytest
import torch

from common.errors import CertificateError, ShapeError
from solvers.bounds.mlp_block import tighten_mlp
from solvers.bounds.network import TightenSettings, certify
from solvers.bounds.warm import warm_multipliers, warm_start


def test_survivors_keep_their_multipliers() -> None:
    """Oracle: indexing by hand; content heads come first, so only their positions count there."""
    old = {
        "blocks.0.tau": torch.arange(1.0, 5.0),
        "blocks.0.query": torch.arange(1.0, 3.0),
        "blocks.1.lambda": torch.arange(1.0, 7.0),
        "blocks.3.lambda": torch.ones(2),
    }
    mask = torch.tensor([True, False, True, False, False, True])
    found = warm_multipliers(old, {0: torch.tensor([1, 3]), 1: mask})
    assert found[0]["tau"].tolist() == [2.0, 4.0]
    assert found[0]["query"].tolist() == [2.0]
    assert found[1]["lambda"].tolist() == [1.0, 3.0, 6.0]
    assert found[3]["lambda"].dtype == torch.float64
    with pytest.raises(ShapeError, match=r"blocks\.3\.lambda has 2 entries"):
        warm_multipliers(old, {3: torch.tensor([2])})


def test_pruned_block_needs_fewer_evaluations() -> None:
    """Oracle: the cold solve of the same pruned block, to the same gap."""
    g = torch.Generator().manual_seed(0)
    width, neurons = 24, 96
    up, down = (torch.randn(neurons, width, generator=g, dtype=torch.float64) for _ in range(2))
    up, down = (m / torch.linalg.matrix_norm(m, 2) for m in (up, down))
    C = 0.9 * torch.eye(width, dtype=torch.float64)
    dense = tighten_mlp(C, 0.1 * down.T, up, tol=0.005)
    kept = up.norm(dim=1) * down.norm(dim=1) > (up.norm(dim=1) * down.norm(dim=1)).quantile(0.1)
    warm = warm_multipliers({"blocks.1.lambda": dense.theta.exp()}, {1: kept})[1]["lambda"].log()
    pruned = (C, 0.1 * down.T[:, kept], up[kept])
    cold = tighten_mlp(*pruned, tol=0.01)
    again = tighten_mlp(*pruned, tol=0.01, theta0=warm)
    assert again.evals < cold.evals
    assert again.gap <= 0.01 * 0.1


def test_a_pruned_model_starts_from_its_parent(build_model) -> None:
    """Oracle: rows cut by hand, in another order; a model of another depth is refused."""
    other = build_model(mlp_width=24)
    certificate = certify(other, settings=TightenSettings(stream_steps=0))
    keep = torch.randperm(24)[:18]
    model = build_model(mlp_width=18)
    for mine, theirs in zip(model.layers, other.layers, strict=True):
        mine.mlp.up.weight.copy_(theirs.mlp.up.weight[keep])
        mine.mlp.down.weight.copy_(theirs.mlp.down.weight[:, keep])
    warm = warm_start(model, other, certificate)
    assert torch.equal(warm[1]["lambda"], certificate.multipliers["blocks.1.lambda"][keep])
    assert warm[1]["stream.excess"].shape == (1,)
    cold = certify(model, settings=TightenSettings(stream_steps=0))
    again = certify(model, settings=TightenSettings(stream_steps=0), warm=warm)
    assert sum(block.evals for block in again.blocks) <= sum(block.evals for block in cold.blocks)
    assert again.tightened <= cold.tightened * 1.02
    with pytest.raises(CertificateError, match=r"certify\.warm: a model of 2 layers, expected 3"):
        warm_start(build_model(layers=3), other, certificate)
