"""A cache as a policy sees it: two layers, shuffled slots, heads with and without content."""

# Legend: L layers, Q requests, R = L * Q rows, K key/value heads, S slots, D head width, W queries.

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from serve.decoder import LayerSpec
from serve.kv import CacheView, Policy
from serve.kv.observer import Attended

CONTEXT, LAYERS, BLOCK = 64, 2, 4
LENGTHS = (19, 12)


def make_spec(*, content_heads=4, interleaved=False, bands=3, with_bias=True, **changes):
    """Return six query heads on three key/value heads, partial RoPE with a scale."""
    fields = {
        "heads": 6,
        "kv_heads": 3,
        "head_dim": 10,
        "content_heads": content_heads,
        "scale": 0.3,
        "inverse_frequency": 100.0 ** (-torch.arange(bands, dtype=torch.float64) / bands),
        "interleaved": interleaved,
        "rope_scale": 1.4,
        "bias_HT": torch.zeros(6, CONTEXT, dtype=torch.float64) if with_bias else None,
    }
    return LayerSpec(**(fields | changes))


def make_view(spec, *, aligned=False, seed=0, dtype=torch.float64):
    """Return random rotated keys in random slots, with gaps in the positions; garbage elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    pages = -(-max(LENGTHS) // BLOCK) + 1
    rows, slots = LAYERS * len(LENGTHS), pages * BLOCK
    shape = (rows, spec.kv_heads, slots)
    k, v = (
        torch.randn(*shape, spec.head_dim, generator=generator, dtype=torch.float64)
        for _ in range(2)
    )
    k[:, spec.content_heads // spec.group :] = 0
    positions = torch.zeros(shape, dtype=torch.long)
    newest = torch.tensor([40, 33] * LAYERS)
    for row in range(rows):
        length = LENGTHS[row % len(LENGTHS)]
        for head in range(spec.kv_heads):
            older = torch.randperm(int(newest[row]), generator=generator)[: length - 1]
            own = torch.cat((older, newest[row, None]))
            own = own[torch.randperm(length, generator=generator)]
            positions[row, head, :length] = positions[row, 0, :length] if aligned and head else own
            k[row, head, length:] = torch.nan
    table = torch.randperm(rows * pages, generator=generator).view(rows, pages)
    bias = torch.randn(LAYERS, spec.heads, CONTEXT, generator=generator, dtype=torch.float64)
    return CacheView(
        layers=(0, 1),
        spec=spec,
        bias_LHT=None if spec.bias_HT is None else bias,
        context=CONTEXT,
        k_pool=_paged(k.to(dtype), table),
        v_pool=_paged(v.to(dtype), table),
        pos_pool=_paged(positions.int(), table),
        tables_RN=table,
        lengths_R=torch.tensor(LENGTHS * LAYERS),
        positions_R=newest + 1,
        prompts_R=torch.full((rows,), 100),
        seeds_R=torch.tensor([5, 6] * LAYERS),
        stats=make_stats(spec, generator),
    )


def _paged(x, table):
    rows, pages = table.shape
    pool = torch.zeros(rows * pages, x.shape[1], BLOCK, *x.shape[3:], dtype=x.dtype)
    blocks = x.unflatten(2, (pages, BLOCK)).transpose(1, 2).flatten(0, 1)
    pool[table.flatten()] = blocks
    return pool


def make_stats(spec, generator):
    """Return statistics of random queries, rotated and unrotated components."""
    rest = spec.head_dim - 2 * spec.bands
    shape = (50, LAYERS, spec.content_heads)
    q = torch.randn(*shape, spec.bands, 2, generator=generator, dtype=torch.float64) + 0.5
    other = torch.randn(*shape, rest, generator=generator, dtype=torch.float64) - 0.3
    return {
        "q_mean": q.mean(0),
        "q_abs": q.norm(dim=-1).mean(0),
        "q_sq": q.square().sum(-1).mean(0),
        "rest_mean": other.mean(0),
        "rest_abs": other.abs().mean(0),
        "rest_sq": other.square().mean(0),
    }


def observe(policy: Policy, view: CacheView, q_RWHD, positions_RW):
    """Let the policy's observer see queries, layer by layer and token by token."""
    specs = [
        dataclasses.replace(
            view.spec, bias_HT=None if view.bias_LHT is None else view.bias_LHT[index]
        )
        for index in range(LAYERS)
    ]
    decoder = SimpleNamespace(layers=specs, device=torch.device("cpu"), dtype=view.k_pool.dtype)
    observer = policy.observer(decoder)
    if observer is None:
        return view
    rows = [observer.open() for _ in LENGTHS]
    for layer in view.layers:
        part = slice(layer * len(rows), (layer + 1) * len(rows))
        for step in range(q_RWHD.shape[1]):
            event = Attended(
                layer=layer,
                rows=rows,
                q_RTHD=q_RWHD[part, step : step + 1],
                positions_RT=positions_RW[part, step : step + 1],
                k_pool=view.k_pool,
                pos_pool=view.pos_pool,
                tables_RW=view.tables_RN[part],
                lengths_R=view.lengths_R[part],
            )
            observer.attended(event)
    return dataclasses.replace(view, observed=observer.observed(view.layers, rows))


@pytest.fixture(scope="session")
def cache() -> SimpleNamespace:
    """Return the helpers of this file by name."""
    return SimpleNamespace(
        make_spec=make_spec, make_view=make_view, observe=observe, context=CONTEXT, layers=LAYERS
    )
