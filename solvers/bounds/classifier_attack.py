"""Attacks on classifiers: pairs of inputs that move the logits as far as possible.

Every figure is an estimate from below of the l2 Lipschitz constant on the whole input space.
Float64, seeded, CPU.
"""

# Shape letters: B starts, I input features, O logits.

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from common.classifier_certificate import ClassifierCertificate
from common.models import LipschitzMLP
from solvers.bounds.attack_ascent import ROUNDING
from solvers.bounds.attack_settings import AttackResult, AttackSettings, Clock

_SIZES = (1.0, 1e3)
"""Norms of the attacked points: with biases the constants near 0 and far away differ."""

_DISTANCE = 1e-3
"""Distance of a pair relative to the size of its points."""


def attack_classifier(
    model: LipschitzMLP,
    certificate: ClassifierCertificate | None = None,
    *,
    settings: AttackSettings | None = None,
) -> AttackResult:
    """Attack a classifier from random points, by gradients, and by singular vectors.

    Args:
        model: Not modified; copied to float64.
        certificate: Of the model; its chains are attacked one by one when there are several.
        settings: Budget; ``tokens`` does not apply.

    Returns:
        Estimates from below, RMS to RMS for the network and l2 for the chains.
    """
    settings = settings or AttackSettings()
    model = copy.deepcopy(model).cpu().double().eval().requires_grad_(False)
    inputs, classes = model.sizes[0], model.sizes[-1]
    scale = (inputs / classes) ** 0.5
    clock = Clock(settings.budget_s)
    chains = certificate.blocks if certificate is not None and len(certificate.blocks) > 1 else ()
    first = clock.part(0.5 if chains else 1.0)
    values = _attack(model, inputs, settings, settings.network_steps, first)
    blocks = [] if chains else [max(values)]
    for left, b in zip(range(len(chains), 0, -1), chains, strict=True):
        part = _part(model, b.first, b.stop)
        found = _attack(part, model.sizes[b.first], settings, 0, clock.part(1 / left))
        blocks.append(max(found))
    random, gradient, structured = (scale * value for value in values)
    return AttackResult(
        value=max(random, gradient, structured),
        blocks=tuple(blocks),
        random=random,
        gradient=gradient,
        structured=structured,
    )


def _part(model: LipschitzMLP, first: int, stop: int) -> Callable[[Tensor], Tensor]:
    def run(x_BI: Tensor) -> Tensor:
        for index in range(first, stop):
            x_BI = model.linears[index](x_BI)
            x_BI = model.activate(x_BI) if index < stop - 1 else x_BI
        return x_BI

    return run


def _attack(
    function: Callable[[Tensor], Tensor],
    inputs: int,
    settings: AttackSettings,
    steps: int,
    clock: Clock,
) -> tuple[float, float, float]:
    """Return the best l2 ratios of random pairs, of gradient ascent and of singular vectors."""
    generator = torch.Generator().manual_seed(settings.seed)
    shape = (2, settings.restarts, inputs)
    points = torch.randn(shape, generator=generator, dtype=torch.float64)
    random = gradient = structured = 0.0
    for left, size in zip(range(len(_SIZES), 0, -1), _SIZES, strict=True):
        part = clock.part(0.5 / left)
        x_BI, direction_BI = (torch.nn.functional.normalize(p, dim=-1) for p in points)
        random = max(random, _ratio(function, size * x_BI, direction_BI, size))
        most = max(settings.steps, steps)
        found = _singular(function, size * x_BI, direction_BI, size, most, part)
        structured = max(structured, found)
        part = clock.part(1 / (2 * left - 1))
        found = _ascent(function, x_BI, direction_BI, size, steps, settings.rate, part)
        gradient = max(gradient, found)
    return random, gradient, structured


def _singular(
    function: Callable[[Tensor], Tensor],
    x_BI: Tensor,
    direction_BI: Tensor,
    size: float,
    steps: int,
    clock: Clock,
) -> float:
    """Follow the Jacobian's top right singular vector, moving the point along it half the time."""
    best = 0.0
    for step in range(steps):
        pushed = torch.func.jvp(function, (x_BI,), (direction_BI,))[1]
        pull = torch.func.vjp(function, x_BI)[1]
        direction_BI = torch.nn.functional.normalize(pull(pushed)[0], dim=-1)
        best = max(best, _ratio(function, x_BI, direction_BI, size))
        if clock.left <= 0:
            break
        if step % 4 == 3:
            # A piecewise linear map is often most sensitive where it is far along that vector.
            x_BI = size * torch.nn.functional.normalize(x_BI / size + direction_BI, dim=-1)
    return best


def _ascent(
    function: Callable[[Tensor], Tensor],
    x_BI: Tensor,
    direction_BI: Tensor,
    size: float,
    steps: int,
    rate: float,
    clock: Clock,
) -> float:
    """Move point and direction by Adam on the ratio of a pair as far apart as its points are."""
    x_BI, direction_BI = (t.clone().requires_grad_() for t in (x_BI, direction_BI))
    adam = torch.optim.Adam([x_BI, direction_BI], lr=rate / x_BI.shape[-1] ** 0.5)
    best = 0.0
    for step in range(steps + 1):
        with torch.enable_grad():
            first, second = size * (x_BI + direction_BI), size * (x_BI - direction_BI)
            moved_B = (function(first) - function(second)).norm(dim=-1)
            ratio_B = moved_B / (first - second).norm(dim=-1)
            if step < steps:
                adam.zero_grad()
                (-ratio_B.sum()).backward()
        best = max(best, float(ratio_B.detach().max()))
        if clock.left <= 0:
            break
        if step < steps:
            adam.step()
    return best * (1 - ROUNDING)


def _ratio(
    function: Callable[[Tensor], Tensor], x_BI: Tensor, direction_BI: Tensor, size: float
) -> float:
    half_BI = 0.5 * _DISTANCE * size * direction_BI
    first, second = x_BI + half_BI, x_BI - half_BI
    moved_B = (function(first) - function(second)).norm(dim=-1)
    return float((moved_B / (first - second).norm(dim=-1)).max()) * (1 - ROUNDING)
