"""The optimizer: torch's own optimizers, the SVD and written-out recursions are the oracles."""

import copy

import pytest
import torch
from torch import nn

from common.errors import ConfigError
from train.optim import Muon

# float32 rounding on top of a cap after a hundred steps.
CAP_SLACK = 1e-5
# torch.optim.Muon iterates in bfloat16 (8 bits); ours in float32 or bfloat16.
BF16_SLACK = 3e-2


def rms_norm(w):
    """RMS->RMS norm by SVD in float64."""
    return float(
        (w.shape[1] / w.shape[0]) ** 0.5 * torch.linalg.matrix_norm(w.detach().double(), 2)
    )


def parameter(*shape, scale=1.0):
    """A random parameter."""
    return nn.Parameter(scale * torch.randn(*shape))


def walk(optimizer, params, steps, seed=1):
    """Step on random gradients that depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("shape", [(24, 24), (48, 16)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_follows_torch_muon_where_the_formulas_coincide(shape, nesterov):
    """Oracle: torch.optim.Muon, same table; scale sqrt(max(1, out/in)) equals ours if out >= in."""
    ours, theirs = parameter(*shape), None
    theirs = nn.Parameter(ours.detach().clone())
    optimizer = Muon([ours], lr=0.02, momentum=0.9, nesterov=nesterov, table="classic")
    oracle = torch.optim.Muon(
        [theirs], lr=0.02, momentum=0.9, nesterov=nesterov, weight_decay=0.0, ns_steps=5
    )
    start = ours.detach().clone()
    walk(optimizer, [ours], 10)
    walk(oracle, [theirs], 10)
    moved = (ours - start).norm()
    assert (ours - theirs).norm() < BF16_SLACK * moved


def test_muon_update_is_target_times_scaled_polar_factor():
    """Oracle: SVD; wide matrices use sqrt(out/in) below 1, decay uses lr * target."""
    p = parameter(8, 32)
    before = p.detach().clone()
    optimizer = Muon([p], lr=0.1, target=3.0, weight_decay=0.5, momentum=0.9, nesterov=False)
    walk(optimizer, [p], 1)
    u, _, vt = torch.linalg.svd(p.grad, full_matrices=False)
    expected = (1 - 0.5 * 0.3) * before - 0.3 * (8 / 32) ** 0.5 * u @ vt
    torch.testing.assert_close(p.detach(), expected, rtol=0, atol=2e-3)


def test_muon_batches_equal_shapes():
    """Oracle: one optimizer per matrix."""
    together = [parameter(12, 20) for _ in range(3)]
    alone = [nn.Parameter(p.detach().clone()) for p in together]
    walk(Muon([{"params": together}], lr=0.1, constraint="soft_cap"), together, 5)
    optimizers = [Muon([p], lr=0.1, constraint="soft_cap") for p in alone]
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        for p, optimizer in zip(alone, optimizers, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b)


def test_adamw_group_equals_torch_adamw():
    """Oracle: torch.optim.AdamW, bit for bit."""
    ours = [parameter(7), parameter(3, 5)]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    settings = {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-9, "weight_decay": 0.1}
    walk(Muon([{"params": ours, "kind": "adamw", **settings}]), ours, 20)
    walk(torch.optim.AdamW(theirs, foreach=False, **settings), theirs, 20)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_rows_group_moves_large_rows_by_the_target():
    """Oracle: closed form: row RMS of the update is lr * target, small rows are amplified 16x."""
    p = parameter(4, 6)
    before = p.detach().clone()
    optimizer = Muon([p], kind="rows", lr=0.2, momentum=0.0, nesterov=False)
    p.grad = torch.ones(4, 6) * torch.tensor([1.0, 0.5, 1e-3, 0.0])[:, None]
    optimizer.step()
    moved = (before - p.detach()).square().mean(1).sqrt()
    torch.testing.assert_close(moved, 0.2 * torch.tensor([1.0, 1.0, 16e-3, 0.0]))


@pytest.mark.parametrize("constraint", ["soft_cap", "exact_cap"])
@pytest.mark.parametrize("table", ["six_step", "polar_express"])
@pytest.mark.parametrize("lr", [0.01, 0.2, 0.9])
def test_caps_hold_after_a_hundred_steps_from_any_start(constraint, table, lr):
    """Property: sigma <= w_max (1 + 1e-5) after each step, also for updates that conspire."""
    wide, tall = parameter(10, 30, scale=5.0), parameter(30, 10, scale=5.0)
    groups = [{"params": [wide], "w_max": 0.8}, {"params": [tall], "w_max": 2.5}]
    optimizer = Muon(groups, lr=lr, constraint=constraint, table=table, momentum=0.9)
    direction = torch.randn(10, 30)
    for step in range(100):
        wide.grad = direction + 0.3 * torch.randn(10, 30)
        tall.grad = direction.T + 0.3 * torch.randn(30, 10)
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / 100)
        optimizer.step()
        assert rms_norm(wide) <= 0.8 * (1 + CAP_SLACK)
        assert rms_norm(tall) <= 2.5 * (1 + CAP_SLACK)


def test_caps_bind_when_the_gradient_keeps_pushing():
    """Property: a constant direction ends at the cap, not far below it."""
    p = parameter(16, 16, scale=0.01)
    optimizer = Muon([p], lr=0.05, constraint="soft_cap", w_max=1.5)
    for step in range(200):
        p.grad = torch.eye(16)
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 200)
        optimizer.step()
    assert rms_norm(p) == pytest.approx(1.5, rel=1e-3)


def test_slices_cap_every_head():
    """Oracle: SVD of each row block."""
    p = parameter(16, 24)
    walk(Muon([p], lr=0.1, constraint="soft_cap", w_max=0.7, slices=4), [p], 20)
    assert max(rms_norm(block) for block in p.detach().chunk(4)) <= 0.7 * (1 + CAP_SLACK)


def test_row_clip_acts_on_rows_without_gradient():
    """Property: every row is clipped, also those whose gradient is zero."""
    p = parameter(6, 8, scale=3.0)
    optimizer = Muon([p], kind="adamw", lr=0.1, constraint="row_clip")
    p.grad = torch.zeros(6, 8)
    optimizer.step()
    assert float(p.detach().square().mean(1).sqrt().max()) <= 1.0


@pytest.mark.parametrize("constraint", ["soft_cap", "exact_cap", "spectral_normalize"])
def test_resume_is_bit_exact(constraint):
    """Oracle: the uninterrupted run; momentum, counters and power vectors travel in the state."""

    def build(values):
        params = [nn.Parameter(v.clone()) for v in values]
        groups = [
            {"params": params[:2], "constraint": constraint, "slices": 2},
            {"params": params[2:3], "kind": "adamw"},
            {"params": params[3:], "kind": "rows", "constraint": "row_clip"},
        ]
        return params, Muon(groups, lr=0.1, power_iters=2)

    values = [torch.randn(8, 12), torch.randn(8, 12), torch.randn(5), torch.randn(9, 12)]
    whole, optimizer = build(values)
    walk(optimizer, whole, 4, seed=1)
    walk(optimizer, whole, 4, seed=2)
    half, first = build(values)
    walk(first, half, 4, seed=1)
    resumed, second = build([p.detach() for p in half])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    walk(second, resumed, 4, seed=2)
    for a, b in zip(whole, resumed, strict=True):
        assert torch.equal(a, b)


def test_closure_is_honoured_with_gradients_enabled():
    """The closure's loss comes back and its backward pass feeds the step."""
    p = parameter(4, 4)
    before = p.detach().clone()
    optimizer = Muon([p], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert loss.item() == pytest.approx(float((before**2).sum()))
    assert not torch.equal(p.detach(), before)


def test_parameters_without_gradient_stay():
    """A frozen branch is left alone."""
    p, idle = parameter(4, 4), parameter(4, 4)
    before = idle.detach().clone()
    p.grad = torch.randn(4, 4)
    Muon([p, idle], lr=0.1, constraint="soft_cap").step()
    assert torch.equal(idle.detach(), before)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"lr": -1}, "lr=-1"),
        ({"w_max": -1}, "w_max=-1"),
        ({"target": 0}, "target=0"),
        ({"kind": "sgd"}, "muon"),
        ({"table": "seven_step"}, "six_step"),
        ({"dtype": "float16"}, "bfloat16"),
        ({"constraint": "cap"}, "soft_cap"),
        ({"kind": "adamw", "constraint": "soft_cap"}, "exact_cap"),
        ({"slices": 3}, "slices=3"),
    ],
)
def test_impossible_groups_are_config_errors(settings, match):
    """Errors name the value and what was expected."""
    with pytest.raises(ConfigError, match=match):
        Muon([parameter(4, 4)], **settings)


def test_vectors_and_mixed_shapes_are_config_errors():
    """A matrix group says what to do with vectors and with unequal shapes."""
    with pytest.raises(ConfigError, match="adamw group"):
        Muon([parameter(4)])
    with pytest.raises(ConfigError, match="one group per shape"):
        Muon([{"params": [parameter(4, 4), parameter(4, 5)]}])
