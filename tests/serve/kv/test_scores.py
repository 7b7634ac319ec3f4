"""Each policy's score against its definition, slot by slot, in float64."""

# Legend: R rows, W queries, H query heads, D head width.

import math

import pytest
import torch

from serve.kv import attention, policy_by_name
from serve.kv.policies import rkv
from serve.kv.policies.rkv import redundancy

EXACT = 1e-10  # float64, sums of a few dozen terms


def tokens_of(view, row, head):
    """Return {slot: position} of the filled slots of a row and head."""
    pos = view.slot_positions()[row, head]
    return {slot: int(pos[slot]) for slot in range(len(pos)) if pos[slot] >= 0}


def logit(view, q, row, head, slot, query_position):
    """Return scale * q.k + bias of one query head and slot."""
    kv_head = head // view.spec.group
    z = view.spec.scale * float(q[head] @ view.keys()[row, kv_head, slot])
    if view.bias_LHT is None:
        return z
    position = tokens_of(view, row, kv_head)[slot]
    return z + float(view.bias_LHT[row // view.requests, head, query_position - position])


def softmax(logits):
    """Return weights of a dict of logits."""
    total = sum(map(math.exp, logits.values()))
    return {slot: math.exp(z) / total for slot, z in logits.items()}


def recent(cache, view, count):
    """Return random queries (R, W, H, D) at the last positions, those of positional heads zero."""
    q = torch.randn(len(view.tables_RN), count, view.spec.heads, 10, dtype=torch.float64)
    q[:, :, view.spec.content_heads :] = 0
    return q, view.positions_R[:, None] - count + torch.arange(count)


def mean_weights(view, q, positions, row, heads, exclude):
    """Average softmax weights over queries; logits of several heads enter by their largest."""
    tokens = tokens_of(view, row, heads[0] // view.spec.group)
    past = [s for s, p in tokens.items() if p < int(view.positions_R[row]) - exclude]
    mean = dict.fromkeys(past, 0.0)
    for query, position in zip(q[row], positions[row].tolist(), strict=True):
        seen = [s for s in past if tokens[s] <= position]
        logits = {s: max(logit(view, query, row, h, s, position) for h in heads) for s in seen}
        for slot, weight in softmax(logits).items():
            mean[slot] += weight / q.shape[1]
    return mean


def pooled(weights, tokens, kernel, kind):
    """Pool over neighbouring positions, zeros beyond the ends."""
    order = sorted(weights, key=tokens.__getitem__)
    result = {}
    for index, slot in enumerate(order):
        near = range(index - kernel // 2, index + kernel // 2 + 1)
        values = [weights[order[i]] if 0 <= i < len(order) else 0.0 for i in near]
        result[slot] = max(values) if kind == "max" else sum(values) / kernel
    return result


def check(score, view, expected):
    """Compare a score with expected(row, kv_head) -> {slot: value} on all content heads."""
    for row in range(len(view.tables_RN)):
        for head in range(view.spec.content_heads // view.spec.group):
            for slot, value in expected(row, head).items():
                assert abs(float(score[row, head, slot]) - value) < EXACT


def heads_of(view, head):
    """Return the query heads of a key/value head."""
    return range(head * view.spec.group, (head + 1) * view.spec.group)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("group", ["mean", "max"])
def test_snapkv(cache, group, with_bias):
    """Oracle: the published definition; window tokens rank above all."""
    torch.manual_seed(0)
    view = cache.make_view(cache.make_spec(with_bias=with_bias))
    pooling = {"mean": "mean", "max": "max"}[group]
    policy = policy_by_name("snapkv", queries=5, kernel=3, group=group, pooling=pooling)
    q, positions = recent(cache, view, 5)
    score = policy.score(cache.observe(policy, view, q, positions))

    def expected(row, head):
        tokens, heads = tokens_of(view, row, head), heads_of(view, head)
        sets = [list(heads)] if group == "max" else [[h] for h in heads]
        parts = [
            pooled(mean_weights(view, q, positions, row, own, 5), tokens, 3, pooling)
            for own in sets
        ]
        found = {slot: sum(part[slot] for part in parts) / len(parts) for slot in parts[0]}
        return {slot: found.get(slot, 1.0) for slot in tokens}

    check(score, view, expected)
    assert any(0 < value < 1 for value in expected(0, 0).values())


def test_tova(cache):
    """Oracle: attention of the newest query, averaged over the content heads of the layer."""
    torch.manual_seed(1)
    view = cache.make_view(cache.make_spec(), aligned=True)
    policy = policy_by_name("tova")
    q, positions = recent(cache, view, 3)
    score = policy.score(cache.observe(policy, view, q, positions))

    def expected(row, head):
        parts = [
            mean_weights(view, q[:, -1:], positions[:, -1:], row, [h], 0)
            for h in range(view.spec.content_heads)
        ]
        tokens, newest = tokens_of(view, row, head), int(view.positions_R[row]) - 1
        mean = {slot: sum(part[slot] for part in parts) / len(parts) for slot in tokens}
        return {slot: 1.0 if tokens[slot] == newest else mean[slot] for slot in tokens}

    check(score, view, expected)


@pytest.mark.parametrize("per_query", [False, True])
def test_h2o(cache, per_query):
    """Oracle: weights summed over queries and query heads."""
    torch.manual_seed(2)
    view = cache.make_view(cache.make_spec())
    policy = policy_by_name("h2o", per_query=per_query)
    q, positions = recent(cache, view, 4)
    score = policy.score(cache.observe(policy, view, q, positions))

    def expected(row, head):
        tokens = tokens_of(view, row, head)
        sums = dict.fromkeys(tokens, 0.0)
        for own in heads_of(view, head):
            for slot, weight in mean_weights(view, q, positions, row, [own], 0).items():
                sums[slot] += 4 * weight
        age = {slot: int(view.positions_R[row]) - p for slot, p in tokens.items()}
        return {s: x / age[s] if per_query else x for s, x in sums.items()}

    check(score, view, expected)


def test_rkv(cache):
    """Oracle: 0.1 attention less 0.9 redundancy, by the definition."""
    torch.manual_seed(3)
    view = cache.make_view(cache.make_spec())
    policy = policy_by_name("rkv", queries=4)
    q, positions = recent(cache, view, 4)
    score = policy.score(cache.observe(policy, view, q, positions))
    repeated = redundancy(view.keys(), view.slot_positions(), 0.5)

    def expected(row, head):
        tokens, heads = tokens_of(view, row, head), list(heads_of(view, head))
        weights = mean_weights(view, q, positions, row, heads, 4)
        found = pooled(weights, tokens, 7, "max")
        mixed = {s: 0.1 * w - 0.9 * float(repeated[row, head, s]) for s, w in found.items()}
        return {slot: mixed.get(slot, 1.0) for slot in tokens}

    check(score, view, expected)


def test_redundancy_spares_the_newest_duplicate(cache):
    """Oracle: the definition, pair by pair; half of the keys are near copies of others."""
    view = cache.make_view(cache.make_spec(content_heads=6))
    keys, pos = view.keys(), view.slot_positions()
    keys[:, :, 6:12] = keys[:, :, :6] + 0.1 * torch.randn_like(keys[:, :, :6])
    found = redundancy(keys, pos, 0.5)
    for row, head in ((0, 0), (1, 2), (3, 1)):
        slots = list(tokens_of(view, row, head))
        k = torch.nn.functional.normalize(keys[row, head], dim=-1)
        total = dict.fromkeys(slots, 0.0)
        for i in slots:
            cosine = {j: float(k[i] @ k[j]) for j in slots if j != i}
            twins = [j for j in cosine if cosine[j] > 0.5]
            if twins:
                del cosine[max(twins, key=lambda j, row=row, head=head: pos[row, head, j])]
            for j, value in cosine.items():
                total[j] += value / len(slots)
        expected = softmax(total)
        for slot in range(pos.shape[2]):
            assert abs(float(found[row, head, slot]) - expected.get(slot, 0.0)) < EXACT


@pytest.mark.parametrize("most", [1, 100, 1500])
def test_cutting_the_work_changes_nothing(cache, monkeypatch, most):
    """Oracle: the same scores from temporaries without a limit."""
    torch.manual_seed(6)
    view = cache.make_view(cache.make_spec())
    q, positions = recent(cache, view, 5)
    results = []
    for limit in (1 << 40, most):
        for module in (attention, rkv):
            monkeypatch.setattr(module, "largest_temporary", lambda device, limit=limit: limit)
        for name in ("snapkv", "rkv", "h2o"):
            policy = policy_by_name(name)
            results.append(policy.score(cache.observe(policy, view, q, positions)))
    for whole, cut in zip(results[:3], results[3:], strict=True):
        torch.testing.assert_close(cut, whole, atol=EXACT, rtol=0)


def test_knorm_and_keydiff(cache):
    """Oracle: the norms, and cosines with the mean of the normalised filled keys."""
    view = cache.make_view(cache.make_spec())
    keys = view.keys()

    def direction(row, head):
        slots = list(tokens_of(view, row, head))
        k = keys[row, head, slots]
        anchor = (k / k.norm(dim=-1, keepdim=True)).mean(0)
        cosines = (k @ anchor) / (k.norm(dim=-1) * anchor.norm())
        return dict(zip(slots, (-cosines).tolist(), strict=True))

    def norms(row, head):
        return {s: -float(keys[row, head, s].norm()) for s in tokens_of(view, row, head)}

    check(policy_by_name("knorm").score(view), view, norms)
    check(policy_by_name("keydiff").score(view), view, direction)


def rotation(spec, position):
    """Return the RoPE matrix (D, D) of one position, without its scale."""
    matrix = torch.eye(spec.head_dim, dtype=torch.float64)
    for band, frequency in enumerate(spec.inverse_frequency.tolist()):
        i, j = (2 * band, 2 * band + 1) if spec.interleaved else (band, band + spec.bands)
        cos, sin = math.cos(frequency * position), math.sin(frequency * position)
        matrix[i, i], matrix[i, j], matrix[j, i], matrix[j, j] = cos, -sin, sin, cos
    return matrix


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("use", [(True, True), (False, True), (True, False)])
def test_expected_attention(cache, interleaved, use):
    """Oracle: sample moments before RoPE, turned by the mean of explicit rotation matrices."""
    torch.manual_seed(4)
    spec = cache.make_spec(interleaved=interleaved)
    view = cache.make_view(spec)
    policy = policy_by_name(
        "expected_attention", horizon=20, use_covariance=use[0], use_values=use[1], sinks=3
    )
    raw = torch.randn(4, 12, spec.heads, 10, dtype=torch.float64) + 0.4
    positions = torch.arange(12).expand(4, -1)
    turns = torch.stack([rotation(spec, p) for p in range(12)])
    q = torch.einsum("wij,rwhj->rwhi", turns, raw)
    score = policy.score(cache.observe(policy, view, q, positions))
    values, keys = view.values(), view.keys()

    def expected(row, head):
        t = int(view.positions_R[row])
        mean_turn = torch.stack([rotation(spec, t + o) for o in range(20)]).mean(0)
        total = dict.fromkeys(tokens_of(view, row, head), 0.0)
        judged = {s: p for s, p in tokens_of(view, row, head).items() if p >= 3}
        for own in heads_of(view, head):
            sample = raw[row, 3:, own]
            mu = mean_turn @ sample.mean(0)
            covariance = mean_turn @ torch.cov(sample.T, correction=0) @ mean_turn.T
            logits = {}
            for slot, p in judged.items():
                k = keys[row, head, slot]
                logits[slot] = float(spec.scale * mu @ k)
                if use[0]:
                    logits[slot] += float(spec.scale**2 * k @ covariance @ k) / 2
                ahead = [d for d in range(t - p, t - p + 20) if d < cache.context]
                bias = view.bias_LHT[row // 2, own]
                logits[slot] += sum(float(bias[d]) for d in ahead) / len(ahead)
            for slot, weight in softmax(logits).items():
                norm = float(values[row, head, slot].norm()) if use[1] else 1.0
                total[slot] += weight * norm / spec.group
        return total

    check(score, view, expected)


def test_random_scores_follow_the_token(cache):
    """Property: seed, layer, head and position decide; the numbers are uniform."""
    view = cache.make_view(cache.make_spec())
    score, found = policy_by_name("random").score(view), {}
    for row in range(4):
        for head in range(3):
            for slot, position in tokens_of(view, row, head).items():
                key = (int(view.seeds_R[row]), row // 2, head, position)
                assert (
                    found.setdefault(key, float(score[row, head, slot])) == score[row, head, slot]
                )
    values = torch.tensor(list(found.values()))
    assert len(set(found.values())) == len(found)
    assert float(values.min()) >= 0
    assert float(values.max()) < 1
    # 186 uniform numbers: the mean is within five standard errors of a half.
    assert abs(float(values.mean()) - 0.5) < 5 * (12 * len(values)) ** -0.5
