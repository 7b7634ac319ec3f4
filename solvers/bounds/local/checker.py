"""Trusted: re-proves a local record from weights, tokens and multipliers; no solver code.

A record can be wrong only through this file, ``chain``, ``blocks``, ``mlp``, ``attention`` and
``attention_centre`` of this package, and the trusted core that ``bounds.checker`` names.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.bundle import Bundle, load_bundle
from common.errors import CertificateError
from common.models import LipschitzTransformer, ModelConfig
from solvers.bounds.admissible import MULTIPLIER_RANGE
from solvers.bounds.claims import at_least, check_identity
from solvers.bounds.local.chain import Level, Neighbourhood
from solvers.bounds.local.record import LocalCertificate

STORED_MARGIN = 1e-9
"""Relative amount a claim is kept below what was proved, so that another machine agrees."""

_PER_TOKEN = (
    "top",
    "radii",
    "radius_level",
    "global_radii",
    "global_level",
    "lipschitz",
    "global_lipschitz",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalReport:
    """Outcome of a successful check: positions, distances evaluated, seconds."""

    positions: int
    levels: int
    seconds: float


def verify_local(
    target: str | Path | Bundle | LipschitzTransformer, record: LocalCertificate
) -> LocalReport:
    """Re-prove every claim of a record.

    Args:
        target: Bundle, its directory or name; or the model itself.
        record: What to check.

    Raises:
        CertificateError: naming the tensor, field or position that is wrong.
        BundleError: for a bundle that cannot be read.
    """
    if not isinstance(target, LipschitzTransformer | Bundle):
        target = load_bundle(target)
    model = target.model if isinstance(target, Bundle) else target
    if not isinstance(model, LipschitzTransformer):
        raise CertificateError(
            "a classifier: no local proof is known for it; give a language model"
        )
    tensors = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    return check_local(model.config, tensors, record)


@torch.no_grad()
def check_local(
    config: ModelConfig, tensors: Mapping[str, Tensor], record: LocalCertificate
) -> LocalReport:
    """Re-prove a record from a configuration and the tensors of a model's state."""
    began = time.perf_counter()
    check_identity(config, tensors, record)
    _check_form(config, record)
    multipliers = check_local_multipliers(config, record.multipliers)
    near = Neighbourhood(config, tensors, multipliers, torch.tensor(record.tokens), record.ball)
    for t, (stored, found) in enumerate(zip(record.top, near.top_T.tolist(), strict=True)):
        if stored != found:
            raise CertificateError(f"position {t}: first class {found}, the record says {stored}")
    for which in ("radius", "global"):
        _check_radii(near, record, which)
    level = near.level(record.epsilon, centred=False)
    _check_blocks(level, record)
    for t in range(len(record.tokens)):
        at_least(f"lipschitz[{t}]", record.lipschitz[t], near.lipschitz(level, t))
        proved = near.global_lipschitz(level, t)
        at_least(f"global_lipschitz[{t}]", record.global_lipschitz[t], proved)
    return LocalReport(
        positions=len(record.tokens),
        levels=len(set(record.radius_level) | set(record.global_level)),
        seconds=time.perf_counter() - began,
    )


def check_local_multipliers(
    config: ModelConfig, multipliers: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """Refuse local multipliers that prove nothing; those of blocks are checked where used.

    Raises:
        CertificateError: naming the multiplier.
    """
    for name, tensor in multipliers.items():
        owner, _, rest = name.partition(".")
        known = {f"{index}." for index in range(2 * config.layers)}
        place = rest.partition(".")[0] + "."
        if owner not in ("blocks", "local") or place not in known:
            raise CertificateError(f"multiplier {name}: belongs to no block; certify again")
        if owner == "blocks":
            continue
        layer, index = config.layer(int(place[:-1]) // 2), int(place[:-1])
        count = layer.mlp_width // layer.unit
        if not index % 2 or rest != f"{index}.lambda":
            raise CertificateError(f"multiplier {name}: belongs to no block; certify again")
        low, high = MULTIPLIER_RANGE
        fits = tensor.dtype == torch.float64 and tuple(tensor.shape) == (count,)
        if not fits or not bool(((tensor >= low) & (tensor <= high)).all()):
            raise CertificateError(
                f"multiplier {name}: expected {count} positive finite float64 numbers "
                f"({low:g} to {high:g}); certify again"
            )
    return multipliers


def movement(level: Level) -> list[float]:
    """Return the largest movement behind each block, per unit of the embeddings."""
    return [float(size_KT[0].max()) for size_KT in level.sizes[1:]]


def _check_form(config: ModelConfig, record: LocalCertificate) -> None:
    count = len(record.tokens)
    if not 1 <= count <= config.context:
        raise CertificateError(f"{count} tokens: expected 1 to the context of {config.context}")
    if not all(0 <= token < config.vocab_size for token in record.tokens):
        raise CertificateError(f"tokens: expected ids from 0 to {config.vocab_size - 1}")
    for name in _PER_TOKEN:
        if len(getattr(record, name)) != count:
            raise CertificateError(f"{name}: expected one value per token ({count})")
    for name in ("radius_level", "global_level"):
        if not all(0 <= index < len(record.levels) for index in getattr(record, name)):
            raise CertificateError(f"{name}: expected indices into {len(record.levels)} levels")
    for name, value in [("epsilon", record.epsilon), *(("levels", e) for e in record.levels)]:
        if not (math.isfinite(value) and value > 0):
            raise CertificateError(f"{name}={value!r}: expected a positive finite distance")
    if not (math.isfinite(record.ball) and record.ball >= 0):
        raise CertificateError(f"ball={record.ball!r}: expected a finite radius")
    if [block.index for block in record.blocks] != list(range(2 * config.layers)):
        raise CertificateError(f"blocks: expected one for each of {2 * config.layers}, in order")


def _check_radii(near: Neighbourhood, record: LocalCertificate, which: str) -> None:
    name = "radii" if which == "radius" else "global_radii"
    prove = near.radius_at if which == "radius" else near.global_radius
    chosen = getattr(record, f"{which}_level")
    for index in sorted(set(chosen)):
        level = near.level(record.levels[index], centred=True)
        for t, stored in enumerate(getattr(record, name)):
            if chosen[t] == index:
                at_least(f"{name}[{t}]", stored, 0.0)
                proved = prove(level, t)
                if not stored <= proved:
                    raise CertificateError(
                        f"{name}[{t}]={stored!r}: above {proved!r}, which is what can be proved; "
                        "certify again"
                    )


def _check_blocks(level: Level, record: LocalCertificate) -> None:
    for block, moved, factor in zip(record.blocks, movement(level), level.certified, strict=True):
        at_least(f"blocks[{block.index}].movement", block.movement, moved)
        at_least(f"blocks[{block.index}].certified", block.certified, factor)
