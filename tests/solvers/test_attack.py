"""Attacks use valid pairs only, find known constants, and would expose a wrong bound."""

import dataclasses
import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from common.errors import CertificateError, ConfigError
from common.models import LipschitzTransformer
from solvers.bounds import attack, block_attack, certify
from solvers.bounds.attack import AttackResult, AttackSettings, structured_starts, with_attack

SETTINGS = AttackSettings(steps=40, network_steps=20, tokens=8)

BuildModel = Callable[..., LipschitzTransformer]


def test_every_token_stays_in_the_ball(
    build_model: BuildModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the norms of what the blocks are really given."""
    model, radius, seen = build_model(), 2.5, []
    layer = model.layers[0]
    attend = layer.attend_block

    def spy(x: Tensor) -> Tensor:
        seen.append(float(x.detach().norm(dim=-1).max()))
        return attend(x)

    monkeypatch.setattr(layer, "attend_block", spy)
    block_attack(model, 0, radius, settings=SETTINGS)
    assert len(seen) == SETTINGS.steps + 1
    assert 0.9 * radius < max(seen) <= radius


def test_a_linear_block_is_solved_exactly(build_model: BuildModel) -> None:
    """Oracle: the spectral norm of (1 - a) I + a W2 W1 for an MLP that is linear near 0."""
    model = build_model(activation="relu", mlp_bias=True, mlp_residual=0.8)
    mlp = model.layers[0].mlp
    mlp.up.bias.fill_(1e3)  # all neurons stay active on the ball
    jacobian = 0.2 * torch.eye(16).double() + 0.8 * mlp.down.weight @ mlp.up.weight
    exact = float(torch.linalg.matrix_norm(jacobian, 2))
    found = block_attack(model, 1, 1.0, settings=AttackSettings(steps=300))
    assert 0.999 * exact < found <= exact * (1 + 1e-9)


def test_the_skip_is_found_to_rounding(build_model: BuildModel) -> None:
    """Oracle: with a = 0 the block is the identity and every ratio is 1."""
    model = build_model(attn_residual=0.0)
    assert 1 - 1e-9 < block_attack(model, 0, 1.0, settings=SETTINGS) <= 1.0


def test_the_structured_start_is_worth_it(
    counterexample: LipschitzTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: bound_tightening 4.2: random starts reveal little of what structured ones do."""
    layer = counterexample.layers[0]
    for sequence_TC, change_TC in structured_starts(layer, 24):
        for tokens in (sequence_TC, change_TC):
            assert float(tokens.norm(dim=-1).max()) <= 1 + 1e-12
    settings = AttackSettings(steps=0, starts=4, tokens=24)
    structured = block_attack(counterexample, 0, 8.0, settings=settings)
    module = importlib.import_module("solvers.bounds.attack")
    monkeypatch.setattr(module, "structured_starts", lambda *_: [])
    random = block_attack(counterexample, 0, 8.0, settings=settings)
    assert structured > 2 * random


def test_attacks_are_deterministic_and_leave_the_model_alone(build_model: BuildModel) -> None:
    """Oracle: equality of two runs and of the state before and after."""
    model = build_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert attack(model, settings=SETTINGS) == attack(model, settings=SETTINGS)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_more_steps_find_more(build_model: BuildModel) -> None:
    """Oracle: the best over more steps of one deterministic search is no smaller."""
    model, values = build_model(), []
    for steps in (0, 10, 40):
        settings = dataclasses.replace(SETTINGS, steps=steps)
        values.append(block_attack(model, 0, 4.0, settings=settings))
    assert values == sorted(values)
    assert values[0] < values[-1]


def test_results_are_stored_as_estimates(build_model: BuildModel) -> None:
    """Oracle: the certificate's fields; nothing else changes."""
    model = build_model()
    certificate = certify(model)
    result = attack(model, certificate, settings=SETTINGS)
    stored = with_attack(certificate, result)
    assert stored.attack == result.value == max(result.structured, result.gradient, result.random)
    assert tuple(block.components["attack"] for block in stored.blocks) == result.blocks
    assert stored.tightened == certificate.tightened


@pytest.mark.parametrize("where", ["block", "network"])
def test_an_attack_above_a_bound_is_an_error(build_model: BuildModel, where: str) -> None:
    """Oracle: such a pair refutes the proof and must not be stored silently."""
    certificate = certify(build_model(), tighten=False)
    huge, fine = 1e9, (0.1,) * 4
    result = AttackResult(
        value=huge if where == "network" else 0.1,
        blocks=fine if where == "network" else (0.1, huge, 0.1, 0.1),
        random=0.0,
        gradient=0.0,
        structured=0.0,
    )
    with pytest.raises(CertificateError, match="exceeds the bound"):
        with_attack(certificate, result)


@pytest.mark.parametrize("field", ["starts", "tokens", "rate"])
def test_settings_are_checked(field: str) -> None:
    """Oracle: the contract."""
    with pytest.raises(ConfigError, match=f"certify.attack_{field}"):
        AttackSettings(**{field: 0})
