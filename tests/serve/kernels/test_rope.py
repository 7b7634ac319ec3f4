"""Rotation and cache writes: against complex multiplication, token by token."""

import cmath

import pytest
import torch

from serve.kernels import rope_write

EXACT = 1e-12  # float64 products
LAYOUTS = [(False, 4), (True, 4), (False, 3), (True, 2)]  # interleaved, bands of D = 8
LAYOUT_IDS = ["half", "interleaved", "half-partial", "interleaved-partial"]
SLOTS = [7, -1, 13, 0]
POSITIONS = [100, 101, 102, 103]


def make_inputs(dtype=torch.float64):
    """Queries of 4 heads, keys and values of 2; empty pools of 5 blocks of 4."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(4, heads, 8, generator=generator, dtype=torch.float64).to(dtype)
        for heads in (4, 2, 2)
    )
    pools = [torch.zeros(5, 2, 4, 8, dtype=dtype) for _ in range(2)]
    pools.append(torch.full((5, 2, 4), -5, dtype=torch.int32))
    return q, k, v, pools


def angles(bands):
    """Random angles (N, F)."""
    return 6.0 * torch.rand(4, bands, generator=torch.Generator().manual_seed(1)).double()


def turned(vector, angle, interleaved):
    """Multiply each band by exp(i angle)."""
    out, bands = list(vector), len(angle)
    for band in range(bands):
        re, im = (2 * band, 2 * band + 1) if interleaved else (band, band + bands)
        z = complex(vector[re], vector[im]) * cmath.exp(1j * angle[band])
        out[re], out[im] = z.real, z.imag
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize(("interleaved", "bands"), LAYOUTS, ids=LAYOUT_IDS)
def test_queries_and_keys_turn_and_land_in_their_slots(interleaved, bands):
    """Oracle: complex multiplication, component by component; padding writes nothing."""
    q, k, v, pools = make_inputs()
    angle = angles(bands)
    places = (torch.tensor(POSITIONS), torch.tensor(SLOTS))
    turns = (angle.cos(), angle.sin())
    out = rope_write(q, k, v, *turns, *pools, *places, interleaved=interleaved)
    k_pool, v_pool, pos_pool = pools
    written = torch.zeros(5, 4, dtype=torch.bool)
    for token, slot in enumerate(SLOTS):
        for head in range(4):
            expected = turned(q[token, head].tolist(), angle[token].tolist(), interleaved)
            assert float((out[token, head] - expected).abs().max()) < EXACT
        if slot < 0:
            continue
        block, offset = divmod(slot, 4)
        written[block, offset] = True
        for head in range(2):
            expected = turned(k[token, head].tolist(), angle[token].tolist(), interleaved)
            assert float((k_pool[block, head, offset] - expected).abs().max()) < EXACT
            assert torch.equal(v_pool[block, head, offset], v[token, head])
            assert int(pos_pool[block, head, offset]) == POSITIONS[token]
    untouched = ~written[:, None].expand(5, 2, 4)
    assert bool((k_pool[untouched] == 0).all())
    assert bool((v_pool[untouched] == 0).all())
    assert bool((pos_pool[untouched] == -5).all())


def test_without_angles_everything_is_written_as_it_is():
    """Oracle: the inputs."""
    q, k, v, pools = make_inputs(torch.bfloat16)
    places = (torch.tensor(POSITIONS), torch.tensor([1, 2, 3, 4]))
    assert torch.equal(rope_write(q, k, v, None, None, *pools, *places), q)
    for token, slot in enumerate([1, 2, 3, 4]):
        block, offset = divmod(slot, 4)
        assert torch.equal(pools[0][block, :, offset], k[token])
        assert torch.equal(pools[1][block, :, offset], v[token])


def test_rotation_in_bfloat16_rounds_once():
    """Property: norms change by no more than the rounding, 2^-8 relative; float32 arithmetic."""
    q, k, v, pools = make_inputs(torch.bfloat16)
    angle = angles(4).float()
    places = (torch.tensor(POSITIONS), torch.arange(4))
    out = rope_write(q, k, v, angle.cos(), angle.sin(), *pools, *places)
    before, after = (x.double().norm(dim=-1) for x in (q, out))
    assert bool(((after - before).abs() <= 2**-8 * before).all())
    exact = rope_write(q.float(), k.float(), v.float(), angle.cos(), angle.sin(),
                       *(pool.float() for pool in pools[:2]), pools[2], *places)  # fmt: skip
    assert torch.equal(out, exact.bfloat16())


PROGRAM = """
    # (interleaved, tokens, heads, KV heads, width, bands): several programs of heads, none
    # rotated, strided inputs; 26 programs
    for interleaved, tokens, heads, kv_heads, width, bands in [
        (False, 3, 4, 2, 12, 6), (True, 2, 3, 1, 16, 4), (False, 2, 10, 9, 8, 4),
        (True, 2, 2, 1, 8, 4), (False, 3, 4, 2, 8, None),
    ]:
        block_size, blocks = 4, 5
        qkv = torch.randn(tokens, heads + 2 * kv_heads, width).bfloat16()
        q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
        cos = sin = None
        if bands:
            angle = torch.randn(tokens, bands)
            cos, sin = angle.cos(), angle.sin()
        places = (torch.tensor([100, 200, 300])[:tokens], torch.tensor([7, -1, 13])[:tokens])
        shape = (blocks, kv_heads, block_size)
        pools = [torch.zeros(*shape, width).bfloat16() for _ in range(2)]
        pools.append(torch.zeros(shape).int())
        results = []
        for backend in ("torch", "triton"):
            copies = [pool.clone() for pool in pools]
            out = kernels.rope_write(
                q, k, v, cos, sin, *copies, *places, interleaved=interleaved, backend=backend
            )
            results.append([out, *copies])
        for want, got in zip(*results, strict=True):
            # Fused multiply-add may round differently: one unit in the last place.
            assert float((want.float() - got.float()).abs().max()) < 2e-2, bands
        assert torch.equal(results[0][2], results[1][2])
        assert torch.equal(results[0][3], results[1][3])
"""


@pytest.mark.slow
def test_triton_writes_alike_under_the_interpreter(interpreted):
    """Oracle: the torch reference; values and positions exactly."""
    interpreted(PROGRAM)
