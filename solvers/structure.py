"""Points that are tuples of tensors, packed into the one tensor that solvers see.

A plain tensor keeps its shape; a tuple becomes a vector of all entries, in order. The geometry of
packed points (norm and inner product, accumulated in float64) lives here too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import ConfigError, ShapeError

Value = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Structure:
    """Layout of the points of one problem.

    Attributes:
        shapes: Shape of each part; one entry for a plain tensor.
        is_tuple: Whether the user's points are tuples.
    """

    shapes: tuple[tuple[int, ...], ...]
    is_tuple: bool

    @classmethod
    def of(cls, value: Value) -> "Structure":
        """Return the layout of a point."""
        if isinstance(value, Tensor):
            return cls((tuple(value.shape),), False)
        return cls(tuple(tuple(part.shape) for part in value), True)

    def pack(self, value: Value | Sequence[Tensor], what: str) -> Tensor:
        """Return one tensor: the value itself, or a tuple's entries as a vector (size,).

        Args:
            value: A point in the user's structure.
            what: Who returned it, for messages.

        Raises:
            ShapeError: when the structure is another one.
        """
        parts = (value,) if isinstance(value, Tensor) else value
        if not isinstance(parts, Sequence) or not all(isinstance(part, Tensor) for part in parts):
            raise ShapeError(
                f"{what}: expected {'a tuple of tensors' if self.is_tuple else 'a tensor'}, got "
                f"{type(value).__name__}; return what has the structure of its argument"
            )
        if isinstance(value, Tensor) == self.is_tuple or self.shapes != tuple(
            tuple(part.shape) for part in parts
        ):
            raise ShapeError(
                f"{what}: expected the shape {self._text(self.shapes)} of its argument, got "
                f"{self._text([tuple(p.shape) for p in parts])}; return one value per coordinate"
            )
        return torch.cat([part.reshape(-1) for part in parts]) if self.is_tuple else parts[0]

    def unpack(self, point: Tensor) -> Value:
        """Return the point in the user's structure; views, not copies."""
        if not self.is_tuple:
            return point
        sizes = [torch.Size(shape).numel() for shape in self.shapes]
        parts = point.split(sizes)
        return tuple(part.view(shape) for part, shape in zip(parts, self.shapes, strict=True))

    def _text(self, shapes: Sequence[tuple[int, ...]]) -> str:
        return str(shapes[0]) if len(shapes) == 1 else "(" + ", ".join(map(str, shapes)) + ")"


def check_start(start: Value) -> None:
    """Refuse a start that is no floating tensor or tuple of such, or not finite.

    Raises:
        ShapeError: for other types, no entries at all, or parts of several dtypes or devices.
        ConfigError: for NaN or infinity.
    """
    parts = (start,) if isinstance(start, Tensor) else start
    floating = isinstance(parts, tuple) and all(
        isinstance(part, Tensor) and part.is_floating_point() for part in parts
    )
    if not floating or not any(part.numel() for part in parts):
        raise ShapeError(
            "start: expected a floating-point tensor with at least one entry, or a tuple of such"
        )
    if len({(part.dtype, part.device) for part in parts}) > 1:
        raise ShapeError("start: expected one dtype and device for all parts; convert them")
    if not all(bool(torch.isfinite(part).all()) for part in parts):
        raise ConfigError("start: expected finite entries; remove NaN and infinity")


def norm(tensor: Tensor) -> float:
    """Return the Euclidean norm of all entries, accumulated in float64."""
    return float(torch.linalg.vector_norm(tensor.double()))


def inner(left: Tensor, right: Tensor) -> float:
    """Return the inner product of two tensors of one shape, accumulated in float64."""
    return float((left.double() * right.double()).sum())
