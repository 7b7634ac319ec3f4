"""Gradient attacks on the first class: one signed or normalised step, and projected descent.

What they find are valid perturbed inputs in float64, so that one of them inside a certified radius
would refute the certificate. What they do not find proves nothing.
"""

# Legend: B batch, D the axis that carries the norm, V classes; ... any axes between.

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from solvers.robustness.settings import RobustnessSettings
from solvers.robustness.threat import Threat

STEP = 2.5
"""Length of a PGD path over its radius: long enough to cross the set and come back a little."""

Logits = Callable[[Tensor], Tensor]
"""Inputs (B, ..., D) to logits (B, ..., V), differentiable."""


def attacked(
    logits: Logits,
    x: Tensor,
    top: Tensor,
    threats: Sequence[Threat],
    settings: RobustnessSettings,
    seed: int,
) -> list[tuple[Tensor, Tensor]]:
    """Attack all inputs under threats that contain one another.

    Args:
        logits: The classifier.
        x: Inputs (B, ..., D), float64.
        top: Their first classes (B, ...).
        threats: Of one norm and domain, radii ascending.
        settings: Steps, restarts, loss, inputs per pass.
        seed: Of the random restarts.

    Returns:
        For each threat two masks (places,), in the order of ``top.flatten()``: where one step and
        where any attack so far changed the first class.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, settings.batch // max(1, top[0].numel()))
    masks: list[list[tuple[Tensor, Tensor]]] = [[] for _ in threats]
    for part_x, part_top in zip(x.split(rows), top.split(rows), strict=True):
        broken = torch.zeros_like(part_top, dtype=torch.bool)
        for threat, found in zip(threats, masks, strict=True):
            step = fgsm(logits, part_x, part_top, threat, settings.loss)
            broken = pgd(logits, part_x, part_top, threat, settings, generator, broken | step)
            found.append((step.flatten(), broken.flatten()))
    return [(torch.cat([a for a, _ in m]), torch.cat([b for _, b in m])) for m in masks]


def fgsm(logits: Logits, x: Tensor, top: Tensor, threat: Threat, loss: str = "margin") -> Tensor:
    """Return where one full step from the input changes the first class.

    Args:
        logits: The classifier.
        x: Inputs (B, ..., D), float64.
        top: Their first classes (B, ...).
        threat: The perturbations allowed.
        loss: ``margin`` or ``cross_entropy``.

    Returns:
        Boolean (B, ...).

    Source:
        arXiv 1412.6572 for ``linf``; normalised gradient for ``l2``.
    """
    gradient, _ = _descent(logits, x, top, loss, torch.ones_like(top, dtype=torch.bool))
    y = threat.project(x, x - threat.epsilon * threat.direction(gradient))
    with torch.no_grad():
        return _changed(logits(y), top)


def pgd(
    logits: Logits,
    x: Tensor,
    top: Tensor,
    threat: Threat,
    settings: RobustnessSettings,
    generator: torch.Generator,
    broken: Tensor,
) -> Tensor:
    """Return where projected gradient descent changes the first class.

    Args:
        logits: The classifier.
        x: Inputs (B, ..., D), float64.
        top: Their first classes (B, ...).
        threat: The perturbations allowed.
        settings: Steps, restarts, loss.
        generator: Of the random restarts.
        broken: Where a weaker attack (a smaller radius, one step) succeeded already.

    Returns:
        Boolean (B, ...): ``broken``, and every place that any iterate changed. One perturbation
        serves all places of a sequence and descends for those still standing.

    Source:
        arXiv 1706.06083.
    """
    broken = broken.clone()
    rate = STEP * threat.epsilon / settings.steps
    for restart in range(settings.restarts):
        y = threat.random(x, generator) if restart else x
        for _ in range(settings.steps):
            gradient, changed = _descent(logits, y, top, settings.loss, ~broken)
            broken |= changed
            if bool(broken.all()):
                return broken
            y = threat.project(x, y - rate * threat.direction(gradient))
        with torch.no_grad():
            broken |= _changed(logits(y), top)
    return broken


def _descent(
    logits: Logits, y: Tensor, top: Tensor, loss: str, chosen: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradient of the chosen places' loss at ``y`` and where the class changed."""
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        z = logits(y)
        first = z.gather(-1, top[..., None])[..., 0]
        value = first - (_others(z, top) if loss == "margin" else z.logsumexp(-1))
        (gradient,) = torch.autograd.grad((value * chosen).sum(), y)
    return gradient, _changed(z.detach(), top)


def _others(z: Tensor, top: Tensor) -> Tensor:
    return z.scatter(-1, top[..., None], float("-inf")).amax(-1)


def _changed(z: Tensor, top: Tensor) -> Tensor:
    return _others(z, top) > z.gather(-1, top[..., None])[..., 0]
