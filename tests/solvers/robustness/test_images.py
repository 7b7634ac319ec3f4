"""Image classifiers: exact for linear ones, never refuted, and a wrong bound is refuted."""

import pytest
import torch
from torch import Tensor

from common.errors import CertificateError, ConfigError, DataError
from common.models import LipschitzMLP
from solvers.robustness import ImageEvaluator, RobustnessSettings
from solvers.robustness.images import feature_bound, forward_error

SETTINGS = RobustnessSettings(
    l2_epsilons=(0.02, 0.1, 0.5), linf_epsilons=(0.01, 0.05, 0.2), steps=15, restarts=2, points=9
)


def problem(
    sizes: tuple[int, ...], activation: str = "relu", count: int = 60
) -> tuple[LipschitzMLP, Tensor, Tensor]:
    """Return a random classifier, images in [0, 1], and labels that are mostly its own."""
    model = LipschitzMLP(sizes, activation)
    x = torch.rand(count, sizes[0])
    with torch.no_grad():  # without this one class wins everywhere and nothing can be attacked
        model.linears[-1].bias -= model(x).mean(0)
    labels = model(x).argmax(-1)
    labels[::7] = (labels[::7] + 1) % sizes[-1]
    return model, x, labels


def test_linear_two_class_curves_meet() -> None:
    """Oracle: for a linear classifier of two classes the certificate is exact, and so is PGD."""
    model, x, labels = problem((6, 2))
    settings = RobustnessSettings(
        l2_epsilons=(0.05, 0.1, 0.2, 0.4), norms=("l2",), box=False, steps=20
    )
    found = ImageEvaluator(model, settings).evaluate(x, labels)
    shares = [(p.certified_acc, p.pgd_acc, p.fgsm_acc) for p in found.points]
    assert all(certified == attacked == step for certified, attacked, step in shares)
    assert shares[0][0] > shares[-1][0]
    assert found.accuracy == pytest.approx(1 - 9 / 60)


@pytest.mark.parametrize("activation", ["relu", "tanh", "abs", "maxmin"])
@pytest.mark.parametrize("box", [True, False])
def test_attacks_never_beat_the_certificate(activation: str, box: bool) -> None:
    """Oracle: the check inside raises; here: order and monotonicity of every curve."""
    model, x, labels = problem((9, 16, 12, 4), activation)
    settings = RobustnessSettings(
        l2_epsilons=SETTINGS.l2_epsilons, linf_epsilons=SETTINGS.linf_epsilons, box=box, points=9
    )
    found = ImageEvaluator(model, settings).evaluate(x, labels)
    for norm in ("l2", "linf"):
        points = [p for p in found.points if p.norm == norm]
        assert [p.epsilon for p in points] == sorted(p.epsilon for p in points)
        for name in ("certified_acc", "certified_top1", "pgd_acc", "pgd_top1"):
            values = [getattr(p, name) for p in points]
            assert values == sorted(values, reverse=True), name
        for p in points:
            assert p.certified_acc <= p.pgd_acc <= min(p.fgsm_acc, p.clean_acc)
            assert p.certified_top1 <= p.pgd_top1
    for one in found.curves:
        assert one.accuracy[0] == found.accuracy
        assert one.top1[0] == 1.0
        assert list(one.accuracy) == sorted(one.accuracy, reverse=True)


def test_a_wrong_bound_is_refuted() -> None:
    """Oracle: a claimed constant far below the true one; both accuracies are in the message."""
    model, x, labels = problem((9, 16, 4))
    with pytest.raises(CertificateError, match=r"under attack .* certified accuracy"):
        ImageEvaluator(model, SETTINGS, pair=1e-6).evaluate(x, labels)


@pytest.mark.parametrize("activation", ["relu", "abs", "maxmin"])
def test_rounding_of_cancelling_biases_is_given_up(activation: str) -> None:
    """Oracle: the exact result; biases of 2^40 round the pixels and are taken off again."""
    model = LipschitzMLP((2, 2, 2), activation).double()
    with torch.no_grad():
        for linear, shift in zip(model.linears, (2.0**40, -(2.0**40)), strict=True):
            linear.weight.copy_(torch.eye(2))
            linear.bias.fill_(shift)
        if activation == "maxmin":  # the larger one comes out first
            model.linears[-1].weight.copy_(torch.eye(2).flip(0))
    x = torch.rand(100, 1).double() + torch.tensor([0.0, 1e-5]).double()
    with torch.no_grad():
        error = (model(x) - x).abs().amax(1, keepdim=True)
        assert float(error.max()) > 1e-5
        assert bool((error <= forward_error(model, x)).all())
        top, radii = ImageEvaluator(model, SETTINGS)._radii(x)
    assert bool((top == 0).any())
    assert not bool(radii[top == 0].any())


def test_a_better_bound_of_pairs_helps() -> None:
    """Oracle: the exact constant of a net that is linear on the data, where the norms are loose."""
    model, x, _ = problem((4, 8, 3))
    with torch.no_grad():
        model.linears[0].bias += 100.0  # every neuron stays active: |W2 W1| is the constant
        model.linears[1].bias -= model(x).mean(0)
    labels = model(x).argmax(-1)
    last, first = (model.linears[i].weight.detach().double() for i in (1, 0))
    rows = last @ first
    exact = float((rows[:, None] - rows[None]).norm(dim=-1).max())
    settings = RobustnessSettings(l2_epsilons=(0.05, 0.2), norms=("l2",), steps=5, points=9)
    radii = [
        float(ImageEvaluator(model, settings, **claim).evaluate(x, labels).median_radius or 0)
        for claim in ({}, {"pair": exact})
    ]
    assert radii[1] > 1.05 * radii[0] > 0


def test_feature_bound_against_svd() -> None:
    """Oracle: product of singular values; a linear classifier's features are its inputs."""
    model, _, _ = problem((5, 8, 6, 3))
    norms = [float(torch.linalg.matrix_norm(w.weight.detach().double(), 2)) for w in model.linears]
    assert norms[0] * norms[1] <= feature_bound(model) <= norms[0] * norms[1] * (1 + 1e-6)
    assert feature_bound(problem((5, 3))[0]) == 1.0


def test_the_model_is_left_alone_and_results_repeat() -> None:
    """Oracle: state and dtype before and after; equality of two runs with one seed."""
    model, x, labels = problem((9, 16, 4))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = ImageEvaluator(model, SETTINGS).evaluate(x, labels, seed=3)
    assert first == ImageEvaluator(model, SETTINGS).evaluate(x, labels, seed=3)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_unusable_images_are_refused() -> None:
    """Oracle: the contract, with the setting that helps in the message."""
    model, x, labels = problem((9, 16, 4))
    with pytest.raises(ConfigError, match=r"robustness\.box=false"):
        ImageEvaluator(model, SETTINGS).evaluate(2 * x, labels)
    with pytest.raises(DataError, match="expected \\(N, 9\\)"):
        ImageEvaluator(model, SETTINGS).evaluate(x[:, :5], labels)
    with pytest.raises(DataError, match="images of shape"):
        ImageEvaluator(model, SETTINGS).evaluate(x[:0], labels[:0])
