"""Which parameter is updated and constrained how: settings and the partition of a model.

Matrices are updated by Muon with an explicit update-norm target and capped, embedding rows are
clipped to RMS 1, vectors follow AdamW and cost nothing in the certificate.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from common.errors import ConfigError
from common.models import LipschitzTransformer
from train.optim_config import Constraint as Constraint
from train.optim_config import OptimConfig as OptimConfig
from train.optim_config import longest_match
from train.projections import PROJECTIONS

HEAD = "head.weight"
# Embedding rows have at most this RMS; certificates start from the measured radius.
ROW_RMS = 1.0


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
    matrices = [name for name in names if role(name) != "vector"]
    # Embedding rows have a cap and a constraint of their own.
    capped = [name for name in matrices if role(name) != "embedding"]
    _check_patterns("constraint.caps", constraint.caps, capped)
    _check_patterns("constraint.kinds", constraint.kinds, capped)
    _check_patterns("constraint.head_gains", constraint.head_gains, capped)
    _check_patterns("optim.target_factors", optim.target_factors, matrices)
    for kind in sorted({constraint.kind_of(name) for name in capped}):
        if optim.matrices == "adamw" and PROJECTIONS[kind].needs_largest:
            field, remedy = "kind", "constraint=exact_cap or another constraint"
            if kind != constraint.kind:
                field = next(
                    f"kinds.{key}" for key, value in constraint.kinds.items() if value == kind
                )
                remedy = f"another one there, such as constraint.{field}=exact_cap"
            raise ConfigError(
                f"constraint.{field}={kind}: optim.matrices=adamw bounds no update norm; use "
                f"{remedy}"
            )
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, parameter in names.items():
        settings = _settings(model, name, optim, constraint)
        is_free = settings["constraint"] == "none" and settings["kind"] == "adamw"
        # The head is alone, since its cap may follow a budget.
        shape = None if is_free else tuple(parameter.shape)
        key = (shape, name == HEAD, *settings.values())
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
    factor = longest_match(optim.target_factors, name, 1.0)
    if optim.targets == "uniform":
        return factor
    if not isinstance(model, LipschitzTransformer):
        return factor / sum(1 for n, _ in model.named_parameters() if role(n) == "linear")
    config, kind = model.config, role(name)
    mass = optim.blocks_mass
    factor /= config.final_scale
    if kind in ("embedding", "head"):
        above = 2 * config.layers if kind == "embedding" else 0
        return factor / (mass + 2) * optim.residual_decay**above
    layer = config.layer(int(name.split(".")[1]))
    residual = layer.attn_residual if "attention" in name else layer.mlp_residual
    target = factor * mass / (6 * config.layers * (mass + 2)) / max(residual, 1e-6)
    target *= optim.residual_decay ** _residuals_above(name, config.layers)
    if kind in ("query", "key", "value"):
        target /= layer.attn_factor
    if kind in ("query", "key"):
        target /= layer.softmax_scale
    return target


def _residuals_above(name: str, layers: int) -> int:
    index = int(name.split(".")[1])
    return 2 * (layers - 1 - index) + ("attention" in name)


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
        "gains": None,
    }
    if kind == "embedding":
        settings |= {"kind": optim.embedding, "lr": optim.embedding_lr, "w_max": ROW_RMS}
        settings["constraint"] = "row_clip" if capped else "none"
    elif kind != "vector":
        settings |= {"kind": optim.matrices, "lr": optim.lr, "w_max": constraint.cap(name)}
        settings |= {"constraint": constraint.kind_of(name), "weight_decay": optim.weight_decay}
        settings["slices"] = row_slices(model, name, constraint)
        settings["gains"] = _gains(name, constraint, settings["slices"])
    if settings["kind"] != "adamw":
        settings["target"] = update_target(model, name, optim)
    elif kind != "vector":
        settings["lr"] *= longest_match(optim.target_factors, name, 1.0)
    return settings


def _gains(name: str, constraint: Constraint, slices: int) -> tuple[float, ...] | None:
    gains = constraint.gains(name)
    if gains is not None and len(gains) != slices:
        raise ConfigError(
            f"constraint.head_gains: {name} has {slices} heads, got {len(gains)} gains"
        )
    return None if gains is None else tuple(gains)


def optimizer_defaults(optim: OptimConfig, constraint: Constraint) -> dict[str, Any]:
    """Return the keyword arguments of ``Muon`` that all groups share."""
    return {
        "momentum": optim.momentum,
        "nesterov": optim.nesterov,
        "betas": optim.betas,
        "eps": optim.eps,
        "table": optim.table,
        "dtype": optim.dtype,
        "shape_factor": optim.shape_factor,
        "momentum_start": optim.momentum_start,
        "momentum_warmup": optim.momentum_warmup,
        "power_iters": constraint.power_iters,
        "spectral_decay": constraint.spectral_decay,
        "constraint_dtype": constraint.dtype,
    }


def _check_patterns(field_name: str, patterns: Mapping[str, Any], matrices: Sequence[str]) -> None:
    for pattern in (key for key, value in patterns.items() if value is not None):
        if not any(pattern in name for name in matrices):
            known = ", ".join(sorted({role(name) for name in matrices}))
            raise ConfigError(
                f"{field_name}: pattern {pattern!r} matches no matrix; expected part of a name, "
                f"such as one of {known}"
            )
