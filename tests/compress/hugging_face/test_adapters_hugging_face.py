"""Decoder models of transformers: stages, accounting, masking, surgery, refusals."""

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor

from common.errors import ConfigError, ShapeError
from compress.adapters import adapter_for
from compress.pruner import prune_model
from compress.settings import CompressConfig
from compress.targets import block_indices

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gpt2")
GATED = FAMILIES[:-1]
DOUBLE = 1e-11
"""Float64 sums with some zero terms left out."""


def choose(adapter: Any, *, uneven: bool = True) -> dict[str, Tensor]:
    """Return random kept inputs per target: whole components, fewer in the second layer."""
    generator = torch.Generator().manual_seed(0)
    kept = {}
    for target in adapter.targets():
        count = max(1, target.components // 2 - (target.layer if uneven else 0))
        chosen = torch.randperm(target.components, generator=generator)[:count].sort().values
        kept[target.name] = block_indices(chosen, target.unit)
    return kept


def masked(model: Any, kept: dict[str, Tensor]) -> Any:
    """Return the dense model with the rows of everything else set to zero."""
    adapter = adapter_for(model).working_copy()
    for target in adapter.targets():
        weight_IO = torch.zeros_like(adapter.weight(target))
        weight_IO[kept[target.name]] = adapter.weight(target)[kept[target.name]]
        adapter.write(target, weight_IO)
    return adapter.model


def through_stages(model: Any, tokens_BT: Tensor) -> Tensor:
    """Return logits by start, all stages, final norm and head."""
    adapter = adapter_for(model)
    with torch.no_grad():
        stream = adapter.start(tokens_BT)
        for stage in adapter.stages():
            stream = stage.run(stream)
        norm = getattr(adapter.decoder, "norm", None) or adapter.decoder.ln_f
        return model.lm_head(norm(stream.hidden_BTC))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_stages_compute_the_model(make_decoder, tokens_BT, logits, family, attention):
    """Oracle: the model's own logits, bit for bit; layers with windows get their own mask."""
    model = make_decoder(family, attention=attention)
    assert torch.equal(through_stages(model, tokens_BT), logits(model, tokens_BT))
    assert all("forward" not in vars(layer) for layer in adapter_for(model).layers)


def test_dropout_is_off_and_the_mode_comes_back(make_decoder, tokens_BT, logits):
    """Oracle: the logits in evaluation mode; training flags before."""
    model = make_decoder("gpt2")
    expected = logits(model, tokens_BT)
    model.train()
    model.transformer.h[0].mlp.training = False
    flags = [module.training for module in model.modules()]
    assert torch.equal(through_stages(model, tokens_BT), expected)
    assert [module.training for module in model.modules()] == flags


def test_layers_of_older_versions_return_tuples(make_decoder, tokens_BT, logits, monkeypatch):
    """Oracle: the same model with layers that return tensors."""
    model = make_decoder("llama")
    expected = logits(model, tokens_BT)
    plain = type(model.model.layers[0]).forward

    def layer(self: Any, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        return (plain(self, *args, **kwargs),)

    def forward(self: Any, input_ids: Tensor, use_cache: bool) -> Tensor:
        hidden = self.embed_tokens(input_ids)
        positions = self.rotary_emb(hidden, torch.arange(input_ids.shape[1])[None])
        for module in self.layers:
            hidden = module(hidden, position_embeddings=positions)[0]
        return self.norm(hidden)

    monkeypatch.setattr(type(model.model.layers[0]), "forward", layer)
    monkeypatch.setattr(type(model.model), "forward", forward)
    assert torch.equal(through_stages(model, tokens_BT), expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_smaller_model_equals_the_masked_one(make_decoder, tokens_BT, logits, family, attention):
    """Oracle: the dense model whose removed rows are zero; layers differ in shape."""
    model = make_decoder(family, dtype=torch.float64, attention=attention)
    adapter = adapter_for(model)
    kept = choose(adapter)
    small = adapter.cut(kept)
    expected = logits(masked(model, kept), tokens_BT)
    torch.testing.assert_close(logits(small, tokens_BT), expected, rtol=DOUBLE, atol=DOUBLE)
    assert not torch.allclose(expected, logits(model, tokens_BT))


@pytest.mark.parametrize("family", FAMILIES)
def test_accounting_is_exact(make_decoder, family):
    """Oracle: counted parameters; operations by the formulas for one neuron and one group."""
    model = make_decoder(family)
    adapter = adapter_for(model)
    kept = choose(adapter)
    gone = sum(
        target.params * (target.components - len(kept[target.name]) // target.unit)
        for target in adapter.targets()
    )
    assert gone == model.num_parameters() - adapter.cut(kept).num_parameters()
    heads, mlp = adapter.targets()[:2]
    width, head_dim, group = 32, 8, 1 if family == "gpt2" else 2
    attended = 6 if family in ("qwen2", "mistral") else 64
    assert mlp.flops == (4 if family == "gpt2" else 6) * width
    projections = 4 * width * head_dim * (group + 1)
    assert heads.flops == projections + 2 * attended * head_dim * group
    wholes = sum(target.flops * target.components for target in adapter.targets())
    assert adapter.flops(torch.zeros(1, 1)) == wholes + 2 * 40 * width
    assert (heads.name, mlp.name) == ("model.layers.0.heads", "model.layers.0.mlp")
    assert (heads.unit, heads.components, mlp.unit, mlp.components) == (
        group * head_dim,
        4,
        1,
        24,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_everything_is_bit_identical(make_decoder, tokens_BT, logits, family):
    """Oracle: the dense model; it, the random state and the flags of parameters stay."""
    model = make_decoder(family)
    adapter = adapter_for(model)
    frozen = next(iter(adapter.place(adapter.targets()[0]).producers)).module.weight
    frozen.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.random.get_rng_state()
    same = adapter.cut({t.name: torch.arange(t.inputs) for t in adapter.targets()})
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(logits(same, tokens_BT), logits(model, tokens_BT))
    assert same.config.to_dict() == model.config.to_dict()
    memory = {parameter.data_ptr() for parameter in model.parameters()}
    for (name, old), new in zip(model.named_parameters(), same.parameters(), strict=True):
        assert torch.equal(before[name], old)
        assert (new.requires_grad, new.dtype) == (old.requires_grad, old.dtype)
        assert new.is_contiguous()
        assert new.data_ptr() not in memory


@pytest.mark.parametrize("family", GATED)
def test_sizes_are_told_to_modules_and_configuration(make_decoder, family):
    """Oracle: the counts that were kept; unequal layers leave the configuration as it was."""
    adapter = adapter_for(make_decoder(family))
    even = adapter.cut(choose(adapter, uneven=False))
    assert even.config.intermediate_size == 12
    assert (even.config.num_attention_heads, even.config.num_key_value_heads) == (4, 2)
    assert even.config.head_dim == 8
    layer = even.model.layers[1]
    assert (layer.mlp.down_proj.in_features, layer.mlp.gate_proj.out_features) == (12, 12)
    assert (layer.self_attn.q_proj.out_features, layer.self_attn.k_proj.out_features) == (32, 16)
    assert layer.self_attn.num_key_value_groups == 2
    assert layer.mlp.intermediate_size == 12
    uneven = adapter.cut(choose(adapter))
    assert uneven.config.to_dict() == adapter.model.config.to_dict()
    assert uneven.model.layers[1].mlp.intermediate_size == 11


def test_gpt2_splits_its_fused_map_where_it_has_to(make_decoder):
    """Oracle: the columns of the kept heads in each third of the fused weight."""
    model = make_decoder("gpt2")
    adapter = adapter_for(model)
    kept = choose(adapter, uneven=False)
    small = adapter.cut(kept)
    attention, old = small.transformer.h[0].attn, model.transformer.h[0].attn
    assert (attention.num_heads, attention.split_size, attention.c_attn.nf) == (2, 16, 48)
    kept_K = kept["model.layers.0.heads"]
    thirds = [third[:, kept_K] for third in old.c_attn.weight.split(32, dim=1)]
    assert torch.equal(attention.c_attn.weight, torch.cat(thirds, dim=1))
    assert small.config.n_inner == 24
    mlp_only = {name: indices for name, indices in kept.items() if name.endswith("mlp")}
    assert adapter.cut(mlp_only).config.n_inner == 12


@pytest.mark.parametrize("family", FAMILIES)
def test_allowed_head_counts_can_be_built(transformers, make_decoder, family):
    """Oracle: the configuration's constructor; the fifth version's Llama wants divisors."""
    adapter = adapter_for(make_decoder(family))
    heads, mlp = adapter.targets()[:2]
    assert adapter.allowed(mlp) is None
    if family == "gpt2":
        assert adapter.allowed(heads) is None
        return
    built = set()
    for count in range(1, 5):
        sizes = {"num_attention_heads": 2 * count, "num_key_value_heads": count}
        # The class of the error belongs to the version of the package.
        with contextlib.suppress(Exception):
            make_decoder(family, **sizes)
            built.add(count)
    assert adapter.allowed(heads) == built
    if transformers.__version__ >= "5":
        assert built == ({1, 2, 4} if family == "llama" else {1, 2, 3, 4})


def test_half_precision_is_fitted_in_double(make_decoder, tokens_BT):
    """Oracle: the float32 fit of the same weights; the new ones are rounded, not the sums."""
    model = make_decoder("llama", dtype=torch.bfloat16)
    settings = CompressConfig(keep=0.5, keep_heads=0.5, ridge=1e-3, order="one_shot")
    half = prune_model(model, tokens_BT, settings)
    single = prune_model(model.float(), tokens_BT, settings)
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.bfloat16}
    for fit, other in zip(half.fits, single.fits, strict=True):
        assert torch.equal(fit.weight_IO, fit.weight_IO.bfloat16().double())
        assert fit.error == pytest.approx(other.error, rel=0.1)


def test_foreign_models_are_refused(transformers, make_decoder, tokens_BT):
    """Oracle: one line that names the class and what would be accepted."""
    config = transformers.BloomConfig(vocab_size=40, hidden_size=32, n_layer=1, n_head=4)
    with pytest.raises(ConfigError, match=r"^BloomForCausalLM: unknown .* Llama.* GPT-2.*$"):
        adapter_for(transformers.BloomForCausalLM(config))
    model = make_decoder("llama")
    model.model.layers[1].self_attn.sinks = torch.nn.Parameter(torch.zeros(9))
    with pytest.raises(ConfigError, match="layer 1 LlamaAttention holds parameters of its own"):
        adapter_for(model)
    model = make_decoder("llama")
    model.model.layers[1].mlp.up_proj = torch.nn.Bilinear(32, 32, 24)
    with pytest.raises(ConfigError, match="layer 1 up_proj is a Bilinear: expected"):
        adapter_for(model)
    model = make_decoder("qwen3")
    model.model.layers[0].self_attn.v_proj = torch.nn.Linear(32, 40)
    with pytest.raises(ConfigError, match="a map of 40 outputs, expected 32"):
        adapter_for(model)
    with pytest.raises(ShapeError, match="at most 64 per sequence"):
        adapter_for(make_decoder("gpt2")).start(torch.zeros(1, 65, dtype=torch.long))
