"""Selection: against a lexicographic sort in Python, with ties, infinities and short rows."""

import math

import pytest
import torch

from serve.kernels import compact_kv, gather_pages, select_slots


def random_scores(seed, *, rows=3, heads=2, slots=40, levels=None):
    """Scores with ties if ``levels`` is given, protected slots, unfilled tails; positions."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, heads, slots)
    scores = torch.randn(shape, generator=generator)
    if levels:
        scores = torch.randint(levels, shape, generator=generator).float() - levels // 2
        scores[..., ::2] *= -1.0  # minus zero ties with zero
    positions = torch.rand(shape, generator=generator).argsort(-1)
    scores[positions < 3] = math.inf
    for row in range(rows):
        length = int(torch.randint(slots // 2, slots + 1, (1,), generator=generator))
        scores[row, :, length:] = -math.inf
        positions[row, :, length:] = -1
    return scores, positions


def lexicographic(scores, positions, budget):
    """Select by sorting (score, position) descending, then by index."""
    keep = torch.zeros(*scores.shape[:2], budget, dtype=torch.int64)
    for row in range(scores.shape[0]):
        for head in range(scores.shape[1]):
            s, p = scores[row, head].tolist(), positions[row, head].tolist()
            order = sorted(range(len(s)), key=lambda i: (-s[i], -p[i], i))
            keep[row, head] = torch.tensor(sorted(order[:budget]))
    return keep


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("levels", [None, 3], ids=["distinct", "ties"])
@pytest.mark.parametrize("budget", [1, 2, 17, 30, 40])
def test_selection_is_lexicographic(seed, levels, budget):
    """Oracle: Python's sort by score, position and index."""
    scores, positions = random_scores(seed, levels=levels)
    keep = select_slots(scores, positions, budget)
    assert keep.dtype == torch.int64
    assert torch.equal(keep, lexicographic(scores, positions, budget))


def test_protected_slots_survive_and_the_newest_of_them_when_there_are_too_many():
    """Oracle: the contract of +inf."""
    positions = torch.tensor([[[7, 3, 9, 1, 5, 0]]])
    scores = torch.tensor([[[math.inf, 8.0, math.inf, math.inf, 9.0, 7.0]]])
    assert select_slots(scores, positions, 4).tolist() == [[[0, 2, 3, 4]]]
    assert select_slots(scores, positions, 2).tolist() == [[[0, 2]]]


def test_a_short_row_keeps_all_it_has():
    """Oracle: the contract of unfilled slots."""
    scores = torch.tensor([[[0.5, -1.0, -math.inf, -math.inf]]])
    positions = torch.tensor([[[4, 8, -1, -1]]])
    assert select_slots(scores, positions, 3).tolist() == [[[0, 1, 2]]]


@pytest.mark.parametrize("seed", range(4))
def test_selecting_from_what_was_selected_changes_nothing(seed):
    """Property: with the same scores, selection and compaction of a compacted cache are no-ops."""
    budget, block_size = 16, 4
    scores, positions = random_scores(seed, levels=4 if seed % 2 else None)
    rows, heads, slots = scores.shape
    tables = torch.randperm(rows * slots // block_size).view(rows, -1)
    pools = []
    for content in (scores, positions):
        paged_content = content.view(rows, heads, -1, block_size).transpose(1, 2).flatten(0, 1)
        pools.append(
            torch.empty_like(paged_content).index_copy_(0, tables.flatten(), paged_content)
        )
    keep = select_slots(scores, positions, budget)
    compact_kv(pools, tables, keep, tables)
    kept_scores, kept_positions = (gather_pages(pool, tables)[..., :budget] for pool in pools)
    again = select_slots(kept_scores, kept_positions, budget)
    assert torch.equal(again, torch.arange(budget).expand_as(again))
    before = [pool.clone() for pool in pools]
    compact_kv(pools, tables, again, tables)
    for pool, old in zip(pools, before, strict=True):
        assert torch.equal(pool, old)


def test_double_scores_differ_where_single_ones_tie():
    """Oracle: a difference below float32's resolution."""
    scores = torch.tensor([[[1.0 + 1e-12, 1.0, 0.0]]], dtype=torch.float64)
    positions = torch.tensor([[[0, 1, 2]]])
    assert select_slots(scores, positions, 1).tolist() == [[[0]]]
    assert select_slots(scores.float(), positions, 1).tolist() == [[[1]]]


PROGRAM = """
    import sys
    sys.path.insert(0, "tests/serve/kernels")
    from test_select import random_scores
    # One tile and several (tiles hold 512 slots); ties at every level of the key; 16 programs
    for seed, slots, levels, budgets in [
        (0, 40, None, [1, 40]), (1, 37, 3, [20]), (2, 700, 5, [600]),
    ]:
        scores, positions = random_scores(seed, rows=2, slots=slots, levels=levels)
        for budget in budgets:
            want = kernels.select_slots(scores, positions, budget)
            narrow = positions.int()
            got = kernels.select_slots(scores, narrow, budget, backend="triton")
            assert torch.equal(got, want), (seed, budget)
"""


@pytest.mark.slow
def test_triton_selects_alike_under_the_interpreter(interpreted):
    """Oracle: the torch reference, exactly."""
    interpreted(PROGRAM)
