"""The eviction ledger against float64 attention where rounding loses most of the digits."""

# Legend: H heads, S slots, D head width.

import math

import pytest
import torch

from common.models import LipschitzTransformer, ModelConfig
from serve.decoder import layer_spec
from serve.kernels import paged_decode
from serve.kv.block_bound import Queries
from serve.kv.eviction import EvictionLedger
from serve.kv.view import CacheView
from solvers.bounds import certify

WIDTH, SLOTS, GONE = 32, 8, 3


def make_ledger() -> EvictionLedger:
    """A ledger of one head whose output matrix is the identity, a cluster for each slot."""
    config = ModelConfig(vocab_size=5, width=WIDTH, layers=1, heads=1, context=SLOTS)
    model = LipschitzTransformer(config)
    model.layers[0].attention.output.weight.copy_(torch.eye(WIDTH))
    return EvictionLedger(model, certify(model, tighten=False), clusters=SLOTS)


def check(q_HD: torch.Tensor, k_SD: torch.Tensor, v_SD: torch.Tensor) -> None:
    """Evict the first slots; the bound must cover the error in the arithmetic of the dtypes."""
    ledger = make_ledger()
    (group,) = ledger.groups.values()
    group.key_L, group.value_L = (x.float().norm(dim=1).amax()[None] * 1.0001 for x in (k_SD, v_SD))
    place, last, row = torch.arange(SLOTS), torch.tensor([SLOTS - 1]), ledger.open()
    pools = (k_SD[None, None], v_SD[None, None], place[None, None].int())
    spec = layer_spec(ledger.model.layers[0].attention)
    table, length = torch.zeros(1, 1, dtype=torch.int64), torch.tensor([SLOTS])
    view = CacheView(
        layers=(0,), spec=spec, bias_LHT=None, context=SLOTS, tables_RN=table, lengths_R=length,
        k_pool=pools[0], v_pool=pools[1], pos_pool=pools[2], positions_R=length, prompts_R=length,
        seeds_R=last,
    )  # fmt: skip
    ledger.evict(view, [row], place[None, None, GONE:])
    kept = [x[:, :, GONE:].contiguous() for x in pools]
    o, lse = paged_decode(q_HD[None], *kept, table, length - GONE, last, spec.scale)
    z, values = spec.scale * (k_SD.double() @ q_HD[0].double()), v_SD.double()
    moved = (z.softmax(0) @ values - o[0, 0].double()).norm()
    o_11LHD = o[None, None]
    queries = Queries(q_HD[None, None, None], o_11LHD, o_11LHD, lse[None, None], last[None])
    ledger.observe((0,), [row], queries)
    assert float(group.gain_L) * float(moved) <= float(ledger.delta_RN[row, 0])


@pytest.mark.parametrize("seed", range(16))
@torch.inference_mode()
def test_cancelling_logits_keep_the_bound(seed: int) -> None:
    """Oracle: softmax in float64 on the same float32 cache; |q||k| is far above every logit."""
    torch.manual_seed(seed)
    size = math.sqrt(1000 * WIDTH)
    q, k, v = size * torch.randn(1, WIDTH), torch.randn(SLOTS, WIDTH), torch.randn(SLOTS, WIDTH)
    unit = q[0] / q.norm()
    check(q, size * (k - 0.999 * (k @ unit)[:, None] * unit), v)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("seed", range(6))
@torch.inference_mode()
def test_bound_covers_the_dtype_of_cache_and_outputs(seed: int, dtype: torch.dtype) -> None:
    """Oracle: softmax in float64 on the rounded cache; clusters of one key leave only rounding."""
    torch.manual_seed(seed)
    size = (0.1, 3.0)[seed % 2]
    q, k, v = size * torch.randn(1, WIDTH), torch.randn(SLOTS, WIDTH), torch.randn(SLOTS, WIDTH)
    # Values that nearly cancel: the output is far smaller than what it is rounded from.
    v[1::2] = 0.01 * v[1::2] - v[::2]
    check(q.to(dtype), (0.1 * k).to(dtype), v.to(dtype))
