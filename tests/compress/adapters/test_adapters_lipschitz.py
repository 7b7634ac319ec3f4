"""Our transformers: targets, really smaller models, and caps that keep the naive certificate."""

import pytest
import torch

from common.errors import ConfigError
from common.models.config import ACTIVATIONS
from common.norms import spectral_norm
from compress.adapters import LipschitzAdapter, adapter_for, captured, rows_of
from compress.targets import block_indices
from solvers.bounds import certify

DOUBLE = 1e-12
"""Float64 sums with some zero terms left out."""
SINGLE = 1e-6
TOKENS = torch.arange(32).reshape(2, 16) % 11
LAYOUTS = {
    "content": {"heads": 4},
    "positional": {"heads": 4, "content_heads": 0},
    "mixed": {"heads": 4, "content_heads": 1},
    "grouped": {"heads": 4, "kv_heads": 2},
    "grouped_mixed": {"heads": 4, "kv_heads": 2, "content_heads": 2, "head_dim": 6},
    "no_bias": {"heads": 4, "position_bias": False, "rope_dims": 2, "head_dim": 4},
}


def choose(adapter, fraction: float, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return random kept inputs per target: whole components, another count in each layer."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for target in adapter.targets():
        count = max(1, round(fraction * target.components) - target.layer)
        chosen = torch.randperm(target.components, generator=generator)[:count].sort().values
        kept[target.name] = block_indices(chosen, target.unit)
    return kept


def mask(adapter, kept: dict[str, torch.Tensor]) -> LipschitzAdapter:
    """Return a copy whose removed inputs have zero weights."""
    copy = adapter.working_copy()
    for target in copy.targets():
        weight_IO = torch.zeros_like(copy.weight(target))
        weight_IO[kept[target.name]] = copy.weight(target)[kept[target.name]]
        copy.write(target, weight_IO)
    return copy


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_smaller_model_equals_the_masked_one(make_model, activation, layout):
    """Oracle: the dense model with removed columns set to zero, at shifted positions too."""
    adapter = adapter_for(make_model(activation, **LAYOUTS[layout]))
    kept = choose(adapter, 0.6)
    masked = mask(adapter, kept)
    small = masked.cut(kept)
    positions = torch.arange(16)[None] + 0
    for arguments in ((TOKENS,), (TOKENS, positions)):
        expected = masked.model(*arguments)
        torch.testing.assert_close(small(*arguments), expected, rtol=DOUBLE, atol=DOUBLE)
    assert small.num_parameters < adapter.model.num_parameters


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_choice_of_heads_can_be_cut(make_model, layout):
    """Content heads alone, positional heads alone, the last group: all equal the masked model."""
    adapter = adapter_for(make_model("relu", **LAYOUTS[layout]))
    for group in range(adapter.model.config.layer(0).kv_heads):
        kept = {
            target.name: block_indices(torch.tensor([group]), target.unit)
            if target.kind == "heads"
            else torch.arange(target.inputs)
            for target in adapter.targets()
        }
        masked = mask(adapter, kept)
        small = masked.cut(kept)
        torch.testing.assert_close(small(TOKENS), masked.model(TOKENS), rtol=DOUBLE, atol=DOUBLE)


@pytest.mark.parametrize("activation", ["gelu", "maxmin"])
def test_keeping_everything_is_bit_identical(make_model, activation):
    """In single precision, as models are stored."""
    model = make_model(activation).float()
    adapter = adapter_for(model)
    same = adapter.cut({t.name: torch.arange(t.inputs) for t in adapter.targets()})
    assert same.config == model.config
    assert torch.equal(same(TOKENS), model(TOKENS))


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "mixed" not in name])
def test_parameter_count_matches_the_targets(make_model, layout):
    """Oracle: counting tensors; heads of one kind all cost the same."""
    for activation, bias in (("maxmin", True), ("relu", False)):
        adapter = adapter_for(make_model(activation, bias=bias, **LAYOUTS[layout]))
        kept = choose(adapter, 0.5)
        small = adapter.cut(kept)
        gone = sum(
            target.params * (target.components - len(kept[target.name]) // target.unit)
            for target in adapter.targets()
        )
        assert adapter.model.num_parameters - small.num_parameters == gone


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_components_together_are_the_blocks(make_model, layout):
    """Oracle: all parameters outside embedding, head and the MLP's output bias."""
    model = make_model("gelu", **LAYOUTS[layout])
    total = sum(t.params * t.components for t in adapter_for(model).targets())
    expected = sum(
        tensor.numel()
        for name, tensor in model.named_parameters()
        if name.startswith("layers") and not name.endswith("down.bias")
    )
    assert total == expected


def test_nothing_else_changes(make_model):
    """The dense model, the random state, gradient flags and the other tensors stay."""
    model = make_model("relu")
    model.layers[0].mlp.up.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapter = adapter_for(model)
    kept = {k: v for k, v in choose(adapter, 0.5).items() if k.endswith("mlp")}
    state = torch.random.get_rng_state()
    small = adapter.cut(kept)
    assert torch.equal(state, torch.random.get_rng_state())
    assert not small.layers[0].mlp.up.weight.requires_grad
    assert small.layers[1].mlp.up.weight.requires_grad
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
        if "mlp" not in name:
            assert torch.equal(small.state_dict()[name], tensor)


def test_blocks_without_effect_are_no_targets(make_model):
    """A residual weight of 0 switches a block off: its activations are never computed."""
    model = make_model("gelu", attn_residual=(0.0, 0.5), mlp_residual=(0.5, 0.0))
    adapter = adapter_for(model)
    names = [target.name for target in adapter.targets()]
    assert names == ["layers.0.mlp", "layers.1.heads"]
    assert [name for stage in adapter.stages() for name in stage.targets] == names


def test_stages_are_the_forward_pass(make_model):
    """Oracle: the model's own forward pass."""
    model = make_model("maxmin", **LAYOUTS["grouped_mixed"])
    adapter = adapter_for(model)
    stream = adapter.start(TOKENS)
    for stage in adapter.stages():
        stream = stage.run(stream)
    assert torch.equal(model.logits(stream), model(TOKENS))


@torch.no_grad()
def test_rows_are_what_enters_the_map(make_model):
    """Oracle: hooks of the whole forward pass; hooks are gone afterwards."""
    model = make_model("maxmin")
    adapter = adapter_for(model)
    seen = {}
    with captured(adapter, adapter.targets(), lambda t, rows: seen.update({t.name: rows})):
        model(TOKENS)
    stream = adapter.start(TOKENS)
    named = {target.name: target for target in adapter.targets()}
    for stage in adapter.stages():
        for name in stage.targets:
            assert torch.equal(rows_of(adapter, stage, named[name], stream), seen[name])
        stream = stage.run(stream)
    seen.clear()
    model(TOKENS)
    assert not seen


@pytest.mark.parametrize("tau", [1.0, 1.3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_head_weights_within_cap_and_bound_keep_the_naive_bound(make_model, layout, tau):
    """Oracle: certificates of dense and pruned model, for weights that fill the cap."""
    adapter = adapter_for(make_model("relu", bias=False, **LAYOUTS[layout]))
    generator = torch.Generator().manual_seed(0)
    kept = choose(adapter, 0.5)
    copy = adapter.working_copy()
    for target in copy.targets():
        kept_K = kept[target.name]
        wild_KO = (
            torch.randn(len(kept_K), 8, generator=generator, dtype=torch.float64)
            + copy.weight(target)[kept_K]
        )
        wild_KO *= copy.cap(target, kept_K, tau) / spectral_norm(wild_KO)
        weight_IO = torch.zeros_like(copy.weight(target))
        weight_IO[kept_K] = copy.bounded(target, kept_K, wild_KO, tau)
        copy.write(target, weight_IO)
    dense = certify(adapter.model, tighten=False)
    pruned = certify(copy.cut(kept), tighten=False)
    for old, new in zip(dense.blocks, pruned.blocks, strict=True):
        layer = adapter.model.config.layer(old.layer)
        a = layer.attn_residual if old.kind == "attention" else layer.mlp_residual
        own_old, own_new = old.naive - (1 - a), new.naive - (1 - a)
        if new.naive_radius_in <= old.naive_radius_in:
            assert own_new <= tau * own_old * (1 + SINGLE)
    if tau == 1.0:
        assert pruned.naive <= dense.naive * (1 + SINGLE)


def test_an_unbounded_pull_back_returns_the_weights(make_model):
    """``tau=inf`` and weights within the limit are returned as they are."""
    adapter = adapter_for(make_model("relu"))
    target = adapter.find("layers.0.heads")
    kept_K = torch.arange(target.unit)
    weight_KO = adapter.weight(target)[kept_K]
    assert adapter.bounded(target, kept_K, 100 * weight_KO, float("inf")) is not None
    assert torch.equal(adapter.bounded(target, kept_K, weight_KO, 1.0), weight_KO)
    assert adapter.cap(target, kept_K, float("inf")) == float("inf")


def test_amplifications_are_those_of_the_certificate(make_model):
    """Oracle: the certificate's deviation of one block's unit error."""
    model = make_model("gelu", attn_residual=0.3, mlp_residual=0.4)
    certificate = certify(model, tighten=False)
    gains = adapter_for(model).amplifications(certificate)
    for target in adapter_for(model).targets():
        layer = model.config.layer(target.layer)
        is_heads = target.kind == "heads"
        share = layer.attn_residual * layer.attn_factor if is_heads else layer.mlp_residual
        deltas = [0.0] * len(certificate.blocks)
        deltas[2 * target.layer + (not is_heads)] = share
        expected = certificate.logit_deviation(deltas) * model.config.vocab_size**0.5
        assert gains[target.name] * certificate.head_norm == pytest.approx(expected, rel=1e-9)


def test_unknown_models_are_refused():
    """The message names the class."""
    with pytest.raises(ConfigError, match="LSTM"):
        adapter_for(torch.nn.LSTM(2, 2))
