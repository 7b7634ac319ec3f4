"""What selection decides for all policies: positional heads, sliding windows, shared sets."""

# Legend: R rows, K key/value heads, S slots.

import dataclasses
import math
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from common.errors import ConfigError
from serve.kv import CacheView, Policy, TriAttentionPolicy, choose, policy_by_name
from serve.kv.policies import KnormPolicy
from serve.kv.positional import future_mass
from serve.kv.selection import standardize

EXACT = 1e-10


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PlainPolicy(Policy):
    """Scores are the norms of the values, compared as they are."""

    name: ClassVar[str] = "plain"
    is_standardized = True

    def score(self, view: CacheView) -> Tensor:
        """Return |v|."""
        return view.values().norm(dim=-1)


def brute_mass(view, row, kv_head, interval):
    """Sum the weights of the next queries by the definition, query by query."""
    positions = [p for p in view.slot_positions()[row, kv_head].tolist() if p >= 0]
    t, total = int(view.positions_R[row]), dict.fromkeys(positions, 0.0)
    group = view.spec.group
    for head in range(kv_head * group, (kv_head + 1) * group):
        bias = view.bias_LHT[row // view.requests, head]
        for query in range(t, min(t + interval, view.context)):
            seen = positions + list(range(t, query + 1))
            weights = [math.exp(float(bias[query - p])) for p in seen]
            for position in positions:
                total[position] += math.exp(float(bias[query - position])) / sum(weights)
    return total


@pytest.mark.parametrize("content_heads", [0, 4])
@pytest.mark.parametrize("interval", [1, 7, 40])
def test_future_mass_equals_the_attention_to_come(cache, content_heads, interval):
    """Oracle: softmax of the bias for each later query, to the end of the context (64)."""
    view = cache.make_view(cache.make_spec(content_heads=content_heads))
    mass, first = future_mass(view, interval), content_heads // 2
    assert mass.shape[1] == 3 - first
    for row in range(4):
        for head in range(first, 3):
            expected, pos = brute_mass(view, row, head, interval), view.slot_positions()[row, head]
            for slot in (pos >= 0).nonzero()[:, 0].tolist():
                assert abs(float(mass[row, head - first, slot]) - expected[int(pos[slot])]) < EXACT


def test_heads_without_bias_or_future_queries_score_alike(cache):
    """Oracle: uniform attention; and nothing at all where the context is used up."""
    view = cache.make_view(cache.make_spec(content_heads=0, with_bias=False))
    mass = future_mass(view, 2)
    assert abs(float(mass[0, 0, 0]) - 2 * (1 / 20 + 1 / 21)) < EXACT
    full = dataclasses.replace(view, context=41, positions_R=torch.full_like(view.positions_R, 41))
    assert not future_mass(full, 2).any()


@pytest.mark.parametrize("name", ["knorm", "snapkv", "triattention", "expected_attention", "h2o"])
def test_positional_heads_keep_the_best_known_set(cache, name):
    """Oracle: the largest future mass among the unprotected, whatever the policy."""
    view = cache.make_view(cache.make_spec())
    policy = policy_by_name(name, budget=9, sinks=1, window=2, interval=5)
    q = torch.zeros(4, 1, 6, 10, dtype=torch.float64)
    view = cache.observe(policy, view, q, view.positions_R[:, None] - 1)
    keep = choose(policy, [view], 9)[0]
    for row in range(4):
        mass, pos = brute_mass(view, row, 2, 5), view.slot_positions()[row, 2]
        newest = max(mass)
        protected = {p for p in mass if p < 1 or p > newest - 2}
        rest = sorted(set(mass) - protected, key=mass.__getitem__, reverse=True)
        expected = protected | set(rest[: 9 - len(protected)])
        assert set(pos[keep[row, 2]].tolist()) == expected


def test_sliding_layers_keep_the_newest(cache):
    """Oracle: recency, although the policy says otherwise."""
    view = cache.make_view(cache.make_spec(sliding_window=8))
    keep = choose(KnormPolicy(budget=6, sinks=0, window=1), [view], 6)[0]
    pos = view.slot_positions()
    assert torch.equal(
        pos.gather(2, keep).sort(dim=-1).values, pos.topk(6, dim=-1).values.sort(dim=-1).values
    )


@pytest.mark.parametrize("selection", ["union", "per_head"])
def test_shared_sets_follow_the_definition(cache, selection):
    """Oracle: top-k of the largest score of all heads, or of the mean over layers, in Python."""
    spec = cache.make_spec(content_heads=6)
    view = cache.make_view(spec, aligned=True)
    view = dataclasses.replace(view, pos_pool=_aligned_over_layers(view), stats=None)
    policy = PlainPolicy(budget=7, sinks=1, window=2, selection=selection)
    keep, norms = choose(policy, [view], 7)[0], view.values().norm(dim=-1)
    pos = view.slot_positions()
    for request in range(2):
        rows = (request, 2 + request)
        for head in range(3):
            own = norms[list(rows)]
            score = own.amax((0, 1)) if selection == "union" else own[:, head].mean(0)
            tokens = {s: int(p) for s, p in enumerate(pos[request, head].tolist()) if p >= 0}
            newest = max(tokens.values())
            fixed = {s for s, p in tokens.items() if p < 1 or p > newest - 2}
            rest = sorted(set(tokens) - fixed, key=lambda s, x=score: float(x[s]), reverse=True)
            expected = sorted(fixed | set(rest[: 7 - len(fixed)]))
            assert keep[rows[0], head].tolist() == expected
            assert keep[rows[1], head].tolist() == expected


def _aligned_over_layers(view):
    """Give the slots of the second layer the positions of the first."""
    pool = view.pos_pool.clone()
    first, second = view.tables_RN.chunk(2)
    pool[second.flatten()] = pool[first.flatten()]
    return pool


def test_union_of_triattention_is_the_largest_over_query_heads(cache):
    """Oracle: z-scores of every query head and layer, one maximum over all of them."""
    view = cache.make_view(cache.make_spec(content_heads=6), aligned=True)
    view = dataclasses.replace(view, pos_pool=_aligned_over_layers(view))
    policy = TriAttentionPolicy(budget=7, sinks=0, window=1, selection="union")
    keep, pos = choose(policy, [view], 7)[0], view.slot_positions()
    raw = policy.raw_scores(view)
    for request in range(2):
        tokens = {s: int(p) for s, p in enumerate(pos[request, 0].tolist()) if p >= 0}
        newest = max(tokens.values())
        free = [s for s, p in tokens.items() if p < newest]
        best = dict.fromkeys(free, -math.inf)
        for row in (request, 2 + request):
            for head in range(6):
                z = raw[row, head, free]
                z = (z - z.mean()) / z.std(correction=0)
                for slot, value in zip(free, z.tolist(), strict=True):
                    best[slot] = max(best[slot], value)
        fixed = [s for s, p in tokens.items() if p == newest]
        chosen = sorted(fixed + sorted(free, key=best.__getitem__, reverse=True)[:6])
        for row in (request, 2 + request):
            assert all(keep[row, head].tolist() == chosen for head in range(3))


@pytest.mark.parametrize("selection", ["union", "per_head"])
def test_layers_of_large_scores_do_not_decide_alone(cache, selection):
    """Property: the unit of a layer's queries is nothing to a shared set, z-scores or not."""
    spec = cache.make_spec(content_heads=6, with_bias=False)
    view = cache.make_view(spec, aligned=True)
    view = dataclasses.replace(view, pos_pool=_aligned_over_layers(view))
    unit = torch.tensor([1.0, 100.0], dtype=torch.float64)
    stats = {name: torch.einsum("l,l...->l...", unit, x) for name, x in view.stats.items()}
    scaled = dataclasses.replace(view, stats=stats)
    for normalize in (True, False):
        policy = TriAttentionPolicy(budget=9, window=1, selection=selection, normalize=normalize)
        assert torch.equal(choose(policy, [view], 7)[0], choose(policy, [scaled], 7)[0])


def test_per_head_needs_equal_numbers_of_heads(cache):
    """Oracle: the error contract."""
    wide = cache.make_view(cache.make_spec(content_heads=6))
    narrow = cache.make_view(cache.make_spec(heads=4, kv_heads=2, content_heads=4))
    policy = PlainPolicy(budget=7, sinks=1, window=2, selection="per_head")
    with pytest.raises(ConfigError, match="different numbers of key/value heads"):
        choose(policy, [wide, narrow], 7)


@pytest.mark.parametrize("selection", ["union", "per_head"])
def test_sliding_windows_alone_have_nothing_to_share(cache, selection):
    """Oracle: the most recent slots, as without sharing."""
    view = cache.make_view(dataclasses.replace(cache.make_spec(), sliding_window=8))
    own = PlainPolicy(budget=7, sinks=1, window=2)
    shared = dataclasses.replace(own, selection=selection)
    assert torch.equal(choose(shared, [view], 7)[0], choose(own, [view], 7)[0])


def test_standardized_scores_have_mean_zero_and_deviation_one():
    """Property: over the candidates; an affine change of the scores changes nothing."""
    torch.manual_seed(5)
    raw, free = torch.randn(2, 3, 2, 30, dtype=torch.float64), torch.rand(2, 3, 30) < 0.6
    z = standardize(raw, free)
    for row, head in ((0, 0), (1, 2)):
        own = z[row, head][:, free[row, head]]
        assert float(own.mean(-1).abs().max()) < EXACT
        assert float((own.std(-1, correction=0) - 1).abs().max()) < EXACT
    torch.testing.assert_close(standardize(3 * raw - 7, free), z)
