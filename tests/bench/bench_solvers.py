"""Oracle complexity of the sampled methods: epochs to a tolerance, their growth with N and 1/eps.

An epoch is N component calls. The tables of spec halpern_solvers 4.2 and 4.3 are repeated on the
instances of ``solvers.library``; all columns of one run, ``make bench ARGS="-k solvers"`` writes
``runs/bench/solvers_tables.md`` too.
"""

import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from solvers import solve
from solvers.library import standard_problem
from solvers.problem import Problem

RESULTS = Path(__file__).resolve().parents[2] / "runs" / "bench"
SIZES = (64, 256, 1024, 4096)
SEEDS = 3
TABLES: dict[str, dict[tuple[str, int, float], list[float]]] = defaultdict(dict)

Method = tuple[str, dict[str, Any]]

# Name -> method and options; the first word of a name that is sampled is followed by its variant.
BILINEAR: dict[str, Method] = {
    "EG 0.7/L": ("extragradient", {"step_scale": 0.7}),
    "FoRB 0.45/L": ("forb", {}),
    "EAG 0.57/L": ("eag", {"restart_factor": 0.0}),
    "FEG": ("feg", {"restart_factor": 0.0}),
    "FEG + restart": ("feg", {}),
    "VR-EG": ("vr_extragradient", {}),
    "A2 m=.3, no restart": ("inexact_halpern", {"restart_factor": 0.0, "implicit": False}),
    "A2 m=1 + restart 0.5": ("inexact_halpern", {"restart_factor": 0.5, "implicit": False}),
    "A2 certified + restart 0.5": (
        "inexact_halpern",
        {"inner": "certified", "restart_factor": 0.5, "implicit": False},
    ),
    "A2 default": ("inexact_halpern", {}),
    "A2 default, b=8": ("inexact_halpern", {"batch": 8}),
}
LEAST_SQUARES: dict[str, Method] = {
    "Halpern 2/L": ("halpern", {}),
    "Halpern + restart": ("halpern_restarted", {}),
    "A1 published": ("vr_halpern", {"parameters": "published"}),
    "A1 1/L_is, no restart": ("vr_halpern", {"restart_factor": 0.0}),
    "A1 default": ("vr_halpern", {}),
}
SAMPLED = ("inexact_halpern", "vr_halpern", "vr_extragradient")
# A budget of epochs, far above what the spec's tables need.
BUDGET = {"bilinear": 8000, "least squares": 12_000}
ONE_SEED = ("A2 m=.3, no restart", "A1 published")  # long, and nearly without spread


def epochs_to(problem: Problem, method: Method, targets: dict[float, float], seed: int) -> dict:
    """Return epochs per label of a target residual, infinity where the budget did not do."""
    name, options = method
    options = options | ({"seed": seed} if name in SAMPLED else {})
    most = BUDGET["least squares" if problem.cocoercive else "bilinear"] * problem.num_components
    limits = {"atol": min(targets.values()), "max_calls": most, "max_iterations": 10**7}
    result = solve(problem, name, check=False, **limits, **options)
    found = {}
    for label, target in targets.items():
        calls = (each.calls for each in result.trace if each.residual <= target)
        found[label] = next(calls, math.inf) / problem.num_components
    return found


def measure(bench: Any, table: str, problem: Problem, methods: dict[str, Method], goals: dict):
    """Run every method on one problem; one row per method and tolerance."""
    size = problem.num_components
    for name, method in methods.items():
        seeds = 1 if method[0] not in SAMPLED or name in ONE_SEED else SEEDS
        runs = [epochs_to(problem, method, goals, seed) for seed in range(seeds)]
        for goal in goals:
            values = [run[goal] for run in runs]
            TABLES[table][name, size, goal] = values
            if math.isfinite(max(values)):
                bench.add(f"{table} N={size} {goal:g} {name}", values, "epochs", components=size)


@pytest.mark.parametrize("size", SIZES)
def test_bilinear_sum(bench: Any, size: int) -> None:
    """Table 4.3: Algorithm 2 against extragradient methods, and the acceptance ratio."""
    problem = standard_problem("bilinear_sum", size=24, seed=size, components=size).problem
    measure(bench, "bilinear", problem, BILINEAR, {1e-2: 1e-2, 1e-3: 1e-3})
    rivals = ("EG 0.7/L", "FEG", "FEG + restart", "VR-EG")
    for goal in (1e-2, 1e-3):
        table = TABLES["bilinear"]
        others = min(statistics.median(table[name, size, goal]) for name in rivals)
        ratio = statistics.median(table["A2 default", size, goal]) / others
        bench.add(f"bilinear N={size} {goal:g} A2 over the best rival", [ratio], "x", most=1.0)
        assert ratio < 1, "Algorithm 2 with restart no longer needs the fewest calls"


@pytest.mark.parametrize("size", SIZES)
def test_least_squares_sum(bench: Any, size: int) -> None:
    """Table 4.2: Algorithm 1 against deterministic Halpern, relative residuals."""
    problem = standard_problem("least_squares_sum", seed=size, components=size).problem
    first = float(problem.full(problem.start).norm())
    measure(bench, "least squares", problem, LEAST_SQUARES, {1e-2: 1e-2 * first})


def test_growth(bench: Any) -> None:
    """Exponents of calls in N and in 1/eps by least squares on logarithms, and the tables."""
    lines = ["# Oracle complexity of the sampled methods", "", *_preamble()]
    for table, cells in TABLES.items():
        goals = sorted({goal for _, _, goal in cells}, reverse=True)
        names = list(dict.fromkeys(name for name, _, _ in cells))
        sizes = sorted({size for _, size, _ in cells})
        lines += ["", f"## {table}", "", *_markdown(cells, names, sizes, goals)]
        for name in names:
            for goal in goals:
                medians = [statistics.median(cells[name, size, goal]) for size in sizes]
                if len(sizes) > 1 and math.isfinite(max(medians)):
                    calls = [size * median for size, median in zip(sizes, medians, strict=True)]
                    bench.add(f"{table} {goal:g} {name}: N^", [_slope(sizes, calls)], "power")
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = "\n".join(lines) + "\n"
    (RESULTS / "solvers_tables.md").write_text(text, encoding="ascii")


def _preamble() -> list[str]:
    return [
        "Epochs (component calls / N) to the residual, median of three seeds; `-` where the budget",
        f"({BUDGET['bilinear']} and {BUDGET['least squares']}) did not suffice. The last column",
        "of each tolerance is the exponent of calls in N. Regenerate:",
        "",
        "```sh",
        'make bench ARGS="-k solvers"      # writes runs/bench/solvers_tables.md',
        "```",
    ]


def _markdown(cells: dict, names: list[str], sizes: list[int], goals: list[float]) -> list[str]:
    heads = [str(size) for size in sizes] + ["N^"]
    lines = ["| method | " + " | ".join(f"{g:g}: {h}" for g in goals for h in heads) + " |"]
    lines.append("|---|" + "---|" * (len(heads) * len(goals)))
    for name in names:
        row = []
        for goal in goals:
            medians = [statistics.median(cells[name, size, goal]) for size in sizes]
            row += [f"{median:.3g}" if math.isfinite(median) else "-" for median in medians]
            finite = math.isfinite(max(medians)) and len(sizes) > 1
            calls = [size * median for size, median in zip(sizes, medians, strict=True)]
            row.append(f"{_slope(sizes, calls):.2f}" if finite else "-")
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    return lines


def _slope(sizes: list[int], calls: list[float]) -> float:
    logs = [math.log(size) for size in sizes]
    return statistics.linear_regression(logs, [math.log(each) for each in calls]).slope
