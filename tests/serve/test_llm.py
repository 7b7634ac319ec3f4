"""Text in, text out: order, stop strings, certified figures, errors; on a tiny real bundle."""

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from common.bundle import Bundle, load_bundle, save_bundle
from common.errors import BundleError, CertificateError, ConfigError, DataError
from common.models import LipschitzMLP, LipschitzTransformer, ModelConfig
from common.tokenizer import ByteTokenizer
from serve import LLM, EngineConfig, SamplingParams
from serve.kv import TriAttentionPolicy, WindowPolicy
from serve.kv.calibrate import calibrate
from solvers.bounds.network import certify

CONTEXT = 80
WINDOW = WindowPolicy(budget=16, interval=4, sinks=2, window=4)
PROMPTS = ["def f(x):", "import os", "x = " * 12, "a"]
PARAMS = SamplingParams(temperature=0.9, seed=3, max_tokens=24)


def make_model() -> LipschitzTransformer:
    """Return a byte model whose logits differ enough to sample varied text."""
    torch.manual_seed(1)
    config = ModelConfig(
        vocab_size=256,
        width=24,
        layers=2,
        heads=2,
        context=CONTEXT,
        position_bias=True,
        mlp_bias=True,
        activation="maxmin",
        final_scale=4.0,
    )
    model = LipschitzTransformer(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        std = 1.0 if "embedding" in name else 0.7 / math.sqrt(24)
        torch.nn.init.normal_(parameter, std=std)
    return model


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A certified, calibrated bundle."""
    model = make_model()
    text = torch.randint(32, 127, (4, CONTEXT), generator=torch.Generator().manual_seed(0))
    return save_bundle(
        tmp_path_factory.mktemp("llm") / "bundle",
        model,
        ByteTokenizer(),
        certificate=certify(model, tighten=False),
        kv_stats=calibrate(model, [text]),
    )


def test_weights_are_prepared_once(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the ledger of the proof shares the engine's decoder."""
    prepared: list[LipschitzTransformer] = []
    monkeypatch.setattr("serve.decoder.PackedTransformer", prepared.append)
    llm = LLM(bundle, kv=WINDOW)
    assert llm.core.ledger is not None
    assert prepared == [llm.model]


def test_progress_counts_every_token_once(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a step brings one token per request, an early end all that it leaves."""
    totals, shown = [], []

    @contextmanager
    def bar(label: str, total: int, show: bool | None = None) -> Iterator[Callable[[int], None]]:
        totals.append(total)
        yield shown.append

    monkeypatch.setattr("serve.llm.progress_bar", bar)
    llm = LLM(bundle, engine=EngineConfig(max_num_seqs=2))
    first = llm.generate("a", PARAMS)[0].text
    lengths = (3, 5, 9)
    params = [replace(PARAMS, max_tokens=n) for n in lengths]
    stopped = replace(PARAMS, max_tokens=20, stop=(first[2:4],))
    shown.clear()
    llm.generate(["b", "c", "d", "a"], [*params, stopped])
    assert totals[-1] == sum(lengths) + 20 == shown[-1]
    steps = [after - before for before, after in itertools.pairwise([0, *shown])]
    assert min(steps) >= 1
    assert sorted(steps)[:-1] == [min(step, 2) for step in sorted(steps)[:-1]]


def test_generate_keeps_the_order_and_equals_solo_runs(bundle: Bundle) -> None:
    """Oracle: one prompt at a time; texts, tokens and strings agree with the tokenizer."""
    llm = LLM(bundle, kv=WINDOW, engine=EngineConfig(max_num_seqs=2))
    outputs = llm.generate(PROMPTS, PARAMS)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        alone = LLM(bundle.path, kv=WINDOW).generate(prompt, PARAMS)[0]
        assert output.token_ids == alone.token_ids
        assert output.text == ByteTokenizer().decode(output.token_ids)
        assert bytes(output.prompt_token_ids).decode() == prompt
        assert (output.finish_reason, len(output.token_ids)) == ("length", 24)
    assert len({output.text for output in outputs}) == len(PROMPTS)


def test_generate_accepts_tokens_and_parameters_for_each_prompt(bundle: Bundle) -> None:
    """Oracle: the same prompts as text; logprobs only where asked for."""
    llm = LLM(bundle)
    tokens = [list(prompt.encode()) for prompt in PROMPTS]
    params = [SamplingParams(seed=i, max_tokens=4 + i, logprobs=i or None) for i in range(4)]
    by_text, by_tokens = llm.generate(PROMPTS, params), llm.generate(tokens, params)
    assert [o.token_ids for o in by_text] == [o.token_ids for o in by_tokens]
    assert [len(o.token_ids) for o in by_text] == [4, 5, 6, 7]
    assert by_text[0].logprobs is None
    assert [next(iter(row)) for row in by_text[2].logprobs] == by_text[2].token_ids


def test_generate_stops_at_a_string_across_tokens(bundle: Bundle) -> None:
    """Oracle: the unstopped text, cut before the first of the strings."""
    llm = LLM(bundle)
    whole = llm.generate(PROMPTS[0], PARAMS)[0]
    stop = whole.text[7:10]
    cut = whole.text.index(stop)
    params = SamplingParams(temperature=0.9, seed=3, max_tokens=24, stop=(stop, "never there"))
    output = llm.generate(PROMPTS[0], params)[0]
    assert (output.text, output.finish_reason) == (whole.text[:cut], "stop")
    assert output.token_ids == whole.token_ids[: len(output.token_ids)]
    token = whole.token_ids[5]
    params = SamplingParams(temperature=0.9, seed=3, stop_token_ids=(token,))
    output = llm.generate(PROMPTS[0], params)[0]
    assert output.token_ids[-1] == token
    assert output.text == ByteTokenizer().decode(output.token_ids[:-1])


def test_choices_and_prompt_logprobs_come_with_the_output(bundle: Bundle) -> None:
    """Oracle: each choice from its own seed; flat fields are those of the first choice."""
    llm = LLM(bundle, kv=WINDOW, engine=EngineConfig(block_size=8))
    params = SamplingParams(temperature=0.9, seed=3, max_tokens=24, n=3, prompt_logprobs=1)
    output, plain = llm.generate([PROMPTS[2], PROMPTS[0]], [params, PARAMS])
    assert [completion.index for completion in output.outputs] == [0, 1, 2]
    assert (output.text, output.token_ids) == (output.outputs[0].text, output.outputs[0].token_ids)
    assert len({completion.text for completion in output.outputs}) == 3
    for completion in output.outputs:
        alone = SamplingParams(temperature=0.9, seed=completion.seed, max_tokens=24)
        again = llm.generate(PROMPTS[2], alone, kv_compression=False)[0]
        assert again.token_ids == completion.token_ids
        assert completion.kv_evicted == 0
    assert len(output.prompt_logprobs) == len(PROMPTS[2]) - 1
    assert plain.prompt_logprobs is None
    assert plain.kv_evicted == plain.outputs[0].kv_evicted == llm.core.counters.evicted_tokens > 0
    second = llm.generate(PROMPTS[2], PARAMS)[0]
    assert second.num_cached_tokens == 40
    assert llm.generate(PROMPTS[2], PARAMS, cache_salt="x")[0].num_cached_tokens == 0


def test_an_uncertified_request_skips_the_bound(bundle: Bundle) -> None:
    """Oracle: no figures for it, the same tokens and figures for its certified neighbour."""
    llm = LLM(bundle, kv=WINDOW)
    bare = SamplingParams(temperature=0.9, seed=3, max_tokens=24, certified=False)
    alone = llm.generate(PROMPTS[0], PARAMS)[0]
    quick, proved = llm.generate([PROMPTS[0], PROMPTS[0]], [bare, PARAMS])
    assert quick.certified_deviation is quick.certified_top1 is quick.certified_radius is None
    assert quick.token_ids == proved.token_ids == alone.token_ids
    assert len(proved.certified_radius) == 24
    assert proved.certified_deviation == pytest.approx(alone.certified_deviation, rel=1e-4)


@pytest.mark.parametrize(
    "kv", [WINDOW, TriAttentionPolicy(budget=16, interval=4, sinks=2, window=4)]
)
def test_certified_deviation_is_zero_before_eviction_and_grows(bundle: Bundle, kv) -> None:
    """Oracle: nothing can differ before the first eviction; a running maximum never falls."""
    output = LLM(bundle, kv=kv).generate("abcd", SamplingParams(seed=1, max_tokens=40))[0]
    bounds = output.certified_deviation
    first = kv.trigger - len("abcd") + 1
    assert bounds[:first] == [0.0] * first
    assert all(output.certified_top1[:first])
    assert all(a <= b for a, b in itertools.pairwise(bounds))
    assert bounds[-1] > 0
    assert 0.4 < output.kv_kept_fraction < 1


def test_a_large_budget_reproduces_the_full_cache(bundle: Bundle) -> None:
    """Oracle O3 at the level of text, by policy name with default options too."""
    expected = [o.token_ids for o in LLM(bundle).generate(PROMPTS, PARAMS)]
    for kv in ("full", "window", WindowPolicy(budget=79), TriAttentionPolicy(budget=79)):
        outputs = LLM(bundle, kv=kv).generate(PROMPTS, PARAMS)
        assert [o.token_ids for o in outputs] == expected
        assert all(o.kv_kept_fraction == 1.0 for o in outputs)
        assert all(set(o.certified_deviation) == {0.0} for o in outputs)


def test_generate_rejects_bad_prompts_and_generates_nothing(bundle: Bundle) -> None:
    """Oracle: one line with both numbers; the engine is empty and usable afterwards."""
    llm = LLM(bundle)
    for prompts, words in (
        (["fine", "x" * 200], f"200 tokens.*{CONTEXT}"),
        (["fine", ""], "empty"),
        ([[1, 2], [300]], "300"),
    ):
        with pytest.raises(DataError, match=words) as caught:
            llm.generate(prompts, PARAMS)
        assert "\n" not in str(caught.value)
        assert not llm.core.has_work
    with pytest.raises(ConfigError, match="2 sampling parameters for 1 prompts"):
        llm.generate(["a"], [PARAMS, PARAMS])
    with pytest.raises(ConfigError, match=r"'n': 2.*expected SamplingParams"):
        llm.generate(["a"], {"n": 2})  # type: ignore[arg-type]
    assert len(llm.generate("a", PARAMS)[0].token_ids) == 24


@pytest.mark.parametrize(
    "prompts", [None, 7, b"ab", [1, 2], [None], [b"ab"], torch.tensor([1, 2]), torch.tensor(3)]
)
def test_what_is_no_list_of_prompts_is_one_line(bundle: Bundle, prompts: Any) -> None:
    """Oracle: the error contract; a single list of ids is a mistake too: it is no list of texts."""
    llm = LLM(bundle)
    with pytest.raises(DataError, match="expected text or a list of token ids") as caught:
        llm.generate(prompts, PARAMS)
    assert "\n" not in str(caught.value)
    assert not llm.core.has_work


def test_tensors_are_token_ids(bundle: Bundle) -> None:
    """Oracle: the same ids as plain lists."""
    llm = LLM(bundle)
    plain, given = ([1, 2], [3, 4]), torch.tensor([[1, 2], [3, 4]])
    assert [o.text for o in llm.generate(given, PARAMS)] == [
        o.text for o in llm.generate(list(plain), PARAMS)
    ]


def test_interruption_leaves_an_empty_engine(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: an empty pool after Ctrl-C in the middle, and the same text afterwards."""
    llm = LLM(bundle)
    expected = llm.generate(PROMPTS, PARAMS)
    step, calls = llm.core.step, iter(range(100))

    def interrupted():
        if next(calls) == 5:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(llm.core, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, PARAMS)
    monkeypatch.undo()
    assert not llm.core.has_work
    assert [o.text for o in llm.generate(PROMPTS, PARAMS)] == [o.text for o in expected]


def test_dtype_converts_a_copy(bundle: Bundle) -> None:
    """Oracle: float64 keeps the certificate and the bundle's own weights; bfloat16 voids it."""
    double = LLM(bundle, kv=WINDOW, engine=EngineConfig(dtype="float64"))
    assert double.model.embedding.weight.dtype == torch.float64
    assert bundle.model.embedding.weight.dtype == torch.float32
    assert double.generate("ab", PARAMS)[0].certified_deviation is not None
    half = LLM(bundle, kv=WINDOW, engine=EngineConfig(dtype="bfloat16"))
    output = half.generate("ab", PARAMS)[0]
    assert output.certified_deviation is None
    assert output.finish_reason == "length"


def test_unusable_bundles_are_refused(bundle: Bundle, tmp_path) -> None:
    """Oracle: the documented errors: no statistics, void certificate, classifier."""
    bare = save_bundle(tmp_path / "bare", bundle.model, ByteTokenizer())
    with pytest.raises(BundleError, match=rf"{bare.path}: .*lipllm calibrate"):
        LLM(bare, kv="triattention")
    assert LLM(bare, kv=WINDOW).generate("ab", PARAMS)[0].certified_deviation is None
    classifier = save_bundle(tmp_path / "mlp", LipschitzMLP([4, 3, 2]))
    with pytest.raises(BundleError, match="cannot generate"):
        LLM(classifier)
    changed = make_model()
    changed.embedding.weight[0] += 1
    with pytest.raises(CertificateError):
        save_bundle(tmp_path / "x", changed, ByteTokenizer(), certificate=bundle.certificate)
    with pytest.raises(BundleError):
        LLM(tmp_path / "missing")
    with pytest.raises(ConfigError, match="expected one of"):
        LLM(load_bundle(bundle.path), kv="unknown")
