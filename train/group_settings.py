"""Checks of an optimizer's parameter groups, and the update norms that their settings imply."""

from collections.abc import Callable
from typing import Any

from common.config import one_of, positive, within
from common.errors import ConfigError
from train.batches import Member
from train.orthogonalize import DTYPES, TABLES, overshoot
from train.projections import PROJECTIONS

KINDS = ("muon", "rows", "adamw")
# What multiplies a polar factor (O, I): RMS->RMS norm 1, and the choices of torch.optim.Muon.
SHAPE_FACTORS: dict[str, Callable[[int, int], float]] = {
    "rms": lambda rows, columns: (rows / columns) ** 0.5,
    "original": lambda rows, columns: max(1.0, rows / columns) ** 0.5,
    "match_rms_adamw": lambda rows, columns: 0.2 * max(rows, columns) ** 0.5,
}
# float32 weights would overflow within a run beyond it.
LARGEST_LR = 1e6
# Beyond these caps the squares that norms are computed from would leave float32.
CAPS = (1e-6, 1e6)


def shape_factor(member: Member) -> float:
    """Return the spectral norm of a matrix's update at ``lr * target = 1``, overshoot aside."""
    return SHAPE_FACTORS[member.group["shape_factor"]](*member.shape)


def update_norm(member: Member) -> float:
    """Return a bound on the RMS->RMS norm of a Muon update, learning rate included."""
    group, (rows, columns) = member.group, member.shape
    relative = shape_factor(member) / SHAPE_FACTORS["rms"](rows, columns)
    eta = group["lr"] * group["target"]
    return eta * relative * overshoot(group["table"], DTYPES[group["dtype"]])


def check_rate(name: str, value: float, *, zero: bool = False) -> None:
    """Raise ``ConfigError`` unless a learning rate is positive and small enough for float32."""
    positive(name, value, zero=zero)
    if value > LARGEST_LR:
        raise ConfigError(f"{name}={value:g}: expected at most {LARGEST_LR:g}; lower it")


def check_cap(name: str, value: float) -> None:
    """Raise ``ConfigError`` unless a cap is one that float32 weights can obey."""
    if not CAPS[0] <= value <= CAPS[1]:
        raise ConfigError(
            f"{name}={value:g}: expected a cap from {CAPS[0]:g} to {CAPS[1]:g}; 1 is usual"
        )


def check_group(group: dict[str, Any]) -> None:
    """Raise ``ConfigError`` for impossible settings or shapes of a parameter group."""
    one_of("kind", group["kind"], KINDS)
    one_of("table", group["table"], TABLES)
    one_of("dtype", group["dtype"], DTYPES)
    one_of("shape_factor", group["shape_factor"], SHAPE_FACTORS)
    one_of("constraint", group["constraint"], PROJECTIONS)
    one_of("constraint_dtype", group["constraint_dtype"], DTYPES)
    check_rate("lr", float(group["lr"]), zero=True)
    check_cap("w_max", group["w_max"])
    positive("target", group["target"])
    check_rate("lr * target", float(group["lr"]) * group["target"], zero=True)
    positive("momentum_warmup", group["momentum_warmup"], zero=True)
    positive("weight_decay", group["weight_decay"], zero=True)
    positive("eps", group["eps"], zero=True)
    positive("spectral_decay", group["spectral_decay"])
    within("spectral_decay", group["spectral_decay"], 0.0, 1.0)
    within("momentum", group["momentum"], 0.0, 1.0)
    within("momentum_start", group["momentum_start"], 0.0, 1.0)
    if group["gains"] is not None and len(group["gains"]) != group["slices"]:
        raise ConfigError(f"gains={group['gains']}: expected one per slice ({group['slices']})")
    for gain in group["gains"] or ():
        positive("gains", gain)
    if group["kind"] != "muon" and PROJECTIONS[group["constraint"]].needs_largest:
        raise ConfigError(
            f"constraint={group['constraint']}: kind={group['kind']!r} has no update norm for it; "
            "use exact_cap or hard_cap"
        )
    _check_shapes(group)


def _check_shapes(group: dict[str, Any]) -> None:
    shapes = {tuple(p.shape) for p in group["params"]}
    needs_matrices = group["kind"] != "adamw" or group["constraint"] != "none"
    if needs_matrices and any(len(shape) != 2 for shape in shapes):
        raise ConfigError(
            f"kind={group['kind']!r}: expected matrices, got shapes {sorted(shapes)}; put vectors "
            "into an adamw group without a constraint"
        )
    if needs_matrices and len(shapes) > 1:
        raise ConfigError(
            f"kind={group['kind']!r}: expected equal shapes in one group, got {sorted(shapes)}; "
            "make one group per shape"
        )
    if any(shape[0] % group["slices"] for shape in shapes if shape):
        raise ConfigError(f"slices={group['slices']}: expected a divisor of the rows {shapes}")
