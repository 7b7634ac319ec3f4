"""Closed-form edits of one map."""

import math

import pytest
import torch

from common.errors import ConfigError
from compress.unlearning.edits import (
    EDITS,
    Classes,
    Strength,
    clip_by_scale,
    edit,
    largest_per_output,
    pair_scores,
    row_sums,
)

EXACT = 1e-9  # float64, well conditioned
NORM_EXACT = 1e-8  # relative, of a capped spectral norm


def test_pair_scores_are_the_fidelity_of_single_inputs(make_classes):
    """Oracle: ``1 - E(y - a x_i w)^2 / E y^2`` with the best factor, computed on the rows."""
    classes, forget, _ = make_classes()
    scores_IO = pair_scores(classes.forget_II, classes.weight_IO)
    for i in range(0, 12, 5):
        for o in range(5):
            output, part = forget @ classes.weight_IO[:, o], forget[:, i] * classes.weight_IO[i, o]
            best = output @ part / (part @ part)
            expected = 1 - (output - best * part).square().sum() / output.square().sum()
            assert scores_IO[i, o] == pytest.approx(float(expected), abs=EXACT)


def test_scores_of_silent_inputs_and_outputs_are_zero(make_classes):
    """Oracle: nothing contributes to nothing; no NaN from dead neurons."""
    classes, _, _ = make_classes()
    weight_IO = classes.weight_IO.clone()
    weight_IO[3] = 0
    weight_IO[:, 1] = 0
    gram_II = classes.forget_II.clone()
    gram_II[7] = gram_II[:, 7] = 0
    scores_IO = pair_scores(gram_II, weight_IO)
    assert torch.isfinite(scores_IO).all()
    assert not scores_IO[3].any()
    assert not scores_IO[7].any()
    assert not scores_IO[:, 1].any()


def test_row_sums_add_up_to_the_energy_of_each_output(make_classes):
    """Oracle: ``E y_o^2``, of which row sums are the shares."""
    classes, forget, _ = make_classes()
    energy_O = (forget @ classes.weight_IO).square().mean(0)
    torch.testing.assert_close(row_sums(classes.forget_II, classes.weight_IO).sum(0), energy_O)


@pytest.mark.parametrize(("share", "count"), [(0.01, 1), (0.25, 3), (0.3, 4), (1.0, 12)])
def test_the_largest_are_chosen_per_output(share, count):
    """Oracle: sorting each column; ``ceil(share I)`` of them."""
    scores_IO = torch.rand(12, 5, generator=torch.Generator().manual_seed(0))
    chosen_IO = largest_per_output(scores_IO, share)
    assert chosen_IO.sum(0).tolist() == [count] * 5
    threshold_O = scores_IO.sort(0, descending=True).values[count - 1]
    assert torch.equal(chosen_IO, scores_IO >= threshold_O)


def test_ridge_solves_its_normal_equations(make_classes):
    """Oracle: the gradient of the stated objective, on the rows themselves."""
    classes, forget, retain = make_classes()
    mu = 0.7
    weight_IO = edit(classes, "ridge", Strength(mu=mu, ridge=0.0)).weight_IO.requires_grad_(True)
    target_O = (retain @ classes.weight_IO).mean(0)
    kept = (retain @ (weight_IO - classes.weight_IO)).square().sum(1).mean()
    moved = (forget @ weight_IO - target_O).square().sum(1).mean()
    total = kept + mu * moved
    total.backward()
    assert weight_IO.grad.abs().max() < EXACT * total.item()


def test_ridge_is_the_published_formula_with_the_penalty_at_the_old_weights(make_classes):
    """Oracle: ``(G_r + mu G_f)^-1 (G_r W + mu mean_f t')`` at lambda 0."""
    classes, _, _ = make_classes(3)
    mu, mean_O = 0.2, classes.retain_mean_I @ classes.weight_IO
    right_IO = classes.retain_II @ classes.weight_IO
    right_IO = right_IO + mu * torch.outer(classes.forget_mean_I, mean_O)
    expected_IO = torch.linalg.solve(classes.retain_II + mu * classes.forget_II, right_IO)
    found_IO = edit(classes, "ridge", Strength(mu=mu, ridge=0.0)).weight_IO
    torch.testing.assert_close(found_IO, expected_IO, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
def test_no_weight_on_the_class_changes_nothing(make_classes, ridge):
    """Oracle: ``mu = 0`` gives the old weights bit for bit."""
    classes, _, _ = make_classes()
    assert torch.equal(
        edit(classes, "ridge", Strength(mu=0.0, ridge=ridge)).weight_IO, classes.weight_IO
    )


def test_push_moves_the_class_beyond_the_retained_mean(make_classes):
    """Oracle: the solution with the goal ``2 mean_r - mean_f`` in place of ``mean_r``."""
    classes, _, _ = make_classes(4)
    mean_O, forget_O = (
        mean @ classes.weight_IO for mean in (classes.retain_mean_I, classes.forget_mean_I)
    )
    right_IO = classes.retain_II @ classes.weight_IO
    right_IO = right_IO + 0.3 * torch.outer(classes.forget_mean_I, 2 * mean_O - forget_O)
    expected_IO = torch.linalg.solve(classes.retain_II + 0.3 * classes.forget_II, right_IO)
    found_IO = edit(classes, "ridge", Strength(mu=0.3, push=1.0, ridge=0.0)).weight_IO
    torch.testing.assert_close(found_IO, expected_IO, rtol=1e-8, atol=1e-10)


def test_more_weight_on_the_class_forgets_more_and_keeps_less(make_classes):
    """Oracle: both parts of a penalised optimum are monotone in the penalty."""
    classes, forget, retain = make_classes(1)
    target_O = (retain @ classes.weight_IO).mean(0)
    kept, moved = [], []
    for mu in (0.01, 0.1, 1.0, 10.0):
        weight_IO = edit(classes, "ridge", Strength(mu=mu)).weight_IO
        kept.append(float((retain @ (weight_IO - classes.weight_IO)).square().mean()))
        moved.append(float((forget @ weight_IO - target_O).square().mean()))
    assert kept == sorted(kept)
    assert moved == sorted(moved, reverse=True)
    assert moved[-1] < moved[0]


@pytest.mark.parametrize("method", EDITS)
def test_a_cap_holds(make_classes, method):
    """Oracle: the largest singular value, where the free edit exceeds it."""
    classes, _, _ = make_classes(2)
    free = edit(classes, method, Strength(share=0.2, mu=1.0)).weight_IO
    cap = 0.7 * float(torch.linalg.matrix_norm(free, 2))
    capped = edit(classes, method, Strength(share=0.2, mu=1.0, cap=cap))
    assert torch.linalg.matrix_norm(capped.weight_IO, 2) <= cap * (1 + NORM_EXACT)
    if method not in ("ridge", "negate"):
        assert not capped.weight_IO[capped.chosen_IO].any()


def test_zeroing_and_negating_can_raise_the_norm():
    """Oracle: a 2 x 2 rotation, of norm 1; one entry away or negated it is larger."""
    turn = torch.tensor([[1.0, 1.0], [-1.0, 1.0]], dtype=torch.float64) / math.sqrt(2)
    pruned = turn.clone()
    pruned[1, 0] = 0
    assert torch.linalg.matrix_norm(pruned, 2) > 1.1
    pruned[1, 0] = -turn[1, 0]
    assert torch.linalg.matrix_norm(pruned, 2) > 1.4
    assert torch.linalg.matrix_norm(clip_by_scale(pruned, 1.0), 2) == pytest.approx(1.0)


def test_capped_ridge_beats_the_scaled_one(make_classes):
    """Oracle: the objective: a constrained optimum is no worse than a feasible point."""
    classes, forget, retain = make_classes(2)
    target_O = (retain @ classes.weight_IO).mean(0)

    def objective(weight_IO):
        kept = (retain @ (weight_IO - classes.weight_IO)).square().sum(1).mean()
        return float(kept + 0.5 * (forget @ weight_IO - target_O).square().sum(1).mean())

    free_IO = edit(classes, "ridge", Strength(mu=0.5)).weight_IO
    cap = 0.8 * float(torch.linalg.matrix_norm(free_IO, 2))
    capped_IO = edit(classes, "ridge", Strength(mu=0.5, cap=cap)).weight_IO
    assert objective(free_IO) <= objective(capped_IO) < objective(clip_by_scale(free_IO, cap))


def test_negate_and_zero_choose_the_same_weights(make_classes):
    """Oracle: the published pair differs in the factor only, -1 or 0."""
    classes, _, _ = make_classes()
    zero, negate = (edit(classes, method, Strength()) for method in ("zero", "negate"))
    assert torch.equal(zero.chosen_IO, negate.chosen_IO)
    assert torch.equal(zero.weight_IO + zero.weight_IO - classes.weight_IO, negate.weight_IO)


@pytest.mark.parametrize("unit", [1, 2, 3])
def test_neurons_go_as_whole_components(make_classes, unit):
    """Oracle: rows are zero in whole blocks, ``ceil(share N)`` of them, the others untouched."""
    classes, _, _ = make_classes(unit=unit)
    found = edit(classes, "neurons", Strength(share=0.3))
    gone_NU = (found.weight_IO == 0).all(1).reshape(-1, unit)
    assert torch.equal(gone_NU.any(1), gone_NU.all(1))
    assert int(gone_NU.all(1).sum()) == math.ceil(0.3 * 12 / unit)
    kept_I = ~gone_NU.flatten()
    assert torch.equal(found.weight_IO[kept_I], classes.weight_IO[kept_I])


def test_contrast_spares_what_both_classes_use():
    """Oracle: by hand: input 0 is large on both classes, input 1 on the class to forget only."""
    classes = Classes(
        forget_II=torch.diag(torch.tensor([4.0, 1.0, 0.1], dtype=torch.float64)),
        forget_mean_I=torch.zeros(3, dtype=torch.float64),
        retain_II=torch.diag(torch.tensor([4.0, 0.0, 0.1], dtype=torch.float64)),
        retain_mean_I=torch.zeros(3, dtype=torch.float64),
        weight_IO=torch.ones(3, 2, dtype=torch.float64),
    )
    strength = Strength(share=1 / 3)
    assert edit(classes, "zero", strength).chosen_IO.nonzero()[:, 0].tolist() == [0, 0]
    assert edit(classes, "contrast", strength).chosen_IO.nonzero()[:, 0].tolist() == [1, 1]


def test_unknown_methods_are_one_line(make_classes):
    """Oracle: the names there are."""
    classes, _, _ = make_classes()
    with pytest.raises(ConfigError, match=r"unlearn\.method='wipe': expected one of ridge, zero"):
        edit(classes, "wipe", Strength())
