"""Muon with weight constraints: one optimizer for every parameter of a Lipschitz network.

Each parameter group says how it is updated (``kind``) and how it is constrained. The constraint
is part of ``step``, so that gradient accumulation, clipping, mixed precision, schedulers, exact
resume and DDP keep working; all state lives in ``self.state`` and all settings in the groups.
"""

# Legend: N stacked matrices of one shape, O/I out/in features.

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from train.batches import Member, batches, gains, stacked, unstacked
from train.constrain import constrain, constraint_key
from train.group_settings import check_group, shape_factor
from train.orthogonalize import DTYPES, orthogonalize

# Rows whose gradient is below 1 / 16 of the largest row's are not amplified to full length.
ROW_FLOOR = 1 / 16


class Muon(torch.optim.Optimizer):
    """Muon, normalised-row and AdamW parameter groups, each with a weight constraint.

    With ``eta = lr * target`` a matrix follows ``W <- (1 - weight_decay * eta) W``, then
    ``W <- W - eta * sqrt(O/I) * polar(momentum)``, then its constraint; the update has RMS->RMS
    norm at most ``eta * overshoot(table)``. Groups of kind ``rows`` (embeddings) use
    ``eta * row / rms(row)`` instead, groups of kind ``adamw`` the usual AdamW. Matrices of equal
    shape are updated as one batch, also across groups. Any setting of a group, ``w_max`` included,
    may change between steps.

    Args:
        params: Parameters or group dictionaries. Every keyword below can be set per group.
        lr: Learning rate, 0 to 1e6 (a schedule may change it at any time).
        kind: ``muon``, ``rows`` or ``adamw``.
        target: Update norm at ``lr = 1`` in RMS->RMS units (row RMS for ``rows``), above 0.
        momentum: Decay of the gradient average, 0 to 1.
        momentum_start: The same at the first step; it rises linearly over ``momentum_warmup``.
        momentum_warmup: Steps until ``momentum`` is reached; 0 uses it from the start.
        nesterov: Whether the update looks ahead by one momentum step.
        weight_decay: Decoupled decay; multiplied by ``lr * target`` (``lr`` for ``adamw``).
        betas: AdamW averages.
        eps: AdamW denominator offset.
        table: Polynomial of the polar factor, a name in ``train.orthogonalize.TABLES``.
        dtype: Arithmetic of the polar factor, ``float32`` or ``bfloat16``.
        shape_factor: Factor of a polar factor (O, I): ``rms`` is sqrt(O/I), ``original`` and
            ``match_rms_adamw`` are those of ``torch.optim.Muon``.
        constraint: Name in ``train.projections.PROJECTIONS``.
        w_max: Cap of the constraint, 1e-6 to 1e6.
        slices: Row blocks constrained and orthogonalised one by one (attention heads), default 1.
        gains: Factor on the cap and the update of each row block; None for all 1.
        power_iters: Rounds of power iteration.
        spectral_decay: Share removed by ``spectral_weight_decay``, above 0 to 1.
        constraint_dtype: Arithmetic of the constraint's products, ``float32`` or ``bfloat16``.

    Raises:
        ConfigError: for impossible values, vectors in matrix groups or mixed shapes.

    Source:
        arXiv 2507.13338 and its reference trainer; deviations: Nesterov momentum is the default,
        all settings are per group, the first step uses the exact cap because nothing is known
        about the initial weights, rows are compared with the largest row instead of with 1.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 0.05,
        kind: str = "muon",
        target: float = 1.0,
        momentum: float = 0.95,
        momentum_start: float = 0.85,
        momentum_warmup: int = 0,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        table: str = "six_step",
        dtype: str = "float32",
        shape_factor: str = "rms",
        constraint: str = "none",
        w_max: float = 1.0,
        slices: int = 1,
        gains: tuple[float, ...] | None = None,
        power_iters: int = 16,
        spectral_decay: float = 0.1,
        constraint_dtype: str = "float32",
    ):
        defaults = {k: v for k, v in locals().items() if k not in ("self", "params", "__class__")}
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Give groups of an older checkpoint the settings they lack."""
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group after checking its settings and shapes (see the class)."""
        super().add_param_group(param_group)
        check_group(self.param_groups[-1])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update and constrain every parameter that has a gradient; return the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update()
        return loss

    def update(self) -> None:
        """Update and constrain every parameter that has a gradient: ``step`` without closure."""
        active = [
            Member(group, p)
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        for batch in batches(_of_kind(active, "muon"), _polar_key):
            self._muon(batch)
        for member in _of_kind(active, "rows"):
            self._rows(*member)
        for batch in batches(_of_kind(active, "adamw"), lambda member: id(member.group)):
            self._adamw(batch[0].group, [member.p for member in batch])
        capped = [member for member in active if member.group["constraint"] != "none"]
        for batch in batches(capped, constraint_key):
            constrain(batch, [self.state[member.p] for member in batch])

    def _direction(self, group: dict[str, Any], p: Tensor) -> Tensor:
        state = self.state[p]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["momentum"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        decay = _momentum(group, int(state["step"]))
        state["step"] += 1
        mean = state["momentum"].lerp_(p.grad, 1 - decay)
        return p.grad.lerp(mean, decay) if group["nesterov"] else mean

    def _muon(self, batch: Sequence[Member]) -> None:
        group = batch[0].group
        stack_NOI = stacked(batch, [self._direction(*member) for member in batch])
        polar_NOI = orthogonalize(stack_NOI, group["table"], DTYPES[group["dtype"]])
        for member, update in zip(batch, unstacked(batch, polar_NOI), strict=True):
            _descend(*member, _gained(member, update), shape_factor(member))

    def _rows(self, group: dict[str, Any], p: Tensor) -> None:
        direction_OI = self._direction(group, p).float()
        rms_O1 = direction_OI.square().mean(dim=-1, keepdim=True).sqrt()
        floor = (ROW_FLOOR * rms_O1.max()).clamp_min(torch.finfo(torch.float32).tiny)
        _descend(group, p, (direction_OI / rms_O1.clamp_min(floor)).to(p.dtype))

    def _adamw(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for p in params:
            state = self.state[p]
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        states = [self.state[p] for p in params]
        adamw(
            params,
            [p.grad for p in params],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _of_kind(members: Iterable[Member], kind: str) -> list[Member]:
    return [member for member in members if member.group["kind"] == kind]


def _polar_key(member: Member) -> Hashable:
    group, p = member
    return member.shape, group["table"], group["dtype"], p.dtype, p.device


def _gained(member: Member, update: Tensor) -> Tensor:
    if member.group["gains"] is None:
        return update
    gains_N11 = update.new_tensor(gains(member))[:, None, None]
    return (update.view(-1, *member.shape) * gains_N11).view(update.shape)


def _momentum(group: dict[str, Any], step: int) -> float:
    """Return the decay of the gradient average at a step, counted from 0."""
    done = min(step / group["momentum_warmup"], 1.0) if group["momentum_warmup"] else 1.0
    return (1 - done) * group["momentum_start"] + done * group["momentum"]


def _descend(group: dict[str, Any], p: Tensor, update: Tensor, factor: float = 1.0) -> None:
    eta = group["lr"] * group["target"]
    p.mul_(1 - group["weight_decay"] * eta).sub_(update, alpha=eta * factor)
