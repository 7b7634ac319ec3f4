"""The next token of each row: greedy, temperature, top-k, top-p, with counter-based randomness.

The random number of a token is a function of (seed, position) alone, and every row is treated by
itself, so that a request draws the same tokens alone and in any batch.
"""

# Legend: R rows, V vocabulary.

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch
from torch import Tensor

from serve.engine.request import SamplingParams

_MASK64 = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A sampled token.

    Attributes:
        token: Its id.
        logprobs: Natural log-probabilities under the unmodified logits: of the token itself,
            then of the most probable others asked for; None when the request wants none.
    """

    token: int
    logprobs: dict[int, float] | None = None


def uniform(seed: int, position: int) -> float:
    """Return the uniform number in [0, 1) that belongs to (seed, position).

    Args:
        seed: Any integer; taken modulo 2^64.
        position: Logical position of the token to draw, from 0.

    Source:
        SplitMix64 (Steele, Lea, Flood 2014) used as a counter-based generator.
    """
    start = _mix((seed + _GOLDEN) & _MASK64)
    return (_mix((start + (position + 1) * _GOLDEN) & _MASK64) >> 11) * 2.0**-53


def filtered_probabilities(logits_RV: Tensor, params: Rows[SamplingParams]) -> Tensor:
    """Return the distribution after temperature, top-k and top-p.

    Args:
        logits_RV: Finite logits (R, V).
        params: One per row, none greedy.

    Returns:
        Probabilities (R, V) in float64; rows sum to 1; tokens outside top-k or top-p have 0. Among
        equally probable tokens at the edge of a cut the smaller id stays.
    """
    vocab = logits_RV.shape[1]
    logits_RV = logits_RV.double()
    temperature_R1 = _column([p.temperature for p in params], logits_RV)
    top_k_R1 = _column([p.top_k or vocab for p in params], logits_RV)
    top_p_R1 = _column([p.top_p for p in params], logits_RV)
    shifted_RV = logits_RV - logits_RV.amax(dim=1, keepdim=True)
    p_RV = torch.softmax(shifted_RV / temperature_R1, dim=1)
    sorted_RV, order_RV = torch.sort(p_RV, dim=1, descending=True, stable=True)
    rank_V = torch.arange(vocab, device=p_RV.device)
    sorted_RV = sorted_RV.masked_fill(rank_V >= top_k_R1, 0.0)
    before_RV = sorted_RV.cumsum(dim=1) - sorted_RV
    # top_p = 1 keeps all: rounding of the running sum must not cut the tail.
    reached_R1 = torch.where(top_p_R1 < 1, top_p_R1 * sorted_RV.sum(dim=1, keepdim=True), torch.inf)
    sorted_RV = sorted_RV.masked_fill(before_RV >= reached_R1, 0.0)
    kept_RV = torch.zeros_like(p_RV).scatter_(1, order_RV, sorted_RV)
    return kept_RV / kept_RV.sum(dim=1, keepdim=True)


@torch.inference_mode()
def sample(
    logits_RV: Tensor, params: Rows[SamplingParams], seeds: Rows[int], positions: Rows[int]
) -> list[Choice | None]:
    """Choose one token per row.

    Args:
        logits_RV: Logits (R, V), any floating dtype.
        params: Parameters of each row.
        seeds: Seed of each row.
        positions: Logical position of the token that each row draws.

    Returns:
        One choice per row; None where the logits hold a NaN or an infinity.
    """
    finite = torch.isfinite(logits_RV).all(dim=1).tolist()
    tokens = logits_RV.argmax(dim=1).tolist()
    drawn = [r for r, p in enumerate(params) if finite[r] and not p.is_greedy]
    if drawn:
        p_RV = filtered_probabilities(logits_RV[drawn], [params[r] for r in drawn])
        u_R = [uniform(seeds[r], positions[r]) for r in drawn]
        for row, token in zip(drawn, _inverse_cdf(p_RV, u_R), strict=True):
            tokens[row] = token
    return [
        Choice(token=token, logprobs=_logprobs(logits_RV[r], token, params[r].logprobs))
        if finite[r]
        else None
        for r, token in enumerate(tokens)
    ]


def _inverse_cdf(p_RV: Tensor, u_R: list[float]) -> list[int]:
    # In vocabulary order: sorting would let a rounding error swap two ranks and the token.
    cdf_RV = p_RV.cumsum(dim=1)
    target_R1 = _column(u_R, cdf_RV) * cdf_RV[:, -1:]
    index_R = torch.searchsorted(cdf_RV, target_R1, right=True)[:, 0]
    # The first index that reaches the total is the last token with any probability.
    last_R = (cdf_RV >= cdf_RV[:, -1:]).int().argmax(dim=1)
    return torch.minimum(index_R, last_R).tolist()


def _logprobs(logits_V: Tensor, token: int, count: int | None) -> dict[int, float] | None:
    if count is None:
        return None
    logprobs_V = torch.log_softmax(logits_V.double(), dim=0)
    values, ids = logprobs_V.topk(min(count, len(logprobs_V)))
    return {token: float(logprobs_V[token])} | dict(zip(ids.tolist(), values.tolist(), strict=True))


def _column(values: Rows[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)
