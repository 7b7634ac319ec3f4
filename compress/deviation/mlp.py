"""By how much a changed down projection can move an MLP block at the same input.

The change is itself a map ``W phi(W_1 x + b_1) + b``; chords from its value at 0 and the K-form
bound it on the tokens that can enter. Source: spec bound_tightening 2.2 and 5; the chord intervals
are our own.
"""

# Legend: C width, F MLP width, N elementwise nonlinearities, K kept neurons.

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from common.models import LayerConfig
from common.norms import SLACK, exact64, gamma, round_up, schur_norm
from compress.deviation.chords import chord_interval
from solvers.bounds.mlp_block import tighten_mlp
from solvers.bounds.mlp_proof import MlpForm, mlp_bound, value_at_zero


def mlp_delta(
    dense: Any, changed: Any, kept_K: Tensor, radius: float, *, max_evals: int = 20
) -> float:
    """Bound ``a |f(x) - f~(x)|`` over all ``|x| <= radius``.

    Args:
        dense: ``MLP`` module before the change.
        changed: After it; its up projection holds the kept rows (checked by the caller).
        kept_K: Kept neurons, in whole components.
        radius: Domain, l2.
        max_evals: Eigen-decompositions spent on the multipliers; 0 is sound too.

    Returns:
        l2 bound, residual weight included; exactly 0 when nothing changed.
    """
    a, change = dense.layer.mlp_residual, _parameters(dense)
    after = _parameters(changed)
    # One rounding of every entry; the bounds below are rounded up by far more.
    change["down.weight"][:, kept_K.cpu()] -= after["down.weight"]
    if dense.layer.mlp_bias:
        change["down.bias"] -= after["down.bias"]
    is_same = not any(bool(change[name].any()) for name in change if name.startswith("down."))
    if a == 0 or is_same:
        return 0.0
    return round_up(branch_bound(change, dense.layer, radius, max_evals=max_evals))


def branch_bound(
    tensors: Mapping[str, Tensor], layer: LayerConfig, radius: float, *, max_evals: int = 20
) -> float:
    """Bound ``a |W_2 phi(W_1 x + b_1) + b_2|`` over all ``|x| <= radius``.

    The map is its value at 0 plus ``(C + B S G) x`` with diagonal ``|S| <= 1``, from the chord
    interval of each neuron; the K-form bounds that matrix for any positive multipliers.

    Args:
        tensors: ``up.weight`` (F, C), ``down.weight`` (C, F) and, if the layer has them, biases;
            float64.
        layer: Activation and residual weight a.
        radius: Domain, l2.
        max_evals: As in ``mlp_delta``.

    Returns:
        l2 bound in float64, rounded upward.
    """
    start = 0.0
    if layer.mlp_bias:
        value_C1 = value_at_zero(tensors, layer)
        start = round_up(float(value_C1.size + value_C1.error))
    if not bool(tensors["down.weight"].any()):
        return start
    form = _chord_form(tensors, layer, radius)
    found = tighten_mlp(form.c_CC, form.b_CN, form.g_NC, max_evals=max_evals)
    slope, _ = mlp_bound(form, found.theta.exp())
    return round_up(start + round_up(layer.mlp_residual * radius * slope))


def _chord_form(tensors: Mapping[str, Tensor], layer: LayerConfig, radius: float) -> MlpForm:
    """Return the difference quotients from 0 as ``C + B S G`` and the rounding made in ``C``."""
    used_F = tensors["down.weight"].any(0)
    if layer.activation == "maxmin":
        used_F = used_F.reshape(-1, 2).any(1).repeat_interleave(2)
    inner_NC, outer_CN = tensors["up.weight"][used_F], tensors["down.weight"][:, used_F]
    rest_N = inner_NC.new_zeros(len(inner_NC))
    if layer.mlp_bias:
        rest_N = tensors["up.bias"][used_F]
    c_CC = size_CC = inner_NC.new_zeros(len(outer_CN), inner_NC.shape[1])
    if layer.activation == "maxmin":
        # max, min = (s + |t|) / 2, (s - |t|) / 2 of the sum s and the difference t of a pair.
        sums_NC, sums_CN = inner_NC[::2] + inner_NC[1::2], outer_CN[:, ::2] + outer_CN[:, 1::2]
        c_CC = sums_CN @ sums_NC / 2
        size_CC = sums_CN.abs() @ sums_NC.abs() / 2
        inner_NC = inner_NC[::2] - inner_NC[1::2]
        outer_CN = (outer_CN[:, ::2] - outer_CN[:, 1::2]) / 2
        rest_N = rest_N[::2] - rest_N[1::2]
    reach_N = radius * inner_NC.norm(dim=1) * (1 + SLACK)
    low_N, high_N = chord_interval(layer, rest_N, reach_N)
    middle_N, spread_N = (low_N + high_N) / 2, (high_N - low_N) / 2 * (1 + SLACK) + SLACK
    c_CC = c_CC + (outer_CN * middle_N) @ inner_NC
    size_CC = size_CC + (outer_CN.abs() * middle_N.abs()) @ inner_NC.abs()
    error = 1.01 * gamma(2 * len(inner_NC) + 16) * schur_norm(size_CC)
    return MlpForm(c_CC, outer_CN * spread_N, inner_NC, error)


def _parameters(mlp: Any) -> dict[str, Tensor]:
    """Return float64 copies of a module's tensors, to be changed in place."""
    return {name: exact64(tensor).clone() for name, tensor in mlp.state_dict().items()}
