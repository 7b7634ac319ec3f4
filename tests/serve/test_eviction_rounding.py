"""The eviction ledger against float64 attention where float32 logits lose most of their digits."""

import math

import pytest
import torch

from common.models import LipschitzTransformer, ModelConfig
from serve.kernels import paged_decode
from serve.kv.eviction import EvictionLedger
from solvers.bounds import certify

WIDTH, SLOTS, GONE = 32, 8, 3


@pytest.mark.parametrize("seed", range(16))
@torch.inference_mode()
def test_cancelling_logits_keep_the_bound(seed: int) -> None:
    """Oracle: softmax in float64 on the same float32 cache; |q||k| is far above every logit."""
    torch.manual_seed(seed)
    config = ModelConfig(vocab_size=5, width=WIDTH, layers=1, heads=1, context=SLOTS)
    model = LipschitzTransformer(config)
    model.layers[0].attention.output.weight.copy_(torch.eye(WIDTH))
    ledger = EvictionLedger(model, certify(model, tighten=False), clusters=SLOTS)
    constants, size = ledger.constants[0], math.sqrt(1000 * WIDTH)
    q, k, v = size * torch.randn(1, 1, WIDTH), torch.randn(SLOTS, WIDTH), torch.randn(SLOTS, WIDTH)
    unit = q[0, 0] / q.norm()
    k = size * (k - 0.999 * (k @ unit)[:, None] * unit)
    ledger.cached_bounds[0] = float(k.norm(dim=1).max()), float(v.norm(dim=1).max())
    place, row = torch.arange(SLOTS)[None, None], ledger.open()
    ledger.summaries[0].add(k[None, None], v[None, None], place, place < GONE)
    ledger._compressed.add(row)
    kept = (k[None, None, GONE:], v[None, None, GONE:], place[..., GONE:].int())
    length, position = torch.tensor([SLOTS - GONE]), torch.tensor([SLOTS - 1])
    table = torch.zeros(1, 1, dtype=torch.int32)
    pools = [x.contiguous() for x in kept]
    o, lse = paged_decode(q, *pools, table, length, position, constants.scale)
    z, values = constants.scale * (k.double() @ q[0, 0].double()), v.double()
    moved = z.softmax(0) @ values - z[GONE:].softmax(0) @ values[GONE:]
    ledger.observe(0, [row], q, o, lse, position)
    assert constants.gain * float(moved.norm()) <= float(ledger.delta_RL[row, 0])
