"""Settings of weight constraints and optimizers.

Name patterns are parts of parameter names; the longest that matches decides.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from common.config import check_types, one_of, positive, within
from common.errors import ConfigError
from train.group_settings import SHAPE_FACTORS, check_cap, check_rate
from train.orthogonalize import DTYPES, TABLES
from train.projections import PROJECTIONS

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Constraint:
    """Weight constraint of every matrix.

    Attributes:
        kind: Name in ``train.projections.PROJECTIONS``.
        w_max: Cap on the RMS->RMS norm of every matrix, 1e-6 to 1e6.
        caps: Caps of single matrices: name pattern (part of the parameter's name, such as
            ``head`` or ``attention.query``) to cap; the longest matching pattern wins; None is
            the same as no pattern.
        kinds: Name pattern to another constraint for the matrices that match.
        per_head: Cap and orthogonalise the query, key and value rows of each head separately.
        head_gains: Name pattern (such as ``layers.0.attention.value``) to one factor per head on
            its cap and on its updates; needs ``per_head``. The bound of positional heads is the
            root of the sum of squares of their gains.
        power_iters: Rounds of power iteration, where there is one.
        spectral_decay: ``spectral_weight_decay`` only: share of the largest singular value that
            every step removes, above 0 to 1, not times the learning rate.
        dtype: Arithmetic of matrix polynomials: ``float32`` or ``bfloat16``.
    """

    kind: str = "soft_cap"
    w_max: float = 1.0
    caps: dict[str, float | None] = field(default_factory=dict)
    kinds: dict[str, str | None] = field(default_factory=dict)
    per_head: bool = False
    head_gains: dict[str, tuple[float, ...]] = field(default_factory=dict)
    power_iters: int = 16
    spectral_decay: float = 0.1
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_types(self)
        kinds = {f"kinds.{pattern}": kind for pattern, kind in self.kinds.items()}
        for name, kind in ({"kind": self.kind} | kinds).items():
            if kind is not None:
                one_of(f"constraint.{name}", kind, [k for k in PROJECTIONS if k != "row_clip"])
        check_cap("constraint.w_max", self.w_max)
        positive("constraint.power_iters", self.power_iters)
        one_of("constraint.dtype", self.dtype, DTYPES)
        positive("constraint.spectral_decay", self.spectral_decay)
        within("constraint.spectral_decay", self.spectral_decay, 0.0, 1.0)
        _check_numbers("constraint.caps", self.caps, check_cap)
        _check_gains(self.head_gains, self.per_head)

    def kind_of(self, name: str) -> str:
        """Return the constraint of the parameter called ``name``."""
        return longest_match(self.kinds, name, self.kind)

    def gains(self, name: str) -> tuple[float, ...] | None:
        """Return the gains of the heads of the parameter called ``name``, None for all 1."""
        matching = [key for key in self.head_gains if key in name]
        return self.head_gains[max(matching, key=len)] if matching else None

    def cap(self, name: str) -> float:
        """Return the cap of the parameter called ``name``."""
        return longest_match(self.caps, name, self.w_max)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """Updates of every parameter.

    Attributes:
        matrices: Update of matrices: ``muon`` or ``adamw``.
        lr: Learning rate of the matrices (times the target), above 0.
        embedding: Update of the embedding: ``rows`` (every row normalised) or ``adamw``.
        embedding_lr: Learning rate of the embedding.
        vector_lr: AdamW learning rate of biases and relative-position biases.
        targets: Update-norm targets: ``uniform`` (all 1) or ``modular`` (modular norm).
        target_factors: Name pattern to factor on the target (on ``lr`` for AdamW's matrices);
            the longest match wins; None is the same as no pattern.
        blocks_mass: Mass of all blocks in the modular norm (embedding and head have 1 each).
        residual_decay: Factor on the modular target for every residual layer between a matrix and
            the output, above 0 to 1 (two per block; 1 is the modular norm, 0.5 what the paper's
            appendix describes).
        momentum: Decay of Muon's gradient average.
        momentum_start: The same at the first step, rising linearly over ``momentum_warmup``.
        momentum_warmup: Steps until ``momentum`` is reached, at least 0.
        nesterov: Whether Muon looks ahead by one momentum step.
        weight_decay: Decoupled decay of matrices, times ``lr * target``.
        betas: AdamW averages.
        eps: AdamW denominator offset.
        table: Polynomial of the polar factor.
        dtype: Arithmetic of the polar factor: ``float32`` or ``bfloat16``.
        shape_factor: Update norm of a polar factor (O, I): ``rms`` is sqrt(O/I), ``original`` and
            ``match_rms_adamw`` are the choices of ``torch.optim.Muon``.
    """

    matrices: Literal["muon", "adamw"] = "muon"
    lr: float = 0.07
    embedding: Literal["rows", "adamw"] = "adamw"
    embedding_lr: float = 0.1
    vector_lr: float = 0.1
    targets: Literal["uniform", "modular"] = "uniform"
    target_factors: dict[str, float | None] = field(default_factory=dict)
    blocks_mass: float = 32.0
    residual_decay: float = 1.0
    momentum: float = 0.95
    momentum_start: float = 0.85
    momentum_warmup: int = 0
    nesterov: bool = True
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    table: str = "six_step"
    dtype: str = "float32"
    shape_factor: str = "rms"

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("lr", "embedding_lr", "vector_lr"):
            check_rate(f"optim.{name}", getattr(self, name))
        for name in ("blocks_mass", "residual_decay"):
            positive(f"optim.{name}", getattr(self, name))
        within("optim.residual_decay", self.residual_decay, 0.0, 1.0)
        one_of("optim.table", self.table, TABLES)
        one_of("optim.dtype", self.dtype, DTYPES)
        one_of("optim.shape_factor", self.shape_factor, SHAPE_FACTORS)
        within("optim.momentum", self.momentum, 0.0, 1.0)
        within("optim.momentum_start", self.momentum_start, 0.0, 1.0)
        positive("optim.momentum_warmup", self.momentum_warmup, zero=True)
        positive("optim.weight_decay", self.weight_decay, zero=True)
        positive("optim.eps", self.eps, zero=True)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(
                f"optim.betas={list(self.betas)}: expected two numbers from 0 to below 1"
            )
        _check_numbers("optim.target_factors", self.target_factors, positive)


def longest_match(patterns: Mapping[str, T | None], name: str, default: T) -> T:
    """Return the value of the longest pattern that is part of ``name``, else the default."""
    matching = {key: v for key, v in patterns.items() if key in name and v is not None}
    return matching[max(matching, key=len)] if matching else default


def _check_gains(gains: Mapping[str, tuple[float, ...]], per_head: bool) -> None:
    if gains and not per_head:
        raise ConfigError(
            f"constraint.head_gains={dict(gains)}: needs constraint.per_head=true; add it"
        )
    for pattern, values in gains.items():
        name = f"constraint.head_gains.{pattern}"
        is_list = isinstance(values, (list, tuple)) and len(values) > 0
        if not is_list or not all(type(value) in (int, float) for value in values):
            raise ConfigError(
                f"{name}={values!r}: expected a list of numbers, one per head; write a name with "
                "dots as '+constraint.head_gains={NAME: [1, 1]}'"
            )
        for value in values:
            positive(name, value)


def _check_numbers(
    field_name: str, patterns: Mapping[str, float | None], check: Callable[[str, float], None]
) -> None:
    for pattern, value in patterns.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ConfigError(
                f"{field_name}.{pattern}={value!r}: expected a number or null; write a name with "
                f"dots as '+{field_name}={{NAME: 1}}'"
            )
        if value is not None:
            check(f"{field_name}.{pattern}", value)
