"""The certified eviction error against full attention, on every kind of head, in float64."""

import itertools
import math

import pytest
import torch

from common.errors import CertificateError, ConfigError
from common.models import LipschitzTransformer, ModelConfig
from serve.decoder import layer_spec
from serve.kernels import compact_kv, paged_decode
from serve.kv import CacheView, choose, eviction, policy_by_name
from serve.kv.calibrate import calibrate, layer_stats
from serve.kv.deviation import (
    AttentionConstants,
    Summary,
    head_deviation,
    log_mass_bound,
    segment_length,
)
from serve.kv.eviction import Deviation, EvictionLedger
from solvers.bounds import certify

IDENTITY = 1e-12  # float64, outputs of size one
LENGTH, VOCAB = 36, 13

KINDS = {
    "content": {"heads": 4, "kv_heads": 2},
    "content_and_bias": {"heads": 4, "kv_heads": 4, "position_bias": True},
    "mixed": {"heads": 6, "kv_heads": 3, "content_heads": 2, "position_bias": True},
    "positional": {"heads": 4, "kv_heads": 2, "content_heads": 0, "position_bias": True},
    "multi_query": {"heads": 4, "kv_heads": 1, "softmax_scale": 6.0},
}


def make_model(kind, *, seed=0, gain=1.0, slope=0.0):
    """A random float64 model; ``slope`` makes the biases fall off with the distance."""
    torch.manual_seed(seed)
    fields = {"vocab_size": VOCAB, "width": 24, "layers": 2, "head_dim": 6, "context": 48}
    config = ModelConfig(**fields, attn_residual=0.5, **KINDS[kind])
    model = LipschitzTransformer(config).double().eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=gain / math.sqrt(24))
    torch.nn.init.normal_(model.embedding.weight, std=1.0)
    for layer in model.layers:
        if layer.attention.position_bias is not None:
            bias = torch.randn(layer.layer.heads, 48) - slope * torch.arange(48)
            layer.attention.position_bias.copy_(bias)
    return model


def make_certificate(model):
    """The network certificate from operator norms alone: valid, quick, far from tight."""
    return certify(model, tighten=False)


class CompressedRun:
    """One sequence decoded token by token over a compacted cache; records everything."""

    def __init__(self, model, ledger, policy, stats, block_size=4):
        self.model, self.ledger, self.policy, self.stats = model, ledger, policy, stats
        layers, pages = model.layers, -(-policy.trigger // block_size)
        self.tables = torch.arange(pages).flip(0)[None].int()
        self.pools = []
        for layer in layers:
            shape = (pages, layer.layer.kv_heads, block_size)
            keys = torch.zeros(*shape, layer.layer.head_dim, dtype=torch.float64)
            pos = torch.zeros(shape, dtype=torch.int32)
            self.pools.append((keys, torch.zeros_like(keys), pos))
        self.row, self.kv_len, self.block_size = ledger.open(), 0, block_size
        self.inputs = [[] for _ in layers]
        self.outputs = [[] for _ in layers]
        self.attention = [[] for _ in layers]

    def attend(self, layer, q, k, v):
        """Write one token's cache slot, attend, and let the ledger see it."""
        keys, values, pos = self.pools[layer]
        at = (int(self.tables[0, self.kv_len // self.block_size]), slice(None))
        at = (*at, self.kv_len % self.block_size)
        keys[at], values[at], pos[at] = k[0, :, 0], v[0, :, 0], self.position
        length, position = torch.tensor([self.kv_len + 1]), torch.tensor([self.position])
        module = self.model.layers[layer].attention
        o, lse = paged_decode(
            q[:, :, 0], keys, values, pos, self.tables, length, position,
            module.layer.logit_scale, module.position_bias,
        )  # fmt: skip
        self.ledger.observe(layer, [self.row], q[:, :, 0], o, lse, position)
        gone = self.ledger.summaries[layer].is_gone[self.row].clone()
        self.attention[layer].append((q[0, :, 0], k[0, :, 0], v[0, :, 0], o[0], gone))
        return o[:, :, None]

    def step(self, token, position):
        """Run one token and compact when due."""
        self.position = position
        x = self.model.embed(torch.tensor([[token]]))
        where = torch.tensor([[position]])
        for index, layer in enumerate(self.model.layers):
            self.inputs[index].append(x[0, 0])
            x = layer.attend_block(x, where, self.attend)
            self.outputs[index].append(x[0, 0])
            x = layer.mlp_block(x)
        self.kv_len += 1
        if self.kv_len >= self.policy.trigger:
            self.compact()
        return self.model.logits(x)[0, 0]

    def compact(self):
        """Cut every layer's cache to the budget."""
        for index, (keys, values, pos) in enumerate(self.pools):
            spec = layer_spec(self.model.layers[index].attention)
            stats = self.stats[index]
            view = CacheView(
                layers=(index,), spec=spec,
                bias_LHT=None if spec.bias_HT is None else spec.bias_HT[None],
                context=self.model.config.context, k_pool=keys, v_pool=values, pos_pool=pos,
                tables_RN=self.tables, lengths_R=torch.tensor([self.kv_len]),
                positions_R=torch.tensor([self.position + 1]),
                prompts_R=torch.tensor([LENGTH]), seeds_R=torch.tensor([0]),
                stats=None if stats is None else {k: x[None] for k, x in stats.items()},
            )  # fmt: skip
            keep = choose(self.policy, [view], self.policy.budget)[0]
            self.ledger.evict(view, [self.row], keep)
            compact_kv((keys, values, pos), self.tables, keep, self.tables)
        self.kv_len = self.policy.budget


def run_compressed(model, *, policy="triattention", clusters=4, structured=False, budget=12):
    """Decode a text with a small budget; returns the run, its tokens, logits and bounds."""
    tokens = torch.randint(VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(5))
    if structured:
        tokens = tokens[:7].repeat(9)[:LENGTH]
    stats = layer_stats(calibrate(model, [tokens[None]]), model)
    ledger = EvictionLedger(model, make_certificate(model), clusters=clusters)
    options = policy_by_name(policy, budget=budget, interval=5, sinks=2, window=3)
    run = CompressedRun(model, ledger, options, stats)
    logits, bounds, deltas = [], [], []
    for position, token in enumerate(tokens.tolist()):
        logits.append(run.step(token, position))
        bounds.append(ledger.deviation([run.row]))
        deltas.append(ledger.delta_RL[run.row].clone())
    return run, tokens, torch.stack(logits), bounds, torch.stack(deltas)


@pytest.mark.parametrize("kind", KINDS)
def test_head_identity_and_block_bound_hold(kind):
    """Oracle: full attention over the recorded keys; o - o' = eps (v_E - o') exactly."""
    model = make_model(kind, gain=1.5)
    run, _, _, _, deltas = run_compressed(model)
    for index, layer in enumerate(model.layers):
        q, k, v, kept, gone = (
            torch.stack(part) for part in zip(*run.attention[index], strict=True)
        )
        x = torch.stack(run.inputs[index])[None]
        moved = (layer.attend_block(x)[0] - torch.stack(run.outputs[index])).norm(dim=-1)
        # The bound of a step is the running maximum of the block's deviation so far.
        assert bool((moved.cummax(0).values <= deltas[:, index] + IDENTITY).all())
        assert float(moved.max()) > 1e-4
        group, bias = layer.layer.group, layer.attention.position_bias
        for t in range(14, LENGTH, 5):
            for head in range(layer.layer.heads):
                z = layer.layer.logit_scale * k[: t + 1, head // group] @ q[t, head]
                if bias is not None:
                    z = z + bias[head, t - torch.arange(t + 1)]
                p, value = z.softmax(0), v[: t + 1, head // group]
                evicted = gone[t, head // group, : t + 1]
                eps = p[evicted].sum()
                lost = p[evicted] @ value[evicted] / eps if bool(evicted.any()) else 0
                error = p @ value - kept[t, head] - eps * (lost - kept[t, head])
                assert float(error.abs().max()) < IDENTITY


@pytest.mark.parametrize(("policy", "structured"), [("window", False), ("triattention", True)])
@pytest.mark.parametrize("kind", KINDS)
def test_certified_logit_deviation_dominates_the_true_one(kind, structured, policy):
    """Oracle: the model with its full cache, at every token; the bound is valid at each of them."""
    model = make_model(kind, seed=3, gain=0.8)
    _, tokens, logits, bounds, _ = run_compressed(model, policy=policy, structured=structured)
    full = model(tokens[None])[0]
    moved = (logits - full).square().mean(1).sqrt()
    bound = torch.cat([bound.logits_R for bound in bounds])
    assert bool((moved <= bound + IDENTITY).all())
    assert float(moved.max()) > 1e-5
    assert bool(bound.isfinite().all())
    assert bool((bound.diff() >= 0).all())
    pairs = ((logits - full)[:, :, None] - (logits - full)[:, None]).abs().amax((1, 2))
    assert bool((pairs <= torch.cat([bound.pair_R for bound in bounds]) + IDENTITY).all())
    for t, bound_t in enumerate(bounds):
        if bool(bound_t.keeps_top1(logits[t : t + 1])):
            assert int(logits[t].argmax()) == int(full[t].argmax())


def test_nothing_evicted_means_no_deviation():
    """Oracle: a budget beyond the text; bounds are exactly zero and every token is certified."""
    model = make_model("mixed")
    _, tokens, logits, bounds, _ = run_compressed(model, policy="window", budget=LENGTH)
    assert all(float(bound.logits_R) == 0 for bound in bounds)
    assert all(bool(b.keeps_top1(logits[t : t + 1])) for t, b in enumerate(bounds))
    assert float((logits - model(tokens[None])[0]).abs().max()) < IDENTITY


def test_steep_biases_make_eviction_harmless_and_provably_so():
    """Property: a positional head that ignores the far past has a tiny certified error."""
    model = make_model("positional", slope=3.0)
    _, tokens, logits, bounds, _ = run_compressed(model, policy="window", budget=20)
    certified = [bool(b.keeps_top1(logits[t : t + 1])) for t, b in enumerate(bounds)]
    assert float(bounds[-1].logits_R) < 1e-6
    assert all(certified)
    assert torch.equal(logits.argmax(1), model(tokens[None])[0].argmax(1))


def test_deviation_equals_the_certificates_error_recursion():
    """Oracle: ``Certificate.logit_deviation`` with zero for the MLP blocks."""
    model = make_model("content_and_bias")
    run, _, _, bounds, deltas = run_compressed(model)
    per_block = [value for delta in deltas[-1].tolist() for value in (delta, 0.0)]
    expected = run.ledger.certificate.logit_deviation(per_block)
    assert abs(float(bounds[-1].logits_R) / expected - 1) < 1e-9


def test_more_clusters_are_not_looser_on_the_whole():
    """Property: a refined partition has smaller balls; summed over the run the bound shrinks."""
    model = make_model("content", gain=1.5)
    totals = [float(run_compressed(model, clusters=c)[4].sum()) for c in (1, 16)]
    assert totals[1] < totals[0]


def test_summary_balls_contain_every_evicted_key_and_value():
    """Oracle: the distances themselves, over several rounds of evictions."""
    torch.manual_seed(2)
    summary = Summary.empty((2, 3, 4), 5, 30, torch.device("cpu"))
    seen = []
    for start in range(0, 30, 10):
        keys, values = torch.randn(2, 2, 3, 10, 5, dtype=torch.float64)
        positions = (start + torch.arange(10)).expand(2, 3, 10)
        gone = torch.rand(2, 3, 10) < 0.6
        summary.add(keys, values, positions, gone)
        seen.append((keys, values, positions, gone))
    keys, values = (torch.cat([part[i] for part in seen], 2) for i in (0, 1))
    positions, gone = (torch.cat([part[i] for part in seen], 2) for i in (2, 3))
    assert torch.equal(summary.is_gone, gone)
    cluster = positions // segment_length(30, 4)
    for c in range(4):
        inside = gone & (cluster == c)
        assert torch.equal(summary.count[:, :, c], inside.sum(2).double())
        for x, centre, radius in (
            (keys, summary.key_centre, summary.key_radius),
            (values, summary.value_centre, summary.value_radius),
        ):
            far = (x - centre[:, :, c, None]).norm(dim=-1)
            assert bool((far.where(inside, 0) <= radius[:, :, c, None]).all())
            mean = (x * inside[..., None]).sum(2) / inside.sum(2).clamp(min=1)[..., None]
            assert float((mean - centre[:, :, c]).abs().max()) < IDENTITY


def filled_summary(kind, *, spread=1.0, seed=4):
    """A layer of the given kind, two rows with random evictions, and the evicted slots."""
    model = make_model(kind, gain=2.0)
    layer = model.layers[0].layer
    generator = torch.Generator().manual_seed(seed)
    shape, size = (2, layer.kv_heads, 30), layer.head_dim
    centre = torch.randn(*shape[:2], 1, size, generator=generator, dtype=torch.float64)
    noise = torch.randn(*shape, size, generator=generator, dtype=torch.float64)
    keys, values = centre + spread * noise, noise.flip(2)
    keys[:, layer.content_kv_heads :] = 0
    gone = torch.rand(shape, generator=generator) < 0.5
    summary = Summary.empty((*shape[:2], 4), size, 48, torch.device("cpu"))
    summary.add(keys, values, torch.arange(30).expand(shape), gone)
    return model, summary, keys, gone


def true_log_mass(model, keys, gone, q, t, cluster):
    """Log-sum-exp of the evicted logits of one cluster, straight from the definition."""
    layer, bias = model.layers[0].layer, model.layers[0].attention.position_bias
    z = layer.logit_scale * q @ keys[:, :, None].mT
    if bias is not None:
        z = z + bias[:, t - torch.arange(30)].view(1, layer.kv_heads, layer.group, 1, 30)
    inside = gone & (torch.arange(30) // segment_length(48, 4) == cluster)
    return z.masked_fill(~inside[:, :, None, None], -torch.inf).logsumexp(-1)[..., 0]


@pytest.mark.parametrize("spread", [0.0, 0.3, 5.0])
@pytest.mark.parametrize("kind", KINDS)
def test_mass_bound_dominates_the_true_mass(kind, spread):
    """Oracle: the evicted logits; exact where all keys of a cluster coincide."""
    model, summary, keys, gone = filled_summary(kind, spread=spread)
    layer, t = model.layers[0].layer, 33
    q = 4 * torch.randn(2, layer.kv_heads, layer.group, layer.head_dim, dtype=torch.float64)
    q[:, layer.content_kv_heads :] = 0
    constants = AttentionConstants.of(model, 0)
    bound = log_mass_bound(summary, constants, q, torch.tensor([t, t]))
    for cluster in range(4):
        true = true_log_mass(model, keys, gone, q[..., None, :], t, cluster)
        assert bool((bound[..., cluster] >= true).all())
        is_exact = torch.full(bound.shape[1:2], spread == 0.0)
        is_exact[layer.content_kv_heads :] = True
        slack = (bound[..., cluster] - true)[:, is_exact].nan_to_num()
        assert float(slack.abs().max() if slack.numel() else 0) < 1e-9


def test_mass_bound_is_nearly_tight_for_two_opposite_keys():
    """Oracle: the mean of exp(a) and exp(-a) is cosh(a), just below exp(a^2 / 2)."""
    model = make_model("content")
    constants = AttentionConstants.of(model, 0)
    q = torch.zeros(1, 2, 2, 6, dtype=torch.float64)
    q[..., 0] = 0.5 / constants.scale
    summary = Summary.empty((1, 2, 1), 6, 48, torch.device("cpu"))
    keys = torch.zeros(1, 2, 2, 6, dtype=torch.float64)
    keys[..., 0] = torch.tensor([1.0, -1.0])
    summary.add(keys, keys, torch.arange(2).expand(1, 2, 2), torch.ones(1, 2, 2, dtype=torch.bool))
    bound = log_mass_bound(summary, constants, q, torch.tensor([5]))
    true = math.log(2 * math.cosh(0.5))
    assert float(bound.min()) >= true
    assert float(bound.max()) < true + 0.01


def test_head_bound_is_the_largest_value_over_all_masses():
    """Oracle: every vertex of the box of cluster masses."""
    _, summary, _, _ = filled_summary("content")
    generator = torch.Generator().manual_seed(7)
    log_mass = torch.randn(2, 2, 2, 4, generator=generator, dtype=torch.float64)
    o = torch.randn(2, 2, 2, 6, generator=generator, dtype=torch.float64)
    lse = torch.randn(2, 2, 2, generator=generator, dtype=torch.float64)
    got = head_deviation(summary, log_mass, o, lse)
    reach = (summary.value_centre[:, :, None] - o[..., None, :]).norm(dim=-1)
    reach = reach + summary.value_radius[:, :, None]
    best = torch.zeros_like(lse)
    for full in itertools.product((0.0, 1.0), repeat=4):
        mass = torch.tensor(full) * (log_mass - lse[..., None]).exp()
        best = best.maximum((mass * reach).sum(-1) / (1 + mass.sum(-1)))
    assert float((got / best.flatten(1) - 1).abs().max()) < 1e-9
    assert bool((got >= best.flatten(1)).all())


def test_rows_are_reused_from_a_clean_state():
    """Oracle: the life cycle of a row; sequences do not see each other's evictions."""
    model = make_model("mixed")
    run = run_compressed(model)[0]
    ledger = run.ledger
    rows = [ledger.open() for _ in range(20)]
    assert len({run.row, *rows}) == 21
    assert float(ledger.deviation(rows).logits_R.max()) == 0
    assert float(ledger.deviation([run.row]).logits_R) > 0
    ledger.close(run.row)
    assert ledger.open() == run.row
    assert float(ledger.deviation([run.row]).logits_R) == 0
    assert not bool(ledger.summaries[0].is_gone[run.row].any())


@pytest.mark.parametrize("largest", [1, 1 << 22])
def test_many_tokens_of_one_sequence_keep_the_largest_bound(largest, monkeypatch):
    """Oracle: the same tokens one by one; weaker observations in between change nothing."""
    monkeypatch.setattr(eviction, "LARGEST", largest)
    model = make_model("content_and_bias")
    first, second = run_compressed(model)[0], run_compressed(model)[0]
    generator = torch.Generator().manual_seed(9)
    q = 3 * torch.randn(6, 4, 6, generator=generator, dtype=torch.float64)
    o = torch.randn(6, 4, 6, generator=generator, dtype=torch.float64)
    lse, positions = torch.zeros(6, 4, dtype=torch.float64), 36 + torch.arange(6)
    fresh = first.ledger.open()
    rows = [first.row, fresh, *[first.row] * 4]
    first.ledger.observe(1, rows, q, o, lse, positions)
    for i in (0, 2, 3, 4, 5):
        at = slice(i, i + 1)
        second.ledger.observe(1, [second.row], q[at], o[at], lse[at], positions[at])
        second.ledger.observe(1, [second.row], q[at], o[at], lse[at] + 1, positions[at])
    got, want = first.ledger.delta_RL[first.row], second.ledger.delta_RL[second.row]
    assert float((got / want - 1).abs().max()) < IDENTITY
    assert float(first.ledger.delta_RL[fresh].max()) == 0


def test_top1_needs_a_margin_beyond_the_bound():
    """Oracle: hand-made logits."""
    pair = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)
    logits = torch.tensor([[2.0, 1.0, 0.0], [1.2, 1.0, 0.0], [1.0, 1.0, 0.0]])
    assert Deviation(pair, pair, pair).keeps_top1(logits).tolist() == [True, False, True]


def test_wrong_certificate_and_options_are_refused():
    """Oracle: the error contract."""
    model, other = make_model("mixed"), make_model("content")
    certificate = make_certificate(other)
    object.__setattr__(certificate, "blocks", certificate.blocks[:2])
    with pytest.raises(CertificateError, match="expected 4"):
        EvictionLedger(model, certificate)
    with pytest.raises(ConfigError, match="clusters"):
        EvictionLedger(model, make_certificate(model), clusters=0)
