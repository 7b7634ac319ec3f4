"""Reconstruction problems with known structure, and tiny transformers of every activation."""

import pytest
import torch
from torch import Tensor

from common.models import LipschitzTransformer, ModelConfig
from compress.targets import Problem


def features(kind: str, rows: int, inputs: int, generator: torch.Generator) -> Tensor:
    """Return activations (rows, inputs): ``free``, ``low_rank`` or ``clusters`` of four."""
    normal = {"generator": generator, "dtype": torch.float64}
    scale = torch.exp(0.5 * torch.randn(inputs, **normal))
    if kind == "free":
        return torch.randn(rows, inputs, **normal) * scale
    if kind == "low_rank":
        mixing = torch.randn(inputs // 5, inputs, **normal) / 2
        latent = torch.randn(rows, inputs // 5, **normal) @ mixing
        return torch.nn.functional.gelu(latent + 0.2 * torch.randn(rows, inputs, **normal)) * scale
    centres = torch.randn(rows, inputs // 4, **normal).repeat_interleave(4, dim=1)
    return (centres + 0.1 * torch.randn(rows, inputs, **normal)) * scale


@pytest.fixture
def make_problem():
    """Return ``(kind, seed, ...) -> (problem, held-out problem)`` of the same map."""

    def make(
        kind: str,
        seed: int = 0,
        *,
        inputs: int = 32,
        outputs: int = 16,
        rows: int = 2048,
        unit: int = 1,
        ridge: float = 0.0,
    ) -> tuple[Problem, Problem]:
        generator = torch.Generator().manual_seed(seed)
        x_MI = features(kind, 2 * rows, inputs, generator)
        weight = torch.randn(inputs, outputs, generator=generator, dtype=torch.float64)
        weight = weight / torch.linalg.matrix_norm(weight, 2)
        first, second = (
            Problem(gram_II=part.T @ part / rows, weight_IO=weight, unit=unit, ridge=ridge)
            for part in x_MI.split(rows)
        )
        return first, second

    return make


@pytest.fixture
def make_model():
    """Return ``(activation, ...) -> LipschitzTransformer`` in float64 with every bias nonzero."""

    def make(activation: str = "gelu", *, bias: bool = True, seed: int = 0, **changes: object):
        settings: dict[str, object] = {
            "vocab_size": 11,
            "width": 8,
            "layers": 2,
            "heads": 2,
            "context": 16,
            "activation": activation,
            "mlp_bias": bias,
            "position_bias": True,
            "head_bias": bias,
        }
        settings.update(changes)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = LipschitzTransformer(ModelConfig(**settings)).double()
            for name, parameter in model.named_parameters():
                scale = 0.3 if name.endswith("bias") else parameter.shape[-1] ** -0.5
                torch.nn.init.normal_(parameter, std=scale)
        return model.eval()

    return make
