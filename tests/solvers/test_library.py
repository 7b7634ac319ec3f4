"""The problem library: planted solutions, constants that hold, and the figures of the spec."""

import pytest
import torch

from common.bundle import save_bundle
from common.errors import ConfigError, LipError
from common.models import LipschitzMLP
from solvers import solve, standard_problem
from solvers.library import PROBLEMS
from solvers.structure import Structure

SMALL = {"matching_pennies": 4, "rock_paper_scissors": 6}
SMALL_OPTIONS = {
    "shared_multipliers": {"components": 3, "width": 3},
    "group_dro": {"components": 40, "groups": 3},
}
PLANTED_TOL = 1e-11
REFERENCE_TOL = 1e-7  # of solutions that a solver found
SLOPE_ROOM = 1e-9


def _build(name, size, seed=3):
    return standard_problem(
        name, size=SMALL.get(name, size), seed=seed, **SMALL_OPTIONS.get(name, {})
    )


def _pack(problem, value):
    return Structure.of(problem.start).pack(value, "value")


@pytest.mark.parametrize("size", [8, 13])
@pytest.mark.parametrize("name", sorted(PROBLEMS))
def test_solutions_are_solutions(name, size):
    """Oracle: one forward-backward step does not move a zero of F + G."""
    known = _build(name, size)
    if known.solution is None:
        pytest.skip("no closed form")
    problem, step = known.problem, 1e-2
    structure = Structure.of(problem.start)
    point = _pack(problem, known.solution)
    moved = point - step * _pack(problem, problem.full(known.solution))
    if problem.resolvent is not None:
        moved = _pack(problem, problem.resolvent(structure.unpack(moved), step))
    tol = REFERENCE_TOL if name in ("group_dro", "shared_multipliers") else PLANTED_TOL
    assert float((moved - point).norm()) <= tol * max(1.0, float(point.norm()))
    assert abs(known.error(known.solution)) <= tol


@pytest.mark.parametrize("name", sorted(PROBLEMS))
def test_error_is_positive_away_from_the_solution(name):
    """Oracle: the start, which no problem has as its solution."""
    known = _build(name, 10)
    assert known.error(known.problem.start) > 1e-4


@pytest.mark.parametrize("name", sorted(PROBLEMS))
def test_lipschitz_bounds_hold_between_points_of_the_domain(name):
    """Oracle: slopes of F and of each component between random pairs of points of the domain."""
    problem = _build(name, 8).as_sum().problem
    if problem.lipschitz_bound is None:
        pytest.skip("only an estimate is known")
    structure = Structure.of(problem.start)
    generator = torch.Generator().manual_seed(1)
    like = _pack(problem, problem.start)
    for _ in range(20):
        pair = []
        for _ in range(2):
            point = structure.unpack(like + torch.randn(like.shape, generator=generator).double())
            pair.append(point if problem.resolvent is None else problem.resolvent(point, 1.0))
        apart = float((_pack(problem, pair[0]) - _pack(problem, pair[1])).norm())
        moved = float(
            (_pack(problem, problem.full(pair[0])) - _pack(problem, problem.full(pair[1]))).norm()
        )
        assert moved <= problem.lipschitz_bound * apart * (1 + SLOPE_ROOM)
        for index in range(min(problem.num_components, 5)):
            _check_component(problem, pair, index, apart)


def _check_component(problem, pair, index, apart):
    constants = getattr(problem, "component_lipschitz", None)
    if constants is None:
        return
    draw = torch.tensor([index]), torch.ones(1, dtype=torch.float64)
    values = [_pack(problem, problem.components(point, *draw)) for point in pair]
    assert float((values[0] - values[1]).norm()) <= float(constants[index]) * apart * (
        1 + SLOPE_ROOM
    )


@pytest.mark.parametrize("name", sorted(PROBLEMS))
def test_components_average_to_the_operator(name):
    """Oracle: the whole operator; the mean over all components, drawn one by one."""
    known = _build(name, 8)
    problem = known.as_sum().problem
    if problem.num_components == 1:
        pytest.skip("no sum")
    structure = Structure.of(problem.start)
    generator = torch.Generator().manual_seed(2)
    like = _pack(problem, problem.start)
    point = structure.unpack(like + 0.3 * torch.rand(like.shape, generator=generator).double())
    blocks = () if getattr(problem, "laws", None) is None else (len(problem.laws),)
    count = problem.num_components
    sizes = [count] if not blocks else [len(law) for law in problem.laws]
    total = torch.zeros_like(like)
    for index in range(count):
        inside = [float(index < size) / size for size in sizes]
        places = [min(index, size - 1) for size in sizes]
        draw = torch.tensor([places]), torch.tensor([inside], dtype=torch.float64)
        draw = draw if len(blocks) and blocks[0] > 1 else tuple(part[:, 0] for part in draw)
        total += _pack(problem, problem.components(point, *draw))
    assert torch.allclose(total, _pack(problem, problem.full(point)), atol=1e-12, rtol=1e-10)
    whole = known.problem.full(Structure.of(known.problem.start).unpack(_pack(problem, point)))
    assert torch.allclose(total, _pack(known.problem, whole), atol=1e-12, rtol=1e-10)


def test_bilinear_sum_has_the_constants_of_the_spec():
    """Oracle: spec halpern_solvers 4.3: L_F = 1, L_Q = 1.013, sigma_min = 0.063, D = 5, d = 24."""
    known = standard_problem("bilinear_sum", components=64)
    problem = known.problem
    eye = torch.eye(24, dtype=torch.float64)
    zero = problem.full(torch.zeros(24, dtype=torch.float64))
    every = [
        torch.stack([_column(problem, index, column) for column in eye], 1) for index in range(64)
    ]
    mean_square = torch.stack([m.T @ m for m in every]).mean(0)
    whole = torch.stack([problem.full(column) - zero for column in eye], 1)
    assert float(torch.linalg.matrix_norm(whole, 2)) == pytest.approx(1.0)
    assert float(torch.linalg.eigvalsh(mean_square)[-1]) ** 0.5 == pytest.approx(1.013, abs=1e-6)
    assert float(torch.linalg.svdvals(whole)[-1]) == pytest.approx(0.063, abs=5e-4)
    assert float(known.solution.norm()) == pytest.approx(5.0)
    assert all(torch.allclose(m, -m.T, atol=1e-12) for m in every)


def _column(problem, index, point):
    draw = torch.tensor([index]), torch.ones(1, dtype=torch.float64)
    return problem.components(point, *draw) - problem.components(torch.zeros_like(point), *draw)


def test_policeman_burglar_shrinks_as_the_spec_says():
    """Oracle: spec 2.10: centring takes the norm of the n = 200 game from about 181 to 3.7."""
    raw = standard_problem("policeman_burglar", centered=False).problem.lipschitz_bound
    centred = standard_problem("policeman_burglar").problem.lipschitz_bound
    assert 150 < raw < 230
    assert 35 < raw / centred < 65


def test_quadratic_is_monotone_but_not_cocoercive():
    """Oracle: spec 3.2: x = 0, y != 0 moves F without any inner product with the move."""
    known = standard_problem("quadratic", size=10)
    origin = torch.zeros(10, dtype=torch.float64)
    move = torch.cat((torch.zeros(5), torch.ones(5))).double()
    change = known.problem.full(move) - known.problem.full(origin)
    assert float(change.norm()) > 0.1
    assert float(change @ move) == pytest.approx(0.0, abs=1e-12)


def test_min_norm_solution_is_the_limit_from_zero():
    """Oracle: the pseudo-inverse; any other solution differs by an element of the null space."""
    known = standard_problem("min_norm_least_squares", size=10)
    result = solve(known.problem, "halpern_restarted", atol=1e-8)
    assert float((result.value - known.solution).norm()) <= 1e-4


def test_group_dro_protects_the_worst_group():
    """Oracle: the same head fitted to the mean loss has a larger loss on its worst group."""
    known = _build("group_dro", 8)
    problem = known.problem
    mean = problem.start[1]
    start = torch.zeros_like(problem.start[0])
    head = start.clone()
    for _ in range(2000):
        head = head - 0.2 * problem.full((head, mean))[0]
    assert known.error((head, mean)) > 1e-4


@pytest.mark.parametrize("head", ["logistic", "hinge"])
def test_group_dro_gradients_are_those_of_the_losses(head):
    """Oracle: automatic differentiation of the losses themselves."""
    from solvers.library.group_dro import LOSSES

    margins = torch.linspace(-3, 3, 61, dtype=torch.float64, requires_grad=True)
    loss = LOSSES[head]
    (slopes,) = torch.autograd.grad(loss.value(margins).sum(), margins)
    assert torch.allclose(slopes, loss.slope(margins.detach()), atol=1e-12)
    steps = (slopes[1:] - slopes[:-1]) / 0.1
    assert float(steps.max()) <= loss.curvature + 1e-9
    assert float(steps.min()) >= 0


def test_group_dro_reads_the_digits():
    """Oracle: their shape: 64 pixels and a constant, ten groups, a distribution over them."""
    pytest.importorskip("sklearn")
    from solvers.library.features import digits

    examples = digits()
    assert examples.features_ND.shape[1] == 65
    assert sorted(set(examples.group_N.tolist())) == list(range(10))
    assert set(examples.label_N.tolist()) == {-1.0, 1.0}


def test_group_dro_reads_the_last_hidden_layer_of_a_classifier(tmp_path):
    """Oracle: the model's own forward pass: its last layer applied to the features."""
    pytest.importorskip("sklearn")
    from solvers.library.features import hidden_features

    model = LipschitzMLP([64, 8, 6, 10])
    path = save_bundle(tmp_path / "digits", model).path
    pixels = torch.rand(5, 64)
    found = model.linears[-1](hidden_features(path, pixels))
    assert torch.allclose(found, model(pixels), atol=1e-6)
    other = save_bundle(tmp_path / "other", LipschitzMLP([4, 3, 2])).path
    with pytest.raises(LipError, match="64 pixels"):
        hidden_features(other, pixels)


def test_shared_multipliers_are_the_mean_of_their_cells():
    """Oracle: finite differences of the mean smoothed bound."""
    from solvers.library import shared_multipliers as module

    generator = torch.Generator().manual_seed(0)
    cells = module._cells(4, 3, 3, generator)
    theta, mu, step = cells[0].best_theta.clone() + 0.1, 0.1, 1e-5
    gradient = sum(cell.gradient(theta, mu) for cell in cells) / 3
    for index in range(4):
        move = torch.zeros_like(theta)
        move[index] = step
        rise = module._objective(cells, theta + move, mu) - module._objective(
            cells, theta - move, mu
        )
        assert rise / (2 * step) == pytest.approx(float(gradient[index]), rel=1e-5, abs=1e-8)


def test_same_seed_same_problem():
    """Oracle: the operator's value, bit for bit; another seed differs."""
    point = torch.linspace(0, 1, 10, dtype=torch.float64)
    values = [
        standard_problem("saddle", size=10, seed=seed).problem.operator(point) for seed in (0, 0, 1)
    ]
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])


@pytest.mark.parametrize("entry", PROBLEMS.values(), ids=list(PROBLEMS))
def test_every_problem_says_what_it_is(entry):
    """The line that lists show: one sentence, short."""
    assert 10 < len(entry.about) <= 110
    assert entry.about.endswith(".")


@pytest.mark.parametrize(
    ("name", "settings", "match"),
    [
        ("knapsack", {}, "matrix_game"),
        ("saddle", {"size": 1}, "size=1"),
        ("saddle", {"size": 10**6}, "2 to 5000"),
        ("least_squares_sum", {"decay": float("nan")}, "decay=nan"),
        ("elastic_net", {"lasso": -1.0}, "lasso=-1"),
        ("rock_paper_scissors", {"size": 8}, "6 to 6"),
        ("saddle", {"components": 3}, "no options"),
        ("bilinear_sum", {"component": 3}, "components"),
        ("bilinear_sum", {"components": 0}, "components=0"),
        ("bilinear_sum", {"components": 2.5}, "expected int"),
        ("group_dro", {"head": "cubic"}, "hinge, logistic"),
        ("group_dro", {"ridge": 0.0}, "ridge=0"),
        ("group_dro", {"groups": 400}, "groups=400"),
        ("group_dro", {"data": "nowhere"}, "nowhere"),
        ("elastic_net", {"ridge": 0.0}, "l2=0"),
    ],
)
def test_impossible_requests_are_refused(name, settings, match):
    """Each in one line that names the setting or what is known."""
    with pytest.raises(LipError, match=match) as refused:
        standard_problem(name, **settings)
    assert "\n" not in str(refused.value)


def test_data_without_a_unique_solution_are_refused():
    """Oracle: columns that underflow to zero; an error that is divided by 0 proves nothing."""
    with pytest.raises(ConfigError, match="not unique"):
        standard_problem("least_squares_sum", decay=1000.0)
