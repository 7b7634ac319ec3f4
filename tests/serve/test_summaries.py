"""Mean tokens of evicted keys: dense attention with explicit pseudo tokens, in float64."""

# Legend: S tokens so far, H query heads, K key/value heads, D head width, V vocabulary.

import pytest
import torch

from serve.decoder import LipschitzDecoder
from serve.engine.companions import Companion
from serve.engine.engine import EngineCore
from serve.engine.request import SamplingParams
from serve.engine.scheduler import EngineConfig
from serve.kv import policy_by_name
from serve.kv.calibrate import calibrate, layer_stats

FLOAT64 = 1e-9
SAMPLED = SamplingParams(temperature=1.0, seed=5, max_tokens=24)


class Spy(Companion):
    """Notes, per request and layer, which positions survive each compaction, and when it was."""

    def __init__(self):
        self.kept, self.seen, self.fed = {}, {}, {}

    def compacting(self, view, sequences, keep_RKS):
        """Read the kept positions off the view."""
        positions = (
            view.slot_positions()
            .gather(2, keep_RKS)
            .view(len(view.layers), len(sequences), *keep_RKS.shape[1:])
        )
        for i, layer in enumerate(view.layers):
            for j, sequence in enumerate(sequences):
                at = (sequence.request.request_id, layer)
                self.kept[at] = [set(row) - {-1} for row in positions[i, j].tolist()]
                self.seen[at] = int(view.positions_R[j])

    def snapshot(self, request_id, layers):
        """Return what the next token of a request sees: kept positions and their time."""
        return [
            (self.kept.get((request_id, i)), self.seen.get((request_id, i))) for i in range(layers)
        ]


def segments(seen, clusters, spec, context):
    """Positions per segment: the smallest power of two that covers; fixed where biases are."""
    length = 1
    while clusters * length < (context if spec.bias_HT is not None else seen):
        length *= 2
    return length


class DenseOracle:
    """A full-length pass that hides evicted tokens and adds their means, straight from the text."""

    def __init__(self, model, tokens, states, clusters):
        """``states[t]`` is the snapshot in force when token t attends."""
        self.decoder = LipschitzDecoder(model)
        self.tokens, self.states, self.clusters = tokens, states, clusters
        self.keys = {}

    @torch.no_grad()
    def logits(self):
        """Logits after each token."""
        rows = []
        for position, token in enumerate(self.tokens):
            self.position = position
            at = torch.tensor([position])
            rows.append(self.decoder.forward(torch.tensor([token]), at, self.attend)[0])
        return torch.stack(rows)

    def attend(self, layer, q_1HD, k_1KD, v_1KD):
        """Attend from one token."""
        spec, t = self.decoder.layers[layer], self.position
        self.keys.setdefault(layer, []).append((k_1KD[0], v_1KD[0]))
        k_SKD, v_SKD = (torch.stack(x) for x in zip(*self.keys[layer], strict=True))
        kept, seen = self.states[t][layer]
        distance_S = t - torch.arange(t + 1)
        out = []
        for head in range(spec.heads):
            group = head // spec.group
            is_gone = torch.zeros(t + 1, dtype=torch.bool)
            if kept is not None:
                is_gone[[p for p in range(seen) if p not in kept[group]]] = True
            bias_S = torch.zeros(t + 1, dtype=torch.float64)
            if spec.bias_HT is not None:
                bias_S = spec.bias_HT[head, distance_S]
            k_SD, v_SD, q_D = k_SKD[:, group], v_SKD[:, group], spec.scale * q_1HD[0, head]
            z, values = [(k_SD @ q_D + bias_S)[~is_gone]], [v_SD[~is_gone]]
            if kept is not None and self.clusters:
                length = segments(seen, self.clusters, spec, self.decoder.context)
                cluster_S = torch.arange(t + 1) // length
                for cluster in range(self.clusters):
                    member = is_gone & (cluster_S == cluster)
                    if bool(member.any()):
                        mass = bias_S[member].exp().sum().log()
                        z.append((q_D @ k_SD[member].mean(0) + mass)[None])
                        values.append(v_SD[member].mean(0)[None])
            out.append(torch.cat(z).softmax(0) @ torch.cat(values))
        return torch.stack(out)[None]


def spy_on(core):
    """Attach a spy; returns the snapshots by request and position."""
    spy, states = Spy(), {}
    core.companions.companions.append(spy)
    forward, layers = core.runner.forward, len(core.decoder.layers)

    def noting(items, **options):
        for item in items:
            name, first = item.sequence.request.request_id, item.sequence.num_tokens
            for position in range(first, first + item.count):
                states.setdefault(name, {})[position] = spy.snapshot(name, layers)
        return forward(items, **options)

    core.runner.forward = noting
    return states


def record(core):
    """Collect the logits from which each token of a request was chosen."""
    rows = {}
    forward = core.runner.forward

    def recording(items, **options):
        logits = forward(items, **options)
        for item, row in zip(items, logits, strict=True):
            rows.setdefault(item.sequence.request.request_id, []).append(row)
        return logits

    core.runner.forward = recording
    return rows


@pytest.mark.parametrize("clusters", [1, 3])
@pytest.mark.parametrize("name", ["window", "triattention", "knorm"])
def test_engine_equals_dense_attention_with_pseudo_tokens(tiny, name, clusters):
    """Oracle: dense attention over kept tokens and explicit means, float64, three layer kinds."""
    model = tiny.model
    texts = torch.tensor(tiny.make_prompts([40, 40], seed=3))
    stats = layer_stats(calibrate(model, [texts]), model)
    policy = policy_by_name(
        name,
        budget=14,
        interval=5,
        sinks=2,
        window=3,
        protect_prompt=False,
        summary_tokens=clusters,
    )
    core = EngineCore(model, EngineConfig(max_num_seqs=4, block_size=4, debug=True), policy, stats)
    states, rows = spy_on(core), record(core)
    sequences = [core.add(p, SAMPLED) for p in tiny.make_prompts([5, 22, 9], seed=1)]
    for _ in range(7):
        core.step()
    sequences.append(core.add(tiny.make_prompts([30], seed=2)[0], SAMPLED))
    while core.has_work:
        core.step()
    for sequence in sequences[1::2]:
        name = sequence.request.request_id
        tokens = sequence.tokens[:-1]
        oracle = DenseOracle(model, tokens, states[name], clusters).logits()
        got = torch.stack(rows[name])
        torch.testing.assert_close(got, oracle[-len(got) :], atol=FLOAT64, rtol=FLOAT64)
    plain = DenseOracle(model, tokens, states[name], 0).logits()
    assert float((got - plain[-len(got) :]).abs().max()) > 1e-4
