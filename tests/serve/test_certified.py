"""What is proved of compressed sequences, against full attention on the same tokens, in float64."""

# Legend: T tokens, H query heads, K key/value heads, D head width, V vocabulary, S slots.

import math

import pytest
import torch

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


def make_core(model, policy, *, clusters=4, max_num_seqs=4):
    """An engine with a ledger of the certificate from operator norms: valid, quick, not tight."""
    tokens = torch.randint(VOCAB, (2, 40), generator=torch.Generator().manual_seed(8))
    stats = layer_stats(calibrate(model, [tokens]), model)
    ledger = EvictionLedger(model, certify(model, tighten=False), clusters=clusters)
    config = EngineConfig(max_num_seqs=max_num_seqs, block_size=4, prefix_caching=False, debug=True)
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
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=max_tokens, **options)
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
