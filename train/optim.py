"""Muon with weight constraints: one optimizer for every parameter of a Lipschitz network.

Each parameter group says how it is updated (``kind``) and how it is constrained. The constraint
is part of ``step``, so that gradient accumulation, clipping, mixed precision, schedulers, exact
resume and DDP keep working; all state lives in ``self.state`` and all settings in the groups.
"""

# Legend: N stacked matrices of one group, O/I out/in features.

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from common.config import one_of, positive, within
from common.errors import ConfigError
from train.orthogonalize import TABLES, orthogonalize, overshoot
from train.projections import PROJECTIONS, power_vectors, project

KINDS = ("muon", "rows", "adamw")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Rows whose gradient is below 1 / 16 of the largest row's are not amplified to full length.
ROW_FLOOR = 1 / 16


class Muon(torch.optim.Optimizer):
    """Muon, normalised-row and AdamW parameter groups, each with a weight constraint.

    With ``eta = lr * target`` a matrix follows ``W <- (1 - weight_decay * eta) W``, then
    ``W <- W - eta * sqrt(O/I) * polar(momentum)``, then its constraint; the update has RMS->RMS
    norm at most ``eta * overshoot(table)``. Groups of kind ``rows`` (embeddings) use
    ``eta * row / rms(row)`` instead, groups of kind ``adamw`` the usual AdamW. A group holds
    matrices of equal shape, which are updated as one batch.

    Args:
        params: Parameters or group dictionaries. Every keyword below can be set per group.
        lr: Learning rate, at least 0 (a schedule may change it at any time).
        kind: ``muon``, ``rows`` or ``adamw``.
        target: Update norm at ``lr = 1`` in RMS->RMS units (row RMS for ``rows``), above 0.
        momentum: Decay of the gradient average, 0 to 1.
        nesterov: Whether the update looks ahead by one momentum step.
        weight_decay: Decoupled decay; multiplied by ``lr * target`` (``lr`` for ``adamw``).
        betas: AdamW averages.
        eps: AdamW denominator offset.
        table: Polynomial of the polar factor, a name in ``train.orthogonalize.TABLES``.
        dtype: Arithmetic of the polar factor, ``float32`` or ``bfloat16``.
        constraint: Name in ``train.projections.PROJECTIONS``.
        w_max: Cap of the constraint, above 0.
        slices: Row blocks constrained and orthogonalised one by one (attention heads), default 1.
        power_iters: Rounds of ``spectral_normalize``.

    Raises:
        ConfigError: for impossible values, vectors in matrix groups or mixed shapes.

    Source:
        arXiv 2507.13338 and its reference trainer; deviations: Nesterov momentum is the default,
        all settings are per group, the first step uses the exact cap because nothing is known
        about the initial weights.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 0.05,
        kind: str = "muon",
        target: float = 1.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        table: str = "six_step",
        dtype: str = "float32",
        constraint: str = "none",
        w_max: float = 1.0,
        slices: int = 1,
        power_iters: int = 16,
    ):
        defaults = {k: v for k, v in locals().items() if k not in ("self", "params", "__class__")}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group after checking its settings and shapes (see the class)."""
        super().add_param_group(param_group)
        _check_group(self.param_groups[-1])

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
        """Update and constrain every parameter that has a gradient."""
        updates = {"muon": self._muon, "rows": self._rows, "adamw": self._adamw}
        for group in self.param_groups:
            active = [p for p in group["params"] if p.grad is not None]
            if active:
                is_first = any("step" not in self.state[p] for p in active)
                updates[group["kind"]](group, active)
                if group["constraint"] != "none":
                    self._constrain(group, active, is_first)

    def _direction(self, group: dict[str, Any], p: Tensor) -> Tensor:
        state = self.state[p]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["momentum"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        state["step"] += 1
        mean = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
        return p.grad.lerp(mean, group["momentum"]) if group["nesterov"] else mean

    def _muon(self, group: dict[str, Any], params: list[Tensor]) -> None:
        stack_NOI = _sliced(torch.stack([self._direction(group, p) for p in params]), group)
        polar_NOI = orthogonalize(stack_NOI, group["table"], DTYPES[group["dtype"]])
        out_features, in_features = polar_NOI.shape[-2:]
        scale = (out_features / in_features) ** 0.5
        updates = (scale * polar_NOI).reshape(len(params), *params[0].shape).unbind()
        self._descend(group, params, updates)

    def _rows(self, group: dict[str, Any], params: list[Tensor]) -> None:
        updates = []
        for p in params:
            direction_OI = self._direction(group, p).float()
            rms_O1 = direction_OI.square().mean(dim=-1, keepdim=True).sqrt()
            floor = (ROW_FLOOR * rms_O1.max()).clamp_min(torch.finfo(torch.float32).tiny)
            updates.append((direction_OI / rms_O1.clamp_min(floor)).to(p.dtype))
        self._descend(group, params, updates)

    def _descend(
        self, group: dict[str, Any], params: list[Tensor], updates: Iterable[Tensor]
    ) -> None:
        eta = group["lr"] * group["target"]
        for p, update in zip(params, updates, strict=True):
            p.mul_(1 - group["weight_decay"] * eta).sub_(update, alpha=eta)

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

    def _constrain(self, group: dict[str, Any], params: list[Tensor], is_first: bool) -> None:
        stack_NOI = _sliced(torch.stack(params), group)
        kind = group["constraint"]
        # The soft cap assumes that the previous weight obeyed the cap; the first step cannot know.
        kind = "exact_cap" if kind == "soft_cap" and is_first else kind
        eta = group["lr"] * group["target"]
        vectors = self._vectors(params, stack_NOI) if kind == "spectral_normalize" else None
        stack_NOI = project(
            stack_NOI,
            kind,
            group["w_max"],
            update_norm=eta * overshoot(group["table"], DTYPES[group["dtype"]]),
            decay=group["weight_decay"] * eta,
            power_iters=group["power_iters"],
            vectors=vectors,
        )
        for i, (p, value) in enumerate(
            zip(params, stack_NOI.reshape(len(params), *params[0].shape), strict=True)
        ):
            p.copy_(value)
            if vectors is not None:
                self.state[p]["vectors"] = vectors.unflatten(0, (len(params), -1))[i]

    def _vectors(self, params: list[Tensor], stack_NOI: Tensor) -> Tensor:
        stored = [self.state[p].get("vectors") for p in params]
        if any(vectors is None for vectors in stored):
            return power_vectors(stack_NOI)
        return torch.cat(stored).clone()


def _sliced(stack_NOI: Tensor, group: dict[str, Any]) -> Tensor:
    rows = stack_NOI.shape[1] // group["slices"]
    return stack_NOI.reshape(-1, rows, stack_NOI.shape[2])


def _check_group(group: dict[str, Any]) -> None:
    one_of("kind", group["kind"], KINDS)
    one_of("table", group["table"], TABLES)
    one_of("dtype", group["dtype"], DTYPES)
    one_of("constraint", group["constraint"], PROJECTIONS)
    positive("lr", float(group["lr"]), zero=True)
    positive("w_max", group["w_max"])
    positive("target", group["target"])
    positive("weight_decay", group["weight_decay"], zero=True)
    positive("eps", group["eps"], zero=True)
    within("momentum", group["momentum"], 0.0, 1.0)
    if group["kind"] != "muon" and group["constraint"] == "soft_cap":
        raise ConfigError(
            f"constraint=soft_cap: kind={group['kind']!r} has no update norm for it; use exact_cap"
        )
    shapes = {tuple(p.shape) for p in group["params"]}
    needs_matrices = group["kind"] != "adamw" or group["constraint"] != "none"
    if needs_matrices and any(len(shape) != 2 for shape in shapes):
        raise ConfigError(
            f"kind={group['kind']!r}: expected matrices, got shapes {sorted(shapes)}; put vectors "
            "into an adamw group without a constraint"
        )
    if needs_matrices and len(shapes) > 1:
        raise ConfigError(
            f"kind={group['kind']!r}: expected equal shapes in one group, got {sorted(shapes)}; "
            "make one group per shape"
        )
    if any(shape[0] % group["slices"] for shape in shapes if shape):
        raise ConfigError(f"slices={group['slices']}: expected a divisor of the rows {shapes}")
