"""What RoPE makes of queries yet to come: offsets, linear forms, and the bias they will meet."""

# Legend: L layers, R rows, H query heads, F rotated bands, O offsets, T relative distances, D head
# width, E = D - F weights (bands, then unrotated components).

import torch
from torch import Tensor

from serve.kernels.reference import rotary_parts

OFFSET_MAX = 65536


def query_offsets(offset_max: int | None, context: int) -> Tensor:
    """Return the future offsets 1, 2, 4, ... up to ``offset_max`` tokens (O,), int64, CPU.

    ``None`` means the smaller of 65536 and the largest power of two within the context.
    """
    largest = min(OFFSET_MAX, context) if offset_max is None else offset_max
    return 2 ** torch.arange(largest.bit_length())


def phasors(frequency_F: Tensor, tokens: Tensor) -> Tensor:
    """Return exp(i w_f n) for each number of tokens (..., F), complex128.

    In float64: float32 phases lose the ranking at long positions.
    """
    phase = tokens.double()[..., None] * frequency_F.double()
    return torch.polar(torch.ones_like(phase), phase)


def turned(x: Tensor, factor_F: Tensor, *, interleaved: bool) -> Tensor:
    """Multiply each rotated band of ``x`` (..., D) by a complex factor (..., F); the rest stays."""
    bands = factor_F.shape[-1]
    values = torch.complex(*rotary_parts(x, bands, interleaved)) * factor_F
    rest = x[..., 2 * bands :].expand(*values.shape[:-1], -1)
    return torch.cat((as_components(values, interleaved=interleaved), rest), dim=-1)


def as_components(x_F: Tensor, *, interleaved: bool) -> Tensor:
    """Lay complex bands (..., F) out as the first 2F components of a head."""
    if interleaved:
        return torch.view_as_real(x_F).flatten(-2)
    return torch.cat((x_F.real, x_F.imag), dim=-1)


def query_form(
    q_mean_HF2: Tensor,
    inverse_frequency_F: Tensor,
    positions_R: Tensor,
    offsets_O: Tensor,
    *,
    interleaved: bool = False,
) -> Tensor:
    """Return the linear form whose product with a rotated key is the mean future logit.

    ``u_f = E[q_f] mean_o(exp(i w_f o)) exp(i w_f t)``.

    Args:
        q_mean_HF2: Mean query before RoPE (..., H, F, 2), real and imaginary part per band.
        inverse_frequency_F: RoPE frequencies in radians per token, float64.
        positions_R: Position t of the next query of each row.
        offsets_O: Offsets from t, in tokens.
        interleaved: Layout of the result; otherwise real parts, then imaginary parts.

    Returns:
        (..., R, H, 2F) float64.
    """
    filter_F = phasors(inverse_frequency_F, offsets_O.to(inverse_frequency_F.device)).mean(0)
    turn_R1F = (phasors(inverse_frequency_F, positions_R) * filter_F)[:, None]
    centre_1HF = torch.view_as_complex(q_mean_HF2.double().contiguous()).unsqueeze(-3)
    return as_components(centre_1HF * turn_R1F, interleaved=interleaved)


def norm_weights(q_mean_HF2: Tensor, q_abs_HF: Tensor, kind: str) -> Tensor:
    """Return the weight (..., H, F) of each key band's modulus, float64.

    ``mlr``: E|q_f| - |E q_f|, the published term; ``full``: E|q_f|; others: zero.
    """
    abs_HF = q_abs_HF.double()
    if kind == "mlr":
        return abs_HF - q_mean_HF2.double().norm(dim=-1)
    return abs_HF if kind == "full" else torch.zeros_like(abs_HF)


def mean_future_bias(bias_HT: Tensor, offsets_O: Tensor) -> Tensor:
    """Average the bias over the future offsets, for every distance of the next query.

    Entry d of the result is the mean of ``b(d + o)`` over the offsets with ``d + o < context``.
    Where none is left only the next query itself can attend, so its own bias ``b(d)`` stands.

    Returns:
        (H, context + 1), dtype of the bias; the last entry repeats the last distance.
    """
    context = bias_HT.shape[1]
    total = torch.zeros_like(bias_HT)
    count_T = torch.zeros(context, dtype=bias_HT.dtype, device=bias_HT.device)
    for offset in offsets_O[offsets_O < context].tolist():
        total[:, : context - offset] += bias_HT[:, offset:]
        count_T[: context - offset] += 1
    mean_HT = torch.where(count_T > 0, total / count_T.clamp(min=1), bias_HT)
    return torch.cat((mean_HT, mean_HT[:, -1:]), dim=1)


def later_bias(bias_HT: Tensor, offset: int) -> Tensor:
    """Return ``b(d + offset)`` for every distance d, -inf where no query is so far on.

    Offset 1 is always possible for a query that can still come: past the table it takes its last
    entry.

    Returns:
        (H, context + 1), dtype of the bias.
    """
    context = bias_HT.shape[1]
    index_T = torch.arange(context + 1, device=bias_HT.device) + offset
    later_HT = bias_HT[:, index_T.clamp(max=context - 1)]
    return later_HT if offset == 1 else later_HT.masked_fill(index_T >= context, -torch.inf)
