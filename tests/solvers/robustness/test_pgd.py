"""Perturbations stay in their set; attacks find the closed-form distance and never less."""

import pytest
import torch
from torch import Tensor

from common.errors import ConfigError
from solvers.robustness import RobustnessSettings, Threat
from solvers.robustness.pgd import attacked, fgsm, pgd

SETTINGS = RobustnessSettings(steps=20, restarts=3)
EXACT = 1e-12  # float64 rounding of norms
BALL = 2.0


def inputs(*shape: int, threat: Threat) -> Tensor:
    """Return inputs that lie in the threat's domain, some of them on its border."""
    x = torch.rand(shape, dtype=torch.float64)
    if threat.box:
        x[..., 0] = 1.0
    else:
        x = x - 0.5
    if threat.ball is not None:
        x = x * (threat.ball / x.norm(dim=-1, keepdim=True)) * (1 - 1e-12)
    return x


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize(("box", "ball"), [(False, None), (True, None), (False, BALL)])
@pytest.mark.parametrize("epsilon", [1e-3, 0.3, 5.0])
def test_perturbations_stay_in_the_set(
    norm: str, box: bool, ball: float | None, epsilon: float
) -> None:
    """Oracle: norms and limits of far, random and near candidates, each checked by itself."""
    threat = Threat(norm=norm, epsilon=epsilon, box=box, ball=ball)
    x = inputs(6, 4, 9, threat=threat)
    generator = torch.Generator().manual_seed(0)
    candidates = [threat.project(x, x + s * torch.randn_like(x)) for s in (1e-4, 0.1, 100.0)]
    for y in (*candidates, threat.random(x, generator)):
        size = (y - x).norm(dim=-1) if norm == "l2" else (y - x).abs().amax(-1)
        assert float(size.max()) <= epsilon * (1 + EXACT) + EXACT
        assert not box or (float(y.min()) >= 0 and float(y.max()) <= 1)
        assert ball is None or float(y.norm(dim=-1).max()) <= ball
    assert float((threat.project(x, x) - x).abs().max()) < EXACT
    # Not a trivial set: a far candidate ends far from the input unless the domain is in the way.
    assert float((candidates[-1] - x).abs().max()) > 0.1 * min(epsilon, 1.0)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_direction_is_steepest(norm: str) -> None:
    """Oracle: the dual norm of the gradient."""
    gradient = torch.randn(5, 8, dtype=torch.float64)
    threat = Threat(norm=norm, epsilon=1.0)
    gain = (threat.direction(gradient) * gradient).sum(-1)
    dual = gradient.norm(dim=-1) if norm == "l2" else gradient.abs().sum(-1)
    assert torch.allclose(gain, dual, rtol=1e-12, atol=0)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("loss", ["margin", "cross_entropy"])
def test_two_class_distance_is_found_exactly(norm: str, loss: str) -> None:
    """Oracle: gap / |w| in the dual norm: every input breaks beyond it, none before it."""
    w, x = torch.randn(2, 6, dtype=torch.float64), torch.randn(40, 6, dtype=torch.float64)

    def logits(y: Tensor) -> Tensor:
        return y @ w.T

    top = logits(x).argmax(-1)
    gap = logits(x).gather(1, top[:, None])[:, 0] - logits(x).gather(1, 1 - top[:, None])[:, 0]
    difference = w[0] - w[1]
    dual = difference.norm() if norm == "l2" else difference.abs().sum()
    for index, distance in enumerate((gap / dual).tolist()):
        one, label = x[index : index + 1], top[index : index + 1]
        for factor, breaks in ((1 - 1e-9, False), (1 + 1e-6, True)):
            threat = Threat(norm=norm, epsilon=distance * factor)
            assert bool(fgsm(logits, one, label, threat, loss)) is breaks
            generator = torch.Generator().manual_seed(0)
            nothing = torch.zeros(1, dtype=torch.bool)
            settings = RobustnessSettings(loss=loss)
            assert bool(pgd(logits, one, label, threat, settings, generator, nothing)) is breaks


def test_larger_radii_break_no_fewer() -> None:
    """Oracle: the sets are nested, so accuracy under attack cannot rise."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4)
    ).double()
    model.requires_grad_(False)
    x = torch.rand(64, 8, dtype=torch.float64)
    threats = [Threat(norm="l2", epsilon=e) for e in (0.05, 0.1, 0.3, 1.0)]
    masks = attacked(model, x, model(x).argmax(-1), threats, SETTINGS, seed=0)
    counts = [int(broken.sum()) for _, broken in masks]
    assert counts == sorted(counts)
    assert 0 < counts[0] < counts[-1]
    for step, broken in masks:
        assert not bool((step & ~broken).any())
    again = attacked(model, x, model(x).argmax(-1), threats, SETTINGS, seed=0)
    assert torch.equal(torch.cat([b for _, b in masks]), torch.cat([b for _, b in again]))


def test_more_work_breaks_no_fewer() -> None:
    """Oracle: restarts only add candidates; and steps must be worth something."""
    torch.manual_seed(2)
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 6)
    ).double()
    model.requires_grad_(False)
    x = torch.randn(128, 8, dtype=torch.float64)
    top, threat = model(x).argmax(-1), Threat(norm="l2", epsilon=0.4)
    counts = []
    for restarts in (1, 4):
        settings = RobustnessSettings(steps=10, restarts=restarts)
        ((step, broken),) = attacked(model, x, top, [threat], settings, seed=0)
        counts.append(int(broken.sum()))
    assert int(step.sum()) < counts[0] <= counts[1]


def test_a_vanishing_gradient_is_survived() -> None:
    """Oracle: constant logits cannot be attacked, and nothing becomes NaN."""
    x = torch.zeros(3, 5, dtype=torch.float64)

    def logits(y: Tensor) -> Tensor:
        return torch.stack((1 + 0 * y.sum(-1), 0 * y.sum(-1)), dim=-1)

    threats = [Threat(norm="l2", epsilon=1.0, ball=1.0)]
    ((step, broken),) = attacked(logits, x, torch.zeros(3).long(), threats, SETTINGS, seed=0)
    assert not bool((step | broken).any())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("norms", ("l1",)),
        ("norms", ()),
        ("domains", ("sphere",)),
        ("domains", ()),
        ("loss", "hinge"),
        ("steps", 0),
        ("text_epsilons", (0.1, -0.1)),
        ("points", 1),
        ("tokens", 0),
    ],
)
def test_settings_are_checked(field: str, value: object) -> None:
    """Oracle: the contract: the message names the setting."""
    with pytest.raises(ConfigError, match=f"robustness.{field}"):
        RobustnessSettings(**{field: value})
