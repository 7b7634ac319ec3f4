"""Mistakes are one line with the remedy; which backend a call takes; the launch table."""

import pytest
import torch

from common.errors import BackendError, ConfigError, LipError, ShapeError
from serve.kernels import compact_kv, paged_decode, rope_write, score_keys, select_slots
from serve.kernels.tuning import AMPERE, HOPPER, SAFE, tuning_for


def calls(paged):
    """Every kernel with good arguments, which a test then spoils: (kernel, arguments)."""
    k_pool, v_pool, pos_pool, tables = paged.make_cache([3], dtype=torch.float32)
    pools, one = (k_pool, v_pool, pos_pool), torch.tensor([3])
    q, k, turn = torch.zeros(1, 4, 8), torch.zeros(1, 2, 8), torch.zeros(1, 4)
    keep, scores = torch.zeros(1, 2, 1, dtype=torch.int64), torch.zeros(1, 2, 4)
    return {
        "score_keys": (score_keys, [k_pool, tables, one, q, torch.zeros(1, 4, 4)]),
        "select_slots": (select_slots, [scores, scores.int(), 2]),
        "compact_kv": (compact_kv, [pools, tables, keep, tables]),
        "paged_decode": (paged_decode, [q, *pools, tables, one, one, 1.0]),
        "rope_write": (rope_write, [q, k, k, turn, turn, *pools, one, one]),
    }


KERNELS = ["score_keys", "select_slots", "compact_kv", "paged_decode", "rope_write"]


@pytest.mark.parametrize("name", KERNELS)
def test_triton_on_the_cpu_is_refused(paged, name):
    """Oracle: the error contract: the device and the other backends are named."""
    kernel, arguments = calls(paged)[name]
    kernel(*arguments)
    with pytest.raises(BackendError, match="expected a CUDA device; use backend=auto"):
        kernel(*arguments, backend="triton")
    with pytest.raises(ConfigError, match="auto, torch, triton"):
        kernel(*arguments, backend="cuda")


SPOILED = [
    ("score_keys", 3, torch.zeros(1, 3, 8), "multiple of K"),
    ("score_keys", 4, torch.zeros(1, 4, 8), "one weight per query head and band"),
    ("score_keys", 2, torch.zeros(1, 5), r"\(R,\) or \(R, K\)"),
    ("score_keys", 1, torch.zeros(1, 0), "N > 0"),
    ("select_slots", 1, torch.zeros(1, 2, 5), "equal shapes"),
    ("select_slots", 2, 5, "widen the tables or lower the budget"),
    ("select_slots", 2, 0, "expected 1 to the number of slots"),
    ("compact_kv", 0, [], "at least one pool"),
    ("compact_kv", 2, torch.zeros(1, 2, 9, dtype=torch.int64), "destination slots"),
    ("compact_kv", 2, torch.zeros(1, 3, 1, dtype=torch.int64), "does not fit pools"),
    ("paged_decode", 0, torch.zeros(1, 4, 6), "multiple of K"),
    ("paged_decode", 2, torch.zeros(5, 2, 4, 8), "expected equal keys and values"),
    ("rope_write", 0, torch.zeros(2, 4, 8), r"expected \(N, H, D\)"),
    ("rope_write", 3, None, "or neither"),
    ("rope_write", 4, torch.zeros(1, 5), "2 F <= 8"),
    ("rope_write", 9, torch.zeros(2), r"\(N,\), \(N,\)"),
]


@pytest.mark.parametrize(
    ("name", "index", "value", "match"), SPOILED, ids=[f"{s[0]}-{s[1]}-{s[3]}" for s in SPOILED]
)
def test_a_wrong_shape_is_one_line_with_the_remedy(paged, name, index, value, match):
    """Oracle: the error contract."""
    kernel, arguments = calls(paged)[name]
    arguments[index] = value
    with pytest.raises(ShapeError, match=match) as caught:
        kernel(*arguments)
    assert isinstance(caught.value, LipError)
    assert "\n" not in str(caught.value)


def test_a_bias_needs_a_row_per_query_head(paged):
    """Oracle: the error contract."""
    kernel, arguments = calls(paged)["paged_decode"]
    with pytest.raises(ShapeError, match="one row per query head"):
        kernel(*arguments, torch.zeros(3, 9))


@pytest.mark.parametrize("name", KERNELS)
def test_no_rows_are_no_work(paged, name):
    """Oracle: results of the usual shape without rows; pools as they were."""
    kernel, arguments = calls(paged)[name]
    pools = [x for x in arguments if isinstance(x, torch.Tensor) and len(x) > 1]
    before = [pool.clone() for pool in pools]
    some = kernel(*arguments)
    for index, value in enumerate(arguments):
        if isinstance(value, torch.Tensor) and len(value) == 1:
            arguments[index] = value[:0]
    for pool, old in zip(pools, before, strict=True):
        pool.copy_(old)
    none = kernel(*arguments)
    for x, y in zip(*(r if isinstance(r, tuple) else (r,) for r in (none, some)), strict=True):
        assert x is y is None or (len(x) == 0 and x.shape[1:] == y.shape[1:])
    for pool, old in zip(pools, before, strict=True):
        assert torch.equal(pool.nan_to_num(), old.nan_to_num())


@pytest.mark.parametrize("tuning", [HOPPER, AMPERE, SAFE], ids=["hopper", "ampere", "safe"])
@pytest.mark.parametrize("width", [8, 64, 80, 128, 256])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_are_powers_of_two_that_fit(tuning, width, itemsize):
    """Property: Triton's ranges and matrix products take powers of two from 16."""
    for tile in (tuning.tile(width, itemsize), tuning.score_tile(width)):
        assert tile >= 16
        assert tile & (tile - 1) == 0
    # Keys and values of every stage, of the padded width: within the least shared memory, 99 KiB.
    padded = 1 << (width - 1).bit_length()
    assert 2 * tuning.stages * tuning.tile(width, itemsize) * padded * itemsize <= 99 * 1024


def test_splits_follow_from_the_width_of_the_table():
    """Oracle: parts of 256 slots, at most as many as the combination holds."""
    assert [HOPPER.splits(slots) for slots in (1, 256, 257, 2176, 10**7)] == [1, 1, 2, 9, 64]
    assert tuning_for(torch.device("cpu")) is SAFE
