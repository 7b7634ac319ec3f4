"""Sampling laws of finite sums: unbiased draws of components from a generator of their own.

Letters: N components, M samples of one draw, B blocks that are sampled independently (a bilinear
coupling has two: rows and columns), D draws prepared at once.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from common.errors import ConfigError

Laws = tuple[Tensor, ...]  # one vector of probabilities per block

_PREPARED = 4096  # samples drawn at once; a loop of single draws would be bound by Python
_SUM_TOL = 1e-6  # rounding allowance of probabilities given in float32


class Draw(NamedTuple):
    """Sampled components and the weights that make their sum unbiased.

    Attributes:
        index_M: int64 (M,), or (M, B) where a sum has several blocks.
        weight_M: ``1 / (M N q)``, same shape, dtype and device of the problem.
    """

    index_M: Tensor
    weight_M: Tensor


def uniform_law(num_components: int) -> Tensor:
    """Return equal probabilities, float64 (N,)."""
    return torch.full((num_components,), 1 / num_components, dtype=torch.float64)


def importance_law(constants_N: Tensor) -> Tensor:
    """Return probabilities proportional to nonnegative constants (N,), uniform if all are 0."""
    constants_N = constants_N.detach().double().cpu()
    total = constants_N.sum()
    return constants_N / total if total > 0 else uniform_law(len(constants_N))


def check_law(name: str, law_N: Tensor) -> None:
    """Refuse what is not a probability vector.

    Raises:
        ConfigError: for entries that are negative or not finite, or a sum other than 1.
    """
    if law_N.ndim != 1 or not bool(torch.isfinite(law_N).all() and (law_N >= 0).all()):
        raise ConfigError(f"{name}: expected a vector of finite probabilities of at least 0")
    if abs((total := float(law_N.double().sum())) - 1) > _SUM_TOL:
        raise ConfigError(f"{name}: probabilities add up to {total}, expected 1; normalise them")


class Sampler:
    """A stream of draws and coins that depends on its seed alone.

    Args:
        laws: Probabilities per block, on any device.
        batch: M, at least 1.
        seed: Of the stream; the generator lives on the CPU whatever the device of the problem.
        like: Tensor whose dtype and device the weights get.
        replacement: False draws M different components; needs one uniform block.

    Raises:
        ConfigError: for a batch that is impossible under the law.
    """

    def __init__(
        self, laws: Laws, batch: int, *, seed: int, like: Tensor, replacement: bool = True
    ) -> None:
        if batch < 1 or (not replacement and batch > len(laws[0])):
            raise ConfigError(f"batch={batch}: expected 1 to the number of components")
        if not replacement and len(laws) > 1:
            raise ConfigError("sampling without replacement: expected a sum with one block")
        self.batch = batch
        self.replacement = replacement
        self._generator = torch.Generator().manual_seed(seed)
        self._coins = torch.Generator().manual_seed(seed + 1)
        self._sums = [_distribution(law_N) for law_N in laws]
        self._scale = [
            (1 / (batch * len(block) * block.double().cpu())).to(like.device, like.dtype)
            for block in laws
        ]
        self._device = like.device
        self._draws: list[Draw] = []
        self._flips: list[float] = []

    def draw(self) -> Draw:
        """Return the next draw."""
        if not self._draws:
            self._draws = self._prepare()
        return self._draws.pop()

    def coin(self, probability: float) -> bool:
        """Return True with this probability."""
        if not self._flips:
            flips = torch.rand(_PREPARED, generator=self._coins, dtype=torch.float64)
            self._flips = flips.tolist()
        return self._flips.pop() < probability

    def _prepare(self) -> list[Draw]:
        num = max(1, _PREPARED // self.batch)
        if self.replacement:
            parts = [self._indices(sums_N, num) for sums_N in self._sums]
        else:
            size = len(self._sums[0])
            keys_DN = torch.rand(min(num, max(1, 2**20 // size)), size, generator=self._generator)
            parts = [keys_DN.topk(self.batch, dim=1).indices]
        parts = [part_DM.to(self._device) for part_DM in parts]
        weights = [scale[part] for scale, part in zip(self._scale, parts, strict=True)]
        index = parts[0] if len(parts) == 1 else torch.stack(parts, dim=-1)
        weight = weights[0] if len(parts) == 1 else torch.stack(weights, dim=-1)
        return [Draw(*pair) for pair in zip(index.unbind(0), weight.unbind(0), strict=True)]

    def _indices(self, sums_N: Tensor, num: int) -> Tensor:
        # A component of probability 0 has an empty interval of the distribution function.
        point_DM = torch.rand(num, self.batch, generator=self._generator, dtype=torch.float64)
        return torch.searchsorted(sums_N, point_DM, right=True)


def _distribution(law_N: Tensor) -> Tensor:
    """Return the distribution function; dividing makes its last entry exactly 1."""
    sums_N = law_N.double().cpu().cumsum(0)
    return sums_N / sums_N[-1]
