"""The partition of a model's parameters, caps per matrix, update targets."""

import pytest

from common.errors import ConfigError
from common.models import LipschitzMLP, LipschitzTransformer, ModelConfig
from train.groups import (
    Constraint,
    OptimConfig,
    optimizer_defaults,
    parameter_groups,
    role,
    update_target,
)
from train.optim import Muon

SIZES = {"vocab_size": 11, "width": 8, "layers": 3, "heads": 4, "context": 6}


def transformer(**changes):
    """A small model with every kind of parameter."""
    freedoms = {"mlp_bias": True, "position_bias": True, "head_bias": True}
    return LipschitzTransformer(ModelConfig(**SIZES, **(freedoms | changes)))


def by_name(groups):
    """Map each parameter name to its group."""
    return {name: group for group in groups for name in group["names"]}


@pytest.mark.parametrize("model", [transformer(), transformer(content_heads=(0, 2, 4))])
@pytest.mark.parametrize("embedding", ["rows", "adamw"])
def test_every_parameter_is_in_exactly_one_group(model, embedding):
    """Oracle: the model's own list of parameters, by identity."""
    groups = parameter_groups(model, OptimConfig(embedding=embedding), Constraint())
    grouped = sorted(id(p) for group in groups for p in group["params"])
    assert grouped == sorted(id(p) for p in model.parameters())
    Muon(groups, **optimizer_defaults(OptimConfig(), Constraint()))


def test_kinds_follow_the_rule():
    """Matrices and head to Muon, embedding clipped by rows, vectors to AdamW without a cap."""
    groups = by_name(parameter_groups(transformer(), OptimConfig(), Constraint()))
    for name, group in groups.items():
        kind = role(name)
        if kind == "vector":
            assert (group["kind"], group["constraint"]) == ("adamw", "none")
        elif kind == "embedding":
            assert group["constraint"] == "row_clip"
        else:
            assert (group["kind"], group["constraint"]) == ("muon", "soft_cap")
    assert role("layers.0.attention.position_bias") == "vector"
    assert role("head.bias") == "vector"
    assert role("head.weight") == "head"


def test_longest_pattern_decides_the_cap():
    """Caps per matrix: general, per kind, per layer."""
    constraint = Constraint(w_max=1.1, caps={"attention": 0.5, "1.attention.query": 0.2, "head": 8})
    groups = by_name(parameter_groups(transformer(), OptimConfig(), constraint))
    assert groups["layers.0.attention.query.weight"]["w_max"] == 0.5
    assert groups["layers.1.attention.query.weight"]["w_max"] == 0.2
    assert groups["layers.0.mlp.up.weight"]["w_max"] == 1.1
    assert groups["head.weight"]["w_max"] == 8


def test_per_head_cuts_query_key_and_value_rows():
    """Slices are the heads that a matrix has."""
    constraint = Constraint(per_head=True)
    model = transformer(content_heads=2)
    groups = by_name(parameter_groups(model, OptimConfig(), constraint))
    assert groups["layers.0.attention.query.weight"]["slices"] == 2
    assert groups["layers.0.attention.value.weight"]["slices"] == 4
    assert groups["layers.0.attention.output.weight"]["slices"] == 1


def test_modular_targets_match_the_published_table():
    """Oracle: specification section 3.3, blocks mass 16 and 32, three layers."""
    model = transformer()
    for mass, hidden, value, ends in ((16, 0.2963, 0.8889, 0.05556), (32, 0.3137, 0.9412, 0.02941)):
        optim = OptimConfig(targets="modular", blocks_mass=mass)
        for name, expected in {
            "layers.0.attention.output.weight": hidden,
            "layers.1.mlp.up.weight": hidden,
            "layers.2.mlp.down.weight": hidden,
            "layers.0.attention.value.weight": value,
            "layers.0.attention.query.weight": value,
            "head.weight": ends,
            "embedding.weight": ends,
        }.items():
            assert update_target(model, name, optim) == pytest.approx(expected, abs=5.1e-5)


def test_modular_targets_follow_scales():
    """Oracle: closed form: query and key by the softmax scale, all by the final scale."""
    optim = OptimConfig(targets="modular")
    plain, scaled = transformer(), transformer(softmax_scale=4.0, final_scale=2.0)
    query, up = "layers.0.attention.query.weight", "layers.0.mlp.up.weight"
    assert update_target(scaled, query, optim) == pytest.approx(
        update_target(plain, query, optim) / 8
    )
    assert update_target(scaled, up, optim) == pytest.approx(update_target(plain, up, optim) / 2)


def test_uniform_targets_with_factors():
    """All targets 1 except where a factor is given."""
    optim = OptimConfig(target_factors={"head": 8.0})
    assert update_target(transformer(), "head.weight", optim) == 8
    assert update_target(transformer(), "layers.0.mlp.up.weight", optim) == 1


def test_classifier_is_partitioned_too():
    """Linear layers to Muon (modular target 1 / layers), biases to AdamW."""
    model = LipschitzMLP((6, 5, 5, 3))
    groups = by_name(
        parameter_groups(model, OptimConfig(targets="modular"), Constraint(caps={"linears.0": 2}))
    )
    assert groups["linears.0.weight"]["w_max"] == 2
    assert groups["linears.1.weight"]["target"] == pytest.approx(1 / 3)
    assert groups["linears.1.bias"]["kind"] == "adamw"


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Constraint(w_max=-1), r"w_max=-1"),
        (lambda: Constraint(kind="row_clip"), "soft_cap"),
        (lambda: Constraint(caps={"head": 0}), r"caps\.head=0"),
        (lambda: Constraint(w_max="big"), "w_max='big'"),
        (lambda: OptimConfig(lr=0), r"optim\.lr=0"),
        (lambda: OptimConfig(matrices="sgd"), "matrices='sgd'"),
    ],
)
def test_impossible_settings_are_config_errors(make, match):
    """Errors name the value."""
    with pytest.raises(ConfigError, match=match):
        make()


def test_pattern_without_match_and_soft_cap_without_muon_are_errors():
    """Typing errors in patterns do not pass silently."""
    with pytest.raises(ConfigError, match=r"'haed' matches no matrix.*query"):
        parameter_groups(transformer(), OptimConfig(), Constraint(caps={"haed": 1.0}))
    with pytest.raises(ConfigError, match="exact_cap"):
        parameter_groups(transformer(), OptimConfig(matrices="adamw"), Constraint())
