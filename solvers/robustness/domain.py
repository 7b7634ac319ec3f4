"""Where a text certificate holds, and what the same multipliers prove on a larger ball.

A certificate covers embedded tokens in the ball of ``Certificate.radius``. Trained embedding rows
often lie on its surface: then only perturbations that stay inside the ball are covered. Because a
block's multipliers prove a bound on any ball, the constants of a larger one follow without solving;
blocks without content heads cost nothing more there.
"""

from collections.abc import Sequence

import torch

from common.certificate import Certificate, product_up
from common.models import LipschitzTransformer
from solvers.bounds.stream_proof import Stream, advance, stream_factors

SAMPLED_ROWS = 4096
"""The median distance is taken over all pairs of at most this many rows, evenly chosen."""


class StreamBound:
    """Proved factors by which the final stream moves per unit of the embedding, max-token l2.

    Args:
        model: Weights of any floating type, as certified.
        certificate: Of exactly these weights; it must have passed the checker.
    """

    def __init__(self, model: LipschitzTransformer, certificate: Certificate) -> None:
        self._model, self._certificate = model, certificate
        self._found: dict[float, float] = {}

    @property
    def ball(self) -> float:
        """The factor on the certified ball."""
        return self._certificate.stream

    def beyond(self, epsilons: Sequence[float]) -> list[float]:
        """Return the factors on balls whose radius exceeds the certified one by each epsilon."""
        radii = [self._certificate.radius + max(epsilon, 0.0) for epsilon in epsilons]
        # Where the widest ball costs nothing, none inside it does.
        if radii and self._prove(max(radii)) <= self.ball * (1 + 1e-9):
            return [self._prove(max(radii))] * len(radii)
        return [self._prove(radius) for radius in radii]

    def _prove(self, radius: float) -> float:
        if radius not in self._found:
            state = self._model.state_dict()
            tensors = {name: tensor.detach().cpu() for name, tensor in state.items()}
            config, factors = self._model.config, []
            stream = Stream.start(config.width, radius)
            for index in range(len(self._certificate.blocks)):
                own = self._certificate.block_multipliers(index)
                bound, stream = advance(config, tensors, index, stream, own)
                factors.append(bound.tightened)
            found = min(product_up(factors), product_up(stream_factors(stream.changes)))
            # The certified ball is inside: no smaller factor is ever used for the larger one.
            self._found[radius] = max(found, self.ball)
        return self._found[radius]


def median_row_distance(model: LipschitzTransformer) -> float:
    """Return the median l2 distance between embedding rows: the scale-free unit of radii."""
    rows_VC = model.embedding.weight.detach().double().cpu()
    if len(rows_VC) > SAMPLED_ROWS:
        keep = torch.linspace(0, len(rows_VC) - 1, SAMPLED_ROWS).round().long()
        rows_VC = rows_VC[keep]
    return float(torch.pdist(rows_VC).median()) if len(rows_VC) > 1 else 0.0
