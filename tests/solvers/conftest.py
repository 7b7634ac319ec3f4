"""Small models with prescribed norms for the tests of bounds and attacks."""

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from common.models import LipschitzTransformer, ModelConfig

BuildModel = Callable[..., LipschitzTransformer]

# Every freedom of the configuration, in combinations that a certificate must cover.
FREEDOMS: dict[str, dict[str, Any]] = {
    "paper": {},
    "one_head": {"heads": 1, "attn_residual": 1.0},
    "maxmin_bias": {"activation": "maxmin", "mlp_bias": True, "head_bias": True},
    "maxmin": {"activation": "maxmin", "mlp_residual": 1.0},
    "gelu_tanh_bias": {"activation": "gelu_tanh", "mlp_bias": True, "mlp_residual": 0.9},
    "silu_bias": {"activation": "silu", "mlp_bias": True, "mlp_residual": 0.9},
    "tanh": {"activation": "tanh", "mlp_residual": 1.0},
    "relu": {"activation": "relu", "attn_residual": 0.9, "mlp_residual": 0.6},
    "abs_bias": {"activation": "abs", "mlp_bias": True},
    "grouped": {"kv_heads": 2, "attn_residual": 0.8},
    "positional": {"content_heads": 0, "position_bias": True, "attn_residual": 1.0},
    "mixed": {"kv_heads": 2, "content_heads": 2, "position_bias": True, "attn_residual": 1.0},
    "scaled": {"softmax_scale": 6.0, "attn_factor": 1.0, "final_scale": 2.5},
    "no_residual": {"attn_residual": 0.0, "mlp_residual": 0.0},
    "layers_differ": {
        "heads": (4, 2),
        "kv_heads": (2, 2),
        "content_heads": (2, 1),
        "head_dim": (4, 6),
        "mlp_width": (20, 30),
        "activation": ("maxmin", "gelu"),
        "mlp_bias": (True, False),
        "attn_residual": (0.7, 0.3),
        "softmax_scale": (2.0, 0.5),
    },
}


def build(
    seed: int = 0, *, kind: str = "gaussian", norm: float = 1.0, **fields: Any
) -> LipschitzTransformer:
    """Return a float64 model whose matrices all have the RMS->RMS norm ``norm``."""
    torch.manual_seed(seed)
    defaults = {"vocab_size": 11, "width": 16, "layers": 2, "heads": 4, "context": 16}
    config = ModelConfig(**(defaults | fields))
    model = LipschitzTransformer(config).double().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or "position_bias" in name:
            parameter.normal_()
        elif name == "embedding.weight":
            parameter.normal_()
            parameter.mul_(math.sqrt(config.width) / parameter.norm(dim=1).max())
        else:
            parameter.normal_()
            if kind == "orthogonal":
                torch.nn.init.orthogonal_(parameter)
            size = torch.linalg.matrix_norm(parameter, 2)
            parameter.mul_(norm * math.sqrt(parameter.shape[0] / parameter.shape[1]) / size)
    return model


@pytest.fixture(scope="session")
def build_model() -> BuildModel:
    """Return the model builder."""
    return build


@pytest.fixture(params=FREEDOMS, ids=str)
def any_model(request: pytest.FixtureRequest) -> LipschitzTransformer:
    """Return one model per freedom of the configuration, at norm 1.5."""
    return build(norm=1.5, **FREEDOMS[request.param])


@pytest.fixture
def counterexample() -> LipschitzTransformer:
    """Return the four-head model of bound_tightening 4.2: orthogonal matrices, no residual."""
    return build(kind="orthogonal", width=64, layers=1, heads=4, context=24, attn_residual=1.0)


@pytest.fixture(scope="session")
def flip_bit() -> Callable[[Path, str], None]:
    """Return a function that flips one bit in the middle of a tensor of a safetensors file."""

    def flip(path: Path, tensor: str) -> None:
        data = bytearray(path.read_bytes())
        size = struct.unpack("<Q", data[:8])[0]
        start, stop = json.loads(data[8 : 8 + size])[tensor]["data_offsets"]
        data[8 + size + (start + stop) // 2] ^= 1
        path.write_bytes(data)

    return flip
