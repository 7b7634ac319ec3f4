"""The optimizer: torch's own optimizers, the SVD and written-out recursions are the oracles."""

import copy

import pytest
import torch
from torch import nn

from common.errors import ConfigError
from train import constrain, optim
from train.batches import Member
from train.group_settings import update_norm
from train.optim import Muon
from train.orthogonalize import TABLES
from train.projections import PROJECTIONS

CAPS = [name for name, p in PROJECTIONS.items() if p.caps and name != "row_clip"]

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


@pytest.mark.parametrize("shape", [(24, 24), (48, 16), (16, 48)])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("factor", ["original", "match_rms_adamw"])
def test_muon_follows_torch_muon(shape, nesterov, factor):
    """Oracle: torch.optim.Muon with weight decay; same table, arithmetic and shape factor."""
    ours = parameter(*shape)
    theirs = nn.Parameter(ours.detach().clone())
    shared = {"lr": 0.02, "momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.1}
    optimizer = Muon([ours], table="classic", dtype="bfloat16", shape_factor=factor, **shared)
    oracle = torch.optim.Muon([theirs], ns_steps=5, adjust_lr_fn=factor, **shared)
    start = ours.detach().clone()
    walk(optimizer, [ours], 10)
    walk(oracle, [theirs], 10)
    moved = (ours - start).norm()
    assert (ours - theirs).norm() < BF16_SLACK * moved


def test_other_shape_factors_would_leave_the_trajectory_of_torch_muon():
    """Control of the test above: sqrt(out/in) is another step for a wide matrix."""
    ours = parameter(16, 48)
    theirs = nn.Parameter(ours.detach().clone())
    start = ours.detach().clone()
    walk(Muon([ours], lr=0.02, table="classic", dtype="bfloat16"), [ours], 10)
    walk(torch.optim.Muon([theirs], lr=0.02, weight_decay=0.0), [theirs], 10)
    assert (ours - theirs).norm() > 10 * BF16_SLACK * (ours - start).norm()


@pytest.mark.parametrize("factor", ["rms", "original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(8, 24), (24, 8)])
@pytest.mark.parametrize("slices", [1, 4])
def test_update_norm_bounds_the_step_of_every_shape_factor(factor, shape, slices):
    """Oracle: SVD in float64 of the difference that a step makes, per row block."""
    p = parameter(*shape)
    before = p.detach().clone()
    optimizer = Muon([p], lr=0.3, target=0.5, shape_factor=factor, slices=slices, table="classic")
    walk(optimizer, [p], 1)
    bound = update_norm(Member(optimizer.param_groups[0], p))
    moved = max(map(rms_norm, (p.detach() - before).chunk(slices)))
    assert 0.5 * bound <= moved <= bound * (1 + CAP_SLACK)


def test_momentum_warms_up_linearly():
    """Oracle: the recursion of the NanoGPT scripts written out, 0.85 to 0.95 over 4 steps."""
    p = parameter(4, 6)
    mean = torch.zeros(4, 6)
    optimizer = Muon([p], momentum=0.95, momentum_start=0.85, momentum_warmup=4)
    for decay in (0.85, 0.875, 0.9, 0.925, 0.95, 0.95):
        p.grad = torch.randn(4, 6)
        mean = decay * mean + (1 - decay) * p.grad
        optimizer.step()
        torch.testing.assert_close(optimizer.state[p]["momentum"], mean)


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


@pytest.mark.parametrize("constraint", CAPS)
@pytest.mark.parametrize(
    ("table", "dtype"),
    [("six_step", "float32"), ("polar_express", "float32"), *((t, "bfloat16") for t in TABLES)],
)
@pytest.mark.parametrize("lr", [0.05, 0.9])
def test_caps_hold_after_a_hundred_steps_from_any_start(constraint, table, dtype, lr):
    """Property: sigma <= w_max (1 + 1e-5) after each step, also for updates that conspire."""
    wide, tall = parameter(6, 18, scale=5.0), parameter(18, 6, scale=5.0)
    groups = [
        {"params": [wide], "w_max": 0.8},
        {"params": [tall], "w_max": 2.5, "weight_decay": 0.1},
    ]
    settings = {"constraint": constraint, "table": table, "dtype": dtype}
    optimizer = Muon(groups, lr=lr, momentum=0.9, **settings)
    direction = torch.randn(6, 18)
    for step in range(100):
        wide.grad = direction + 0.3 * torch.randn(6, 18)
        tall.grad = direction.T + 0.3 * torch.randn(18, 6)
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / 100)
        optimizer.step()
        assert rms_norm(wide) <= 0.8 * (1 + CAP_SLACK)
        assert rms_norm(tall) <= 2.5 * (1 + CAP_SLACK)


@pytest.mark.parametrize("constraint", CAPS)
def test_caps_hold_in_bfloat16_arithmetic(constraint):
    """Property: NanoGPT's arithmetic, update and constraint in bfloat16, on a flat spectrum."""
    p = parameter(24, 24)
    settings = {"table": "five_step", "dtype": "bfloat16", "constraint_dtype": "bfloat16"}
    optimizer = Muon([p], lr=0.1, constraint=constraint, w_max=1.2, **settings)
    for step in range(100):
        p.grad = torch.eye(24)
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 100)
        optimizer.step()
        assert rms_norm(p) <= 1.2
    # Stated overshoots and roundings are allowances, so weights settle somewhat below the cap.
    assert rms_norm(p) >= 0.88 * 1.2


@pytest.mark.parametrize("constraint", CAPS)
def test_caps_may_change_between_steps(constraint):
    """Property: a lowered cap holds at once, by a little or a lot; a raised one is not undone."""
    p = parameter(10, 14, scale=5.0)
    optimizer = Muon([p], lr=0.05, constraint=constraint)
    for w_max in (2.0, 1.95, 1.9, 0.7, 3.0, 2.9):
        optimizer.param_groups[0]["w_max"] = w_max
        walk(optimizer, [p], 1)
        assert rms_norm(p) <= w_max * (1 + CAP_SLACK)


def test_weight_decay_alone_bounds_muon_at_its_equilibrium():
    """Oracle: fixed point of sigma (1 - wd eta) + eta: no more than 1 / wd, and reached."""
    p = parameter(8, 8, scale=0.01)
    optimizer = Muon([p], lr=0.05, weight_decay=0.5)
    for _ in range(400):
        p.grad = torch.eye(8)
        optimizer.step()
        assert rms_norm(p) <= 2.0
    assert rms_norm(p) == pytest.approx(2.0, rel=0.01)


def test_hard_cap_under_adamw_holds_without_an_update_norm():
    """Property: the norm is measured where no bound is known."""
    p = parameter(10, 14, scale=5.0)
    optimizer = Muon([p], kind="adamw", lr=0.5, constraint="hard_cap", w_max=1.5)
    for _ in range(30):
        walk(optimizer, [p], 1)
        assert rms_norm(p) <= 1.5 * (1 + CAP_SLACK)


def test_groups_of_one_shape_share_a_batch_and_keep_their_settings(monkeypatch):
    """Oracle: one optimizer per group; one orthogonalisation and one projection serve them all."""
    groups = [
        {"w_max": 0.5, "lr": 0.1},
        {"w_max": 2.0, "lr": 0.05, "target": 3.0},
        {"w_max": 1.0, "lr": 0.2, "weight_decay": 0.3, "slices": 1},
    ]
    together = [parameter(12, 20) for _ in groups]
    alone = [nn.Parameter(p.detach().clone()) for p in together]
    sizes = {"orthogonalize": [], "project": []}
    for module, name in ((optim, "orthogonalize"), (constrain, "project")):
        original = getattr(module, name)

        def counted(stack, *args, name=name, original=original, **settings):
            sizes[name].append(len(stack))
            return original(stack, *args, **settings)

        monkeypatch.setattr(module, name, counted)
    shared = [{"params": [p], **g} for p, g in zip(together, groups, strict=True)]
    walk(Muon(shared, constraint="soft_cap"), together, 4)
    assert sizes == {"orthogonalize": [3] * 4, "project": [3] * 4}
    optimizers = [Muon([p], constraint="soft_cap", **g) for p, g in zip(alone, groups, strict=True)]
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        for p, optimizer in zip(alone, optimizers, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b)


def test_checkpoint_without_newer_settings_still_loads():
    """Property: groups saved by an older version take the defaults that they lack."""
    p = parameter(6, 6)
    optimizer = Muon([p], lr=0.1, constraint="soft_cap")
    walk(optimizer, [p], 2)
    saved = copy.deepcopy(optimizer.state_dict())
    for name in ("shape_factor", "momentum_warmup", "momentum_start", "constraint_dtype"):
        del saved["param_groups"][0][name]
    del saved["state"][0]["held"]
    resumed = Muon([p], lr=0.1, constraint="soft_cap")
    resumed.load_state_dict(saved)
    walk(resumed, [p], 1)
    assert rms_norm(p) <= 1 + CAP_SLACK


def test_caps_bind_when_the_gradient_keeps_pushing():
    """Property: a constant direction ends at the cap, not far below it."""
    p = parameter(16, 16, scale=0.01)
    optimizer = Muon([p], lr=0.05, constraint="soft_cap", w_max=1.5)
    for step in range(200):
        p.grad = torch.eye(16)
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 200)
        optimizer.step()
    assert rms_norm(p) == pytest.approx(1.5, rel=1e-3)


@pytest.mark.parametrize("constraint", CAPS)
def test_slices_cap_every_head(constraint):
    """Oracle: SVD of each row block."""
    p = parameter(16, 24)
    walk(Muon([p], lr=0.1, constraint=constraint, w_max=0.7, slices=4), [p], 20)
    assert max(rms_norm(block) for block in p.detach().chunk(4)) <= 0.7 * (1 + CAP_SLACK)


@pytest.mark.parametrize("constraint", CAPS)
def test_gains_scale_cap_and_update_of_every_block(constraint):
    """Oracle: SVD of each row block; the first step of an uncapped twin moves by gain * lr."""
    blocks = (1.5, 0.25, 1.0, 0.75)
    p, twin = parameter(16, 24), parameter(16, 24)
    before = twin.detach().clone()
    walk(Muon([twin], lr=0.1, slices=4, gains=blocks), [twin], 1)
    moved = (twin.detach() - before).chunk(4)
    walk(Muon([p], lr=0.1, constraint=constraint, w_max=0.7, slices=4, gains=blocks), [p], 20)
    for gain, block, step in zip(blocks, p.detach().chunk(4), moved, strict=True):
        assert rms_norm(block) <= 0.7 * gain * (1 + CAP_SLACK)
        assert rms_norm(step) == pytest.approx(0.1 * gain, rel=0.01)


def test_row_clip_acts_on_rows_without_gradient():
    """Property: every row is clipped, also those whose gradient is zero."""
    p = parameter(6, 8, scale=3.0)
    optimizer = Muon([p], kind="adamw", lr=0.1, constraint="row_clip")
    p.grad = torch.zeros(6, 8)
    optimizer.step()
    assert float(p.detach().square().mean(1).sqrt().max()) <= 1.0


@pytest.mark.parametrize("constraint", [name for name in PROJECTIONS if name != "row_clip"])
def test_resume_is_bit_exact(constraint):
    """Oracle: the uninterrupted run; momentum, counters and power vectors travel in the state."""

    def build(values):
        params = [nn.Parameter(v.clone()) for v in values]
        groups = [
            {"params": params[:2], "constraint": constraint, "slices": 2},
            {"params": params[2:3], "kind": "adamw"},
            {"params": params[3:], "kind": "rows", "constraint": "row_clip"},
        ]
        return params, Muon(groups, lr=0.1, power_iters=2, momentum_warmup=6)

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
        ({"slices": 2, "gains": (1.0,)}, "one per slice"),
        ({"slices": 2, "gains": (1.0, -1.0)}, r"gains=-1\.0"),
        ({"lr": 1e38}, r"lr=1e\+38: expected at most 1e\+06"),
        ({"lr": 1e4, "target": 1e4}, "lr \\* target=1e"),
        ({"shape_factor": "sqrt"}, "match_rms_adamw"),
        ({"constraint_dtype": "float16"}, "bfloat16"),
        ({"spectral_decay": 0.0}, "spectral_decay=0"),
        ({"momentum_start": 1.5}, r"momentum_start=1\.5"),
        ({"momentum_warmup": -1}, "momentum_warmup=-1"),
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
