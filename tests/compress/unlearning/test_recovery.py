"""Refitting on retained data, and the guard against a class that comes back with it."""

import pytest
import torch

from common.errors import ConfigError
from compress.targets import Problem
from compress.unlearning.edits import Strength, edit
from compress.unlearning.measure import accuracy
from compress.unlearning.recovery import guard, rebound, recover
from compress.unlearning.samples import image_classes
from compress.unlearning.settings import UnlearnConfig
from compress.unlearning.unlearner import unlearn_model


@pytest.mark.parametrize("method", ["zero", "negate", "contrast", "neurons"])
def test_recovery_is_least_squares_over_what_is_free(make_classes, method):
    """Oracle: ``lstsq`` on the rows, output by output; chosen weights stay as edited."""
    classes, _, retain = make_classes()
    found = edit(classes, method, Strength(share=0.3))
    problem = Problem(gram_II=classes.retain_II, weight_IO=classes.weight_IO, ridge=0.0)
    new_IO = recover(problem, found, float("inf"))
    assert torch.equal(new_IO[found.chosen_IO], found.weight_IO[found.chosen_IO])
    for o in range(5):
        free = ~found.chosen_IO[:, o]
        wanted = retain @ classes.weight_IO[:, o] - retain[:, ~free] @ found.weight_IO[~free, o]
        expected = torch.linalg.lstsq(retain[:, free], wanted[:, None]).solution[:, 0]
        torch.testing.assert_close(new_IO[free, o], expected, rtol=1e-7, atol=1e-9)


def test_recovery_obeys_the_cap(make_classes):
    """Oracle: the largest singular value."""
    classes, _, _ = make_classes()
    found = edit(classes, "zero", Strength(share=0.3))
    problem = Problem(gram_II=classes.retain_II, weight_IO=classes.weight_IO, ridge=0.0)
    cap = 0.9 * float(torch.linalg.matrix_norm(recover(problem, found, float("inf")), 2))
    capped_IO = recover(problem, found, cap)
    assert torch.linalg.matrix_norm(capped_IO, 2) <= cap * (1 + 1e-9)
    assert not capped_IO[found.chosen_IO].any()


def test_nothing_chosen_and_everything_chosen_are_left_alone(make_classes):
    """Oracle: no free weight, no change; no edit, the old weights."""
    classes, _, _ = make_classes()
    problem = Problem(gram_II=classes.retain_II, weight_IO=classes.weight_IO)
    everything = edit(classes, "zero", Strength(share=1.0))
    assert not recover(problem, everything, float("inf")).any()


@pytest.mark.parametrize(
    ("figures", "share"),
    [((0.9, 0.1, 0.1), 0.0), ((0.9, 0.1, 0.5), 0.5), ((0.9, 0.1, 0.9), 1.0), ((-2, -4, -3), 0.5)],
)
def test_rebound_is_the_share_of_forgetting_undone(figures, share):
    """Oracle: by hand, for accuracies and for negative bits per byte."""
    assert rebound(*figures) == pytest.approx(share)


def test_nothing_forgotten_cannot_rebound():
    """Oracle: no division by zero or by a gain."""
    assert rebound(0.5, 0.5, 0.9) == 0.0
    assert rebound(0.5, 0.6, 0.9) == 0.0


def test_recovery_restores_a_class_and_the_guard_says_so(classifier, digits):
    """Oracle: the published effect (.0 edited, .95 after refitting on retained data alone)."""
    settings = UnlearnConfig(
        forget=3, method="neurons", share=0.3, layers=1.0, recovery="lsq", tau=float("inf")
    )
    data = image_classes(digits, settings)
    found = unlearn_model(classifier, data.forget_train.inputs, data.retain_train.inputs, settings)
    known, edited, now = (
        accuracy(model, data.forget_held) for model in (classifier, found.edited, found.model)
    )
    assert edited < 0.2
    assert now > 0.8
    with pytest.raises(ConfigError, match=r"of the class back.*nothing was written") as info:
        guard(known, edited, now, settings.rebound)
    assert "\n" not in str(info.value)
    assert guard(known, edited, now, 1.0) > 0.8
