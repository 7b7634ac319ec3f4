"""Attacks: valid pairs of inputs that move the output as far as possible, for lower bounds.

Every figure here is an estimate from below of a Lipschitz constant on the certified ball; it shows
how much room a bound can have left and would expose a wrong one. Float64, seeded, CPU.
Source: spec bound_tightening 4.2 and 9.6 (structured start), lipschitz_training 5.5.
"""

# Shape letters: B starts, T token, C width, D head width, H heads.

import copy
import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from common.certificate import Certificate
from common.config import check_types, positive
from common.errors import CertificateError
from common.models import LipschitzTransformer
from common.models.layers import Layer
from common.models.rope import rotate, rotation

PAIR_DISTANCE = 1e-3
"""Distance of a pair relative to the ball: local enough, and far above float64 rounding."""

ROUNDING = 1e-11
"""Relative rounding error a ratio may carry at that distance, subtracted from every result."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AttackSettings:
    """Budget of the attacks.

    Attributes:
        steps: Adam steps of each attack on a block; 0 switches the attacks off.
        network_steps: Adam steps of the attack on the whole network.
        starts: Sequences attacked at once (structured ones first, then random ones).
        tokens: Length of the attacked sequences, at most the model's context.
        rate: Step per token relative to the radius.
        seed: Seed of the random starts.
    """

    steps: int = 40
    network_steps: int = 16
    starts: int = 4
    tokens: int = 16
    rate: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("steps", "network_steps"):
            positive(f"certify.attack_{name}", getattr(self, name), zero=True)
        for name in ("starts", "tokens", "rate"):
            positive(f"certify.attack_{name}", getattr(self, name))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AttackResult:
    """Largest ratios found: of the network (RMS to RMS) and of each block (l2); by kind."""

    value: float
    blocks: tuple[float, ...]
    random: float
    gradient: float
    structured: float


def attack(
    model: LipschitzTransformer,
    certificate: Certificate | None = None,
    *,
    settings: AttackSettings | None = None,
) -> AttackResult:
    """Attack the whole network and each of its blocks.

    Args:
        model: Not modified; copied to float64.
        certificate: Gives the radius of each block's ball; the embedding's radius when absent.
        settings: Budget.

    Returns:
        Estimates from below, each reached by a pair of sequences inside the certified balls.
    """
    settings = settings or AttackSettings()
    model = copy.deepcopy(model).cpu().double().eval().requires_grad_(False)
    radius = model.domain_radius() if certificate is None else certificate.radius
    radii = [radius] * (2 * len(model.layers))
    if certificate is not None:
        radii = [block.radius_in for block in certificate.blocks]
    blocks = tuple(
        block_attack(model, index, radii[index], settings=settings) for index in range(len(radii))
    )
    search = _Search(settings, model.config.width, min(settings.tokens, model.config.context))
    factor = math.sqrt(model.config.width / model.config.vocab_size)

    def network(x_BTC: Tensor) -> Tensor:
        return factor * model.logits(model.stream(x_BTC))

    starts = structured_starts(_layer(model, 0), search.tokens)
    structured = search.run(network, radius, settings.network_steps, starts[: search.half])
    gradient = search.run(network, radius, settings.network_steps, [])
    random = search.run(network, radius, 0, [])
    return AttackResult(
        value=max(structured, gradient, random),
        blocks=blocks,
        random=random,
        gradient=gradient,
        structured=structured,
    )


def block_attack(
    model: LipschitzTransformer,
    index: int,
    radius: float,
    *,
    settings: AttackSettings | None = None,
) -> float:
    """Attack one residual block on the ball of ``radius``.

    Args:
        model: Float64 model whose parameters need no gradients.
        index: Block, as in a certificate.
        radius: l2 bound on every token.
        settings: Budget.

    Returns:
        The largest ratio found, max-token l2 to max-token l2.
    """
    settings = settings or AttackSettings()
    layer = _layer(model, index // 2)
    tokens = 1 if index % 2 else min(settings.tokens, model.config.context)
    search = _Search(settings, model.config.width, tokens)
    if index % 2:
        return search.run(layer.mlp_block, radius, settings.steps, [])
    starts = structured_starts(layer, tokens)
    return search.run(layer.attend_block, radius, settings.steps, starts)


def _layer(model: LipschitzTransformer, index: int) -> Layer:
    layer = model.layers[index]
    assert isinstance(layer, Layer)
    return layer


def with_attack(certificate: Certificate, result: AttackResult) -> Certificate:
    """Return the certificate with the attacks' values stored in it.

    Raises:
        CertificateError: if an attack exceeds a bound, which would refute the proof.
    """
    blocks = []
    for block, value in zip(certificate.blocks, result.blocks, strict=True):
        if value > block.tightened:
            raise CertificateError(
                f"block {block.index}: attack {value!r} exceeds the bound {block.tightened!r}; "
                "the proof is wrong, please report it"
            )
        components = {**block.components, "attack": value}
        blocks.append(dataclasses.replace(block, components=components))
    if result.value > certificate.tightened:
        raise CertificateError(
            f"attack {result.value!r} exceeds the bound {certificate.tightened!r}; the proof is "
            "wrong, please report it"
        )
    return dataclasses.replace(certificate, blocks=tuple(blocks), attack=result.value)


@torch.no_grad()
def structured_starts(layer: Layer, tokens: int) -> list[tuple[Tensor, Tensor]]:
    """Return one pair (sequence, direction) per content head that makes its logits most sensitive.

    Keys lie along the direction that the last token's query change sees, half of them on each
    side, so that the attention weights swing between two far values.

    Args:
        layer: Float64 layer with content heads.
        tokens: Length T.

    Returns:
        Tuples of a sequence (T, C) and a change (T, C), both with tokens of norm at most 1.
    """
    attention, config = layer.attention, layer.layer
    if attention.query is None or attention.key is None:
        return []
    dim = config.head_dim
    q_HDC = attention.query.weight.detach().unflatten(0, (-1, dim))
    k_HDC = attention.key.weight.detach().unflatten(0, (-1, dim))
    k_HDC = k_HDC.repeat_interleave(config.group, 0)
    v_HDC = attention.value.weight.detach().unflatten(0, (-1, dim))
    v_HDC = v_HDC.repeat_interleave(config.group, 0)
    positions = torch.arange(tokens)[None]
    angles = rotation(positions, attention.inverse_frequency, q_HDC.dtype)
    signs_T = torch.where(torch.arange(tokens) % 2 == 0, 1.0, -1.0).to(q_HDC.dtype)
    starts = []
    for q_DC, k_DC, v_DC in zip(q_HDC, k_HDC, v_HDC[: len(q_HDC)], strict=True):
        right_CD = torch.linalg.svd(q_DC, full_matrices=False).Vh[0]
        query_TD = (q_DC @ right_CD).expand(1, 1, tokens, dim)
        # Undo each key's rotation and apply the last query's: all logits then align.
        last = rotate(query_TD, angles[:, :, :, -1:].expand_as(angles))
        seen_TC = rotate(last, torch.stack((angles[0], -angles[1])))[0, 0] @ k_DC
        seen_TC = torch.nn.functional.normalize(seen_TC, dim=-1)
        seen_TC += 0.3 * torch.nn.functional.normalize(v_DC.sum(0), dim=0)
        sequence_TC = signs_T[:, None] * torch.nn.functional.normalize(seen_TC, dim=-1)
        change_TC = torch.zeros_like(sequence_TC)
        sequence_TC[-1], change_TC[-1] = 0.0, right_CD
        starts.append((sequence_TC, change_TC))
    return starts


class _Search:
    """Adam on a batch of pairs, with the best ratio over all steps remembered."""

    def __init__(self, settings: AttackSettings, width: int, tokens: int) -> None:
        self.settings, self.width, self.tokens = settings, width, tokens
        self.half = max(1, settings.starts // 2)

    def run(
        self,
        function: Callable[[Tensor], Tensor],
        radius: float,
        steps: int,
        starts: list[tuple[Tensor, Tensor]],
    ) -> float:
        """Return the best ratio of ``function`` on pairs in the ball of ``radius``."""
        centre, change = self._begin(starts)
        rate = self.settings.rate / math.sqrt(self.width)
        adam = torch.optim.Adam([centre, change], lr=rate)
        best = 0.0
        for step in range(steps + 1):
            ratio_B = self._ratio(function, centre, change, radius)
            best = max(best, float(ratio_B.detach().max()))
            if step < steps:
                adam.zero_grad()
                (-ratio_B.sum()).backward()
                adam.step()
        return best * (1 - ROUNDING)

    def _begin(self, starts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.settings.seed)
        shape = (max(self.settings.starts, len(starts)), self.tokens, self.width)
        noise = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
        centre, change = noise / math.sqrt(self.width)
        for row, (sequence_TC, change_TC) in enumerate(starts):
            centre[row] = sequence_TC
            change[row] = change_TC + 0.01 * change[row]
        return centre.requires_grad_(), change.requires_grad_()

    def _ratio(
        self,
        function: Callable[[Tensor], Tensor],
        centre: Tensor,
        change: Tensor,
        radius: float,
    ) -> Tensor:
        """Return the ratio (B,) at the pairs ``centre +- change``, moved into the ball."""
        half = radius * PAIR_DISTANCE / 2
        centre_BTC = (radius - half) * (1 - ROUNDING) * _clip(centre)
        change_BTC = half * _clip(change)
        first, second = centre_BTC + change_BTC, centre_BTC - change_BTC
        outputs = function(torch.cat((first, second)))
        moved_BT = (outputs[: len(first)] - outputs[len(first) :]).norm(dim=-1)
        given_BT = (first - second).norm(dim=-1)
        return moved_BT.amax(-1) / given_BT.amax(-1)


def _clip(x_BTC: Tensor) -> Tensor:
    return x_BTC / x_BTC.norm(dim=-1, keepdim=True).clamp(min=1.0)
