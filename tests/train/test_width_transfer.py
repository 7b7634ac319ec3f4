"""Learning rates transfer over widths, because a step changes the output alike at every width.

The wrong scales are run as well, as controls: each must fail what the right one passes.
"""

import math

import pytest
import torch
from torch.nn import functional as F

from common.models import LipschitzMLP, LipschitzTransformer, ModelConfig
from train.groups import Constraint, OptimConfig, optimizer_defaults, parameter_groups, role
from train.init import initialise
from train.optim import Muon

WIDTHS = (16, 64, 256)
INPUTS, CLASSES = 8, 4
# Largest over smallest change of the output by one step, over the widths.
SAME = 1.4
# The same for scales that are wrong: by sqrt(256 / 16) at the head alone, by 256 / 16 everywhere.
DIFFERENT = {"spectral norm 1": 1.9, "adamw": 5.0}
LR = 1e-3


def filled(model, seed=0):
    """Orthogonal weights everywhere: zero outputs would hide what earlier layers do."""
    initialise(model, Constraint(kind="none"), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if role(name) != "vector" and float(p.norm()) == 0:
                torch.nn.init.orthogonal_(p, (p.shape[0] / p.shape[1]) ** 0.5, generator)
    return model


def classifier(width):
    """An MLP with two hidden layers and four classes: quadrants of a random projection."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(128, INPUTS, generator=generator)
    plane = x @ torch.randn(INPUTS, 2, generator=generator)
    target = 2 * (plane[:, 0] > 0) + (plane.prod(1) > 0).long()
    return filled(LipschitzMLP((INPUTS, width, width, CLASSES))), x, target


def transformer(width):
    """Two layers of two heads on random tokens."""
    config = ModelConfig(vocab_size=11, width=width, layers=2, heads=2, context=8)
    tokens = torch.randint(11, (4, 9), generator=torch.Generator().manual_seed(0))
    return filled(LipschitzTransformer(config)), tokens[:, :-1], tokens[:, 1:]


def loss_of(model, x, target):
    """Mean cross-entropy over samples or tokens."""
    return F.cross_entropy(model(x).flatten(0, -2), target.flatten())


def stepper(model, optim):
    """The optimizer that training would use, without a constraint."""
    constraint = Constraint(kind="none")
    groups = parameter_groups(model, optim, constraint)
    return Muon(groups, **optimizer_defaults(optim, constraint))


def change_of_output(make, width, scale):
    """RMS change of the logits by one small step."""
    model, x, target = make(width)
    factors = {}
    if scale == "spectral norm 1":
        shapes = {n: p.shape for n, p in model.named_parameters() if role(n) != "vector"}
        factors = {n: math.sqrt(s[1] / s[0]) for n, s in shapes.items() if "embedding" not in n}
    rates = {"lr": LR, "embedding_lr": LR, "vector_lr": 1e-3 * LR}
    matrices = "adamw" if scale == "adamw" else "muon"
    optimizer = stepper(model, OptimConfig(matrices=matrices, target_factors=factors, **rates))
    loss_of(model, x, target).backward()
    with torch.no_grad():
        before = model(x)
        optimizer.step()
        return float((model(x) - before).square().mean().sqrt())


@pytest.mark.parametrize("make", [classifier, transformer])
def test_a_step_changes_the_output_alike_at_every_width(make):
    """Property: sqrt(out/in) makes a step width-free; the wrong scales grow with the width."""
    ratios = {}
    for scale in ("rms", *DIFFERENT):
        changes = [change_of_output(make, width, scale) for width in WIDTHS]
        ratios[scale] = max(changes) / min(changes)
    assert ratios["rms"] <= SAME, ratios
    assert all(ratios[scale] >= least for scale, least in DIFFERENT.items()), ratios
