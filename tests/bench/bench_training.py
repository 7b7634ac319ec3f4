"""What constraints and Muon add to a plain AdamW step of the paper's 2M model."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from train.groups import Constraint, OptimConfig, optimizer_defaults, parameter_groups
from train.optim import Muon
from train.projections import PROJECTIONS

OVERHEAD = 0.15
KINDS = [kind for kind in PROJECTIONS if kind not in ("none", "row_clip")]
ADAMW = OptimConfig(matrices="adamw", lr=3e-3)
VARIANTS = {
    "muon": (OptimConfig(), Constraint(kind="none")),
    **{f"muon + {kind}": (OptimConfig(), Constraint(kind=kind)) for kind in KINDS},
    # Per-head caps make small matrices of the large ones.
    "muon + soft_cap per head": (OptimConfig(), Constraint(per_head=True)),
    "adamw + exact_cap": (ADAMW, Constraint(kind="exact_cap")),
    "adamw + hard_cap": (ADAMW, Constraint(kind="hard_cap")),
    "adamw + spectral_hammer": (ADAMW, Constraint(kind="spectral_hammer")),
}


def test_optimizer_overhead(bench: Any, timed: Callable, make_model: Callable) -> None:
    """Overhead = (optimizer step - AdamW step) / (forward + backward + AdamW step).

    The optimizer steps of one round follow its forward and backward pass and see its gradients.
    """
    source = make_model()
    tokens_BT = torch.randint(source.config.vocab_size, (bench.batch, bench.length + 1))
    steps = {"adamw": _stepper(source, None)}
    steps |= {name: _stepper(source, settings) for name, settings in VARIANTS.items()}

    def pass_both() -> None:
        source.zero_grad(set_to_none=True)
        logits_BTV = source(tokens_BT[:, :-1])
        F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten()).backward()

    times = timed({"pass": pass_both} | steps, bench.rounds)
    sizes = {"batch": bench.batch, "length": bench.length, "parameters": source.num_parameters}
    bench.add("train: forward + backward", times["pass"].cpu, "s", **sizes)
    for name in steps:
        bench.add(f"train: {name} step", times[name].cpu, "s", **sizes)
    plain = [a + b for a, b in zip(times["pass"].cpu, times["adamw"].cpu, strict=True)]
    for name in VARIANTS:
        extra = [a - b for a, b in zip(times[name].cpu, times["adamw"].cpu, strict=True)]
        ratios = [a / b for a, b in zip(extra, plain, strict=True)]
        bench.add(f"train: {name} overhead", ratios, "ratio", most=OVERHEAD, **sizes)


def _stepper(source: Any, settings: tuple[OptimConfig, Constraint] | None) -> Callable[[], None]:
    """Return a function that copies the gradients of ``source`` and steps a twin of it."""
    twin = type(source)(source.config)
    twin.load_state_dict(source.state_dict())
    if settings is None:
        optimizer: Any = torch.optim.AdamW(twin.parameters(), lr=1e-3)
    else:
        groups = parameter_groups(twin, *settings)
        optimizer = Muon(groups, **optimizer_defaults(*settings))

    def step() -> None:
        for mine, its in zip(twin.parameters(), source.parameters(), strict=True):
            mine.grad = its.grad
        optimizer.step()

    return step
