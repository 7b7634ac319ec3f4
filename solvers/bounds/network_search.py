"""The search for a network's multipliers: block by block, then all together. Untrusted.

First every block alone, on the domain that the blocks before it leave; then one descent for the
whole stream, which also shapes the domains; then the attention blocks again, on those.
"""

# Shape letters: C width, H query heads, D head width, V vocabulary.

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from common.config import check_types, one_of, positive
from common.models import LayerConfig, ModelConfig
from solvers.bounds.admissible import MULTIPLIER_RANGE
from solvers.bounds.attention_search import AttentionSearch, search_attention
from solvers.bounds.kform import METHODS
from solvers.bounds.mlp_block import MlpSolution, tighten_mlp
from solvers.bounds.mlp_proof import mlp_form, value_at_zero
from solvers.bounds.stream_proof import Stream, local_tensors
from solvers.bounds.stream_search import AttentionPart, MlpPart, Part, domains, search_stream

_NAMES = ("query", "key", "value", "output")
_FIRST_TOL = 0.05  # of the attention searches whose result only starts the joint one
_LEAST = 1e-6  # smallest start of a multiplier that may be zero at the optimum
_WIDEST = 512  # the joint search is on by default up to this width
_STEPS = 30


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TightenSettings:
    """How the multipliers are searched.

    Attributes:
        method: One of ``solvers.bounds.kform.METHODS``.
        tol: Wanted duality gap relative to the block's first value.
        max_evals: Eigen-decompositions per search.
        stream_steps: Steps of the joint search; None for 30 up to width 512 and 0 above.
    """

    method: str = "halpern_anderson"
    tol: float = 0.01
    max_evals: int = 200
    stream_steps: int | None = None

    def __post_init__(self) -> None:
        check_types(self)
        one_of("certify.method", self.method, METHODS)
        positive("certify.tol", self.tol)
        positive("certify.max_evals", self.max_evals, zero=True)
        if self.stream_steps is not None:
            positive("certify.stream_steps", self.stream_steps, zero=True)

    def steps(self, width: int) -> int:
        """Return the number of joint steps for a model of this width."""
        default = _STEPS if width <= _WIDEST else 0
        return default if self.stream_steps is None else self.stream_steps


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BlockFound:
    """What was found for one block.

    Attributes:
        own: Multipliers of its l2 constant.
        unit: ``domain.*`` and ``stream.*`` multipliers for ellipsoids of unit radius.
        dual: The solver's lower bound on the block's constant.
        evals: Eigen-decompositions.
        seconds: Wall time of the block's own searches.
    """

    own: dict[str, Tensor]
    unit: dict[str, Tensor]
    dual: float
    evals: int
    seconds: float

    def at(self, stream: Stream) -> dict[str, Tensor]:
        """Return all multipliers for the scale of the ellipsoids that enter the block."""
        scaled = dict(self.own)
        for kind, ellipsoid in (("domain", stream.tokens.domain), ("stream", stream.changes)):
            norm = max(ellipsoid.norm, _LEAST)
            for name, tensor in self.unit.items():
                if name.startswith(kind):
                    scaled[name] = tensor * norm ** _SCALING[name.removeprefix(f"{kind}.")]
        return {name: tensor.clamp(*MULTIPLIER_RANGE) for name, tensor in scaled.items()}


# Power of the ellipsoid's radius by which a multiplier of unit ellipsoids changes.
_SCALING = {"value": 1, "skip": 1, "key": 1, "excess": 1, "mixed": 0, "query": -1, "lambda": -1}


def search_network(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    radius: float,
    settings: TightenSettings,
    track: Callable[[Iterable[int]], Iterable[int]],
    warm: Mapping[int, Mapping[str, Tensor]],
) -> list[BlockFound]:
    """Search the multipliers of all blocks.

    Args:
        config: The model's configuration.
        tensors: Its state.
        radius: l2 radius of the embedded tokens.
        settings: How.
        track: Wraps the loop over blocks to show progress.
        warm: Block to multipliers of a similar one, from ``warm_multipliers``; may be empty.
    """
    options = {"method": settings.method, "max_evals": settings.max_evals}
    parts = [_part(config, tensors, index) for index in range(2 * config.layers)]
    first: list[BlockFound] = []
    for index in track(range(len(parts))):
        part, local, start = parts[index], local_tensors(tensors, index), warm.get(index, {})
        if isinstance(part, MlpPart):
            first.append(_search_mlp(part, settings.tol, options, start))
            continue
        tol = max(_FIRST_TOL, settings.tol) if part.layer.content_heads else settings.tol
        domain_CC = domains(parts, [found.unit for found in first], radius)[-1]
        first.append(_search_attention(local, part.layer, domain_CC, tol, options, start))
    head_VC = tensors["head.weight"].double()
    steps = settings.steps(config.width)
    units = search_stream(parts, head_VC, radius, [found.unit for found in first], steps=steps)
    shaped = domains(parts, units, radius)
    result = []
    for index, (part, found, unit) in enumerate(zip(parts, first, units, strict=True)):
        if isinstance(part, AttentionPart) and part.layer.content_heads:
            local = local_tensors(tensors, index)
            domain_CC, start = shaped[index], found.own
            again = _search_attention(local, part.layer, domain_CC, settings.tol, options, start)
            found = dataclasses.replace(
                again, evals=found.evals + again.evals, seconds=found.seconds + again.seconds
            )
        result.append(dataclasses.replace(found, unit=unit))
    return result


def _search_mlp(
    part: MlpPart, tol: float, options: Mapping[str, Any], warm: Mapping[str, Tensor]
) -> BlockFound:
    form, start_N = part.slopes, warm.get("lambda")
    if start_N is not None:
        start_N = start_N.log() if len(start_N) == form.g_NC.shape[0] else None
    solution: MlpSolution = tighten_mlp(
        form.c_CC, form.b_CN, form.g_NC, tol=tol, theta0=start_N, **options
    )
    lambda_N = solution.theta.exp().clamp(*MULTIPLIER_RANGE)
    rows_NC = form.g_NC * lambda_N.sqrt()[:, None]
    spare = solution.primal - float(torch.linalg.matrix_norm(rows_NC, 2)) ** 2
    excess = lambda_N.new_full((1,), max(spare, 1e-3 * solution.primal, _LEAST))
    unit: dict[str, Tensor] = {}
    for kind in ("domain", "stream"):
        unit |= {f"{kind}.lambda": lambda_N.clone(), f"{kind}.excess": excess.clone()}
    return BlockFound(
        own={"lambda": lambda_N},
        unit=unit,
        dual=solution.dual,
        evals=solution.evals,
        seconds=solution.seconds,
    )


def _search_attention(
    local: Mapping[str, Tensor],
    layer: LayerConfig,
    domain_CC: Tensor,
    tol: float,
    options: Mapping[str, Any],
    warm: Mapping[str, Tensor],
) -> BlockFound:
    weights = [local.get(f"{name}.weight") for name in _NAMES]
    solution: AttentionSearch = search_attention(
        weights, layer, domain_CC, tol=tol, warm=warm, **options
    )
    own = {k: t.clamp(*MULTIPLIER_RANGE) for k, t in solution.multipliers.items()}
    skip = own["value"].new_full((1,), max(abs(1 - layer.attn_residual), _LEAST))
    unit = {f"stream.{name}": tensor.clone() for name, tensor in own.items()}
    unit |= {"stream.skip": skip, "domain.skip": skip.clone(), "domain.value": solution.growth}
    a = layer.attn_residual
    return BlockFound(
        own=own,
        unit=unit,
        dual=abs(1 - a) + a * layer.attn_factor * solution.dual,
        evals=solution.evals,
        seconds=solution.seconds,
    )


def _part(config: ModelConfig, tensors: Mapping[str, Tensor], index: int) -> Part:
    layer, local = config.layer(index // 2), local_tensors(tensors, index)
    if index % 2:
        up_FC, down_CF = local["up.weight"], local["down.weight"]
        slopes = mlp_form(up_FC, down_CF, layer)
        chords = slopes if layer.mlp_bias else mlp_form(up_FC, down_CF, layer, sector=True)
        return MlpPart(layer, slopes, chords, value_at_zero(local, layer).mid[:, 0])
    dim, group, content = layer.head_dim, layer.group, layer.content_heads
    o_CX = local["output.weight"].double()
    v_KDC = local["value.weight"].double().unflatten(0, (-1, dim))
    q_HDC = k_HDC = v_KDC[:0]
    if content:
        q_HDC = local["query.weight"].double().unflatten(0, (-1, dim))
        k_KDC = local["key.weight"].double().unflatten(0, (-1, dim))
        k_HDC = k_KDC.repeat_interleave(group, 0)
    return AttentionPart(
        layer,
        q_HDC,
        k_HDC,
        v_KDC.repeat_interleave(group, 0),
        o_CX.unflatten(1, (-1, dim)).transpose(0, 1),
    )
