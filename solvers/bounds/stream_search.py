"""Multipliers for the whole stream: one descent through all blocks. Untrusted.

The ellipsoids of ``stream_proof`` are differentiable functions of the logarithms of all multipliers
of all blocks; Adam lowers the last one, seen by the head. Ellipsoids are kept at unit radius here
(``Found`` holds multipliers for that scale), so that the scale of a deep network cannot matter.
"""

# Shape letters: C width, H query heads, D head width, N multipliers of an MLP, V vocabulary.

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from common.models import LayerConfig
from solvers.bounds.mlp_proof import MlpForm

Found = dict[str, Tensor]

_RATE = 0.05
_SMOOTHING = (0.05, 0.002)  # of the last eigenvalue, relative: first and last step
_PATIENCE = 5  # steps between tests of progress
_PROGRESS = 2e-3  # of the bound's logarithm that these steps must gain
_CONTENT = ("query", "key", "mixed")


class AttentionPart(NamedTuple):
    """Float64 weights of one attention block by head; content heads first, groups repeated."""

    layer: LayerConfig
    q_HDC: Tensor
    k_HDC: Tensor
    v_HDC: Tensor
    o_HCD: Tensor


class MlpPart(NamedTuple):
    """The forms of one MLP block: of changes, and of tokens."""

    layer: LayerConfig
    slopes: MlpForm
    chords: MlpForm
    offset_C: Tensor


Part = AttentionPart | MlpPart


class _Shape(NamedTuple):
    """An ellipsoid of unit radius: factor and logarithm of the scale."""

    factor_CC: Tensor
    log_scale: Tensor | float

    @classmethod
    def of(cls, shape_CC: Tensor, log_scale: Tensor | float) -> "_Shape":
        shape_CC = (shape_CC + shape_CC.mT) / 2
        top = torch.linalg.eigvalsh(shape_CC.detach())[-1].clamp(min=1e-290)
        ridge_CC = 1e-12 * torch.eye(len(shape_CC), dtype=shape_CC.dtype)
        factor_CC = torch.linalg.cholesky(shape_CC / top + ridge_CC)
        return cls(factor_CC, log_scale + 0.5 * torch.log(top))


def search_stream(
    parts: Sequence[Part],
    head_VC: Tensor,
    radius: float,
    starts: Sequence[Mapping[str, Tensor]],
    *,
    steps: int,
) -> list[Found]:
    """Lower the bound on the change of the logits by descent on all multipliers at once.

    Args:
        parts: Attention and MLP blocks in turn.
        head_VC: Head weight, float64.
        radius: l2 radius of the embedded tokens.
        starts: Per block, positive ``domain.*`` and ``stream.*`` multipliers for unit ellipsoids.
        steps: Adam steps; with 0 the starts are returned.

    Returns:
        The best multipliers seen, for unit ellipsoids.
    """
    logs = [{k: t.log().clone().requires_grad_() for k, t in start.items()} for start in starts]
    leaves = [leaf for block in logs for leaf in block.values()]
    gram_CC = head_VC.mT @ head_VC
    optimizer = torch.optim.Adam(leaves, lr=_RATE, betas=(0.9, 0.98))
    best, kept = math.inf, [leaf.detach().clone() for leaf in leaves]
    reference = math.inf
    for step in range(steps + 1):
        share = step / max(steps, 1)
        optimizer.param_groups[0]["lr"] = _RATE * min(1.0, 2.02 - 2 * share)
        smoothing = _SMOOTHING[0] + (_SMOOTHING[1] - _SMOOTHING[0]) * min(1.0, 1.25 * share)
        with torch.enable_grad():
            objective, value = _objective(parts, logs, gram_CC, radius, smoothing)
        if not math.isfinite(value):
            break
        if value < best:
            best, kept = value, [leaf.detach().clone() for leaf in leaves]
        if step % _PATIENCE == 0:
            if best > reference - _PROGRESS:
                break
            reference = best
        if step < steps:
            optimizer.zero_grad()
            objective.backward()
            optimizer.step()
    for leaf, log in zip(leaves, kept, strict=True):
        leaf.data = log
    return [{k: leaf.detach().exp() for k, leaf in block.items()} for block in logs]


def domains(
    parts: Sequence[Part], found: Sequence[Mapping[str, Tensor]], radius: float
) -> list[Tensor]:
    """Return the factors (C, C), scale included, of the domains around the blocks of ``found``.

    One before each of them and one after the last; ``parts`` may hold more blocks.
    """
    shape = _ball(parts[0], radius)
    shapes = [shape]
    for part, own in zip(parts, found, strict=False):
        shape = _domain(part, own, shape)
        shapes.append(shape)
    return [shape.factor_CC * math.exp(float(shape.log_scale)) for shape in shapes]


def _ball(part: Part, radius: float) -> _Shape:
    width = part.o_HCD.shape[1] if isinstance(part, AttentionPart) else len(part.offset_C)
    return _Shape(torch.eye(width, dtype=torch.float64), math.log(max(radius, 1e-300)))


def _objective(
    parts: Sequence[Part],
    logs: Sequence[Mapping[str, Tensor]],
    gram_CC: Tensor,
    radius: float,
    smoothing: float,
) -> tuple[Tensor, float]:
    """Return the smoothed and the exact logarithm of the bound on the logits' change."""
    domain, changes = _ball(parts[0], radius), _ball(parts[0], 1.0)
    for part, own_logs in zip(parts, logs, strict=True):
        own = {name: leaf.exp() for name, leaf in own_logs.items()}
        changes, domain = _changes(part, own, changes, domain), _domain(part, own, domain)
    seen_CC = changes.factor_CC.mT @ gram_CC @ changes.factor_CC
    values = torch.linalg.eigvalsh((seen_CC + seen_CC.mT) / 2)
    top = values[-1].detach().clamp(min=1e-290)
    smooth = torch.logsumexp(values / (smoothing * top), 0) * smoothing * top
    exact = 0.5 * math.log(max(float(top), 1e-300)) + float(changes.log_scale)
    return 0.5 * smooth.log() + changes.log_scale, exact


def _changes(part: Part, own: Mapping[str, Tensor], changes: _Shape, domain: _Shape) -> _Shape:
    if isinstance(part, MlpPart):
        shape_CC = _mlp(part.slopes, own["stream.lambda"], own["stream.excess"], changes)
        return _Shape.of(shape_CC, changes.log_scale)
    layer, move_CC = part.layer, changes.factor_CC
    a, factor = layer.attn_residual, layer.attn_residual * layer.attn_factor
    inner_HDD, rest = _values(part, move_CC, own["stream.value"])
    change_CC = None
    if layer.content_heads:
        score_HDD, change_CC, key = _scores(part, own, move_CC, domain)
        content = layer.content_heads
        inner_HDD = torch.cat((inner_HDD[:content] + score_HDD, inner_HDD[content:]))
        rest = rest + key
    output_CC = torch.einsum("hcd,hde,hfe->cf", part.o_HCD, inner_HDD, part.o_HCD)
    shape_CC = _image(move_CC, output_CC, change_CC, rest, (1 - a, factor), own["stream.skip"])
    return _Shape.of(shape_CC, changes.log_scale)


def _domain(part: Part, own: Mapping[str, Tensor], domain: _Shape) -> _Shape:
    if isinstance(part, MlpPart):
        shape_CC = _mlp(part.chords, own["domain.lambda"], own["domain.excess"], domain)
        after = _Shape.of(shape_CC, domain.log_scale)
        offset_C = part.offset_C * torch.exp(-torch.as_tensor(after.log_scale))
        size = offset_C.norm()
        if float(size) == 0.0:
            return after
        shape_CC = (1 + size) * after.factor_CC @ after.factor_CC.mT
        shape_CC = shape_CC + (1 + 1 / size) * torch.outer(offset_C, offset_C)
        return _Shape.of(shape_CC, after.log_scale)
    a, factor = part.layer.attn_residual, part.layer.attn_residual * part.layer.attn_factor
    inner_HDD, rest = _values(part, domain.factor_CC, own["domain.value"])
    output_CC = torch.einsum("hcd,hde,hfe->cf", part.o_HCD, inner_HDD, part.o_HCD)
    weights = (1 - a, factor)
    shape_CC = _image(domain.factor_CC, output_CC, None, rest, weights, own["domain.skip"])
    return _Shape.of(shape_CC, domain.log_scale)


def _values(part: AttentionPart, move_CC: Tensor, value_H: Tensor) -> tuple[Tensor, Tensor]:
    moved_HDC = part.v_HDC @ move_CC
    return moved_HDC @ moved_HDC.mT / value_H[:, None, None], value_H.sum()


def _scores(
    part: AttentionPart, own: Mapping[str, Tensor], move_CC: Tensor, domain: _Shape
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output forms (H, D, D), the form of changes (C, C) and the key path's part."""
    query_H, key_H, mixed_H = (own[f"stream.{name}"][:, None, None] for name in _CONTENT)
    tokens_CC = domain.factor_CC * torch.exp(torch.as_tensor(domain.log_scale))
    scale = part.layer.logit_scale
    seen_HDC, k_HDC = part.v_HDC[: len(part.k_HDC)] @ tokens_CC, part.k_HDC @ tokens_CC
    reach_H, moved_H = _tops(k_HDC), _tops(part.k_HDC @ move_CC)
    plain_H = scale * (reach_H * (1 + mixed_H) / (4 * query_H) + moved_H / key_H)
    crossed_HDD = seen_HDC @ k_HDC.mT
    cross_H = scale * (1 + 1 / mixed_H) / (4 * query_H)
    score_HDD = plain_H * (seen_HDC @ seen_HDC.mT) + cross_H * (crossed_HDD @ crossed_HDD.mT)
    change_XC = ((part.q_HDC @ move_CC) * (scale * query_H).sqrt()).flatten(0, 1)
    token_XC = ((part.q_HDC @ tokens_CC) * (scale * key_H).sqrt()).flatten(0, 1)
    return score_HDD, change_XC.mT @ change_XC, torch.linalg.eigvalsh(token_XC.mT @ token_XC)[-1]


def _tops(matrices_HDC: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(matrices_HDC @ matrices_HDC.mT)[:, -1, None, None]


def _image(
    move_CC: Tensor,
    output_CC: Tensor,
    change_CC: Tensor | None,
    rest: Tensor,
    weights: tuple[float, float],
    excess: Tensor,
) -> Tensor:
    skip, factor = weights
    eye_CC = torch.eye(len(move_CC), dtype=move_CC.dtype)
    shift, room_CC = excess, excess * eye_CC
    if change_CC is not None:
        shift = factor * torch.linalg.eigvalsh(change_CC)[-1] + excess
        room_CC = shift * eye_CC - factor * change_CC
    shape_CC = factor * output_CC
    if skip:
        shape_CC = shape_CC + skip**2 * move_CC @ torch.linalg.solve(room_CC, move_CC.mT)
    return (shift + factor * rest) * shape_CC


def _mlp(form: MlpForm, lambda_N: Tensor, excess: Tensor, changes: _Shape) -> Tensor:
    rows_NC = form.g_NC @ changes.factor_CC
    change_CC = rows_NC.mT @ (lambda_N[:, None] * rows_NC)
    shift = torch.linalg.eigvalsh(change_CC)[-1] + excess
    linear_CC = form.c_CC @ changes.factor_CC
    room_CC = shift * torch.eye(len(change_CC), dtype=change_CC.dtype) - change_CC
    shape_CC = linear_CC @ torch.linalg.solve(room_CC, linear_CC.mT)
    return shift * (shape_CC + (form.b_CN / lambda_N) @ form.b_CN.mT)
