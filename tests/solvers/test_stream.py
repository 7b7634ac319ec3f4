"""The stream's ellipsoids hold all tokens and all changes; the search only makes them smaller."""

import math

import pytest
import torch
from torch import Tensor

from common.models import LipschitzTransformer
from solvers.bounds.admissible import multiplier_shapes
from solvers.bounds.attack import block_attack
from solvers.bounds.attack_settings import AttackSettings
from solvers.bounds.ellipsoid import Ellipsoid
from solvers.bounds.network import certify
from solvers.bounds.network_search import TightenSettings, search_network
from solvers.bounds.stream_proof import Stream, advance, logit_factors, stream_factors

BATCH, TOKENS, STEP = 64, 8, 1e-4
INSIDE = 1 + 1e-6


def gauge(ellipsoid: Ellipsoid, points_BTC: Tensor) -> float:
    """Return the smallest multiple of the ellipsoid that holds all points."""
    factor, flat = ellipsoid.factor_CC, points_BTC.flatten(0, 1).T
    scaled = torch.linalg.solve(factor, flat * 2.0**-ellipsoid.exponent)
    assert torch.allclose(scaled.norm(dim=0), ellipsoid.gauge(points_BTC).flatten())
    return float(scaled.norm(dim=0).max())


def random_multipliers(model: LipschitzTransformer, index: int) -> dict[str, Tensor]:
    """Return multipliers nobody searched."""
    shapes = multiplier_shapes(model.config.layer(index // 2), index)
    return {name: torch.randn(n, dtype=torch.float64).exp() for name, n in shapes.items()}


def pairs(model: LipschitzTransformer, radius: float) -> tuple[Tensor, Tensor]:
    """Return sequences of tokens on the sphere of ``radius`` and unit changes of every token."""
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH, TOKENS, model.config.width)
    x, dx = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return radius * x / x.norm(dim=-1, keepdim=True), dx / dx.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("searched", [False, True], ids=["random", "searched"])
def test_tokens_and_changes_stay_inside(any_model: LipschitzTransformer, searched: bool) -> None:
    """Oracle: real sequences through the model's own layers, changes by central differences."""
    config, radius = any_model.config, any_model.domain_radius()
    tensors, stream = any_model.state_dict(), Stream.start(config.width, radius)
    x_BTC, dx_BTC = pairs(any_model, radius * (1 - 1e-3))
    near, far = x_BTC - STEP * dx_BTC, x_BTC + STEP * dx_BTC
    found = None
    if searched:
        settings = TightenSettings(max_evals=5, stream_steps=5)
        found = search_network(config, tensors, radius, settings, lambda indices: indices, {})
    positions = torch.arange(TOKENS).expand(BATCH, TOKENS)
    for index in range(2 * config.layers):
        own = found[index].at(stream) if found else random_multipliers(any_model, index)
        stream = advance(config, tensors, index, stream, own)[1]
        x_BTC, near, far = (_block(any_model, index, z, positions) for z in (x_BTC, near, far))
        assert gauge(stream.tokens.domain, x_BTC) <= INSIDE
        assert float(x_BTC.norm(dim=-1).max()) <= stream.tokens.radius * INSIDE
        assert gauge(stream.changes, (far - near) / (2 * STEP)) <= INSIDE
    moved = float((far - near).norm(dim=-1).max()) / (2 * STEP)
    assert moved <= math.prod(stream_factors(stream.changes)) * INSIDE
    factors = logit_factors(config, any_model.head.weight, stream.changes)
    logits = (any_model.logits(far) - any_model.logits(near)) / (2 * STEP)
    assert float(logits.norm(dim=-1).max()) <= math.prod(factors) * INSIDE


def _block(model: LipschitzTransformer, index: int, x_BTC: Tensor, positions: Tensor) -> Tensor:
    layer = model.layers[index // 2]
    return layer.mlp_block(x_BTC) if index % 2 else layer.attend_block(x_BTC, positions)


@pytest.mark.parametrize("norm", [1.0, 2.0])
def test_the_joint_bound_is_below_the_product(build_model, norm: float) -> None:
    """Oracle: the product of the block bounds; an attack on the first block from below."""
    model = build_model(norm=norm, layers=3, kind="gaussian")
    plain = certify(model, settings=TightenSettings(stream_steps=0))
    joint = certify(model, settings=TightenSettings(stream_steps=30))
    product = math.prod(block.tightened for block in joint.blocks)
    assert joint.stream < 0.98 * product
    assert joint.tightened < plain.tightened
    value = block_attack(model, 0, joint.radius, settings=AttackSettings(steps=20))
    assert value < joint.blocks[0].tightened


def test_scales_far_apart_do_no_harm(build_model) -> None:
    """Oracle: rescaled embeddings: the changes do not know the unit, tokens carry it."""
    model = build_model(layers=1, content_heads=0, position_bias=True)
    small = certify(model).stream
    model.embedding.weight.mul_(1e30)
    large = certify(model)
    assert large.stream == pytest.approx(small, rel=1e-3)
    assert large.blocks[1].radius_out > 1e29
