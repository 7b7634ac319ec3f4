"""Measured speed-up of pruning against the ratio of operations, in processor seconds."""

from time import process_time
from typing import Any

import pytest
import torch

from common.models import LipschitzTransformer, ModelConfig
from compress.adapters import LipschitzAdapter
from compress.flops import token_flops
from compress.targets import block_indices
from compress.timing import decode_speed, forward_speed, mlp_speedup

NEAR = 0.15
KEEP = 0.5


def wide(activation: str) -> LipschitzTransformer:
    """Return a transformer whose time goes into its MLPs: width 512, hidden width 4096."""
    config = ModelConfig(
        vocab_size=256,
        width=512,
        layers=2,
        heads=8,
        context=128,
        mlp_width=4096,
        activation=activation,
    )
    return LipschitzTransformer(config).eval()


def halved(model: LipschitzTransformer) -> Any:
    """Return the model with half of each MLP's neurons."""
    adapter = LipschitzAdapter(model)
    kept = {
        target.name: block_indices(torch.arange(round(KEEP * target.components)), target.unit)
        for target in adapter.targets()
        if target.kind == "mlp"
    }
    return adapter.cut(kept)


@pytest.mark.parametrize("activation", ["gelu", "relu", "maxmin"])
def test_speedup_near_the_flop_ratio(bench: Any, activation: str) -> None:
    """MLPs alone, the forward pass and a decode step, which is bound by memory: no budget."""
    dense = wide(activation)
    small = halved(dense)
    rounds = max(bench.rounds, 9)
    ratio = token_flops(dense.config) / token_flops(small.config)
    forward = forward_speed(dense, small, rounds=rounds, clock=process_time)
    decode = decode_speed(dense, small, rounds=rounds, clock=process_time)
    measured = {
        "MLPs": (mlp_speedup(dense, small, rounds=rounds, clock=process_time), 1 / KEEP),
        "forward": (forward.ratio, ratio),
        "decode": (decode.ratio, ratio),
    }
    for name, (found, expected) in measured.items():
        settings = {"measured": found, "flops": expected, "activation": activation}
        bench.add(
            f"prune: |speed-up / FLOP ratio - 1|, {name} ({activation})",
            [abs(found / expected - 1)],
            "share",
            most=None if name == "decode" else NEAR,
            **settings,
        )
