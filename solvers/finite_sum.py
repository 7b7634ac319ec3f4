"""Finite sums ``F = (1/N) sum_i F_i``: components, sampling laws and their constants.

Variance reduction depends on two constants: L_F of the mean, and L_Q of one sampled component,
``E |F_q(u) - F_q(v)|^2 <= L_Q^2 |u - v|^2`` for the unbiased ``F_q = F_i / (N q_i)``.
Source: spec halpern_solvers 1.2, 1.3. Letters: N components, M samples, B blocks.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from common.config import one_of, positive
from common.errors import ConfigError, ShapeError
from solvers.sampling import Laws, check_law, importance_law, uniform_law
from solvers.structure import check_start

Sampling = Literal["auto", "uniform", "importance"]
SAMPLINGS = get_args(Sampling)
_SLACK = 1.01  # ratio at which two constants count as contradictory rather than rounded


@dataclass(frozen=True, kw_only=True)
class FiniteSumInclusion:
    """``F = (1/N) sum_i F_i`` with components that can be sampled.

    Attributes:
        components: ``components(z, index_M, weight_M)`` returns ``sum_j weight_j F_index_j(z)``;
            ``index`` int64 and ``weight`` (dtype of ``start``) of shape (number drawn,), or
            (number drawn, B) where ``laws`` has several blocks.
        num_components: N, at least 1; what one full evaluation costs in component calls.
        start: First point and anchor; a floating tensor or a tuple of them.
        resolvent: As in :class:`solvers.problem.Inclusion`.
        lipschitz_bound: L_F of the mean operator F (1/L_F-cocoercive where ``cocoercive``).
        lipschitz_est: A guess of the same.
        component_lipschitz: (N,) constants ``L_i`` of the components, for importance sampling.
        mean_square_lipschitz: L_Q under the law ``auto``; derived from the components if omitted.
        cocoercive: As in :class:`solvers.problem.Inclusion`; where True, each component is taken
            to be 1/L_i-cocoercive.
        laws: One probability vector per independently sampled block (a matrix: rows and columns);
            omitted, the law ``auto`` is importance where the constants are known, else uniform.
        mean: F itself, where that is faster than summing all components; must equal their mean.

    Raises:
        ConfigError: for constants that are negative or not finite, ``num_components < 1``, or a
            law that never draws a component which varies.
        ShapeError: for a start that is not a floating tensor, or constants of the wrong length.
    """

    components: Callable[[Any, Tensor, Tensor], Any]
    num_components: int
    start: Any
    resolvent: Callable[[Any, float], Any] | None = None
    lipschitz_bound: float | None = None
    lipschitz_est: float | None = None
    component_lipschitz: Tensor | None = None
    mean_square_lipschitz: float | None = None
    cocoercive: bool | None = None
    laws: Laws | None = None
    mean: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        """Refuse constants, laws and starting points that no theory covers."""
        for name in ("lipschitz_bound", "lipschitz_est", "mean_square_lipschitz"):
            if (value := getattr(self, name)) is not None:
                positive(name, value, zero=True)
        if self.num_components < 1:
            raise ConfigError(f"num_components={self.num_components}: expected at least 1")
        check_start(self.start)
        if self.component_lipschitz is not None:
            self._check_components(self.component_lipschitz)
        if self.laws is not None:
            self._check_laws(self.laws)
        self._warn_of_contradiction()

    def full(self, point: Any) -> Any:
        """Return the mean over all components at ``point``."""
        if self.mean is not None:
            return self.mean(point)
        like = self.start[0] if isinstance(self.start, tuple) else self.start
        sizes = [len(law) for law in self.laws or (torch.empty(self.num_components),)]
        columns = []
        for size in sizes:
            # A shorter block is padded with weight 0.
            index_N = torch.arange(max(sizes), device=like.device)
            weight_N = (index_N < size).to(like.dtype) / size
            columns.append((index_N.clamp_max(size - 1), weight_N))
        if len(columns) == 1:
            return self.components(point, *columns[0])
        index, weight = (torch.stack(part, dim=-1) for part in zip(*columns, strict=True))
        return self.components(point, index, weight)

    def sampling_laws(self, sampling: str = "auto") -> Laws:
        """Return the probabilities per block, float64.

        Raises:
            ConfigError: for importance sampling without the constants of the components.
        """
        one_of("sampling", sampling, SAMPLINGS)
        if sampling == "auto" and self.laws is not None:
            return self.laws
        if sampling == "uniform" or (sampling == "auto" and self.component_lipschitz is None):
            sizes = [len(law) for law in self.laws or ()] or [self.num_components]
            return tuple(uniform_law(size) for size in sizes)
        if self.component_lipschitz is None or len(self.laws or (0,)) > 1:
            raise ConfigError(
                "sampling=importance: needs component_lipschitz, one constant per component of a "
                "single block; give it, or choose sampling=auto"
            )
        return (importance_law(self.component_lipschitz),)

    def mean_square_bound(self, sampling: str = "auto") -> float | None:
        """Return L_Q under a law, the smallest that the given constants prove; None if unknown."""
        known = []
        if self.mean_square_lipschitz is not None and sampling == "auto":
            known.append(self.mean_square_lipschitz)
        if (ratio_N := self._weighted_constants(sampling)) is not None:
            law_N = self.sampling_laws(sampling)[0].to(ratio_N)
            known.append(math.sqrt(float((law_N * ratio_N**2).sum())))
        return min(known, default=None)

    def average_cocoercivity(self, sampling: str = "auto") -> float | None:
        """Return L with ``E |F_q(u) - F_q(v)|^2 <= L <F(u) - F(v), u - v>``; None if unknown.

        It is ``max_i L_i / (N q_i)``, for components that are 1/L_i-cocoercive each.
        """
        ratio_N = self._weighted_constants(sampling)
        return None if ratio_N is None else float(ratio_N.max())

    def _weighted_constants(self, sampling: str) -> Tensor | None:
        """Return ``L_i / (N q_i)``, 0 for components that are constant and never drawn."""
        laws = self.sampling_laws(sampling)
        if self.component_lipschitz is None or len(laws) > 1:
            return None
        constants_N = self.component_lipschitz.detach().double().cpu()
        return constants_N / (self.num_components * laws[0].double().cpu()).clamp_min(1e-300)

    def _check_components(self, constants: Tensor) -> None:
        if constants.shape != (self.num_components,):
            raise ShapeError(
                f"component_lipschitz: expected ({self.num_components},), "
                f"got {tuple(constants.shape)}; give one constant per component"
            )
        if not bool(torch.isfinite(constants).all() and (constants >= 0).all()):
            raise ConfigError("component_lipschitz: expected finite constants of at least 0")

    def _check_laws(self, laws: Laws) -> None:
        for number, law in enumerate(laws):
            check_law(f"laws[{number}]", law)
        if not laws or max(len(law) for law in laws) != self.num_components:
            raise ShapeError(
                f"laws: expected the longest to have num_components={self.num_components} entries, "
                f"got {[len(law) for law in laws]}"
            )
        if len(laws) > 1 or self.component_lipschitz is None:
            unseen = any(bool((law == 0).any()) for law in laws)
        else:
            varies_N = self.component_lipschitz.detach().cpu() > 0
            unseen = bool(((laws[0].cpu() == 0) & varies_N).any())
        if unseen:
            raise ConfigError(
                "laws: probability 0 for a component that may vary makes every estimate biased; "
                "give it a positive probability"
            )

    def _warn_of_contradiction(self) -> None:
        """Warn where L_F exceeds L_Q: Jensen forbids it of the best constants."""
        known, mean_square = self.lipschitz_bound, self.mean_square_bound()
        if known is not None and mean_square is not None and known > _SLACK * mean_square:
            warnings.warn(
                f"lipschitz_bound={known:.4g} exceeds the mean-square constant "
                f"{mean_square:.4g} of the components, although L_F <= L_Q always holds: "
                "one of them is loose or wrong; correct it",
                stacklevel=4,
            )
