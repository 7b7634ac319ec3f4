"""What a window of recent tokens keeps of purely positional heads: proved before any text.

Their attention weights are a function of distances alone, so the evicted mass at every future
position is known from the bias table: a certificate without data. Source: own derivation.
"""

# Legend: H purely positional heads, T positions of a query.

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from serve.decoder import Decoder, LayerSpec
from serve.kv.bias import LOG_MAX
from serve.kv.policy import Policy
from serve.kv.summary import outward


def evicted_mass_bound(spec: LayerSpec, context: int, *, window: int, sinks: int = 0) -> Tensor:
    """Bound the attention mass that full attention gives to what a window leaves out.

    Args:
        spec: A layer; its heads from ``content_heads`` on have zero queries and keys.
        context: Longest sequence, in tokens.
        window: Most recent tokens that are kept, the query's own included, at least 1.
        sinks: First tokens that are kept too.

    Returns:
        (H, T), float64, in [0, 1]: for a query at each position, exact but for rounding outward;
        0 while nothing is left out.
    """
    heads = spec.heads - spec.content_heads
    if spec.bias_HT is None:
        bias_HT = torch.zeros(heads, context, dtype=torch.float64)
    else:
        bias_HT = spec.bias_HT[spec.content_heads :, :context].double()
    logs_HT = bias_HT - bias_HT.amax(1, keepdim=True)
    total_HT = logs_HT.exp().cumsum(1)
    # Distance window + i is left out of queries from position window + sinks + i on.
    lost_HT = logs_HT[:, window:].clamp(min=-LOG_MAX).exp().cumsum(1)
    lost_HT = lost_HT[:, : max(0, context - window - sinks)]
    mass_HT = torch.zeros_like(total_HT)
    first = context - lost_HT.shape[1]
    # Running sums may round once per distance.
    rounding = outward(torch.float64) + 2 * context * torch.finfo(torch.float64).eps
    mass_HT[:, first:] = lost_HT / total_HT[:, first:] * (1 + rounding)
    return mass_HT.nan_to_num(nan=1.0, posinf=1.0).clamp(max=1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class PositionalCertificate:
    """What the positional heads of a model keep under a window, whatever the text.

    Attributes:
        window: Most recent tokens kept, the query's own included.
        sinks: First tokens kept.
        mass_bounds: Per layer with such heads, the largest evicted mass of each over all positions.
    """

    window: int
    sinks: int
    mass_bounds: dict[int, list[float]]

    @property
    def largest(self) -> float:
        """Bound on the evicted mass of every positional head at every position."""
        return max((bound for row in self.mass_bounds.values() for bound in row), default=0.0)

    def __str__(self) -> str:
        rows = [bound for row in self.mass_bounds.values() for bound in row]
        tight = sum(bound <= 0.01 for bound in rows)
        # Rounded down: the text is a bound as well.
        kept = math.floor((1 - self.largest) * 1e4) / 1e4
        return (
            f"{len(rows)} purely positional heads: a window of {self.window} tokens after"
            f" {self.sinks} sinks keeps at least {kept:.4f} of the attention of each,"
            f" and 99 % of {tight} of them, at every position of every text"
        )


def positional_certificate(decoder: Decoder, policy: Policy) -> PositionalCertificate | None:
    """Return what a window of the policy's budget keeps; None without positional heads or budget.

    Right after a compaction the sinks and ``budget - sinks`` tokens are left and the next one comes
    in; later the cache is longer. The statement is about a window: of a policy that keeps other
    tokens it is what it competes with.
    """
    if policy.budget is None:
        return None
    window = policy.budget - policy.sinks + 1
    bounds = {}
    for index, spec in enumerate(decoder.layers):
        if spec.content_heads < spec.heads and spec.sliding_window is None:
            rule = {"window": window, "sinks": policy.sinks}
            bounds[index] = evicted_mass_bound(spec, decoder.context, **rule).amax(1).tolist()
    if not bounds:
        return None
    return PositionalCertificate(window=window, sinks=policy.sinks, mass_bounds=bounds)
