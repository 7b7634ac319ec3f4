"""What is proved of compressed sequences, against full attention on the same tokens, in float64."""

# Legend: T tokens, H query heads, K key/value heads, D head width, V vocabulary, S slots.

import itertools
import math
from dataclasses import replace

import pytest
import torch

from common.errors import CertificateError, ConfigError
from common.models import LipschitzTransformer, ModelConfig
from serve.engine.companions import Companion
from serve.engine.config import EngineConfig
from serve.engine.engine import EngineCore
from serve.engine.sampling_params import SamplingParams
from serve.kv import policy_by_name
from serve.kv.calibrate import calibrate, layer_stats
from serve.kv.eviction import EvictionLedger
from solvers.bounds import certify

IDENTITY = 1e-12  # float64, outputs of size one
VOCAB, CONTEXT = 13, 48

KINDS = {
    "content": {"heads": 4, "kv_heads": 2},
    "content_and_bias": {"heads": 4, "kv_heads": 4, "position_bias": True},
    "mixed": {"heads": 6, "kv_heads": 3, "content_heads": 2, "position_bias": (True, False)},
    "positional": {"heads": 4, "kv_heads": 2, "content_heads": 0, "position_bias": True},
    "multi_query": {"heads": 4, "kv_heads": 1, "softmax_scale": 6.0},
}
POLICIES = {
    "window": ("window", {}),
    "window_summary": ("window", {"summary_tokens": 1}),
    "triattention": ("triattention", {}),
    "triattention_summary": ("triattention", {"summary_tokens": 3}),
    "knorm_summary": ("knorm", {"summary_tokens": 4}),
}


def make_model(kind, *, seed=0, gain=1.0, slope=0.0, dtype=torch.float64):
    """A random model; ``slope`` makes the biases fall off with the distance."""
    torch.manual_seed(seed)
    fields = {"vocab_size": VOCAB, "width": 24, "layers": 2, "head_dim": 6, "context": CONTEXT}
    config = ModelConfig(**fields, attn_residual=0.5, **KINDS[kind])
    model = LipschitzTransformer(config).double().eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=gain / math.sqrt(24))
    torch.nn.init.normal_(model.embedding.weight, std=1.0)
    for layer in model.layers:
        if layer.attention.position_bias is not None:
            bias = torch.randn(layer.layer.heads, CONTEXT) - slope * torch.arange(CONTEXT)
            layer.attention.position_bias.copy_(bias)
    return model.to(dtype)


def make_policy(name, budget=10, **changes):
    """A policy of the table with a small budget."""
    kind, options = POLICIES[name]
    fields = {"budget": budget, "interval": 4, "sinks": 2, "window": 3, "protect_prompt": False}
    return policy_by_name(kind, **(fields | options | changes))


def make_core(model, policy, *, clusters=4, max_num_seqs=4, **settings):
    """An engine with a ledger of the certificate from operator norms: valid, quick, not tight."""
    tokens = torch.randint(VOCAB, (2, 40), generator=torch.Generator().manual_seed(8))
    stats = layer_stats(calibrate(model, [tokens]), model)
    ledger = EvictionLedger(model, certify(model, tighten=False), clusters=clusters)
    settings |= {"max_num_seqs": max_num_seqs, "block_size": 4, "prefix_caching": False}
    config = EngineConfig(**settings, debug=True)
    return EngineCore(model, config, policy, stats, ledger)


def prompts(lengths, seed=1):
    """Random prompts."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in lengths]


def run(core, texts, max_tokens=20, **options):
    """Generate; return the sequences and, by sequence, the logits of every sampled token."""
    rows = {}
    record = core.companions.record

    def noting(sequences, logits_RV):
        for sequence, row in zip(sequences, logits_RV, strict=True):
            rows.setdefault(sequence, []).append(row)
        record(sequences, logits_RV)

    core.companions.record = noting
    params = SamplingParams(**({"temperature": 1.0, "seed": 5} | options), max_tokens=max_tokens)
    sequences = [core.add(text, params) for text in texts]
    while core.has_work:
        core.step()
    return sequences, {sequence: torch.stack(part) for sequence, part in rows.items()}


class Watch(Companion):
    """Keeps, of one sequence, every query, key, value and the output that was used, by layer."""

    def __init__(self, layers):
        self.seen = [[] for _ in range(layers)]

    def attended(self, part, sequences):
        """Read the newest slots off the pool."""
        block_size = part.pool.keys.shape[2]
        last = int(part.lengths_R[0]) - 1
        for i in range(len(part.q_NHD)):
            slot = last - (len(part.q_NHD) - 1 - i)
            at = (int(part.tables_RW[0, slot // block_size]), slice(None), slot % block_size)
            k, v = part.pool.keys[at].clone(), part.pool.values[at].clone()
            self.seen[part.layer].append((part.q_NHD[i], k, v, part.o_NHD[i]))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", KINDS)
def test_block_bound_dominates_the_true_movement(kind, policy):
    """Oracle: full attention over the recorded keys and values, through the output matrix."""
    model = make_model(kind, gain=1.5)
    core = make_core(model, make_policy(policy))
    watch = Watch(len(model.layers))
    core.companions.companions.append(watch)
    close, deltas = core.ledger.close, []
    core.ledger.close = lambda row: (deltas.append(core.ledger.delta_RN[row].clone()), close(row))
    run(core, prompts([17]))
    largest = []
    for index, layer in enumerate(model.layers):
        q_THD, k_TKD, v_TKD, used = (torch.stack(x) for x in zip(*watch.seen[index], strict=True))
        group, bias = layer.layer.group, layer.attention.position_bias
        k_THD, v_THD = (x.repeat_interleave(group, 1) for x in (k_TKD, v_TKD))
        z_HTS = layer.layer.logit_scale * torch.einsum("thd,shd->hts", q_THD, k_THD)
        distance_TS = torch.arange(len(q_THD))[:, None] - torch.arange(len(q_THD))
        if bias is not None:
            z_HTS = z_HTS + bias[:, distance_TS.clamp(min=0)]
        z_HTS = z_HTS.masked_fill(distance_TS < 0, -torch.inf)
        moved = torch.einsum("hts,shd->thd", z_HTS.softmax(-1), v_THD) - used
        gain = layer.layer.attn_residual * layer.layer.attn_factor
        moved = gain * layer.attention.output(moved.flatten(1)).norm(dim=1)
        largest.append(float(moved.max()))
        assert largest[-1] <= float(deltas[0][index]) + IDENTITY
    assert max(largest) > 1e-4


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", KINDS)
def test_certified_deviation_dominates_the_true_one(kind, policy):
    """Oracle: the model with its full cache at every token, several sequences at once."""
    model = make_model(kind, seed=3, gain=0.8)
    core = make_core(model, make_policy(policy))
    sequences, logits = run(core, prompts([5, 17, 26]))
    for sequence in sequences:
        full = model(torch.tensor(sequence.tokens[:-1])[None])[0, -len(sequence.output) :]
        moved = logits[sequence] - full
        rms, bound = moved.square().mean(1).sqrt(), torch.tensor(sequence.deviations)
        assert bool((rms <= bound + IDENTITY).all())
        assert float(rms.max()) > 1e-6
        assert bool(bound.isfinite().all())
        assert bool((bound.diff() >= 0).all())
        proved = torch.tensor(sequence.keeps_top1)
        assert torch.equal(logits[sequence].argmax(1)[proved], full.argmax(1)[proved])


def check_deviation(model, sequences, logits):
    """Compare with full attention on the same tokens."""
    for sequence in sequences:
        full = model(torch.tensor(sequence.tokens[:-1])[None])[0, -len(sequence.output) :]
        moved = (logits[sequence] - full).square().mean(1).sqrt()
        assert bool((moved <= torch.tensor(sequence.deviations) + IDENTITY).all())
    assert float(moved.max()) > 1e-6


@pytest.mark.parametrize("policy", ["window", "knorm_summary"])
def test_prompt_chunks_over_compressed_caches_are_bounded(policy):
    """Oracle: full attention; prompts are compacted while they are read, seven tokens at a time."""
    model = make_model("mixed", seed=3, gain=0.8)
    settings = {"max_num_batched_tokens": 7}
    core = make_core(model, make_policy(policy, compress_prefill=True), **settings)
    counts, observe = [], core.ledger.observe
    core.ledger.observe = lambda *x: (counts.append(x[2].q.shape[1]), observe(*x))
    sequences, logits = run(core, prompts([41, 38]), max_tokens=4)
    assert max(counts) > 3
    assert all(sequence.deviations[0] > 0 for sequence in sequences)
    check_deviation(model, sequences, logits)


@pytest.mark.parametrize(("tokens", "start"), [(512, 30), (4, 21)])
def test_prompts_over_compressed_caches_leave_the_bounds_of_others_alone(tokens, start):
    """Oracle: each alone; tokens of the first wait when the second is compacted, then read on."""
    model, texts = make_model("mixed", gain=0.8), prompts([12, 41])
    policy = make_policy("window", interval=12, compress_prefill=True)
    core = make_core(model, policy, max_num_batched_tokens=tokens)
    assert len(core.ledger.groups) == 2
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=30)
    sequences = [core.add(texts[0], params)]
    while sequences[0].num_tokens < start:
        core.step()
    sequences.append(core.add(texts[1], replace(params, max_tokens=4)))
    while core.has_work:
        core.step()
    for text, sequence in zip(texts, sequences, strict=True):
        (alone,), _ = run(make_core(model, policy), [text], max_tokens=len(sequence.output))
        assert (sequence.error, alone.output) == (None, sequence.output)
        assert alone.deviations == pytest.approx(sequence.deviations, rel=1e-9)


@pytest.mark.parametrize("kind", ["content_and_bias", "mixed"])
def test_bounds_are_those_of_one_attempt_though_steps_run_again(kind, monkeypatch):
    """Oracle: an engine that has the memory; here each step fails once, after its last layer."""
    model = make_model(kind, gain=0.8)
    policy, texts = make_policy("window", interval=12), prompts([17, 9])
    expected, _ = run(make_core(model, policy), texts, max_tokens=30)
    core = make_core(model, policy)
    forward, calls = core.runner.forward, itertools.count()

    def short(items, **kwargs):
        logits = forward(items, **kwargs)
        if next(calls) % 2 == 0:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return logits

    monkeypatch.setattr(core.runner, "forward", short)
    sequences, _ = run(core, texts, max_tokens=30)
    for sequence, own in zip(sequences, expected, strict=True):
        assert (sequence.error, sequence.output) == (None, own.output)
        assert sequence.deviations == pytest.approx(own.deviations, rel=1e-9)
        assert sequence.keeps_top1 == own.keeps_top1


def test_a_request_that_does_not_ask_costs_nothing_and_changes_nothing():
    """Oracle: the others' figures without it; its own tokens are those it gets anyway."""
    model = make_model("content_and_bias", gain=0.8)
    policy, texts = make_policy("window_summary"), prompts([17, 23])
    core = make_core(model, policy)
    asking = run(core, texts[:1])[0][0]
    alone = run(make_core(model, policy), texts[1:])[0][0]
    core = make_core(model, policy)
    params = {"temperature": 1.0, "seed": 5, "max_tokens": 20}
    silent = core.add(texts[1], SamplingParams(**params, certified=False))
    other = core.add(texts[0], SamplingParams(**params))
    opened, rows = core.ledger.open, []
    core.ledger.open = lambda: rows.append(opened()) or rows[-1]
    while core.has_work:
        core.step()
    assert silent.output == alone.output
    assert silent.deviations == silent.keeps_top1 == silent.radii == []
    assert len(rows) == 1
    assert other.deviations == pytest.approx(asking.deviations, rel=1e-9)
    assert other.radii == pytest.approx(asking.radii, rel=1e-9)


def test_bounds_do_not_depend_on_the_batch():
    """Oracle: each request in an engine of its own, float64."""
    model = make_model("mixed", gain=0.8)
    policy, texts = make_policy("triattention_summary"), prompts([17, 9, 30, 22])
    together = run(make_core(model, policy), texts)[0]
    for text, sequence in zip(texts, together, strict=True):
        (alone,) = run(make_core(model, policy), [text])[0]
        assert alone.output == sequence.output
        assert alone.deviations == pytest.approx(sequence.deviations, rel=1e-9)
        assert alone.keeps_top1 == sequence.keeps_top1
        assert alone.radii == pytest.approx(sequence.radii, rel=1e-6)


@pytest.mark.parametrize("policy", ["window", "window_summary"])
def test_top_token_survives_every_change_within_the_radius(policy):
    """Oracle: the full model on embeddings moved by the radius, at random and uphill."""
    model = make_model("positional", seed=2, gain=0.5, slope=2.0)
    core = make_core(model, make_policy(policy, budget=20), clusters=8)
    (sequence,), logits = run(core, prompts([12]), max_tokens=24)
    assert all(sequence.keeps_top1)
    limit, tokens = core.ledger.certificate.radius, torch.tensor(sequence.tokens[:-1])
    x_TC, first = model.embed(tokens), len(sequence.tokens[:-1]) - len(sequence.output)
    for index in (0, 12, 23):
        end, radius = first + index + 1, sequence.radii[index]
        top, runner_up = logits[sequence][index].topk(2).indices.tolist()
        assert radius > 0
        moved = x_TC[:end].clone().requires_grad_()
        row = model.logits(model.stream(moved[None]))[0, -1]
        (uphill,) = torch.autograd.grad(row[runner_up] - row[top], moved)
        for direction in (uphill, torch.randn_like(uphill), torch.randn_like(uphill)):
            step = radius * direction / direction.norm(dim=1, keepdim=True).clamp(min=1e-300)
            y_TC = x_TC[:end] + step
            y_TC = y_TC * (limit / y_TC.norm(dim=1, keepdim=True)).clamp(max=1)
            assert int(model.logits(model.stream(y_TC[None]))[0, -1].argmax()) == top


def test_radius_is_what_the_bound_leaves_of_the_margin():
    """Oracle: by hand from the head's rows, before anything is evicted and after."""
    model = make_model("content", gain=0.4)
    core = make_core(model, make_policy("window"))
    (sequence,), logits = run(core, prompts([6]), max_tokens=16)
    assert sequence.deviations[0] == 0.0
    assert sequence.deviations[-1] > 0.0
    certificate, rows_VC = core.ledger.certificate, model.head.weight
    to_logits = certificate.head_norm / math.sqrt(VOCAB)
    for z_V, bound, kept, radius in zip(
        logits[sequence], sequence.deviations, sequence.keeps_top1, sequence.radii, strict=True
    ):
        top = int(z_V.argmax())
        others = torch.arange(VOCAB) != top
        apart_V = (rows_VC[top] - rows_VC).norm(dim=1) * model.config.final_scale
        distance = float(((z_V[top] - z_V) / apart_V)[others].min())
        left = distance - bound / to_logits
        assert kept == (left > 0)
        assert radius == pytest.approx(max(left, 0) / certificate.stream, rel=1e-6)


def test_steep_biases_make_eviction_harmless_and_provably_so():
    """Property: a positional head that ignores the far past has a tiny certified error."""
    model = make_model("positional", slope=3.0)
    core = make_core(model, make_policy("window", budget=20))
    (sequence,), logits = run(core, prompts([12]), max_tokens=24)
    full = model(torch.tensor(sequence.tokens[:-1])[None])[0, -24:]
    assert sequence.deviations[-1] < 1e-6
    assert all(sequence.keeps_top1)
    assert torch.equal(logits[sequence].argmax(1), full.argmax(1))


def test_deviation_equals_the_certificates_error_recursion():
    """Oracle: ``Certificate.logit_deviation`` with zero for the MLP blocks."""
    model = make_model("content_and_bias")
    core = make_core(model, make_policy("window"))
    close, deltas = core.ledger.close, []
    core.ledger.close = lambda row: (deltas.append(core.ledger.delta_RN[row].tolist()), close(row))
    (sequence,), _ = run(core, prompts([17]))
    per_block = [value for delta in deltas[0] for value in (delta, 0.0)]
    expected = core.ledger.certificate.logit_deviation(per_block)
    assert sequence.deviations[-1] == pytest.approx(expected, rel=1e-9)


def test_mean_tokens_and_clusters_tighten_the_bound():
    """Property: on content heads of small logits both lower what is proved."""
    model, last = make_model("content", gain=0.7), {}
    for name, clusters in (("window", 1), ("window", 8), ("window_summary", 8)):
        core = make_core(model, make_policy(name), clusters=clusters)
        (sequence,), _ = run(core, prompts([17]), temperature=0.0)
        last[name, clusters] = sequence.deviations[-1]
    assert last["window", 8] < last["window", 1]
    assert last["window_summary", 8] < 0.7 * last["window", 8]


def test_wrong_certificates_and_options_are_refused():
    """Oracle: the error contract."""
    model, certificate = make_model("mixed"), certify(make_model("content"), tighten=False)
    object.__setattr__(certificate, "blocks", certificate.blocks[:2])
    with pytest.raises(CertificateError, match="expected 4"):
        EvictionLedger(model, certificate)
    with pytest.raises(ConfigError, match="clusters"):
        EvictionLedger(model, certify(model, tighten=False), clusters=0)
