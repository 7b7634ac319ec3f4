"""Mean tokens of evicted keys: dense attention with explicit pseudo tokens, in float64."""

# Legend: S tokens so far, H query heads, K key/value heads, D head width, V vocabulary.

import pytest
import torch

from serve.decoder import LipschitzDecoder
from serve.engine.attention import Part
from serve.engine.companions import Companion
from serve.engine.config import EngineConfig
from serve.engine.engine import EngineCore
from serve.engine.pools import LayerPool
from serve.engine.request import Request, Sequence
from serve.engine.sampling_params import SamplingParams
from serve.engine.summaries import Summaries
from serve.kv import CacheView, policy_by_name
from serve.kv.calibrate import calibrate, layer_stats

FLOAT64 = 1e-9
FLOAT32 = 1e-3  # logits of size ten
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

    def __init__(self, decoder, tokens, states, clusters):
        """``states[t]`` is the snapshot in force when token t attends."""
        self.decoder = decoder
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
            bias_S = torch.zeros(t + 1, dtype=k_SKD.dtype)
            if spec.bias_HT is not None:
                bias_S = spec.bias_HT[head, distance_S]
            k_SD, v_SD, q_D = k_SKD[:, group], v_SKD[:, group], spec.scale * q_1HD[0, head]
            is_seen = ~is_gone
            if spec.sliding_window is not None:
                is_seen &= distance_S < spec.sliding_window
            z, values = [(k_SD @ q_D + bias_S)[is_seen]], [v_SD[is_seen]]
            if kept is not None and self.clusters and spec.sliding_window is None:
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
    """Collect the logits after the last token of every chunk and decode row, by position."""
    rows = {}
    forward = core.runner.forward

    def recording(items, **options):
        logits = forward(items, **options)
        for item, row in zip(items, logits, strict=True):
            at = item.sequence.num_tokens + item.count - 1
            rows.setdefault(item.sequence.request.request_id, {})[at] = row
        return logits

    core.runner.forward = recording
    return rows


def generate(core, prompts, late, params=SAMPLED):
    """Run prompts, and one that arrives later, to their ends."""
    sequences = [core.add(prompt, params) for prompt in prompts]
    for _ in range(7):
        core.step()
    sequences.append(core.add(late, params))
    while core.has_work:
        core.step()
    return sequences


def check(decoder, sequences, rows, states, clusters, tolerance):
    """Compare with dense attention; the mean tokens must have mattered."""
    for sequence in sequences:
        name, tokens = sequence.request.request_id, sequence.tokens[:-1]
        oracle = DenseOracle(decoder, tokens, states[name], clusters).logits()
        got, at = torch.stack(list(rows[name].values())), list(rows[name])
        torch.testing.assert_close(got, oracle[at], atol=tolerance, rtol=tolerance)
    plain = DenseOracle(decoder, tokens, states[name], 0).logits()
    assert float((got - plain[at]).abs().max()) > 10 * tolerance


@pytest.mark.parametrize("clusters", [1, 3])
@pytest.mark.parametrize("name", ["window", "triattention", "knorm"])
def test_engine_equals_dense_attention_with_pseudo_tokens(tiny, name, clusters):
    """Oracle: dense attention over kept tokens and explicit means, float64, three layer kinds."""
    model = tiny.model
    texts = torch.tensor(tiny.make_prompts([40, 40], seed=3))
    stats = layer_stats(calibrate(model, [texts]), model)
    options = {"budget": 14, "interval": 5, "sinks": 2, "window": 3, "protect_prompt": False}
    policy = policy_by_name(name, **options, summary_tokens=clusters)
    core = EngineCore(model, EngineConfig(max_num_seqs=4, block_size=4, debug=True), policy, stats)
    states, rows = spy_on(core), record(core)
    late = tiny.make_prompts([30], seed=2)[0]
    sequences = generate(core, tiny.make_prompts([5, 22, 9], seed=1), late)
    check(core.decoder, sequences[1::2], rows, states, clusters, FLOAT64)


def test_chunks_over_compressed_caches_see_the_mean_tokens(tiny):
    """Oracle: as above; prompts are compacted while they are read, nine tokens at a time."""
    policy = policy_by_name(
        "knorm", budget=14, interval=5, sinks=2, window=3, summary_tokens=2, compress_prefill=True
    )
    config = EngineConfig(
        max_num_seqs=3, max_num_batched_tokens=9, block_size=4, prefix_caching=False, debug=True
    )
    core = EngineCore(tiny.model, config, policy)
    chunks = []
    summaries = core.companions.companions[-1]
    merge = summaries._merge
    summaries._merge = lambda *given: (chunks.append(given[-1].chunk), merge(*given))[1]
    states, rows = spy_on(core), record(core)
    prompts = tiny.make_prompts([50, 8], seed=1)
    sequences = generate(core, prompts, tiny.make_prompts([44], seed=2)[0])
    assert sum(chunk is not None for chunk in chunks) > 3
    check(core.decoder, sequences, rows, states, 2, FLOAT64)


@pytest.mark.parametrize("sliding", [False, True], ids=["full", "mixed_sliding"])
def test_models_of_transformers_get_mean_tokens(sliding):
    """Oracle: as above, for a random Qwen2 in float32; sliding windows get no mean token."""
    transformers = pytest.importorskip("transformers")
    from serve.hugging_face import HuggingFaceDecoder

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        options = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}
        config = transformers.Qwen2Config(
            vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=192,
            initializer_range=0.3, **(options if sliding else {}),
        )  # fmt: skip
        decoder = HuggingFaceDecoder(transformers.Qwen2ForCausalLM(config).eval())
    policy = policy_by_name(
        "knorm", budget=28, interval=5, sinks=2, window=3, protect_prompt=False, summary_tokens=3
    )
    core = EngineCore(decoder, EngineConfig(max_num_seqs=4, block_size=4, debug=True), policy)
    states, rows = spy_on(core), record(core)
    generator = torch.Generator().manual_seed(4)
    prompts = [torch.randint(97, (n,), generator=generator).tolist() for n in (9, 40, 35)]
    sequences = generate(core, prompts[:2], prompts[2])
    check(decoder, sequences[1:], rows, states, 3, FLOAT32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_merges_in_float32(tiny, dtype):
    """Oracle: float64 softmax over kept keys and means; one rounding of the output is allowed."""
    decoder = LipschitzDecoder(tiny.make_model(dtype))
    layer, summaries = 1, Summaries(decoder, 2)
    spec, torch_rng = decoder.layers[layer], torch.Generator().manual_seed(3)
    shape = (4, spec.kv_heads, 4, spec.head_dim)
    k, v = (torch.randn(shape, generator=torch_rng).to(dtype) for _ in range(2))
    place = torch.arange(16).view(4, 1, 4).expand(shape[:3]).int()
    request = Request(request_id="a", prompt=(1,), params=SAMPLED, seed=0, max_total=90)
    sequences = [Sequence.start(request), Sequence.start(request)]
    keep = torch.tensor([0, 5, 9, 13, 14, 15]).expand(1, spec.kv_heads, 6)
    table, length = torch.arange(4)[None], torch.tensor([16])
    view = CacheView(
        layers=(layer,), spec=spec, bias_LHT=None, context=96, k_pool=k, v_pool=v, pos_pool=place,
        tables_RN=table, lengths_R=length, positions_R=length, prompts_R=length, seeds_R=length,
    )  # fmt: skip
    summaries.compacting(view, sequences[:1], keep)
    q, o = (torch.randn(2, spec.heads, spec.head_dim, generator=torch_rng).to(dtype) for _ in "qo")
    lse = torch.randn(2, spec.heads, generator=torch_rng)
    where = (length.expand(2), table, length, LayerPool(k, v, place))
    part = Part(layer, None, q, o, lse, *where)
    got = summaries.attended(part, sequences)
    assert torch.equal(got[1], o[1])
    flat_k, flat_v = (x.transpose(0, 1).flatten(1, 2).double() for x in (k, v))
    gone = torch.ones(16, dtype=torch.bool)
    gone[keep[0, 0]] = False
    for head in range(spec.heads):
        z, values = [lse[0, head].double()], [o[0, head].double()]
        for part_of in (slice(0, 8), slice(8, 16)):
            member = torch.zeros(16, dtype=torch.bool)
            member[part_of] = gone[part_of]
            mean = flat_k[head // spec.group, member].mean(0)
            z.append(spec.scale * q[0, head].double() @ mean + member.sum().double().log())
            values.append(flat_v[head // spec.group, member].mean(0))
        expected = torch.stack(z).softmax(0) @ torch.stack(values)
        error = (got[0, head].double() - expected).abs().max()
        assert float(error) < torch.finfo(dtype).eps * float(expected.abs().max())


def test_rows_are_given_back_and_start_empty(tiny):
    """Oracle: the same request in an engine of its own, after others have come and gone."""
    policy = policy_by_name("window", budget=14, interval=5, sinks=2, window=3, summary_tokens=2)
    config = EngineConfig(max_num_seqs=2, block_size=4, prefix_caching=False, debug=True)
    core = EngineCore(tiny.model, config, policy)
    prompts = tiny.make_prompts([25, 31, 19, 27, 22], seed=6)
    sequences = [core.add(prompt, SAMPLED) for prompt in prompts]
    while core.has_work:
        core.step()
    (summaries,) = core.companions.companions
    assert not summaries._rows
    assert {store.rows for store in summaries._stores} == {4}
    for prompt, sequence in zip(prompts, sequences, strict=True):
        assert tiny.run_alone(tiny.model, prompt, SAMPLED, policy).output == sequence.output
