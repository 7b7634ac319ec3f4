"""Fixtures of the serving tests: a tiny model with every freedom, prompts, solo runs."""

import random
from types import SimpleNamespace

import pytest
import torch

from common.models import LipschitzTransformer, ModelConfig
from serve.engine.config import EngineConfig
from serve.engine.engine import EngineCore
from serve.engine.request import Sequence
from serve.engine.sampling_params import SamplingParams
from serve.kv import Policy

CONTEXT = 96
VOCAB = 50
GREEDY = SamplingParams(temperature=0.0, max_tokens=16)


def make_model(dtype: torch.dtype = torch.float64, **changes: object) -> LipschitzTransformer:
    """Return a tiny model that uses every freedom: per-layer shapes, groups, biases."""
    settings = {
        "vocab_size": VOCAB,
        "width": 32,
        "layers": 3,
        "heads": (4, 2, 4),
        "kv_heads": (2, 1, 4),
        "content_heads": (2, 2, 0),
        "head_dim": (8, 16, 6),
        "context": CONTEXT,
        "position_bias": (True, False, True),
        "mlp_bias": True,
        "head_bias": True,
        "activation": ("maxmin", "gelu", "abs"),
        "attn_residual": 0.6,
        "mlp_residual": 0.5,
        "attn_factor": 2.0,
        "softmax_scale": 12.0,
        "final_scale": 2.0,
    }
    model = LipschitzTransformer(ModelConfig(**(settings | changes)))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and "position" not in name and "embedding" not in name
        std = parameter.shape[1] ** -0.5 if is_matrix else 0.5
        torch.nn.init.normal_(parameter, std=std, generator=generator)
    return model.to(dtype).eval()


def make_prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Return random prompts."""
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB) for _ in range(length)] for length in lengths]


def run_alone(
    model: LipschitzTransformer,
    prompt: list[int],
    params: SamplingParams,
    policy: Policy | None = None,
    **settings: object,
) -> Sequence:
    """Run one request in an engine of its own."""
    core = EngineCore(model, EngineConfig(debug=True, **settings), policy)
    sequence = core.add(prompt, params)
    while core.has_work:
        core.step()
    return sequence


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    """Return the helpers of this file by name, with a shared float64 ``model``."""
    return SimpleNamespace(
        make_model=make_model,
        make_prompts=make_prompts,
        run_alone=run_alone,
        model=make_model(),
        context=CONTEXT,
        vocab=VOCAB,
        greedy=GREEDY,
    )
