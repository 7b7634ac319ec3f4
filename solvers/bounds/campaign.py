"""Attempts to refute the bounds: many small random models, each proved, checked and attacked.

A ratio of attack to bound above 1 would refute a proof, so anything a certificate may be asked to
cover is drawn: heads, depth, norms, activations, positions, biases, shared keys and values.
"""

# Shape letters: B pairs, T token, C width.

import dataclasses
import itertools
import math
import time
from typing import Any

import torch
from torch import Tensor

from common.config import check_types, positive
from common.models import LipschitzTransformer, ModelConfig
from common.models.config import ACTIVATIONS
from solvers.bounds.attack import attack
from solvers.bounds.attack_settings import AttackSettings
from solvers.bounds.checker import verify
from solvers.bounds.network import TightenSettings, certify

HEADS = (1, 2, 3, 4, 6, 8)
DEPTHS = (1, 2, 3, 4, 5, 6)
SPECTRA = ("gaussian", "orthogonal", "aligned")
POSITIONS: dict[str, dict[str, Any]] = {
    "rope": {},
    "none": {"rope_dims": 0},
    "bias": {"position_bias": True},
    "positional": {"position_bias": True, "content_heads": 0},
}
_LOWEST, _HIGHEST = 0.5, 4.0
_HEAD_DIM, _CONTEXT, _VOCABULARY = 2, 8, 7


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CampaignSettings:
    """Size of a campaign.

    Attributes:
        configurations: Configurations of the model.
        draws: Weights drawn for each.
        pairs: Random pairs of inputs for each of these, local and far apart.
        restarts: Restarts of each gradient search on the network and on each block, per draw.
        steps: Ascent steps of each.
        tokens: Longest sequence, at most 8.
        max_evals: Operator evaluations of the certifier per search.
        stream_steps: Steps of its joint search.
    """

    configurations: int = 100
    draws: int = 2
    pairs: int = 50
    restarts: int = 50
    steps: int = 8
    tokens: int = 8
    max_evals: int = 4
    stream_steps: int = 6

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("configurations", "draws", "pairs", "restarts", "tokens"):
            positive(f"campaign.{name}", getattr(self, name))
        for name in ("steps", "max_evals", "stream_steps"):
            positive(f"campaign.{name}", getattr(self, name), zero=True)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One configuration and one draw of its weights; a pure function of the two numbers.

    Attributes:
        configuration: Number of the configuration.
        draw: Number of the draw.
    """

    configuration: int
    draw: int

    def describe(self) -> dict[str, Any]:
        """Return what was drawn, as one row of a table."""
        index = self.configuration
        random = torch.Generator().manual_seed(index)
        share = float(torch.rand((), generator=random, dtype=torch.float64))
        # Strides such that nearly every pair of values meets within 100 configurations.
        return {
            "configuration": index,
            "draw": self.draw,
            "heads": HEADS[index % len(HEADS)],
            "depth": DEPTHS[(index // len(HEADS) + index) % len(DEPTHS)],
            "w_max": round(_LOWEST * (_HIGHEST / _LOWEST) ** share, 3),
            "activation": ACTIVATIONS[index % len(ACTIVATIONS)],
            "position": list(POSITIONS)[index // 12 % len(POSITIONS)],
            "biases": index % 5 > 2,
            "grouped": index // 6 % 2 == 1,
            "residual": ("paper", "half", "none")[(index // 24 + index) % 3],
            "spectrum": SPECTRA[(index + self.draw) % len(SPECTRA)],
        }

    def model(self) -> LipschitzTransformer:
        """Return the model, float64, every matrix with an RMS->RMS norm of ``w_max``."""
        row = self.describe()
        heads = row["heads"]
        position = dict(POSITIONS[row["position"]])
        kv_heads = 1 if row["grouped"] else heads
        residual = {"paper": None, "half": 0.5, "none": 1.0}[row["residual"]]
        config = ModelConfig(
            vocab_size=_VOCABULARY,
            width=_HEAD_DIM * heads if heads > 2 else 6,
            layers=row["depth"],
            heads=heads,
            kv_heads=kv_heads,
            head_dim=_HEAD_DIM,
            context=_CONTEXT,
            mlp_width=10,
            activation=row["activation"],
            mlp_bias=row["biases"],
            head_bias=row["biases"],
            attn_residual=residual,
            mlp_residual=residual,
            **position,
        )
        return random_model(config, row["w_max"], row["spectrum"], seed=self._seed)

    def attempt(self, settings: CampaignSettings) -> dict[str, Any]:
        """Prove, check and attack the model; returns its row of the record.

        Raises:
            CertificateError: if the checker refuses an honest certificate.
        """
        began, model = time.perf_counter(), self.model()
        tightening = TightenSettings(
            max_evals=settings.max_evals, stream_steps=settings.stream_steps
        )
        proof = certify(model, settings=tightening)
        verify(model, proof)
        search = AttackSettings(
            steps=settings.steps,
            network_steps=settings.steps,
            restarts=settings.restarts,
            tokens=settings.tokens,
            seed=self._seed,
        )
        found = attack(model, proof, settings=search)
        pairs = random_pairs(model, proof.radius, settings.pairs, settings.tokens, self._seed)
        blocks = [a / b.tightened for a, b in zip(found.blocks, proof.blocks, strict=True)]
        best = max(found.value, pairs)
        return self.describe() | {
            "pairs": settings.pairs,
            "restarts": settings.restarts,
            "tightened": proof.tightened,
            "attack": best,
            "ratio": best / proof.tightened,
            "pair_ratio": pairs / proof.tightened,
            "block_ratio": max(blocks),
            "worst_block": blocks.index(max(blocks)),
            "seconds": round(time.perf_counter() - began, 3),
        }

    @property
    def _seed(self) -> int:
        return 1000 * self.configuration + self.draw


def cases(settings: CampaignSettings) -> list[Case]:
    """Return all cases, the draws of one configuration together."""
    both = itertools.product(range(settings.configurations), range(settings.draws))
    return [Case(configuration=configuration, draw=draw) for configuration, draw in both]


@torch.no_grad()
def random_model(
    config: ModelConfig, norm: float, spectrum: str, *, seed: int
) -> LipschitzTransformer:
    """Return a float64 model with random weights of a given RMS->RMS norm.

    Args:
        config: Shape.
        norm: RMS->RMS norm of every matrix but the embedding, whose rows have RMS at most 1.
        spectrum: One of ``SPECTRA``; ``aligned`` adds a strong direction that all matrices share,
            as in trained models.
        seed: Of all weights.
    """
    generator = torch.Generator().manual_seed(seed)
    model = LipschitzTransformer(config).double().requires_grad_(False)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if name == "embedding.weight":
            noise *= math.sqrt(config.width) / noise.norm(dim=1).max()
        elif parameter.ndim == 2 and "position_bias" not in name:
            if spectrum == "orthogonal":
                torch.nn.init.orthogonal_(noise, generator=generator)
            if spectrum == "aligned":
                noise += 2.0
            scale = math.sqrt(noise.shape[0] / noise.shape[1])
            noise *= norm * scale / torch.linalg.matrix_norm(noise, 2)
        parameter.copy_(noise)
    return model


@torch.no_grad()
def random_pairs(
    model: LipschitzTransformer, radius: float, count: int, tokens: int, seed: int
) -> float:
    """Return the largest ratio of random pairs of inputs, at all distances up to the diameter."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, count, tokens, model.config.width)
    x_BTC, change_BTC = torch.randn(shape, generator=generator, dtype=torch.float64)
    sizes = torch.rand((2, count, tokens, 1), generator=generator, dtype=torch.float64)
    first_BTC = _on_sphere(x_BTC, radius * sizes[0].sqrt())
    reach_B11 = 10.0 ** (-3 * sizes[1, :, :1])
    second_BTC = first_BTC + _on_sphere(change_BTC, 2 * radius * reach_B11)
    size_BT1 = second_BTC.norm(dim=-1, keepdim=True)
    second_BTC *= (radius / size_BT1).clamp(max=1.0) * (1 - 1e-12)
    outputs = model.logits(model.stream(torch.cat((first_BTC, second_BTC))))
    moved_BT = (outputs[:count] - outputs[count:]).norm(dim=-1)
    given_BT = (first_BTC - second_BTC).norm(dim=-1)
    ratio = float((moved_BT.amax(-1) / given_BT.amax(-1)).max())
    return ratio * math.sqrt(model.config.width / model.config.vocab_size) * (1 - 1e-9)


def _on_sphere(x_BTC: Tensor, radius: Tensor) -> Tensor:
    return x_BTC / x_BTC.norm(dim=-1, keepdim=True) * radius * (1 - 1e-12)
