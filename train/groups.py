"""Which parameter is updated and constrained how: settings and the partition of a model.

Matrices are updated by Muon with an explicit update-norm target and capped, embedding rows are
clipped to RMS 1, vectors follow AdamW and cost nothing in the certificate.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from common.config import check_types, one_of, positive, within
from common.errors import ConfigError
from common.models import LipschitzTransformer
from train.optim import DTYPES
from train.orthogonalize import TABLES
from train.projections import PROJECTIONS

# Embedding rows have at most this RMS; certificates start from the measured radius.
ROW_RMS = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Constraint:
    """Weight constraint of every matrix.

    Attributes:
        kind: Name in ``train.projections.PROJECTIONS``.
        w_max: Cap on the RMS->RMS norm of every matrix, above 0.
        caps: Caps of single matrices: name pattern (part of the parameter's name, such as
            ``head`` or ``attention.query``) to cap; the longest matching pattern wins.
        per_head: Cap and orthogonalise the query, key and value rows of each head separately.
        power_iters: Rounds of power iteration (``spectral_normalize``).
    """

    kind: str = "soft_cap"
    w_max: float = 1.0
    caps: dict[str, float] = field(default_factory=dict)
    per_head: bool = False
    power_iters: int = 16

    def __post_init__(self) -> None:
        check_types(self)
        one_of("constraint.kind", self.kind, [k for k in PROJECTIONS if k != "row_clip"])
        positive("constraint.w_max", self.w_max)
        positive("constraint.power_iters", self.power_iters)
        for pattern, cap in self.caps.items():
            positive(f"constraint.caps.{pattern}", cap)

    def cap(self, name: str) -> float:
        """Return the cap of the parameter called ``name``."""
        return _longest_match(self.caps, name, self.w_max)


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
        target_factors: Name pattern to factor on the target; the longest match wins.
        blocks_mass: Mass of all blocks in the modular norm (embedding and head have 1 each).
        momentum: Decay of Muon's gradient average.
        nesterov: Whether Muon looks ahead by one momentum step.
        weight_decay: Decoupled decay of matrices, times ``lr * target``.
        betas: AdamW averages.
        eps: AdamW denominator offset.
        table: Polynomial of the polar factor.
        dtype: Arithmetic of the polar factor: ``float32`` or ``bfloat16``.
    """

    matrices: Literal["muon", "adamw"] = "muon"
    lr: float = 0.07
    embedding: Literal["rows", "adamw"] = "adamw"
    embedding_lr: float = 0.1
    vector_lr: float = 0.1
    targets: Literal["uniform", "modular"] = "uniform"
    target_factors: dict[str, float] = field(default_factory=dict)
    blocks_mass: float = 32.0
    momentum: float = 0.95
    nesterov: bool = True
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    table: str = "six_step"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("lr", "embedding_lr", "vector_lr", "blocks_mass"):
            positive(f"optim.{name}", getattr(self, name))
        one_of("optim.table", self.table, TABLES)
        one_of("optim.dtype", self.dtype, DTYPES)
        within("optim.momentum", self.momentum, 0.0, 1.0)
        positive("optim.weight_decay", self.weight_decay, zero=True)
        positive("optim.eps", self.eps, zero=True)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(
                f"optim.betas={list(self.betas)}: expected two numbers from 0 to below 1"
            )
        for pattern, factor in self.target_factors.items():
            positive(f"optim.target_factors.{pattern}", factor)


def parameter_groups(
    model: nn.Module, optim: OptimConfig, constraint: Constraint
) -> list[dict[str, Any]]:
    """Partition the parameters of a model into groups for ``train.optim.Muon``.

    Args:
        model: ``LipschitzTransformer`` or ``LipschitzMLP``.
        optim: Updates.
        constraint: Caps; the embedding rows are clipped to RMS 1 unless its kind is ``none``.

    Returns:
        Group dictionaries; every parameter is in exactly one, matrices of equal shape and
        settings share one. ``names`` lists the parameters of a group.

    Raises:
        ConfigError: for a pattern that matches nothing, or soft_cap without Muon.
    """
    names = dict(model.named_parameters())
    _check_patterns("constraint.caps", constraint.caps, names)
    _check_patterns("optim.target_factors", optim.target_factors, names)
    if optim.matrices == "adamw" and constraint.kind == "soft_cap":
        raise ConfigError(
            "constraint.kind=soft_cap: optim.matrices=adamw bounds no update norm; use "
            "constraint=exact_cap or constraint=spectral_normalize"
        )
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, parameter in names.items():
        settings = _settings(model, name, optim, constraint)
        is_free = settings["constraint"] == "none" and settings["kind"] == "adamw"
        key = (None if is_free else tuple(parameter.shape), *settings.values())
        group = groups.setdefault(key, {**settings, "params": [], "names": []})
        group["params"].append(parameter)
        group["names"].append(name)
    assert sum(len(group["params"]) for group in groups.values()) == len(names)
    return list(groups.values())


def role(name: str) -> str:
    """Return ``query``, ``up``, ``head`` ... for a weight matrix and ``vector`` for the rest."""
    parts = name.split(".")
    if parts[-1] != "weight":
        return "vector"
    return "linear" if parts[0] == "linears" else parts[-2]


def row_slices(model: nn.Module, name: str, constraint: Constraint) -> int:
    """Return into how many row blocks (heads) a matrix is cut before it is constrained."""
    if not (constraint.per_head and role(name) in ("query", "key", "value")):
        return 1
    head_dim = model.config.layer(int(name.split(".")[1])).head_dim
    return model.get_parameter(name).shape[0] // head_dim


def update_target(model: nn.Module, name: str, optim: OptimConfig) -> float:
    """Return the update-norm target of a matrix (RMS->RMS units, dimensionless).

    Source:
        Closed form of the modular norm of arXiv 2507.13338's trainer with each block's own
        residual weight and attention factor; masses: 1 for embedding and head.
    """
    factor = _longest_match(optim.target_factors, name, 1.0)
    if optim.targets == "uniform":
        return factor
    if not isinstance(model, LipschitzTransformer):
        return factor / sum(1 for n, _ in model.named_parameters() if role(n) == "linear")
    config, kind = model.config, role(name)
    mass = optim.blocks_mass
    factor /= config.final_scale
    if kind in ("embedding", "head"):
        return factor / (mass + 2)
    layer = config.layer(int(name.split(".")[1]))
    residual = layer.attn_residual if "attention" in name else layer.mlp_residual
    target = factor * mass / (6 * config.layers * (mass + 2)) / max(residual, 1e-6)
    if kind in ("query", "key", "value"):
        target /= layer.attn_factor
    if kind in ("query", "key"):
        target /= layer.softmax_scale
    return target


def _settings(
    model: nn.Module, name: str, optim: OptimConfig, constraint: Constraint
) -> dict[str, Any]:
    kind = role(name)
    capped = constraint.kind != "none"
    settings: dict[str, Any] = {
        "kind": "adamw",
        "lr": optim.vector_lr,
        "target": 1.0,
        "weight_decay": 0.0,
        "constraint": "none",
        "w_max": 1.0,
        "slices": 1,
    }
    if kind == "embedding":
        settings |= {"kind": optim.embedding, "lr": optim.embedding_lr, "w_max": ROW_RMS}
        settings["constraint"] = "row_clip" if capped else "none"
        if optim.embedding == "rows":
            settings["target"] = update_target(model, name, optim)
    elif kind != "vector":
        settings |= {"kind": optim.matrices, "lr": optim.lr, "w_max": constraint.cap(name)}
        settings |= {"constraint": constraint.kind, "weight_decay": optim.weight_decay}
        if optim.matrices == "muon":
            settings["target"] = update_target(model, name, optim)
        settings["slices"] = row_slices(model, name, constraint)
    return settings


def optimizer_defaults(optim: OptimConfig, constraint: Constraint) -> dict[str, Any]:
    """Return the keyword arguments of ``Muon`` that all groups share."""
    return {
        "momentum": optim.momentum,
        "nesterov": optim.nesterov,
        "betas": optim.betas,
        "eps": optim.eps,
        "table": optim.table,
        "dtype": optim.dtype,
        "power_iters": constraint.power_iters,
    }


def _longest_match(patterns: Mapping[str, float], name: str, default: float) -> float:
    matching = [pattern for pattern in patterns if pattern in name]
    return patterns[max(matching, key=len)] if matching else default


def _check_patterns(field_name: str, patterns: Mapping[str, float], names: Mapping) -> None:
    matrices = [name for name in names if role(name) != "vector"]
    for pattern in patterns:
        if not any(pattern in name for name in matrices):
            known = ", ".join(sorted({role(name) for name in matrices}))
            raise ConfigError(
                f"{field_name}: pattern {pattern!r} matches no matrix; expected part of a name, "
                f"such as one of {known}"
            )
