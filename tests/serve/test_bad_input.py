"""What must not happen: after each mistake one line, an empty pool and a working engine."""

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from common.bundle import Bundle, save_bundle
from common.errors import ConfigError, LipError
from common.models import LipschitzTransformer, ModelConfig
from common.tokenizer import ByteTokenizer
from serve import LLM, EngineConfig, SamplingParams
from serve.kv import WindowPolicy, policy_by_name
from serve.kv.calibrate import calibrate

CONTEXT = 96
PARAMS = SamplingParams(seed=1, max_tokens=8)
MODEL = {"vocab_size": 256, "width": 24, "layers": 2, "heads": 2, "context": CONTEXT}


def make_bundle(folder, **changes: int | tuple[int, ...]) -> Bundle:
    """Return a calibrated bundle of a tiny model."""
    torch.manual_seed(0)
    model = LipschitzTransformer(ModelConfig(**(MODEL | changes))).eval().requires_grad_(False)
    text = torch.randint(0, 256, (2, CONTEXT))
    return save_bundle(folder, model, ByteTokenizer(), kv_stats=calibrate(model, [text]))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Return a running LLM with a window policy and a small pool."""
    bundle = make_bundle(tmp_path_factory.mktemp("bad") / "bundle")
    kv = WindowPolicy(budget=16, interval=4, sinks=2, window=4)
    llm = LLM(bundle, kv=kv, engine=EngineConfig(block_size=8, num_blocks=10, debug=True))
    return SimpleNamespace(llm=llm, bundle=bundle, expected=llm.generate("abc", PARAMS)[0].text)


BAD: dict[str, tuple[Callable[[SimpleNamespace], object], str]] = {
    "no prompt": (lambda s: s.llm.generate([], PARAMS), "no prompt"),
    "empty text": (lambda s: s.llm.generate("", PARAMS), "empty"),
    "empty tokens": (lambda s: s.llm.generate([[]], PARAMS), "empty"),
    "one of two empty": (lambda s: s.llm.generate(["a", ""], PARAMS), "empty"),
    "lone surrogate": (lambda s: s.llm.generate("a\ud800", PARAMS), "surrogate|UTF-8|encode"),
    "prompt of the context": (lambda s: s.llm.generate("x" * CONTEXT, PARAMS), f"{CONTEXT}"),
    "prompt far too long": (lambda s: s.llm.generate("x" * 10**5, PARAMS), "100000 tokens"),
    "larger than the pool": (
        lambda s: s.llm.generate("x" * 60, SamplingParams(max_tokens=36), kv_compression=False),
        "pool has 10",
    ),
    "negative token": (lambda s: s.llm.generate([[-1]], PARAMS), "-1"),
    "token beyond": (lambda s: s.llm.generate([[256]], PARAMS), "256"),
    "huge token": (lambda s: s.llm.generate([[2**63]], PARAMS), "9223372036854775808"),
    "fractional token": (lambda s: s.llm.generate([[1.5]], PARAMS), "1.5"),
    "boolean token": (lambda s: s.llm.generate([[True]], PARAMS), "True"),
    "nested tokens": (lambda s: s.llm.generate([[[1]]], PARAMS), "integer"),
    "too few parameters": (lambda s: s.llm.generate(["a", "b"], [PARAMS]), "1 sampling"),
    "unknown policy": (lambda s: LLM(s.bundle, kv="best"), "best.*expected one of"),
    "unknown option": (lambda s: policy_by_name("window", size=3), "size"),
    "budget below protected": (
        lambda s: WindowPolicy(budget=8, sinks=4, window=8),
        r"budget=8.*sinks.*window.*raise the budget",
    ),
    "NaN temperature": (lambda s: SamplingParams(temperature=float("nan")), "temperature=nan"),
    "infinite temperature": (lambda s: SamplingParams(temperature=float("inf")), "inf"),
    "bias of a missing token": (
        lambda s: s.llm.generate("a", SamplingParams(logit_bias={256: 1.0})),
        "256",
    ),
    "stop token of no vocabulary": (
        lambda s: s.llm.generate("a", SamplingParams(stop_token_ids=(999,))),
        "999",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_line_and_the_next_request_works(
    served: SimpleNamespace, case: str
) -> None:
    """Oracle: the message names the value; the text of before; all blocks free."""
    act, words = BAD[case]
    with pytest.raises(LipError, match=words) as caught:
        act(served)
    assert "\n" not in str(caught.value)
    core = served.llm.core
    assert not core.has_work
    assert core.scheduler.blocks.num_free == core.scheduler.blocks.num_blocks
    assert served.llm.generate("abc", PARAMS)[0].text == served.expected


def test_statistics_of_another_model_are_refused(served: SimpleNamespace, tmp_path) -> None:
    """Oracle: the documented error at the start, not during a request."""
    other = make_bundle(tmp_path / "other", heads=3)
    mixed = dataclasses.replace(served.bundle, kv_stats=other.kv_stats)
    with pytest.raises(LipError) as caught:
        LLM(mixed, kv="triattention")
    assert "\n" not in str(caught.value)


def test_sets_that_layers_cannot_share_are_refused_at_the_start(tmp_path) -> None:
    """Oracle: the documented error before any request, not one for each of them later."""
    bundle = make_bundle(tmp_path / "uneven", heads=(2, 3))
    kv = WindowPolicy(budget=16, interval=4, sinks=2, window=4, selection="per_head")
    with pytest.raises(ConfigError, match=r"per_head.*\[2, 3\]; choose per_layer_per_head"):
        LLM(bundle, kv=kv)


def test_the_longest_prompt_has_room_for_one_token(served: SimpleNamespace) -> None:
    """Oracle: context - 1 tokens are served, whatever max_tokens asks for."""
    llm = LLM(served.bundle, engine=EngineConfig(block_size=8, debug=True))
    output = llm.generate("x" * (CONTEXT - 1), SamplingParams(max_tokens=10**9))[0]
    assert (len(output.token_ids), output.finish_reason) == (1, "length")
