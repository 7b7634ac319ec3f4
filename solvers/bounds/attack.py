"""Attacks: valid pairs of inputs that move the output as far as possible, for lower bounds.

Every figure here is an estimate from below of a Lipschitz constant on the certified ball; it shows
how much room a bound can have left and would expose a wrong one. Float64, seeded, CPU.
Source: spec bound_tightening 4.2 and 9.6 (structured start), lipschitz_training 5.5; deviations:
the direction follows a power iteration in the max-token norm, and sequences grow by doubling.
"""

# Shape letters: T token, C width, V vocabulary.

import copy
import dataclasses
import functools
import math

import torch
from torch import Tensor

from common.certificate import Certificate
from common.models import LipschitzTransformer
from common.models.layers import Layer
from solvers.bounds.attack_ascent import Recipe, Target, ascend, clip
from solvers.bounds.attack_search import SHORTEST, Search
from solvers.bounds.attack_settings import AttackResult, AttackSettings, Clock
from solvers.bounds.attack_starts import mixed_starts, random_starts, stacked_starts
from solvers.bounds.attack_tokens import swap_attack
from solvers.bounds.ellipsoid import Ellipsoid, Tokens
from solvers.bounds.stream_proof import token_domains

_BLOCK_SHARE = 0.2
"""Share of the time that the attacks on single blocks may take."""

_ON_THE_BALL = 1e3


def attack(
    model: LipschitzTransformer,
    certificate: Certificate | None = None,
    *,
    settings: AttackSettings | None = None,
) -> AttackResult:
    """Attack the whole network and each of its blocks.

    Args:
        model: Not modified; copied to float64.
        certificate: Gives the tokens of each block; all lie in the embedding's ball when absent.
        settings: Budget.

    Returns:
        Estimates from below, each reached by a pair of sequences inside the certified balls.
    """
    settings = settings or AttackSettings()
    model, clock = _copy(model), Clock(settings.budget_s)
    radius = model.domain_radius() if certificate is None else certificate.radius
    domains = [Tokens.ball(model.config.width, radius)] * (2 * len(model.layers))
    if certificate is not None:
        domains = token_domains(model.config, model.state_dict(), certificate)
    block_clock = clock.part(_BLOCK_SHARE)
    blocks = tuple(
        _block_attack(model, index, domains[index], settings, block_clock.part(1 / (left + 1)))
        for index, left in enumerate(reversed(range(len(domains))))
    )
    kinds = _network_attacks(model, radius, settings, clock)
    return AttackResult(value=max(kinds.values()), blocks=blocks, **kinds)


def block_attack(
    model: LipschitzTransformer,
    index: int,
    domain: float | Ellipsoid | Tokens,
    *,
    settings: AttackSettings | None = None,
) -> float:
    """Attack one residual block on a domain of tokens.

    Args:
        model: Not modified; copied to float64.
        index: Block, as in a certificate.
        domain: Holds every token; a number is the l2 radius of a ball.
        settings: Budget.

    Returns:
        The largest ratio found, max-token l2 to max-token l2.
    """
    settings = settings or AttackSettings()
    clock = Clock(settings.budget_s)
    if isinstance(domain, Ellipsoid):
        domain = Tokens(domain, domain.radius, domain.radius)
    elif not isinstance(domain, Tokens):
        domain = Tokens.ball(model.config.width, domain)
    return _block_attack(_copy(model), index, domain, settings, clock)


def _copy(model: LipschitzTransformer) -> LipschitzTransformer:
    return copy.deepcopy(model).cpu().double().eval().requires_grad_(False)


def _layers(model: LipschitzTransformer) -> list[Layer]:
    return [layer for layer in model.layers if isinstance(layer, Layer)]


def _block_attack(
    model: LipschitzTransformer,
    index: int,
    domain: Tokens,
    settings: AttackSettings,
    clock: Clock,
) -> float:
    layer = _layers(model)[index // 2]
    tokens = 1 if index % 2 else min(settings.tokens, model.config.context)
    search = _search(settings, settings.steps, tokens, lengthen=False)
    run = layer.mlp_block if index % 2 else layer.attend_block
    soften = functools.partial(_soften, [layer])
    target = Target(run, domain.radius, soften, domain.gauge)
    starts = functools.partial(mixed_starts, [] if index % 2 else [layer], model.config.width)
    return search.run(target, starts, clock)


def _network_attacks(
    model: LipschitzTransformer, radius: float, settings: AttackSettings, clock: Clock
) -> dict[str, float]:
    """Return the best ratio of each kind, embedding RMS to logits RMS."""
    layers = _layers(model)
    scale = model.config.final_scale * math.sqrt(model.config.width / model.config.vocab_size)
    head_VC = scale * model.head.weight[: model.config.vocab_size]
    # A triangular factor moves as far as the logits do and is no larger than the width.
    head_VC = torch.linalg.qr(head_VC).R if len(head_VC) > head_VC.shape[1] else head_VC

    def network(x_BTC: Tensor) -> Tensor:
        return model.stream(x_BTC) @ head_VC.T

    target = Target(network, radius, functools.partial(_soften, layers))
    tokens = min(settings.tokens, model.config.context)
    search = _search(settings, settings.network_steps, tokens)
    starts = functools.partial(random_starts, model.config.width)
    kinds = {
        "random": dataclasses.replace(search, steps=0).run(target, starts, clock),
        "power": _power(target, model, search, clock.part(0.05)),
        "swaps": swap_attack(
            target,
            model.embedding.weight,
            count=settings.restarts,
            tokens=min(SHORTEST, tokens),
            seed=settings.seed,
            clock=clock.part(0.05),
        ),
        "structured": search.run(
            target, functools.partial(stacked_starts, layers), clock.part(0.4)
        ),
    }
    return kinds | {"gradient": search.run(target, starts, clock)}


def _power(target: Target, model: LipschitzTransformer, search: Search, clock: Clock) -> float:
    """Iterate on the direction alone, at random points of the sphere and at random texts."""
    generator = torch.Generator().manual_seed(search.seed)
    tokens = min(SHORTEST, search.tokens)
    x_BTC, direction_BTC = random_starts(model.config.width, search.restarts, tokens, generator)
    ids_BT = torch.randint(len(model.embedding.weight), x_BTC.shape[:2], generator=generator)
    text_BTC = model.embed(ids_BT) / target.radius
    x_BTC = torch.cat((clip(_ON_THE_BALL * x_BTC), text_BTC))
    direction_BTC = direction_BTC.repeat(2, 1, 1)
    steps = search.steps // 2
    found = ascend(
        target, x_BTC, direction_BTC, recipe=Recipe(), steps=steps, rate=0.0, clock=clock
    )
    return found.value


def _search(settings: AttackSettings, steps: int, tokens: int, *, lengthen: bool = True) -> Search:
    return Search(
        steps=steps,
        restarts=settings.restarts,
        tokens=tokens,
        lengthen=lengthen,
        rate=settings.rate,
        seed=settings.seed,
    )


def _soften(layers: list[Layer], factor: float) -> None:
    """Scale the attention logits of a copy."""
    for layer in layers:
        scale = factor * layer.layer.softmax_scale
        layer.attention.layer = dataclasses.replace(layer.layer, softmax_scale=scale)
