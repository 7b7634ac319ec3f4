"""Attacks use valid pairs only, find known constants, and would expose a wrong bound."""

import dataclasses
import functools
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from common.errors import CertificateError, ConfigError
from common.models import LipschitzTransformer
from solvers.bounds import attack, block_attack, certify
from solvers.bounds.attack_ascent import NEAR, Found, Recipe, Target, ascend
from solvers.bounds.attack_search import lengths_to
from solvers.bounds.attack_settings import AttackResult, AttackSettings, Clock
from solvers.bounds.attack_starts import lengthened, structured_starts
from solvers.bounds.attack_tokens import swap_attack
from solvers.bounds.ellipsoid import Ellipsoid
from solvers.bounds.models import with_attack

SLOW_MACHINE = 20.0  # seconds a loaded machine may take for the starts alone
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
    target = Target(lambda x: layer.attend_block(x), radius, lambda _: None)
    x, direction = torch.randn(2, 4, 8, 16, dtype=torch.float64)
    recipe = Recipe(far=(0.5,), near=(NEAR,))
    ascend(target, x, direction, recipe=recipe, steps=20, rate=1.0, clock=Clock(0))
    assert len(seen) == 21
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


def test_the_direction_is_the_worst_one(build_model: BuildModel) -> None:
    """Oracle: the max-token norm of an explicit Jacobian, maximised over the output direction."""
    layer = build_model(attn_residual=0.9).layers[0]
    target = Target(layer.attend_block, 3.0, lambda _: None)
    x, direction = torch.randn(2, 8, 5, 16, dtype=torch.float64) / 4
    x = (x / x.norm(dim=-1, keepdim=True) * 0.9)[:1].repeat(8, 1, 1)
    clock = Clock(0)
    found = ascend(target, x, direction, recipe=Recipe(), steps=60, rate=0.0, clock=clock)

    def last(z: Tensor) -> Tensor:
        return layer.attend_block(z[None])[0, -1]

    jacobian = torch.autograd.functional.jacobian(last, 3.0 * x[0])
    y = torch.nn.functional.normalize(torch.randn(20000, 16, dtype=torch.float64), dim=-1)
    sums = torch.einsum("no,otc->ntc", y, jacobian).norm(dim=-1).sum(-1)
    upper = torch.linalg.matrix_norm(jacobian.permute(1, 0, 2), 2).sum()
    assert float(sums.max()) < found.value <= float(upper)


def test_the_structured_start_is_worth_it(counterexample: LipschitzTransformer) -> None:
    """Oracle: bound_tightening 4.2: random starts reveal little of what structured ones do."""
    layer = counterexample.layers[0]
    starts = structured_starts(layer, 24)
    for tokens in (tokens for start in starts for tokens in start):
        assert float(tokens.norm(dim=-1).max()) <= 1 + 1e-12
    target = Target(layer.attend_block, 8.0, lambda _: None)
    look = functools.partial(ascend, target, recipe=Recipe(), steps=0, rate=0.1, clock=Clock(0))
    structured = look(torch.stack([x for x, _ in starts]), torch.stack([d for _, d in starts]))
    random = look(*torch.randn(2, 4, 24, 64, dtype=torch.float64) / 8)
    assert structured.value > 2 * random.value


def test_large_pairs_see_past_kinks(build_model: BuildModel) -> None:
    """Oracle: MaxMin has no curvature, so that close pairs give the input no gradient to follow."""
    model = build_model(activation="maxmin", mlp_bias=True, mlp_residual=1.0)
    target = Target(model.layers[0].mlp_block, 4.0, lambda _: None)
    x, direction = torch.randn(2, 16, 1, 16, dtype=torch.float64) / 4
    values = [
        ascend(target, x, direction, recipe=recipe, steps=60, rate=0.3, clock=Clock(0)).value
        for recipe in (Recipe(), Recipe(far=(0.5,), near=(0.01,)))
    ]
    assert values[1] > values[0]


def test_softening_is_undone(build_model: BuildModel) -> None:
    """Oracle: only ratios of the true map count, and the last call restores it."""
    model, factors = build_model(), []
    target = Target(model.layers[0].attend_block, 4.0, factors.append)
    x, direction = torch.randn(2, 2, 4, 16, dtype=torch.float64)
    recipe = Recipe(soft=0.1)
    ascend(target, x, direction, recipe=recipe, steps=10, rate=0.1, clock=Clock(0))
    assert factors[0] == pytest.approx(0.1)
    assert factors[-3:] == [1.0] * 3


def test_longer_sequences_start_from_shorter_ones() -> None:
    """Oracle: the contract: twice the length, each token twice, or the old sequence at the end."""
    found = Found(torch.ones(2), *torch.randn(2, 2, 3, 4, dtype=torch.float64))
    x, direction = lengthened(found, torch.Generator().manual_seed(0))
    assert x.shape == direction.shape == (4, 6, 4)
    assert torch.equal(x[0, ::2], found.x[0])
    assert torch.equal(x[0, 1::2], found.x[0])
    assert torch.equal(x[3, 3:], found.x[1])
    assert lengths_to(60) == [8, 15, 30, 60]
    assert lengths_to(3) == [3]


def test_swaps_are_pairs_of_texts(build_model: BuildModel) -> None:
    """Oracle: exhaustive search over all pairs of one-token texts of a linear map."""
    rows = torch.randn(11, 16, dtype=torch.float64)
    w = torch.randn(5, 16, dtype=torch.float64)
    target = Target(lambda x: x @ w.T, 10.0, lambda _: None)
    found = swap_attack(target, rows, count=64, tokens=1, seed=0, clock=Clock(0))
    away = rows[:, None] - rows[None] + 1e-300
    exact = float(((away @ w.T).norm(dim=-1) / away.norm(dim=-1).clamp(min=1e-9)).max())
    assert 0.8 * exact < found <= exact


def test_a_budget_ends_the_search(build_model: BuildModel) -> None:
    """Oracle: a search of hours under a budget of half a second, and what its starts reach."""
    model = build_model()
    settings = AttackSettings(steps=10**6, network_steps=10**6, restarts=100, budget_s=0.5)
    began = time.monotonic()
    result = attack(model, settings=settings)
    assert time.monotonic() - began < SLOW_MACHINE
    assert min(result.gradient, result.structured, *result.blocks) > 0


def test_attacks_are_deterministic_and_leave_the_model_alone(build_model: BuildModel) -> None:
    """Oracle: equality of two runs and of the state before and after."""
    model = build_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert attack(model, settings=SETTINGS) == attack(model, settings=SETTINGS)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_more_steps_find_more(build_model: BuildModel) -> None:
    """Oracle: a search must beat its own starts, and a longer one must beat a short one here."""
    model, values = build_model(), []
    for steps in (0, 5, 40):
        settings = dataclasses.replace(SETTINGS, steps=steps)
        values.append(block_attack(model, 0, 4.0, settings=settings))
    assert values[0] < values[1] < values[2]


def test_results_are_stored_as_estimates(build_model: BuildModel) -> None:
    """Oracle: the certificate's fields; nothing else changes."""
    model = build_model()
    certificate = certify(model)
    result = attack(model, certificate, settings=SETTINGS)
    stored = with_attack(certificate, result)
    kinds = ("random", "power", "gradient", "structured", "swaps")
    assert stored.attack == result.value == max(getattr(result, kind) for kind in kinds)
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


@pytest.mark.parametrize("field", ["restarts", "tokens", "rate"])
def test_settings_are_checked(field: str) -> None:
    """Oracle: the contract."""
    with pytest.raises(ConfigError, match=rf"^attack\.{field}"):
        AttackSettings(**{field: 0})


def test_rounding_between_close_points_is_no_sensitivity(build_model: BuildModel) -> None:
    """Oracle: an isometry with a large bias, attacked in a domain 1e-9 thin: its constant is 1."""
    model = build_model(activation="abs", mlp_bias=True, mlp_residual=1.0, mlp_ratio=1)
    mlp = model.layers[0].mlp
    mlp.up.weight.copy_(torch.linalg.qr(mlp.up.weight).Q)
    mlp.down.weight.copy_(torch.linalg.qr(mlp.down.weight).Q)
    mlp.down.bias.fill_(10.0)
    factor = torch.diag(torch.cat((torch.ones(2), torch.full((14,), 1e-9))).double())
    thin = Ellipsoid(factor, 0, 1.0)
    assert block_attack(model, 1, thin, settings=SETTINGS) <= 1.0
