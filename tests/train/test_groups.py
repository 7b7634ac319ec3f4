"""The partition of a model's parameters, caps per matrix, update targets."""

import pytest
import torch

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
from train.projections import PROJECTIONS

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


def test_residual_decay_halves_targets_toward_the_input():
    """Oracle: the halving per residual layer of the paper's appendix, two residuals per block."""
    model = transformer()
    plain, halved = (OptimConfig(targets="modular", residual_decay=d) for d in (1.0, 0.5))
    for name, above in {
        "head.weight": 0,
        "layers.2.mlp.up.weight": 0,
        "layers.2.attention.query.weight": 1,
        "layers.0.mlp.down.weight": 4,
        "layers.0.attention.output.weight": 5,
        "embedding.weight": 6,
    }.items():
        ratio = update_target(model, name, halved) / update_target(model, name, plain)
        assert ratio == pytest.approx(0.5**above)


def test_target_factors_scale_the_learning_rate_of_adamw():
    """Oracle: closed form; nothing that is set is ignored in silence."""
    optim = OptimConfig(
        matrices="adamw", lr=0.01, embedding_lr=0.02, target_factors={"up": 3.0, "embedding": 0.5}
    )
    groups = by_name(parameter_groups(transformer(), optim, Constraint(kind="exact_cap")))
    assert groups["layers.0.mlp.up.weight"]["lr"] == pytest.approx(0.03)
    assert groups["layers.0.mlp.down.weight"]["lr"] == pytest.approx(0.01)
    assert groups["embedding.weight"]["lr"] == pytest.approx(0.01)


def test_null_patterns_are_no_errors():
    """Configurations list every role; null is w_max, whatever longer pattern it shadows."""
    caps = {"query": None, "up": None, "mlp": 0.5, "head": 8.0, "linear": None}
    constraint = Constraint(w_max=1.1, caps=caps)
    groups = by_name(parameter_groups(transformer(), OptimConfig(), constraint))
    assert groups["layers.0.attention.query.weight"]["w_max"] == 1.1
    assert groups["layers.0.mlp.up.weight"]["w_max"] == 0.5
    constraint = Constraint(caps={"query": None, "linear": 2.0})
    classifier = by_name(parameter_groups(LipschitzMLP((6, 5, 3)), OptimConfig(), constraint))
    assert classifier["linears.0.weight"]["w_max"] == 2.0


@pytest.mark.parametrize("kind", [kind for kind in PROJECTIONS if kind != "row_clip"])
@pytest.mark.parametrize("matrices", ["muon", "adamw"])
@pytest.mark.parametrize("per_head", [False, True])
def test_every_constraint_steps_every_model(kind, matrices, per_head):
    """Property of the registry: each member works for all groups, heads included, or says why."""
    constraint = Constraint(kind=kind, per_head=per_head, caps={"query": 0.5})
    optim = OptimConfig(matrices=matrices, lr=0.02)
    model = transformer()
    if matrices == "adamw" and kind == "soft_cap":
        with pytest.raises(ConfigError, match="exact_cap"):
            parameter_groups(model, optim, constraint)
        return
    optimizer = Muon(
        parameter_groups(model, optim, constraint), **optimizer_defaults(optim, constraint)
    )
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.randn(p.shape)
        optimizer.step()
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    if PROJECTIONS[kind].caps:
        weight = model.get_parameter("layers.0.attention.query.weight").detach()
        for block in weight.chunk(4 if per_head else 1):
            ratio = (block.shape[1] / block.shape[0]) ** 0.5
            assert float(ratio * torch.linalg.matrix_norm(block.double(), 2)) <= 0.5 * (1 + 1e-5)


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
        (lambda: Constraint(w_max=1e-40), r"constraint\.w_max=1e-40: expected a cap from 1e-06"),
        (lambda: Constraint(w_max=float("nan")), r"constraint\.w_max=nan"),
        (lambda: Constraint(caps={"head": 1e30}), r"caps\.head=1e\+30: expected .* to 1e\+06"),
        (lambda: Constraint(kind="row_clip"), "soft_cap"),
        (lambda: Constraint(caps={"head": 0}), r"caps\.head=0"),
        (lambda: Constraint(w_max="big"), "w_max='big'"),
        (lambda: OptimConfig(lr=0), r"optim\.lr=0"),
        (lambda: OptimConfig(lr=1e38), r"optim\.lr=1e\+38: expected at most 1e\+06; lower it"),
        (lambda: OptimConfig(embedding_lr=1e38), r"optim\.embedding_lr=1e\+38"),
        (lambda: OptimConfig(shape_factor="sqrt"), "match_rms_adamw"),
        (lambda: OptimConfig(momentum_start=-0.1), r"momentum_start=-0\.1"),
        (lambda: OptimConfig(residual_decay=0), r"residual_decay=0"),
        (lambda: OptimConfig(target_factors={"up": "big"}), r"target_factors\.up='big'"),
        (lambda: Constraint(spectral_decay=1.5), r"spectral_decay=1\.5"),
        (lambda: Constraint(dtype="float16"), "bfloat16"),
        (lambda: Constraint(kinds={"head": "sfot_cap"}), r"kinds\.head='sfot_cap'"),
        (lambda: Constraint(head_gains={"value": (1.0, 1.0)}), r"per_head=true; add it"),
        (
            lambda: Constraint(per_head=True, head_gains={"value": ("a", "b")}),
            r"head_gains\.value=\('a', 'b'\): expected a list of numbers",
        ),
        # What head_gains.layers.0.attention.value=[1, 1] on the command line becomes.
        (
            lambda: Constraint(per_head=True, head_gains={"layers": {0: {"attention": [1.0]}}}),
            r"head_gains\.layers=.*write a name with dots as",
        ),
        (lambda: Constraint(caps={"layers": {0: 1.0}}), r"caps\.layers=.*name with dots as"),
        (lambda: Constraint(caps={"up": "big"}), r"caps\.up='big'"),
        (lambda: OptimConfig(matrices="sgd"), "matrices='sgd'"),
    ],
)
def test_impossible_settings_are_config_errors(make, match):
    """Errors name the value."""
    with pytest.raises(ConfigError, match=match):
        make()


@pytest.mark.parametrize(
    ("model", "constraint", "match"),
    [
        (transformer(content_heads=0), Constraint(caps={"query": 0.5}), r"caps: pattern 'query'"),
        (transformer(), Constraint(caps={"linear": 0.5}), r"caps: pattern 'linear'"),
        (transformer(), Constraint(kinds={"embedding": "stiefel"}), r"kinds: pattern 'embedding'"),
        (LipschitzMLP((6, 5, 3)), Constraint(caps={"up": 0.5}), r"caps: pattern 'up'.*linear"),
    ],
)
def test_a_cap_for_what_the_model_lacks_is_an_error(model, constraint, match):
    """Nothing that is set is ignored in silence; embedding rows keep their own cap."""
    with pytest.raises(ConfigError, match=match):
        parameter_groups(model, OptimConfig(), constraint)


def test_soft_cap_of_one_matrix_needs_muon_too():
    """Before training, whichever setting chose it."""
    constraint = Constraint(kind="stiefel", kinds={"head": "soft_cap"})
    with pytest.raises(ConfigError, match=r"kinds\.head=soft_cap: optim\.matrices=adamw"):
        parameter_groups(transformer(), OptimConfig(matrices="adamw"), constraint)


def test_pattern_without_match_and_soft_cap_without_muon_are_errors():
    """Typing errors in patterns do not pass silently."""
    with pytest.raises(ConfigError, match=r"'haed' matches no matrix.*query"):
        parameter_groups(transformer(), OptimConfig(), Constraint(caps={"haed": 1.0}))
    with pytest.raises(ConfigError, match="exact_cap"):
        parameter_groups(transformer(), OptimConfig(matrices="adamw"), Constraint())
