"""Matrices of equal shape and settings, gathered from all parameter groups into one stack.

One batched product then serves every matrix of a shape, however caps and targets differ.
"""

# Legend: N stacked matrices, O/I out/in features of a matrix or of one of its row blocks.

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Member(NamedTuple):
    """A parameter that is stepped now, and its group."""

    group: dict[str, Any]
    p: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns (O, I) of each of the group's ``slices`` row blocks."""
        return self.p.shape[0] // self.group["slices"], self.p.shape[1]


def batches(members: Iterable[Member], key: Callable[[Member], Hashable]) -> Iterable[list[Member]]:
    """Return the members in lists of equal ``key``, in order of first appearance."""
    found: dict[Hashable, list[Member]] = {}
    for member in members:
        found.setdefault(key(member), []).append(member)
    return found.values()


def stacked(batch: Sequence[Member], tensors: Iterable[Tensor]) -> Tensor:
    """Return the row blocks of all tensors, one per member and shaped like it, as (N, O, I)."""
    return torch.cat([t.reshape(-1, *m.shape) for m, t in zip(batch, tensors, strict=True)])


def unstacked(batch: Sequence[Member], stack_NOI: Tensor) -> list[Tensor]:
    """Return one tensor per member, shaped like its parameter: the inverse of ``stacked``."""
    parts = stack_NOI.split([member.group["slices"] for member in batch])
    return [part.reshape(member.p.shape) for member, part in zip(batch, parts, strict=True)]


def gains(member: Member) -> tuple[float, ...]:
    """Return the factor on cap and update of each row block of a member."""
    return member.group["gains"] or (1.0,) * member.group["slices"]
