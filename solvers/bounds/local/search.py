"""Find good local certificates: distances to try, and multipliers shared by all tokens.

Untrusted: every number that is stored comes from the functions the checker uses.
"""

# Legend: T token, N neurons or MaxMin pairs, M cells (tokens), C width, F MLP width.

import dataclasses
import math
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from common.certificate import Certificate, config_sha256, tensors_sha256
from common.config import check_types, one_of, positive, within
from common.errors import CertificateError, ConfigError, DataError
from common.models import LipschitzTransformer, ModelConfig
from solvers.bounds.admissible import MULTIPLIER_RANGE, check_weights
from solvers.bounds.head_proof import domain_radius
from solvers.bounds.local.blocks import MlpKnown
from solvers.bounds.local.chain import Level, Neighbourhood
from solvers.bounds.local.checker import STORED_MARGIN, movement
from solvers.bounds.local.record import LocalBlock, LocalCertificate
from solvers.bounds.local.shared import SHARED_METHODS, shared_multipliers

_LINEAR = 1e-6  # distance, relative to the tokens, at which nothing but the gradient matters
_BETWEEN = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SearchSettings:
    """How local certificates are searched for.

    Attributes:
        radius: Distance (l2 per token) to prove, or None to look for the largest ones.
        levels: Distances tried where the radius is not given.
        cells: Tokens for which the shared multipliers of each MLP are optimised; 0 for none: MLPs
            then move tokens by their certified constants.
        method: Solver of the shared multipliers, one of ``shared.SHARED_METHODS``.
        tol: Wanted duality gap relative to the first value; of ``vr_halpern`` the residual.
        max_evals: Eigen-decompositions of all cells, per MLP.
    """

    radius: float | None = None
    levels: int = 16
    cells: int = 4
    method: str = "halpern_anderson"
    tol: float = 0.01
    max_evals: int = 12

    def __post_init__(self) -> None:
        check_types(self)
        if self.radius is not None:
            positive("radius", self.radius)
            within("radius", self.radius, 0, 1e6)  # nothing can be proved there, only overflow
        for name in ("levels", "tol", "max_evals"):
            positive(name, getattr(self, name))
        positive("cells", self.cells, zero=True)
        one_of("method", self.method, SHARED_METHODS)


@torch.no_grad()
def certify_local(
    model: LipschitzTransformer,
    tokens: Sequence[int],
    certificate: Certificate | None = None,
    *,
    settings: SearchSettings | None = None,
) -> LocalCertificate:
    """Prove how far the embeddings of a sequence may move before a first class changes.

    Args:
        model: Weights of any floating type on any device, taken exactly as stored.
        tokens: Token ids, 1 to the model's context.
        certificate: Of exactly these weights; its multipliers make every bound better.
        settings: How to search.

    Returns:
        A record that ``verify_local`` accepts for exactly these weights.

    Raises:
        DataError: for no tokens, too many, or ids outside the vocabulary.
        ConfigError: for a certificate of another model.
        CertificateError: for weights that admit no proof.
    """
    settings = settings or SearchSettings()
    config, tensors = model.config, {n: t.detach().cpu() for n, t in model.state_dict().items()}
    check_weights(tensors)
    ids_T = _ids(config, tokens)
    hashes = tensors_sha256(tensors)
    if certificate is not None and dict(certificate.weights_sha256) != hashes:
        raise ConfigError("certificate: it is of other weights; certify this model first")
    ball = domain_radius(tensors["embedding.weight"]) if certificate is None else certificate.radius
    multipliers = {} if certificate is None else dict(certificate.multipliers)
    near = Neighbourhood(config, tensors, multipliers, ids_T, ball)
    tiny = near.level(_LINEAR, centred=True)
    if not math.isfinite(tiny.certified[-1]):
        raise CertificateError(
            "the certified constant overflows, expected a finite one: no radius can be proved; "
            "train under a constraint"
        )
    least_T, most_T = _brackets(near, tiny)
    if settings.cells:
        middle = settings.radius or float((least_T * most_T).sqrt().median())
        starts = _starts(config, tensors, multipliers)
        found = _shared(near.level(middle, centred=True), starts, len(ids_T), settings)
        if found:
            multipliers |= found
            near = Neighbourhood(config, tensors, multipliers, ids_T, ball)
    claims: dict[str, Any] = _claims(near, _levels(least_T, most_T, settings), settings)
    return LocalCertificate(
        tokens=tuple(ids_T.tolist()),
        top=tuple(near.top_T.tolist()),
        ball=ball,
        weights_sha256=hashes,
        config_sha256=config_sha256(config),
        multipliers_sha256=tensors_sha256(multipliers),
        multipliers=multipliers,
        settings=dataclasses.asdict(settings),
        versions={"torch": torch.__version__, "python": platform.python_version()},
        **claims,
    )


def _ids(config: ModelConfig, tokens: Sequence[int]) -> Tensor:
    ids_T = torch.as_tensor(tokens, dtype=torch.int64)
    if not 1 <= len(ids_T) <= config.context:
        raise DataError(
            f"prompt of {len(ids_T)} tokens: expected 1 to the model's context of {config.context}"
        )
    if int(ids_T.min()) < 0 or int(ids_T.max()) >= config.vocab_size:
        raise DataError(f"token ids: expected 0 to {config.vocab_size - 1}; use this model's own")
    return ids_T


def _starts(
    config: ModelConfig, tensors: Mapping[str, Tensor], multipliers: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return local multipliers from a certificate's, or from the norms of each neuron's weights."""
    found = {}
    for index in range(1, 2 * config.layers, 2):
        layer = config.layer(index // 2)
        if not layer.mlp_residual:
            continue
        lambda_N = multipliers.get(f"blocks.{index}.lambda")
        if lambda_N is None:
            up_FC, down_CF = (
                tensors[f"layers.{index // 2}.mlp.{name}.weight"].double()
                for name in ("up", "down")
            )
            inner_F, outer_F = up_FC.norm(dim=1), layer.mlp_residual * down_CF.norm(dim=0)
            ratio_F = outer_F.clamp(min=1e-30) / inner_F.clamp(min=1e-30)
            lambda_N = ratio_F.unflatten(0, (-1, layer.unit)).mean(1)
        found[f"local.{index}.lambda"] = lambda_N.clamp(*MULTIPLIER_RANGE)
    return found


def _brackets(near: Neighbourhood, tiny: Level) -> tuple[Tensor, Tensor]:
    """Return per token a radius that the certificate gives and one that the gradient allows."""
    least, most = [], []
    for t in range(len(near.top_T)):
        position, rough = near.position(tiny, t), near.global_lipschitz(tiny, t)
        gap = float(position.gap_V.min().clamp(min=0.0))
        most.append(
            float((position.gap_V.clamp(min=0) / position.moved_KV[0].clamp(min=1e-30)).min())
        )
        least.append(gap / max(rough, 1e-30))
    floor = 1e-9
    least_T, most_T = torch.tensor(least).clamp(min=floor), torch.tensor(most)
    return least_T.double(), torch.maximum(most_T, least_T).double()


def _levels(least_T: Tensor, most_T: Tensor, settings: SearchSettings) -> tuple[float, ...]:
    """Return distances where the radii may lie, dense where many of them may."""
    if settings.radius is not None:
        return (settings.radius,)
    points = torch.cat([least_T ** (1 - a) * most_T**a for a in _BETWEEN])
    share = torch.linspace(0, 1, settings.levels, dtype=torch.float64)
    return tuple(sorted(set(torch.quantile(points, share).tolist())))


def _claims(
    near: Neighbourhood, levels: tuple[float, ...], settings: SearchSettings
) -> dict[str, Any]:
    """Return all claims, each a little weaker than what was proved."""
    count = len(near.top_T)
    best, where = [0.0] * count, [0] * count
    global_best, global_where = [0.0] * count, [0] * count
    done = [False] * count
    for index, epsilon in enumerate(levels):
        level = near.level(epsilon, centred=True)
        for t in range(count):
            coarse = near.global_radius(level, t)
            if coarse > global_best[t]:
                global_best[t], global_where[t] = coarse, index
            if done[t]:
                continue
            radius = near.radius_at(level, t)
            # Bounds grow with the distance: what is not reached here is not reached beyond.
            done[t] = radius < epsilon * (1 - 1e-6)
            if radius > best[t]:
                best[t], where[t] = radius, index
    epsilon = settings.radius or max(float(torch.tensor(best).median()), levels[0])
    level = near.level(epsilon, centred=False)
    up = 1 + STORED_MARGIN
    blocks = zip(movement(level), level.certified, strict=True)
    return {
        "radii": tuple(radius * (1 - STORED_MARGIN) for radius in best),
        "radius_level": tuple(where),
        "levels": levels,
        "global_radii": tuple(radius * (1 - STORED_MARGIN) for radius in global_best),
        "global_level": tuple(global_where),
        "epsilon": epsilon,
        "lipschitz": tuple(near.lipschitz(level, t) * up for t in range(count)),
        "global_lipschitz": tuple(near.global_lipschitz(level, t) * up for t in range(count)),
        "blocks": tuple(
            LocalBlock(index=index, movement=moved * up, certified=factor * up)
            for index, (moved, factor) in enumerate(blocks)
        ),
    }


def _shared(
    level: Level, starts: Mapping[str, Tensor], count: int, settings: SearchSettings
) -> dict[str, Tensor]:
    """Return multipliers of the MLPs where a local K-form beats the certified constant."""
    found, before = {}, 1.0
    cells_M = torch.linspace(0, count - 1, settings.cells).round().long().unique()
    for index, (known, certified) in enumerate(zip(level.known, level.certified, strict=True)):
        name, ceiling, before = f"local.{index}.lambda", certified / before, certified
        if isinstance(known, MlpKnown):
            lambda_N = shared_multipliers(
                known,
                starts[name],
                cells_M,
                ceiling,
                method=settings.method,
                tol=settings.tol,
                max_evals=settings.max_evals,
            )
            if lambda_N is not None:
                found[name] = lambda_N
    return found
