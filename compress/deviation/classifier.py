"""By how much pruning can move the logits of a Lipschitz MLP, over all images of pixels in [0, 1].

Matrix after matrix, a pruned one differs from the dense one by a change at the same input. Form B
measures that on the pruned network's activations and carries it on by dense norms, form A the
other way round; both hold. The box of images lies in a ball around grey, and activations lie in
balls around those of the grey image.
Source: spec modhifi 5.2 (forms A and B); the balls around grey are our own.
"""

# Legend: I inputs of a matrix, O its outputs, K kept ones.

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.errors import CertificateError
from common.models import LayerConfig
from common.norms import exact64, gamma, round_up, schur_norm, spectral_norm_bound
from compress.deviation.mlp import branch_bound
from compress.pruner import Pruning

GREY = 0.5
"""Centre of the pixels' range; no pixel is further than this from it."""


class Matrix(NamedTuple):
    """A linear layer in float64, its bias zero where the layer has none."""

    weight_OI: Tensor
    bias_O: Tensor


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Form:
    """One way to add up the changes of the matrices.

    Attributes:
        matrices: The network on whose activations the changes are bounded; the pruned one at full
            size: removed columns are zero, removed rows still there.
        changes: Dense minus pruned matrix, in the rows that the rest of the other network reads.
        deltas: Per matrix, l2 bound on the change of its output at the same input.
        gains: Per matrix, by how much such a change can move the logits (l2).
        radii: Per matrix, l2 distance of its inputs from those of the grey image.
        bound: Bound on the RMS change of the logits over the classes.
    """

    matrices: tuple[Matrix, ...]
    changes: tuple[Matrix, ...]
    deltas: tuple[float, ...]
    gains: tuple[float, ...]
    radii: tuple[float, ...]
    bound: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ClassifierDeviation:
    """Certified effect of pruning a classifier.

    Attributes:
        form_a: Changes on dense activations, constants of the pruned network.
        form_b: Changes on the pruned network's activations, dense constants.
    """

    form_a: Form
    form_b: Form

    @property
    def bound(self) -> float:
        """The smaller of both bounds."""
        return min(self.form_a.bound, self.form_b.bound)


def classifier_deviation(
    dense: Any, pruning: Pruning, *, norms: Sequence[float] | None = None, max_evals: int = 20
) -> ClassifierDeviation:
    """Bound the change of the logits over all images with pixels in [0, 1].

    Args:
        dense: ``LipschitzMLP`` before pruning.
        pruning: The pruned one and the decisions.
        norms: Proved spectral norms of the dense matrices, if a certificate holds them.
        max_evals: Eigen-decompositions spent on each change; 0 is sound too.

    Returns:
        Both forms; all bounds are 0 when nothing differs.

    Raises:
        CertificateError: if the pruned model is not what the decisions say.
    """
    old, new = _matrices(dense), _masked(dense, pruning)
    kept = _kept(dense, pruning)
    _require_cut(dense, pruning.model, new, kept)
    layer = _layer(dense.activation)
    dense_norms = norms or [spectral_norm_bound(matrix.weight_OI) for matrix in old]
    pruned_norms = [spectral_norm_bound(linear.weight) for linear in pruning.model.linears]
    changes = tuple(
        Matrix(a.weight_OI - b.weight_OI, a.bias_O - b.bias_O)
        for a, b in zip(old, new, strict=True)
    )
    seen = tuple(
        Matrix(change.weight_OI[rows], change.bias_O[rows])
        for change, rows in zip(changes, kept[1:], strict=True)
    )
    return ClassifierDeviation(
        form_a=_form(old, seen, pruned_norms, layer, max_evals),
        form_b=_form(new, changes, dense_norms, layer, max_evals),
    )


def activated(z: Tensor, activation: str) -> Tensor:
    """Return the activations of pre-activations (..., I), named as in ``LipschitzMLP``."""
    if activation == "maxmin":
        pairs = z.unflatten(-1, (-1, 2))
        return torch.stack((pairs.amax(-1), pairs.amin(-1)), dim=-1).flatten(-2)
    return {"relu": torch.relu, "tanh": torch.tanh, "abs": torch.abs}[activation](z)


def _form(
    matrices: tuple[Matrix, ...],
    changes: tuple[Matrix, ...],
    norms: Sequence[float],
    layer: LayerConfig,
    max_evals: int,
) -> Form:
    """Bound every change where the network of ``matrices`` leads, and carry it on by ``norms``."""
    inputs = matrices[0].weight_OI.shape[1]
    centre_I = torch.full((inputs,), GREY, dtype=torch.float64)
    radius = round_up(GREY * math.sqrt(inputs))
    # The first matrix only loses rows.
    deltas, radii = [0.0], [radius]
    for matrix, change in zip(matrices[:-1], changes[1:], strict=True):
        rest_O = matrix.weight_OI @ centre_I + matrix.bias_O
        doubt = _rounding(matrix, centre_I)
        deltas.append(_moved(matrix.weight_OI, rest_O, change, layer, radius, doubt, max_evals))
        centre_I = activated(rest_O, layer.activation)
        around = Matrix(torch.eye(len(centre_I), dtype=torch.float64), -centre_I)
        naive = round_up(round_up(spectral_norm_bound(matrix.weight_OI) * radius) + 2 * doubt)
        moved = _moved(matrix.weight_OI, rest_O, around, layer, radius, doubt, 0)
        radius = min(naive, moved)
        radii.append(radius)
    gains = [1.0]
    for norm in reversed(norms[1:]):
        gains.append(round_up(gains[-1] * norm))
    gains.reverse()
    total = 0.0
    for delta, gain in zip(deltas, gains, strict=True):
        total = round_up(total + round_up(delta * gain))
    return Form(
        matrices=matrices,
        changes=changes,
        deltas=tuple(deltas),
        gains=tuple(gains),
        radii=tuple(radii),
        bound=round_up(total / math.sqrt(len(matrices[-1].bias_O))),
    )


def _moved(
    weight_OI: Tensor,
    rest_O: Tensor,
    outer: Matrix,
    layer: LayerConfig,
    radius: float,
    doubt: float,
    max_evals: int,
) -> float:
    """Bound ``|B phi(z) + b|`` where ``z`` lies at ``rest + W u``, ``|u| <= radius``.

    ``doubt`` bounds the l2 error of ``rest``; no activation enlarges it.
    """
    if not bool(outer.weight_OI.any()) and not bool(outer.bias_O.any()):
        return 0.0
    tensors = {
        "up.weight": weight_OI,
        "up.bias": rest_O,
        "down.weight": outer.weight_OI,
        "down.bias": outer.bias_O,
    }
    bound = branch_bound(tensors, layer, radius, max_evals=max_evals)
    return round_up(bound + round_up(schur_norm(outer.weight_OI) * doubt))


def _rounding(matrix: Matrix, centre_I: Tensor) -> float:
    """Bound the l2 rounding error of ``W centre + b``."""
    size_O = matrix.weight_OI.abs() @ centre_I.abs() + matrix.bias_O.abs()
    return 1.01 * gamma(len(centre_I) + 2) * float(size_O.norm())


def _layer(activation: str) -> LayerConfig:
    """Return the description of two matrices with an activation between them."""
    return LayerConfig(
        heads=1,
        kv_heads=1,
        content_heads=0,
        head_dim=2,
        mlp_width=2,
        activation=activation,
        gelu_divisor=1.0,
        mlp_bias=True,
        position_bias=False,
        attn_residual=0.0,
        mlp_residual=1.0,
        attn_factor=0.0,
        softmax_scale=0.0,
    )


def _matrices(model: Any) -> tuple[Matrix, ...]:
    return tuple(
        Matrix(
            exact64(linear.weight),
            exact64(linear.weight.new_zeros(linear.out_features))
            if linear.bias is None
            else exact64(linear.bias),
        )
        for linear in model.linears
    )


def _masked(dense: Any, pruning: Pruning) -> tuple[Matrix, ...]:
    """Return the pruned matrices at full size."""
    found = list(_matrices(dense))
    for fit in pruning.fits:
        bias_O = found[fit.target.layer].bias_O
        if fit.bias_O is not None:
            bias_O = exact64(fit.bias_O.to(dense.linears[fit.target.layer].bias.dtype))
        found[fit.target.layer] = Matrix(exact64(fit.weight_IO).T.contiguous(), bias_O)
    return tuple(found)


def _kept(dense: Any, pruning: Pruning) -> list[Tensor]:
    """Return the kept components between the matrices, from pixels to classes."""
    kept = [torch.arange(size) for size in dense.sizes]
    for fit in pruning.fits:
        kept[fit.target.layer] = fit.kept_K.cpu()
    return kept


def _require_cut(dense: Any, pruned: Any, new: Sequence[Matrix], kept: Sequence[Tensor]) -> None:
    """Refuse a model that is not the kept part of the full-size matrices."""
    is_same = pruned.activation == dense.activation and len(pruned.linears) == len(new)
    for index, own in enumerate(_matrices(pruned) if is_same else ()):
        columns_K, rows_K = kept[index], kept[index + 1]
        gone = new[index].weight_OI.clone()
        gone[:, columns_K] = 0
        is_same = is_same and not bool(gone.any())
        is_same = is_same and torch.equal(own.weight_OI, new[index].weight_OI[rows_K][:, columns_K])
        is_same = is_same and torch.equal(own.bias_O, new[index].bias_O[rows_K])
    if not is_same:
        raise CertificateError(
            "pruned classifier: its matrices are not those of the pruning's decisions, so its "
            "change cannot be certified; prune with compress.pruner.prune_model"
        )
