"""The next token of each row: greedy or drawn after filters, with counter-based randomness.

The random number of a token is a function of (seed, choice, position) alone, and every row is
treated by itself, so that a request draws the same tokens alone and in any batch.
"""

# Legend: R rows, V vocabulary, K largest probabilities of a row.

from collections.abc import Collection
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch
from torch import Tensor

from serve.engine.logits import TokenCounts, adjust
from serve.engine.request import Sequence
from serve.engine.sampling_params import SamplingParams

_MASK64 = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_CHOICE = 0xD1B54A32D192ED03
# Sorted probabilities that nearly always hold the mass of top-p; a row that needs more gets all.
NUCLEUS = 1024


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


def choice_seed(seed: int, choice: int) -> int:
    """Return the seed of one of several choices: the given one for the first, others for the rest.

    Args:
        seed: Signed 64-bit seed of the request.
        choice: Index of the choice, from 0.

    Returns:
        Signed 64-bit seed; as the seed of a request of its own it repeats that choice.
    """
    if choice == 0:
        return seed
    mixed = _mix((_mix(seed & _MASK64) + choice * _CHOICE) & _MASK64)
    return mixed - 2**64 if mixed >= 2**63 else mixed


def filtered_probabilities(logits_RV: Tensor, params: Rows[SamplingParams]) -> Tensor:
    """Return the distribution after temperature, top-k, min-p and top-p, in this order.

    Args:
        logits_RV: Finite logits (R, V).
        params: One per row, none greedy.

    Returns:
        Probabilities (R, V) in float64; rows sum to 1; tokens that a filter leaves out have 0.
        Among equally probable tokens at the edge of a cut the smaller id stays.
    """
    logits_RV = logits_RV.double()
    shifted_RV = logits_RV - logits_RV.amax(dim=1, keepdim=True)
    p_RV = torch.softmax(shifted_RV / _column([p.temperature for p in params], logits_RV), dim=1)
    rows = [r for r, p in enumerate(params) if p.has_filter]
    if not rows:
        return p_RV
    p_RV[rows] = _filter(p_RV[rows], [params[r] for r in rows], NUCLEUS)
    return p_RV


@torch.inference_mode()
def sample(
    logits_RV: Tensor,
    params: Rows[SamplingParams],
    seeds: Rows[int],
    positions: Rows[int],
    *,
    counts: Rows[TokenCounts | None] | None = None,
    banned: Rows[Collection[int]] | None = None,
) -> list[Choice | None]:
    """Choose one token per row.

    Args:
        logits_RV: Logits (R, V), any floating dtype.
        params: Parameters of each row.
        seeds: Seed of each row.
        positions: Logical position of the token that each row draws.
        counts: Occurrences for each row whose parameters have a penalty.
        banned: Tokens that each row may not choose now.

    Returns:
        One choice per row; None where the logits hold a NaN or an infinity.
    """
    # Rows that are not finite are drawn like any other, and thrown away at the end.
    is_finite_R = torch.isfinite(logits_RV).all(dim=1)
    nothing = [None] * len(params)
    work_RV = adjust(logits_RV, params, counts or nothing, banned or [()] * len(params))
    tokens_R = work_RV.argmax(dim=1)
    drawn = [r for r, p in enumerate(params) if not p.is_greedy]
    if drawn:
        p_RV = filtered_probabilities(work_RV[drawn], [params[r] for r in drawn])
        u_R1 = _column([uniform(seeds[r], positions[r]) for r in drawn], p_RV)
        tokens_R[drawn] = _inverse_cdf(p_RV, u_R1)
    logprobs = _logprobs(logits_RV, tokens_R, [p.logprobs for p in params])
    # One transfer for both.
    tokens = torch.where(is_finite_R, tokens_R, -1).tolist()
    return [
        None if token < 0 else Choice(token=token, logprobs=row)
        for token, row in zip(tokens, logprobs, strict=True)
    ]


class Sampler:
    """Samples sequences, and keeps what their penalties need to remember."""

    def __init__(self) -> None:
        self._counts: dict[Sequence, TokenCounts] = {}

    def choose(self, sequences: Rows[Sequence], logits_RV: Tensor) -> list[Choice | None]:
        """Choose the next token of each sequence from its row of logits; see ``sample``."""
        requests = [sequence.request for sequence in sequences]
        counts = [self._count(sequence, logits_RV) for sequence in sequences]
        banned = [
            request.stop_ids if sequence.num_output < request.params.min_tokens else ()
            for sequence, request in zip(sequences, requests, strict=True)
        ]
        return sample(
            logits_RV,
            [request.params for request in requests],
            [request.seed for request in requests],
            [sequence.num_tokens for sequence in sequences],
            counts=counts,
            banned=banned,
        )

    def close(self, sequence: Sequence) -> None:
        """Forget a sequence that ended."""
        self._counts.pop(sequence, None)

    def _count(self, sequence: Sequence, logits_RV: Tensor) -> TokenCounts | None:
        if not sequence.request.params.has_penalty:
            return None
        if sequence not in self._counts:
            self._counts[sequence] = TokenCounts(logits_RV.shape[1], logits_RV.device)
        self._counts[sequence].follow(sequence.tokens, len(sequence.request.prompt))
        return self._counts[sequence]


def top_logprobs(logits_RV: Tensor, tokens_R: Tensor, count: int) -> list[dict[int, float]]:
    """Return log-probabilities by token id: of each row's token, then of its ``count`` largest.

    Args:
        logits_RV: Unmodified logits (R, V).
        tokens_R: A token of each row.
        count: How many of the most probable tokens, at most V.
    """
    logprobs_RV = torch.log_softmax(logits_RV.double(), dim=1)
    own_R1 = logprobs_RV.gather(1, tokens_R[:, None])
    top = logprobs_RV.topk(min(count, logits_RV.shape[1]), dim=1)
    values = torch.cat((own_R1, top.values), dim=1).tolist()
    ids = torch.cat((tokens_R[:, None], top.indices), dim=1).tolist()
    # The first entry of a repeated key keeps its place, and both have the same value.
    return [dict(zip(*row, strict=True)) for row in zip(ids, values, strict=True)]


def _logprobs(
    logits_RV: Tensor, tokens_R: Tensor, counts: Rows[int | None]
) -> list[dict[int, float] | None]:
    rows: list[dict[int, float] | None] = [None] * len(counts)
    for count in {count for count in counts if count is not None}:
        chosen = [r for r, wanted in enumerate(counts) if wanted == count]
        found = top_logprobs(logits_RV[chosen], tokens_R[chosen], count)
        for row, logprobs in zip(chosen, found, strict=True):
            rows[row] = logprobs
    return rows


def _filter(p_RV: Tensor, params: Rows[SamplingParams], width: int) -> Tensor:
    """Keep the m most probable tokens of each row, where every filter limits m."""
    vocab = p_RV.shape[1]
    top_k_R1 = _column([p.top_k or vocab for p in params], p_RV)
    top_p_R1 = _column([p.top_p for p in params], p_RV)
    floor_R1 = _column([p.min_p for p in params], p_RV) * p_RV.amax(dim=1, keepdim=True)
    width = min(vocab, max([width, *(p.top_k for p in params)]))
    sorted_RK = p_RV.topk(width, dim=1).values
    rank_K = torch.arange(width, device=p_RV.device)
    is_in_RK = (rank_K < top_k_R1) & (sorted_RK >= floor_R1)
    sum_RK = sorted_RK.masked_fill(~is_in_RK, 0.0).cumsum(dim=1)
    # Without top-k the mass may extend beyond the sorted part.
    whole_R1 = p_RV.masked_fill(p_RV < floor_R1, 0.0).sum(dim=1, keepdim=True)
    total_R1 = torch.where(top_k_R1 < vocab, sum_RK[:, -1:], whole_R1)
    # top_p = 1 keeps all: rounding of the running sum must not cut the tail.
    reached_R1 = torch.where(top_p_R1 < 1, top_p_R1 * total_R1, torch.inf)
    is_in_RK &= sum_RK - sorted_RK < reached_R1
    kept_RV = _largest(p_RV, sorted_RK, is_in_RK.sum(dim=1, keepdim=True))
    rows: list[int] = []
    if width < vocab and not all(p.top_k for p in params):
        is_open = is_in_RK[:, -1].tolist()
        rows = [row for row, p in enumerate(params) if is_open[row] and not p.top_k]
    if rows:
        kept_RV[rows] = _filter(p_RV[rows], [params[row] for row in rows], vocab)
    return kept_RV / kept_RV.sum(dim=1, keepdim=True)


def _largest(p_RV: Tensor, sorted_RK: Tensor, count_R1: Tensor) -> Tensor:
    """Zero all but the ``count`` largest of each row; among equal ones the smaller ids stay."""
    # A row of NaN keeps none.
    edge_R1 = sorted_RK.gather(1, (count_R1 - 1).clamp(min=0))
    above_RV, tied_RV = p_RV > edge_R1, p_RV == edge_R1
    room_R1 = count_R1 - above_RV.sum(dim=1, keepdim=True)
    return p_RV.masked_fill(~(above_RV | (tied_RV & (tied_RV.cumsum(dim=1) <= room_R1))), 0.0)


def _inverse_cdf(p_RV: Tensor, u_R1: Tensor) -> Tensor:
    # In vocabulary order: sorting would let a rounding error swap two ranks and the token.
    cdf_RV = p_RV.cumsum(dim=1)
    index_R = torch.searchsorted(cdf_RV, u_R1 * cdf_RV[:, -1:], right=True)[:, 0]
    # The first index that reaches the total is the last token with any probability.
    last_R = (cdf_RV >= cdf_RV[:, -1:]).int().argmax(dim=1)
    return torch.minimum(index_R, last_R)


def _column(values: Rows[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)
