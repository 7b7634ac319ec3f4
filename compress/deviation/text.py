"""What a change does on a text, position by position: measured, and bounded for that text.

A position's output depends on the tokens up to it alone, so the recursion of ``deviation`` holds
for every prefix of a sequence: with ``e_l(t)`` the largest distance of the two streams over
positions up to t, ``e_{l+1}(t) <= rho_l e_l(t) + max_{s <= t} delta_l(s)``. The changes
``delta_l(s)`` at the same input are measured, on the dense (form A) or the changed network's own
trajectory (form B); where a proved one is smaller, rounding was measured and the proved one counts.
What follows is proved for that text only, in real arithmetic; networks run in float64, and
``ALLOWANCE`` stands for their rounding.
Source: spec modhifi 5.1, 5.2; the prefix form is our own derivation.
"""

# Legend: B sequences, T tokens, C width, V vocabulary, L blocks, M positions.

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.errors import CertificateError
from common.norms import SLACK
from compress.deviation.network import Deviation, Form

BATCH_TOKENS = 8192
AGREEMENT = 1e-9
"""Relative rounding allowed between a measurement and the bound above it."""
ALLOWANCE = 1e-12
"""Rounding allowed on top, relative to the largest token of the final stream (l2)."""
QUANTILES = {"median": 0.5, "q90": 0.9, "max": 1.0}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Measured:
    """Deviations seen on a text; two numbers per position and block are kept in memory.

    Attributes:
        running_a_ML: Largest l2 change of each block's output over the positions up to each one
            of its sequence, at the dense network's input.
        running_b_ML: The same at the changed network's input.
        mean_squares_L: Mean over positions of the squared change at the changed network's input.
        logits_M: RMS change of the logits over the vocabulary.
        margins_M: Dense logit of the first minus that of the second token.
        same_M: Whether the most likely token is the same.
        stream_size: Largest l2 norm of a token of either final stream.
    """

    running_a_ML: Tensor
    running_b_ML: Tensor
    mean_squares_L: Tensor
    logits_M: Tensor
    margins_M: Tensor
    same_M: Tensor
    stream_size: float

    @property
    def deltas(self) -> tuple[float, ...]:
        """Per block, the largest l2 change of its output on the changed network's trajectory."""
        return tuple(self.running_b_ML.amax(0).tolist())

    @property
    def logits(self) -> float:
        """Largest RMS change of a token's logits over the vocabulary."""
        return float(self.logits_M.max())

    @property
    def top1_agreement(self) -> float:
        """Share of positions whose most likely token is unchanged."""
        return float(self.same_M.double().mean())


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TextBounds:
    """Bounds for one text, RMS over the vocabulary, per position.

    Attributes:
        measured: What was seen there.
        a_M: Bound of form A.
        b_M: Bound of form B.
        proved_text: Share of positions whose most likely token these bounds prove unchanged: a
            statement about that text alone.
        proved_domain: Share of them for which the bound over all inputs does.
        allowance: Rounding by which float64 may exceed the bounds.
    """

    measured: Measured
    a_M: Tensor
    b_M: Tensor
    proved_text: float
    proved_domain: float
    allowance: float

    @property
    def bound_M(self) -> Tensor:
        """The smaller of the two bounds."""
        return torch.minimum(self.a_M, self.b_M)

    def quantiles(self) -> dict[str, dict[str, float]]:
        """Return median, 90 % quantile and maximum over positions of everything."""
        rows = {
            "actual": self.measured.logits_M,
            "form_a": self.a_M,
            "form_b": self.b_M,
            "bound": self.bound_M,
        }
        return {
            name: {label: _quantile(row_M, share) for label, share in QUANTILES.items()}
            for name, row_M in rows.items()
        }


@torch.no_grad()
def measure_deviation(dense: Any, changed: Any, tokens_BT: Tensor) -> Measured:
    """Run two networks on the same text and compare them block by block.

    Both run in float64, so that equal networks give exactly 0 and rounding hardly counts.

    Args:
        dense: Transformer before the change.
        changed: After it; embedding and head are the same.
        tokens_BT: Token ids.
    """
    # Only tensors are copied: the float64 twins live for the duration of this call.
    dense, changed = copy.deepcopy(dense).double(), copy.deepcopy(changed).double()
    device = next(dense.parameters()).device
    size = max(1, BATCH_TOKENS // tokens_BT.shape[1])
    parts = [_measure(dense, changed, part.to(device)) for part in tokens_BT.split(size)]
    counts = torch.tensor([len(part.logits_M) for part in parts], dtype=torch.float64)
    squares_L = sum(n * part.mean_squares_L for n, part in zip(counts, parts, strict=True))
    names = ("running_a_ML", "running_b_ML", "logits_M", "margins_M", "same_M")
    joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    return Measured(
        **joined,
        mean_squares_L=squares_L / counts.sum(),
        stream_size=max(part.stream_size for part in parts),
    )


def _measure(dense: Any, changed: Any, tokens_BT: Tensor) -> Measured:
    x_BTC = y_BTC = dense.embed(tokens_BT)
    at_dense, at_changed = [], []
    for old, new in zip(dense.layers, changed.layers, strict=True):
        for name in ("attend_block", "mlp_block"):
            before, after = getattr(old, name), getattr(new, name)
            next_BTC, moved_BTC = before(x_BTC), after(y_BTC)
            at_dense.append((next_BTC - after(x_BTC)).norm(dim=-1))
            at_changed.append((before(y_BTC) - moved_BTC).norm(dim=-1))
            x_BTC, y_BTC = next_BTC, moved_BTC
    old_BTV, new_BTV = dense.logits(x_BTC), changed.logits(y_BTC)
    top_BT2 = old_BTV.topk(2, dim=-1).values
    a_BTL, b_BTL = torch.stack(at_dense, -1), torch.stack(at_changed, -1)
    return Measured(
        running_a_ML=a_BTL.cummax(1).values.flatten(0, 1).cpu(),
        running_b_ML=b_BTL.cummax(1).values.flatten(0, 1).cpu(),
        mean_squares_L=b_BTL.square().mean((0, 1)).cpu(),
        logits_M=(old_BTV - new_BTV).square().mean(-1).sqrt().flatten().cpu(),
        margins_M=(top_BT2[..., 0] - top_BT2[..., 1]).flatten().cpu(),
        same_M=(old_BTV.argmax(-1) == new_BTV.argmax(-1)).flatten().cpu(),
        stream_size=float(torch.maximum(x_BTC.norm(dim=-1), y_BTC.norm(dim=-1)).max()),
    )


def text_bounds(measured: Measured, deviation: Deviation) -> TextBounds:
    """Carry the measured changes to the logits with proved constants.

    No bound exceeds that over all inputs.

    Args:
        measured: Of the same pair of networks.
        deviation: Its certified deviation.

    Raises:
        CertificateError: if a position moved by more than its bound: a constant is wrong.
    """
    proof, room = deviation.b.certificate, ALLOWANCE * measured.stream_size
    pairs = list(zip(deviation.forms, (measured.running_a_ML, measured.running_b_ML), strict=True))
    allowance = room * proof.head_norm / proof.vocab_size**0.5
    # What was measured contains the rounding of the changes.
    carried_M = torch.minimum(*(form.logits(running_ML) for form, running_ML in pairs))
    limit_M = carried_M * (1 + AGREEMENT) + allowance
    if bool((measured.logits_M > limit_M).any()):
        worst = int((measured.logits_M - limit_M).argmax())
        raise CertificateError(
            f"measured deviation above its bound ({float(measured.logits_M[worst]):.6g} > "
            f"{float(limit_M[worst]):.6g} at position {worst}): the certificate is refuted; "
            "certify the dense bundle again and report this"
        )
    held = [
        (form, torch.minimum(running_ML, running_ML.new_tensor(form.deltas)))
        for form, running_ML in pairs
    ]
    a_M, b_M = (form.logits(deltas_ML) for form, deltas_ML in held)
    stream_M = torch.minimum(*(form.stream(deltas_ML) for form, deltas_ML in held))

    def share(stream: Tensor | float) -> float:
        moved = (stream * (1 + AGREEMENT) + room) * proof.pair_norm * (1 + SLACK)
        return float((measured.margins_M > moved).double().mean())

    return TextBounds(
        measured=measured,
        a_M=a_M,
        b_M=b_M,
        proved_text=share(stream_M),
        proved_domain=share(deviation.stream),
        allowance=allowance,
    )


def expected_est(measured: Measured, form: Form) -> float:
    """Return ``sum_l D_l sqrt(mean |delta_l|^2)``, an estimate and not a bound.

    The mean over positions says nothing about the largest one, which is what the constants carry
    through attention: see spec modhifi 5.1.
    """
    roots = measured.mean_squares_L.sqrt().tolist()
    return sum(gain * root for gain, root in zip(form.gains(), roots, strict=True))


def _quantile(values_M: Tensor, share: float) -> float:
    # torch.quantile refuses more than 16 million numbers.
    rank = min(len(values_M) - 1, round(share * (len(values_M) - 1)))
    return float(values_M.sort().values[rank])
