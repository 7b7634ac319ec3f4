"""The model of transformers: our forward, batches with padding, caches, generation, training."""

from typing import Any

import pytest
import torch

from common.errors import ConfigError, ShapeError
from common.models import LipschitzTransformer
from common.models.config import ACTIVATIONS

transformers = pytest.importorskip("transformers")

# Rounding in float64 and float32 of logits of size about 10; kernels sum in other orders.
EXACT, SINGLE = 1e-9, 2e-4
PLAIN = {"position_bias": False}
VARIANTS: dict[str, dict[str, object]] = {
    "everything": {},
    "plain": {**PLAIN, "mlp_bias": False, "head_bias": False},
    "positional": {"content_heads": 0, "heads": 4, "kv_heads": 2},
    "uniform": {**PLAIN, "heads": 4, "kv_heads": 2, "content_heads": 4, "head_dim": 8},
    "partly rotated": {**PLAIN, "rope_dims": 4},
    "padded head": {"vocab_multiple": 16},
    "no logits": {**PLAIN, "softmax_scale": 0.0},
    "dead blocks": {"attn_residual": (0.0, 0.6, 0.0), "mlp_residual": (0.0, 0.5, 0.0)},
}


@pytest.fixture(scope="module")
def wrap() -> Any:
    """Return the function under test."""
    from serve.export.modeling import wrap

    return wrap


def random_tokens(tiny: Any, *shape: int) -> torch.Tensor:
    """Return random token ids."""
    return torch.randint(tiny.vocab, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_are_ours(tiny: Any, wrap: Any, variant: str, attention: str) -> None:
    """Oracle: our model's forward, in float64 and in float32."""
    tokens_BT = random_tokens(tiny, 2, 40)
    for dtype, tolerance in ((torch.float64, EXACT), (torch.float32, SINGLE)):
        model = tiny.make_model(dtype, **VARIANTS[variant])
        wrapped = wrap(model)
        wrapped.set_attn_implementation(attention)
        with torch.no_grad():
            expected, found = model(tokens_BT), wrapped(tokens_BT).logits
        assert found.dtype == dtype
        # The eager function of transformers takes its softmax in float32.
        limit = SINGLE if attention == "eager" else tolerance
        torch.testing.assert_close(found, expected, atol=limit, rtol=0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(tiny: Any, wrap: Any, activation: str) -> None:
    """Oracle: our model's forward."""
    model = tiny.make_model(activation=activation)
    tokens_BT = random_tokens(tiny, 1, 12)
    torch.testing.assert_close(wrap(model)(tokens_BT).logits, model(tokens_BT), atol=EXACT, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_chunks_through_a_cache(tiny: Any, wrap: Any, variant: str, kind: str) -> None:
    """Oracle: our model's forward over the whole sequence."""
    model = tiny.make_model(**VARIANTS[variant])
    wrapped, tokens_BT = wrap(model), random_tokens(tiny, 2, 30)
    cache = transformers.DynamicCache(config=wrapped.config)
    if kind == "static":
        cache = transformers.StaticCache(config=wrapped.config, max_cache_len=40)
    with torch.no_grad():
        parts = [
            wrapped(part_BT, past_key_values=cache).logits
            for part_BT in tokens_BT.split([9, 1, 12, 1, 1, 6], dim=1)
        ]
        torch.testing.assert_close(torch.cat(parts, 1), model(tokens_BT), atol=EXACT, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_left_padding(tiny: Any, wrap: Any, variant: str, attention: str) -> None:
    """Oracle: our model's forward of each sequence by itself; padding tokens are arbitrary."""
    # The eager function of transformers is single precision: padding is NaN in float64.
    is_exact = attention == "sdpa"
    dtype, limit = (torch.float64, EXACT) if is_exact else (torch.float32, SINGLE)
    model = tiny.make_model(dtype, **VARIANTS[variant])
    wrapped = wrap(model)
    wrapped.set_attn_implementation(attention)
    lengths, tokens_BT = (7, 20, 1), random_tokens(tiny, 3, 20)
    mask_BT = torch.stack([(torch.arange(20) >= 20 - n).long() for n in lengths])
    positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        for positions in (positions_BT, None):
            logits = wrapped(tokens_BT, attention_mask=mask_BT, position_ids=positions).logits
            assert logits.isfinite().all()
            for row, length in enumerate(lengths):
                expected = model(tokens_BT[row : row + 1, -length:])[0]
                torch.testing.assert_close(logits[row, -length:], expected, atol=limit, rtol=0)


def greedy_by_ours(model: LipschitzTransformer, prompt: list[int], count: int) -> list[int]:
    """Return greedy tokens up to the first narrow choice, by our full forward."""
    tokens = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            values, ids = model(torch.tensor([tokens]))[0, -1].topk(2)
        if values[0] - values[1] < 1e-3:
            break
        tokens.append(int(ids[0]))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_greedy_generation(tiny: Any, wrap: Any, variant: str, options: dict[str, object]) -> None:
    """Oracle: our full forward token by token, and our engine; batch of three lengths."""
    model = tiny.make_model(**VARIANTS[variant])
    wrapped, prompts = wrap(model), tiny.make_prompts([3, 17, 9])
    wrapped.generation_config.disable_compile = True
    tokens_BT, mask_BT = pad_left(prompts)
    found = wrapped.generate(
        tokens_BT,
        attention_mask=mask_BT,
        do_sample=False,
        max_new_tokens=16,
        pad_token_id=0,
        **options,
    )
    compared = 0
    for row, prompt in enumerate(prompts):
        new = found[row, tokens_BT.shape[1] :].tolist()
        expected = greedy_by_ours(model, prompt, 16)
        compared += len(expected)
        assert new[: len(expected)] == expected
        engine = tiny.run_alone(model, prompt, tiny.greedy).output
        assert engine[: len(expected)] == expected
    assert compared >= 16


def pad_left(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and attention mask of prompts that end together."""
    width = max(map(len, prompts))
    rows = [[0] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(rows), torch.tensor(mask)


def test_beams_have_the_score_of_their_text(tiny: Any, wrap: Any) -> None:
    """Oracle: log-probabilities by our full forward; the best beam is not worse than greedy."""
    model = tiny.make_model()
    wrapped = wrap(model)
    tokens_BT, mask_BT = pad_left(tiny.make_prompts([5, 11]))
    settings = {"attention_mask": mask_BT, "max_new_tokens": 8, "pad_token_id": 0}
    beams = wrapped.generate(
        tokens_BT,
        num_beams=4,
        do_sample=False,
        length_penalty=0.0,
        output_scores=True,
        return_dict_in_generate=True,
        **settings,
    )
    greedy = wrapped.generate(tokens_BT, do_sample=False, **settings)
    for row in range(2):
        prompt = tokens_BT[row][mask_BT[row].bool()]
        scores = [
            _log_probability(model, prompt, rows[row, tokens_BT.shape[1] :])
            for rows in (beams.sequences, greedy)
        ]
        assert float(beams.sequences_scores[row]) == pytest.approx(scores[0], abs=1e-5)
        assert scores[0] >= scores[1] - 1e-9


def _log_probability(model: LipschitzTransformer, prompt: torch.Tensor, new: torch.Tensor) -> float:
    with torch.no_grad():
        logits = model(torch.cat([prompt, new])[None])[0, len(prompt) - 1 : -1]
    return float(logits.log_softmax(-1).gather(1, new[:, None]).sum())


def test_sampling_follows_the_seed_and_the_distribution(tiny: Any, wrap: Any) -> None:
    """Oracle: the same seed gives the same tokens; frequencies are the model's probabilities."""
    model = tiny.make_model(final_scale=0.5)
    wrapped, prompt = wrap(model), torch.tensor(tiny.make_prompts([6]))
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(
            wrapped.generate(
                prompt.expand(1500, -1), do_sample=True, top_k=0, max_new_tokens=1, pad_token_id=0
            )[:, -1]
        )
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    with torch.no_grad():
        expected = model(prompt)[0, -1].softmax(-1)
    found = torch.bincount(torch.cat(draws[1:]), minlength=tiny.vocab) / 3000
    # Five standard deviations of a frequency.
    assert ((found - expected).abs() <= 5 * (expected / 3000).sqrt() + 1e-3).all()


def test_loss_and_gradients(tiny: Any, wrap: Any) -> None:
    """Oracle: cross entropy and gradients by our model's forward."""
    model = tiny.make_model()
    wrapped, tokens_BT = wrap(model), random_tokens(tiny, 2, 16)
    labels_BT = tokens_BT.clone()
    labels_BT[0, :5] = -100
    loss = wrapped(tokens_BT, labels=labels_BT).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    logits = model(tokens_BT)[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits.float(), labels_BT[:, 1:].flatten())
    expected.backward()
    torch.testing.assert_close(loss, expected)
    assert found.keys() == {name for name, p in model.named_parameters() if p.grad is not None}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, atol=1e-7, rtol=1e-5)


def test_logits_to_keep(tiny: Any, wrap: Any) -> None:
    """Oracle: slices of all logits."""
    wrapped, tokens_BT = wrap(tiny.model), random_tokens(tiny, 2, 10)
    every, index = wrapped(tokens_BT).logits, torch.tensor([0, 4])
    for options, expected in (
        ({"logits_to_keep": 3}, every[:, -3:]),
        ({"num_logits_to_keep": 1}, every[:, -1:]),
        ({"logits_to_keep": index}, every[:, index]),
    ):
        found = wrapped(tokens_BT, **options).logits
        torch.testing.assert_close(found, expected, atol=EXACT, rtol=0)


def test_outputs_on_demand(tiny: Any, wrap: Any) -> None:
    """Oracle: streams of our layers; attention rows are distributions; tuples on request."""
    model = tiny.model
    wrapped, tokens_BT = wrap(model), random_tokens(tiny, 1, 10)
    wrapped.set_attn_implementation("eager")
    output = wrapped(tokens_BT, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == model.config.layers + 1
    stream = model.stream(model.embed(tokens_BT))
    torch.testing.assert_close(output.hidden_states[-1], stream, atol=SINGLE, rtol=0)
    assert [a.shape[1] for a in output.attentions] == list(model.config.heads)
    for weights in output.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
        assert weights.triu(1).count_nonzero() == 0
    assert wrapped(tokens_BT, use_cache=False).past_key_values is None
    assert torch.equal(wrapped(tokens_BT, return_dict=False)[0], output.logits)
    embedded = wrapped(inputs_embeds=model.embed(tokens_BT)).logits
    assert torch.equal(embedded, output.logits)
    with pytest.raises(ValueError, match="exactly one"):
        wrapped()


def test_attention_functions_of_others(tiny: Any, wrap: Any) -> None:
    """Oracle: our forward; the function gets scale, groups and unknown arguments; bias refused."""
    seen: list[Any] = []

    def probe(module: Any, q: Any, k: Any, v: Any, mask: Any, **options: Any) -> Any:
        seen.append((module.layer_idx, module.num_key_value_groups, mask, options["note"]))
        output = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=options["scaling"], enable_gqa=True
        )
        return output.transpose(1, 2), None

    transformers.AttentionInterface.register("probe", probe)
    model, tokens_BT = tiny.make_model(**VARIANTS["uniform"]), random_tokens(tiny, 2, 9)
    wrapped = wrap(model)
    assert wrapped.is_backend_compatible()
    wrapped.set_attn_implementation("probe")
    logits = wrapped(tokens_BT, note="x").logits
    torch.testing.assert_close(logits, model(tokens_BT), atol=EXACT, rtol=0)
    assert seen == [(layer, 2, None, "x") for layer in range(3)]
    biased = wrap(tiny.model)
    biased.set_attn_implementation("probe")
    with pytest.raises(ConfigError, match="position biases"):
        biased(tokens_BT, note="x")
    biased.set_attn_implementation("sdpa")
    with pytest.raises(ConfigError, match="over pages"):
        biased(tokens_BT, cache=object())


def test_a_decode_step_does_nothing_twice(
    tiny: Any, wrap: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: one table of angles per head width and pass; without padding no mask."""
    from serve.export import attention

    widths: list[int] = []
    masks: list[Any] = []

    def rotation(positions: Any, frequency: Any, dtype: Any) -> Any:
        widths.append(2 * len(frequency))
        return original(positions, frequency, dtype)

    def sdpa(*arguments: Any, **options: Any) -> Any:
        masks.append(arguments[4])
        return function(*arguments, **options)

    original = attention.rotation
    function = transformers.AttentionInterface().get_interface("sdpa", None)
    monkeypatch.setattr(attention, "rotation", rotation)
    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "sdpa", sdpa)
    for variant, expected in (("uniform", [8]), ("plain", [8, 16])):
        wrapped = wrap(tiny.make_model(**VARIANTS[variant]))
        tokens_BT = random_tokens(tiny, 2, 9)
        cache = wrapped(tokens_BT).past_key_values
        del widths[:], masks[:]
        ones_BT = torch.ones(2, 10, dtype=torch.int64)
        wrapped(tokens_BT[:, :1], attention_mask=ones_BT, past_key_values=cache)
        assert widths == expected
        assert masks == [None] * 3


def test_packed_sequences_do_not_see_each_other(tiny: Any, wrap: Any) -> None:
    """Oracle: our model's forward of each sequence by itself."""
    model = tiny.model
    tokens_BT = random_tokens(tiny, 1, 20)
    positions_BT = torch.cat([torch.arange(8), torch.arange(12)])[None]
    logits = wrap(model)(tokens_BT, position_ids=positions_BT, use_cache=False).logits
    expected = torch.cat([model(tokens_BT[:, :8]), model(tokens_BT[:, 8:])], dim=1)
    torch.testing.assert_close(logits, expected, atol=EXACT, rtol=0)


def test_the_context_is_a_limit(tiny: Any, wrap: Any) -> None:
    """Oracle: the length of the position table; one token less works."""
    wrapped = wrap(tiny.model)
    tokens_BT = random_tokens(tiny, 1, tiny.context)
    cache = wrapped(tokens_BT).past_key_values
    with pytest.raises(ShapeError, match=f"sequence of {tiny.context + 1} tokens"):
        wrapped(tokens_BT[:, :1], past_key_values=cache)
