"""The constraint of one optimizer step, applied to a batch of parameters and their state."""

# Legend: N stacked matrices of one shape, O/I out/in features.

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from train.batches import Member, gains, stacked, unstacked
from train.group_settings import update_norm
from train.orthogonalize import DTYPES
from train.projections import PROJECTIONS, power_vectors, project


def constraint_key(member: Member) -> Hashable:
    """Return what parameters must share to be constrained as one batch; caps may differ."""
    group, p = member
    names = ("constraint", "constraint_dtype", "power_iters", "spectral_decay")
    return member.shape, p.dtype, p.device, *(group[name] for name in names)


def constrain(batch: Sequence[Member], states: Sequence[dict[str, Any]]) -> None:
    """Constrain the parameters of a batch in place.

    Args:
        batch: Members of equal ``constraint_key``, after their update.
        states: Their optimizer states. ``held`` is the cap that a weight is known to obey,
            ``vectors`` its power vectors (slices, I, 1).
    """
    group = batch[0].group
    kind, projection = group["constraint"], PROJECTIONS[group["constraint"]]
    largest = [_largest(member, state) for member, state in zip(batch, states, strict=True)]
    # Nothing is known about initial weights, which the soft cap would need.
    kind = "exact_cap" if projection.needs_largest and None in largest else kind
    stack_NOI = stacked(batch, [member.p for member in batch])
    vectors = _vectors(states, stack_NOI) if projection.uses_vectors else None
    stack_NOI = project(
        stack_NOI,
        kind,
        _per_block(batch, [member.group["w_max"] for member in batch]),
        largest=_per_block(batch, largest),
        spectral_decay=group["spectral_decay"],
        power_iters=group["power_iters"],
        vectors=vectors,
        dtype=DTYPES[group["constraint_dtype"]],
    )
    for member, state, value in zip(batch, states, unstacked(batch, stack_NOI), strict=True):
        member.p.copy_(value)
        state["held"] = float(member.group["w_max"]) if projection.caps else None
    if vectors is not None:
        parts = vectors.split([member.group["slices"] for member in batch])
        for state, part in zip(states, parts, strict=True):
            state["vectors"] = part.clone()


def _per_block(batch: Sequence[Member], values: Sequence[float | None]) -> list[float | None]:
    pairs = [(v, g) for m, v in zip(batch, values, strict=True) for g in gains(m)]
    return [None if value is None else value * gain for value, gain in pairs]


def _largest(member: Member, state: dict[str, Any]) -> float | None:
    """Return a bound on the norm of an updated weight, None where nothing bounds it."""
    group, held = member.group, state.get("held")
    if held is None or group["kind"] != "muon":
        return None
    shrinkage = abs(1 - group["weight_decay"] * group["lr"] * group["target"])
    return held * shrinkage + update_norm(member)


def _vectors(states: Sequence[dict[str, Any]], stack_NOI: Tensor) -> Tensor:
    stored = [state.get("vectors") for state in states]
    if any(vectors is None for vectors in stored):
        return power_vectors(stack_NOI)
    return torch.cat(stored)
