"""By how much pruning can have moved the output: certified and semi-empirical bounds.

Each pruned block differs from the dense one by ``delta_l`` at the same input; the dense
certificate carries that to the logits: ``e_{l+1} <= rho_l e_l + delta_l``, errors on the pruned
trajectory, constants of the dense network. Tokens of the pruned network may leave the dense
network's balls; then the dense blocks are first proved again on wider ones.
Source: spec modhifi 5.2 (form B), bound_tightening 2.2 and 5; the chord intervals are our own.
"""

# Legend: C width, F MLP width, N elementwise nonlinearities.

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from common.certificate import BlockProof, Certificate
from common.errors import CertificateError
from common.models import LayerConfig
from common.norms import (
    SLACK,
    exact64,
    gamma,
    round_up,
    schur_norm,
)
from compress.chords import chord_interval
from compress.targets import block_indices
from solvers.bounds.ellipsoid import Tokens
from solvers.bounds.mlp_block import tighten_mlp
from solvers.bounds.mlp_proof import MlpForm, mlp_bound
from solvers.bounds.slopes import PHI_ERROR, apply
from solvers.bounds.stream_proof import prove_block


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Deviation:
    """Certified effect of pruning.

    Attributes:
        deltas: Per block (attention and MLP in turn), l2 bound on the change of its output.
        logits: Bound on the RMS change of the logits over the vocabulary, largest over tokens.
        radii: Per block, l2 bound on the tokens that enter it in the pruned network.
        certificate: The dense certificate, its blocks proved on wider balls where needed; a record
            of this calculation, not a certificate to store.
    """

    deltas: tuple[float, ...]
    logits: float
    radii: tuple[float, ...]
    certificate: Certificate


def certified_deviation(
    dense: Any,
    pruned: Any,
    kept: Mapping[str, Tensor],
    certificate: Certificate,
    *,
    max_evals: int = 20,
) -> Deviation:
    """Bound the change of the logits over all inputs of the certificate's domain.

    Args:
        dense: Transformer the certificate speaks about.
        pruned: The same one with fewer MLP neurons and new down projections.
        kept: Indices of the kept neurons per target name; all of them where none is named.
        certificate: Proof of the dense transformer.
        max_evals: Budget of eigen-decompositions per layer to tighten the bound; 0 is sound too.

    Returns:
        Per-block and total bounds. All are 0 when nothing differs.

    Raises:
        CertificateError: if anything else than the MLPs differs.
    """
    _require_same_frame(dense, pruned)
    tokens = Tokens.ball(certificate.width, certificate.radius)
    deltas, radii, blocks = [], [], []
    for index, layer in enumerate(dense.layers):
        kept_K = kept.get(f"layers.{index}.mlp", torch.arange(layer.layer.mlp_width))
        attention, mlp = certificate.blocks[2 * index : 2 * index + 2]
        radii.append(tokens.radius)
        attention, tokens = _prove_again(dense, certificate, attention, tokens)
        radii.append(tokens.radius)
        radius_in = tokens.radius
        mlp, tokens = _prove_again(dense, certificate, mlp, tokens)
        blocks += [attention, mlp]
        delta, radius_out = _block_bounds(
            dense.layers[index].mlp, pruned.layers[index].mlp, kept_K, radius_in, max_evals
        )
        tokens = _widened(tokens, delta, radius_out)
        deltas += [0.0, delta]
    enlarged = dataclasses.replace(certificate, blocks=tuple(blocks))
    return Deviation(
        deltas=tuple(deltas),
        logits=enlarged.logit_deviation(deltas),
        radii=tuple(radii),
        certificate=enlarged,
    )


def block_delta(
    dense: Any, pruned: Any, kept_K: Tensor, radius: float, *, max_evals: int = 20
) -> float:
    """Bound ``a |f(x) - f~(x)|`` over all ``|x| <= radius`` for one pruned MLP.

    Args:
        dense: ``MLP`` module before pruning.
        pruned: After pruning; its up projection holds the kept rows.
        kept_K: Kept neurons.
        radius: Domain, l2.
        max_evals: As in ``certified_deviation``.

    Returns:
        l2 bound, residual weight included; exactly 0 when nothing changed.

    Raises:
        CertificateError: if more than the down projection differs.
    """
    _require_kept_rows(dense, pruned, kept_K)
    change = _parameters(dense)
    down_CF = change["down.weight"].clone()
    down_CF[:, kept_K.cpu()] -= exact64(pruned.down.weight)
    change["down.weight"] = down_CF
    if "down.bias" in change:
        change["down.bias"] = change["down.bias"] - exact64(pruned.down.bias)
    bound = branch_bound(change, dense.layer, radius, max_evals=max_evals)
    return round_up(dense.layer.mlp_residual * bound)


def branch_bound(
    tensors: Mapping[str, Tensor],
    layer: LayerConfig,
    radius: float,
    *,
    skip: float = 0.0,
    max_evals: int = 20,
) -> float:
    """Bound ``|skip x + W_2 phi(W_1 x + b_1) + b_2|`` over all ``|x| <= radius``.

    The map is its value at 0 plus ``(C + B S G) x`` with diagonal ``|S| <= 1``, from the chord
    interval of each neuron; the K-form bounds that matrix for any positive multipliers.

    Args:
        tensors: ``up.weight`` (F, C), ``down.weight`` (C, F) and, if the layer has them, biases.
        layer: Activation.
        radius: Domain, l2.
        skip: Weight of the identity.
        max_evals: Eigen-decompositions spent on the multipliers.

    Returns:
        l2 bound in float64, rounded upward; 0 when the map is exactly zero.
    """
    start = _norm_at_zero(tensors, layer)
    if not skip and not bool(tensors["down.weight"].any()):
        return start
    form = _chord_form(tensors, layer, radius, skip)
    found = tighten_mlp(form.c_CC, form.b_CN, form.g_NC, max_evals=max_evals)
    slope, _ = mlp_bound(form, found.theta.exp())
    return round_up(start + round_up(slope * radius))


def _chord_form(
    tensors: Mapping[str, Tensor], layer: LayerConfig, radius: float, skip: float
) -> MlpForm:
    """Return the difference quotients from 0 as ``C + B S G`` and the rounding made in ``C``."""
    used_F = tensors["down.weight"].any(0)
    if layer.activation == "maxmin":
        used_F = used_F.reshape(-1, 2).any(1).repeat_interleave(2)
    inner_NC, outer_CN = tensors["up.weight"][used_F], tensors["down.weight"][:, used_F]
    rest_N = inner_NC.new_zeros(len(inner_NC))
    if layer.mlp_bias:
        rest_N = tensors["up.bias"][used_F]
    c_CC = skip * torch.eye(inner_NC.shape[1], dtype=torch.float64)
    size_CC = c_CC.abs()
    if layer.activation == "maxmin":
        # max, min = (s + |t|) / 2, (s - |t|) / 2 of the sum s and the difference t of a pair.
        sums_NC, sums_CN = inner_NC[::2] + inner_NC[1::2], outer_CN[:, ::2] + outer_CN[:, 1::2]
        c_CC = c_CC + sums_CN @ sums_NC / 2
        size_CC = size_CC + sums_CN.abs() @ sums_NC.abs() / 2
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


def _block_bounds(
    dense: Any, pruned: Any, kept_K: Tensor, radius: float, max_evals: int
) -> tuple[float, float]:
    """Return ``(delta, radius after the pruned block)`` for tokens of norm at most ``radius``."""
    delta = block_delta(dense, pruned, kept_K, radius, max_evals=max_evals)
    if delta == 0:
        return 0.0, float("inf")
    a = dense.layer.mlp_residual
    tensors = _parameters(pruned)
    for name in ("down.weight", "down.bias"):
        if name in tensors:
            tensors[name] = a * tensors[name]
    return delta, branch_bound(tensors, pruned.layer, radius, skip=1 - a, max_evals=0)


def _widened(tokens: Tokens, delta: float, radius_out: float) -> Tokens:
    """Return where tokens of both networks lie after a block that pruning moved by ``delta``."""
    if delta == 0.0:
        return tokens
    both = max(tokens.radius, min(radius_out, round_up(tokens.radius + delta)))
    naive_radius = max(both, round_up(tokens.naive_radius + delta))
    return Tokens(tokens.domain.plus_ball(delta), both, naive_radius)


def _prove_again(
    dense: Any, certificate: Certificate, block: BlockProof, tokens: Tokens
) -> tuple[BlockProof, Tokens]:
    """Return a block's proof where the tokens of both networks lie, and where they go."""
    bound = prove_block(
        dense.config,
        dense.state_dict(),
        block.index,
        tokens,
        certificate.block_multipliers(block.index),
    )
    proof = dataclasses.replace(
        block,
        tightened=bound.tightened,
        naive=bound.naive,
        radius_in=tokens.radius,
        radius_out=bound.radius_out,
        naive_radius_in=tokens.naive_radius,
        naive_radius_out=bound.naive_radius_out,
    )
    return proof, bound.tokens


def _norm_at_zero(tensors: Mapping[str, Tensor], layer: LayerConfig) -> float:
    """Bound ``|W_2 phi(b_1) + b_2|``; exactly 0 for zero tensors or without biases."""
    if not layer.mlp_bias:
        return 0.0
    down_CF, rest_F = tensors["down.weight"], tensors["up.bias"]
    hidden_F = apply(rest_F, layer)
    value_C = down_CF @ hidden_F + tensors["down.bias"]
    size_C = down_CF.abs() @ (hidden_F.abs() + rest_F.abs()) + tensors["down.bias"].abs()
    rounding = (PHI_ERROR / min(1.0, layer.gelu_divisor) + 2 * gamma(down_CF.shape[1] + 8)) * float(
        size_C.norm()
    )
    return round_up(float(value_C.norm()) + rounding)


def _require_same_frame(dense: Any, pruned: Any) -> None:
    """Refuse a pair that differs outside its MLPs: the bound would not see it."""
    if pruned.config != dense.config.replace(mlp_width=pruned.config.mlp_width):
        raise CertificateError(
            "pruned model: its configuration differs from the dense one in more than mlp_width, "
            "so the change cannot be certified; prune with compress.prune"
        )
    own = pruned.state_dict()
    for name, tensor in dense.state_dict().items():
        if ".mlp." not in name and not torch.equal(own[name], tensor):
            raise CertificateError(
                f"pruned model: {name} differs from the dense one, so the change cannot be "
                "certified; prune with compress.prune"
            )


def _require_kept_rows(dense: Any, pruned: Any, kept_K: Tensor) -> None:
    """Refuse a pair whose hidden activations differ: the bound only sees the down projection."""
    unit, rows_K = dense.layer.unit, kept_K.to(dense.up.weight.device)
    is_same = torch.equal(kept_K, block_indices(kept_K[::unit] // unit, unit))
    for name, tensor in dense.up.state_dict().items():
        is_same = is_same and torch.equal(pruned.up.state_dict()[name], tensor[rows_K])
    if not is_same:
        raise CertificateError(
            "pruned MLP: its up projection is not the kept rows of the dense one, so its change "
            "cannot be certified; prune with compress.prune"
        )


def _parameters(mlp: Any) -> dict[str, Tensor]:
    return {name: exact64(tensor) for name, tensor in mlp.state_dict().items()}
