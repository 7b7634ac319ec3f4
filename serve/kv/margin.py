"""How far the last residual stream may move before the most probable token can change."""

# Legend: R rows (tokens), V vocabulary.

import torch
from torch import Tensor

from common.certificate import Certificate
from common.models import LipschitzTransformer
from solvers.robustness.radii import EXACT_CLASSES, PairNorms

ROUNDINGS = 8  # allowed units in the last place of the logits
FARTHEST = 1e300  # stands for "any distance"


class HeadMargins:
    """Distances of the last stream (l2 of a token) from a change of the largest logit.

    Args:
        model: Its last matrix; differences of its rows count, up to ``EXACT_CLASSES`` rows. Beyond,
            the largest of them, which the certificate holds, stands for all.
        certificate: Of this model.

    Source:
        Differences of rows: project's notes on bound tightening.
    """

    def __init__(self, model: LipschitzTransformer, certificate: Certificate) -> None:
        vocab, scale = model.config.vocab_size, model.config.final_scale
        self._pairs: PairNorms | None = None
        self._pair_norm = certificate.pair_norm
        if vocab <= EXACT_CLASSES:
            rows_VC = model.head.weight[:vocab].detach()
            self._pairs = PairNorms(rows_VC, scale, certificate.pair_norm)

    def distance(self, logits_RV: Tensor) -> Tensor:
        """Return within which distance (R,) the largest logit provably stays so, float64.

        Rounding of the logits is allowed for; a tie has distance 0.
        """
        logits = logits_RV.double()
        top_R1, index_R1 = logits.max(dim=-1, keepdim=True)
        unit = ROUNDINGS * torch.finfo(logits_RV.dtype).eps
        gap_RV = top_R1 - logits - unit * (top_R1.abs() + logits.abs())
        gap_RV = gap_RV.clamp(min=0)
        if self._pairs is None:
            distance_RV = gap_RV / self._pair_norm
        else:
            distance_RV = gap_RV / self._pairs.of(index_R1[:, 0])
        # No gap is no distance, whatever can move.
        distance_RV = distance_RV.masked_fill(gap_RV == 0, 0.0)
        return distance_RV.scatter(-1, index_R1, FARTHEST).amin(-1).clamp(max=FARTHEST)
