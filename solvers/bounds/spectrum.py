"""Top of a term's spectrum: dense, reduced to half the size, or by warm-started block Krylov.

All three return unit vectors, from which a dual bound follows whatever their accuracy. The
values of the last two are Rayleigh quotients: estimates from below, never bounds.
Source: spec bound_tightening 6.1 (low-rank mode); the reduction is a Schur complement.
"""

# Shape letters: D dimension of a term, H half of it, R vectors returned, K columns of a basis.

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from solvers.bounds.terms import Term

WINDOW = 25.0  # eigenvalues further below the top, in units of mu, weigh less than 1e-10
RANK = 32  # vectors of the Krylov search
ACCURACY = 0.03  # residual that ends it, see ``Krylov``
_SHIFT_ERROR = 0.02  # allowed effect of the shift on an eigenvalue, in units of mu
_MAX_SHIFTS = 4
_TOP_UNITS = 1e-13  # the same for an exact eigenvalue, relative
COARSE_DIM = 512  # of terms that may be decomposed in float32
_COARSE_UNITS = 5e-5  # mu over the top above which float32 resolves it
_MAX_SHARE = 0.05  # squared weight of the eliminated half beyond which the reduction is no use
_MAX_BLOCKS = 6  # basis over searched vectors before a restart
_MAX_EXPANSIONS = 30
_NEW = 1e-3  # part of a direction that must be new to the basis
_ROUNDING_UNITS = 30.0  # residual that rounding leaves, in units of eps times the top
_SEED = 0


class Spectrum(NamedTuple):
    """Largest eigenvalues, ascending, with unit vectors in the columns, both float64."""

    values_R: Tensor
    vectors_DR: Tensor


class Engine(ABC):
    """Finds the part of a term's spectrum that a smoothing ``mu`` sees.

    Attributes:
        is_exact: Whether the values are eigenvalues to rounding.
    """

    is_exact = False

    def __init__(self, term: Term) -> None:
        self.term = term

    @abstractmethod
    def __call__(self, theta_N: Tensor, mu: float) -> Spectrum:
        """Return the top eigenpairs at ``theta``."""

    def top(self, theta_N: Tensor) -> float:
        """Return the largest eigenvalue, exact to rounding in float64."""
        return float(torch.linalg.eigvalsh(self.term.matrix(theta_N))[-1])

    def serves(self, old_mu: float, mu: float) -> bool:
        """Whether a spectrum made for ``old_mu`` is good enough for ``mu``."""
        return mu <= old_mu

    def refine(self) -> bool:
        """Ask for more accuracy from now on; false when there is none to gain."""
        return False


class _TwoPrecisions(Engine):
    """Works in float32 while that resolves the smoothing, which saves half the time and more.

    Attributes:
        coarse: The term in float32, None where float64 alone is used.
        shift: Top of the last spectrum.
    """

    def __init__(self, term: Term) -> None:
        super().__init__(term)
        self.coarse: Term | None = term.to(torch.float32) if term.dim >= COARSE_DIM else None
        self.shift: float | None = None

    def term_for(self, mu: float) -> Term:
        """Return the term in the type whose rounding ``mu`` allows; float32 for a first look."""
        resolved = self.shift is None or mu > _COARSE_UNITS * abs(self.shift)
        return self.coarse if self.coarse is not None and resolved else self.term

    def refine(self) -> bool:
        """Give up float32."""
        was_coarse, self.coarse = self.coarse is not None, None
        return was_coarse


class Dense(Engine):
    """Full eigen-decomposition."""

    is_exact = True

    def __call__(self, theta_N: Tensor, mu: float) -> Spectrum:
        """Return all eigenpairs."""
        return Spectrum(*torch.linalg.eigh(self.term.matrix(theta_N)))

    def serves(self, old_mu: float, mu: float) -> bool:
        """All of a spectrum serves every smoothing."""
        return True


class Halved(_TwoPrecisions):
    """Decomposition of half the size for ``[[X, C^T], [C, Y]]`` whose top leans on ``C``.

    In the basis ``x + y, x - y`` the matrix is ``[[P, A], [A^T, N]]`` with ``P = (X + Y) / 2 +
    sym C`` and ``N = (X + Y) / 2 - sym C``. Its eigenvalues near a shift ``s`` above N are those
    of ``P + A (s - N)^-1 A^T`` up to ``(s - value) |w|^2``, ``w`` the share of the second half; the
    Rayleigh quotient of both halves removes that error to first order. Falls back to the full
    decomposition where N reaches the top or ``w`` is not small.
    """

    def __init__(self, term: Term) -> None:
        super().__init__(term)
        self.is_useful = True

    def __call__(self, theta_N: Tensor, mu: float) -> Spectrum:
        """Return the eigenpairs within ``WINDOW * mu`` of the top."""
        term = self.term_for(mu)
        k_DD = term.matrix(theta_N)
        for _ in range(_MAX_SHIFTS):
            found = self._reduced(k_DD, WINDOW * mu) if self.is_useful else None
            if found is None:
                break
            if found[1] <= _SHIFT_ERROR * mu:
                return found[0] if self.term_for(mu) is term else self(theta_N, mu)
        return Spectrum(*torch.linalg.eigh(self.term.matrix(theta_N)))

    def top(self, theta_N: Tensor) -> float:
        """Return the largest eigenvalue by the same reduction, repeated until it stands still."""
        k_DD = self.term.matrix(theta_N)
        for _ in range(2 * _MAX_SHIFTS):
            found = self._reduced(k_DD, 0.0) if self.is_useful else None
            if found is None:
                break
            if found[1] <= _TOP_UNITS * abs(self.shift or 0.0):
                return float(found[0].values_R[-1])
        return float(torch.linalg.eigvalsh(k_DD)[-1])

    def _reduced(self, k_DD: Tensor, window: float) -> tuple[Spectrum, float] | None:
        """Return pairs within ``window`` of the top with the error of the shift; updates it."""
        half = self.term.dim // 2
        x_HH, y_HH, c_HH = k_DD[:half, :half], k_DD[half:, half:], k_DD[half:, :half]
        mean_HH, sym_HH = (x_HH + y_HH) / 2, (c_HH + c_HH.mT) / 2
        p_HH, n_HH = mean_HH + sym_HH, sym_HH - mean_HH
        a_HH = (x_HH - y_HH + c_HH - c_HH.mT) / 2
        shift = self.shift
        if shift is None:
            shift = float(torch.linalg.eigvalsh(p_HH)[-1])
        n_HH.diagonal().add_(shift)
        lower_HH, info = torch.linalg.cholesky_ex(n_HH)
        if int(info):
            self.is_useful = False
            return None
        side_HH = torch.linalg.solve_triangular(lower_HH, a_HH.mT, upper=False)
        values_H, vectors_HH = torch.linalg.eigh(p_HH + side_HH.mT @ side_HH)
        keep_H = values_H >= values_H[-1] - window
        values_R, u_HR = values_H[keep_H].double(), vectors_HH[:, keep_H]
        w_HR = torch.linalg.solve_triangular(lower_HH.mT, side_HH @ u_HR, upper=True)
        share_R = w_HR.double().square().sum(0)
        quotient_R = (values_R + shift * share_R) / (1 + share_R)
        self.shift = float(quotient_R[-1])
        self.is_useful = float(share_R.max()) <= _MAX_SHARE
        vectors_DR = torch.cat((u_HR + w_HR, u_HR - w_HR)).double()
        error = abs(shift - self.shift) * float(share_R.max())
        return Spectrum(quotient_R, vectors_DR / vectors_DR.norm(dim=0)), error


class Krylov(_TwoPrecisions):
    """A few vectors from products alone, warm-started from the last ones.

    Attributes:
        accuracy: Residual norm, in units of ``mu`` over the root of a vector's weight, that ends
            the search.
    """

    def __init__(self, term: Term, rank: int = RANK, accuracy: float = ACCURACY) -> None:
        super().__init__(term)
        self.accuracy = accuracy
        self.block_DR = random_block(term.dim, rank, term.factors[0].rows_RD)

    def __call__(self, theta_N: Tensor, mu: float) -> Spectrum:
        """Return the largest Ritz pairs."""
        term = self.term_for(mu)
        start_DR = self.block_DR.to(term.factors[0].rows_RD)
        floor = _ROUNDING_UNITS * torch.finfo(start_DR.dtype).eps

        def enough(values_R: Tensor) -> Tensor:
            weight_R = torch.softmax(values_R / mu, 0).clamp(min=1e-10)
            wanted_R = self.accuracy * mu * weight_R.rsqrt()
            return wanted_R.clamp(min=floor * float(values_R[-1].abs()))

        found = top_ritz(lambda block: term.product(theta_N, block), start_DR, enough)
        self.shift = float(found.values_R[-1])
        # Rounding of many expansions adds up; the next search starts from clean vectors.
        self.block_DR = torch.linalg.qr(found.vectors_DR.double()).Q
        if self.term_for(mu) is not term:
            return self(theta_N, mu)
        return Spectrum(found.values_R.double(), self.block_DR)

    def serves(self, old_mu: float, mu: float) -> bool:
        """Residuals are measured in units of ``mu``."""
        return mu == old_mu

    def refine(self) -> bool:
        """Ask for smaller residuals and more vectors from now on; false at the end of it."""
        super().refine()
        dim, rank = self.block_DR.shape
        if self.accuracy < ACCURACY / 50:
            return False
        self.accuracy /= 10
        self.block_DR = random_block(dim, 2 * rank, self.block_DR)
        return True


def random_block(dim: int, rank: int, like: Tensor) -> Tensor:
    """Return the first vectors (D, R) of a search: orthonormal, the same in every run."""
    generator = torch.Generator().manual_seed(_SEED)
    block_DR = torch.randn(dim, min(rank, dim), generator=generator, dtype=torch.float64)
    return torch.linalg.qr(block_DR).Q.to(like)


def top_ritz(
    product: Callable[[Tensor], Tensor], start_DR: Tensor, enough: Callable[[Tensor], Tensor]
) -> Spectrum:
    """Return the R largest Ritz pairs of a symmetric matrix known by its products.

    Args:
        product: Maps a block (D, any) to the matrix times that block.
        start_DR: Orthonormal vectors to start from.
        enough: Maps the R Ritz values to the residual norms (R,) that are small enough.

    Returns:
        Ritz pairs with such residuals, or the best after a fixed number of expansions.

    Source:
        Rayleigh-Ritz on the start, expanded by the residuals that are too large (block Davidson
        without preconditioner), with thick restarts.
    """
    rank = start_DR.shape[1]
    basis_DK, image_DK = start_DR, product(start_DR)
    small_KK = basis_DK.mT @ image_DK
    for _ in range(_MAX_EXPANSIONS):
        values_K, turn_KK = torch.linalg.eigh((small_KK + small_KK.mT) / 2)
        values_R, turn_KR = values_K[-rank:], turn_KK[:, -rank:]
        vectors_DR = basis_DK @ turn_KR
        residual_DR = image_DK @ turn_KR - vectors_DR * values_R
        open_R = residual_DR.norm(dim=0) > enough(values_R)
        if not bool(open_R.any()):
            break
        if basis_DK.shape[1] >= _MAX_BLOCKS * rank:
            kept_KK = turn_KK[:, -2 * rank :]
            basis_DK, image_DK = basis_DK @ kept_KK, image_DK @ kept_KK
            small_KK = torch.diag(values_K[-2 * rank :])
        added_DK = _new_directions(basis_DK, residual_DR[:, open_R])
        if not added_DK.shape[1]:
            break
        moved_DK = product(added_DK)
        side_KK, corner_KK = basis_DK.mT @ moved_DK, added_DK.mT @ moved_DK
        small_KK = torch.cat(
            (torch.cat((small_KK, side_KK), 1), torch.cat((side_KK.mT, corner_KK), 1))
        )
        basis_DK = torch.cat((basis_DK, added_DK), 1)
        image_DK = torch.cat((image_DK, moved_DK), 1)
    return Spectrum(values_R, vectors_DR)


def _new_directions(basis_DK: Tensor, block_DR: Tensor) -> Tensor:
    """Return an orthonormal basis of what a block adds to a basis."""
    for _ in range(2):
        block_DR = block_DR / block_DR.norm(dim=0).clamp(min=1e-30)
        block_DR = block_DR - basis_DK @ (basis_DK.mT @ block_DR)
        block_DR, upper_RR = torch.linalg.qr(block_DR)
        block_DR = block_DR[:, upper_RR.diagonal().abs() > _NEW]
    return block_DR
