"""The command ``solve``: its keys, what it leaves behind, and its refusals."""

import csv
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from common.errors import ConfigError
from solvers import solve, solve_app, standard_problem
from solvers.solve_app import SolveSettings, samples
from solvers.trace import residual_trace


def _summary(done):
    assert done.status == 0, done.err
    path = Path(done.out.splitlines()[-1].removeprefix("summary: "))
    return path.parent, json.loads(path.read_text())


@pytest.mark.parametrize(
    "settings",
    [
        {"problem": "knapsack"},
        {"method": "simplex"},
        {"size": 0},
        {"atol": -1.0},
        {"max_calls": 0},
        {"time_limit": 0.0},
        {"method": "halpern", "options": {"step_scale": 3.0}},
        {"method": "halpern", "options": {"unknown": 1}},
        {"options": {"step_scale": 1.0}},
    ],
)
def test_settings_refuse_impossible_values(settings):
    """Each is refused before a problem is built."""
    with pytest.raises(ConfigError):
        SolveSettings(**settings)


@pytest.mark.parametrize(
    ("method", "expected"), [("halpern", False), ("feg", False), ("vr_halpern", True)]
)
def test_methods_that_sample_are_told_apart(method, expected):
    """Oracle: which of them the papers call stochastic."""
    assert samples(method) is expected


def test_short_keys_choose_problem_and_method(lipllm):
    """Oracle: the summary meets the tolerance; the trace ends where the summary says."""
    done = lipllm("solve", "problem=rotation", "method=feg", "solve.size=4", "solve.atol=1e-3")
    folder, summary = _summary(done)
    metrics = summary["metrics"]
    assert metrics["solve/residual"] <= 1e-3
    assert metrics["solve/error"] <= metrics["solve/error_allowed"] * (1 + 1e-9)
    assert metrics["solve/evals"] == metrics["solve/full_evals"] > metrics["solve/iterations"]
    assert "(feg: residual " in summary["notes"]["status"]
    assert summary["notes"]["outcome"] == "converged"
    rows = list(csv.DictReader((folder / "trace.csv").read_text().splitlines()))
    assert float(rows[-1]["best"]) == pytest.approx(metrics["solve/residual"], rel=1e-6)
    assert ElementTree.parse(folder / "residual.svg").getroot().tag.endswith("svg")
    config = json.loads((folder / "run.json").read_text())["config"]
    assert config["solve"]["problem"] == "rotation"


def test_keys_of_the_group_still_work_and_auto_is_the_default(lipllm):
    """Oracle: the method that is named in the sentence."""
    _, summary = _summary(lipllm("solve", "solve.problem=rock_paper_scissors"))
    assert "(pdhg: residual " in summary["notes"]["status"]


def test_matrix_form_and_sum_form_count_calls_alike(lipllm):
    """Oracle: an evaluation of a game with 4 moves each costs 4 component calls in both forms."""
    for method in ("extragradient", "vr_extragradient"):
        done = lipllm(
            "solve", "problem=matrix_game", f"method={method}", "solve.size=8", "solve.rtol=0.1"
        )
        metrics = _summary(done)[1]["metrics"]
        assert metrics["solve/evals"] == (
            4 * metrics["solve/full_evals"] + metrics["solve/component_evals"]
        )


def test_sampling_follows_the_seed(lipllm):
    """Oracle: the summary's figures; one seed twice, then another."""
    figures = []
    for seed in (0, 0, 1):
        settings = ("problem=least_squares_sum", "method=vr_halpern", "solve.size=6")
        limits = ("+solve.problem_options.components=40", "solve.max_iterations=30", "force=true")
        done = lipllm("solve", *settings, *limits, f"seed={seed}", "solve.atol=0")
        metrics = _summary(done)[1]["metrics"]
        figures.append((metrics["solve/residual"], metrics["solve/component_evals"]))
    assert figures[0] == figures[1] != figures[2]


def test_budget_ends_a_run_with_its_sentence(lipllm):
    """A run that stops early is a result: exit 0, and the sentence says what ended it."""
    done = lipllm("solve", "problem=quadratic", "solve.size=20", "solve.max_calls=500")
    _, summary = _summary(done)
    assert summary["notes"]["outcome"] == "max calls"
    assert summary["metrics"]["solve/evals"] < 700


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("problem=knapsack",), "matrix_game"),
        (("method=simplex",), "halpern_restarted"),
        (("problem=matrix_game", "method=halpern"), "method="),
        (("problem=rotation", "method=pdhg"), "method="),
        (("problem=rock_paper_scissors", "solve.size=8"), "size=8"),
        (("problem=saddle", "+solve.problem_options.components=3"), "no options"),
        (("solve.atol=fast",), "solve.atol"),
        (("probelm=saddle",), "did you mean problem"),
        (("solve.max_calls=-1",), "solve.max_calls=-1"),
    ],
)
def test_command_refuses_in_one_line(lipllm, arguments, hint):
    """Exit 2, one line that names the setting or the remedy."""
    done = lipllm("solve", *arguments)
    assert done.status == 2
    (line,) = done.err.strip().splitlines()
    assert line.startswith("lipllm: error: ")
    assert hint in line


def test_new_option_is_told_how_to_be_written(lipllm):
    """Oracle: the remedy itself works."""
    done = lipllm("solve", "solve.options={step_scale: 1.5}")
    assert done.status == 2
    assert "+solve.options.NAME=VALUE" in done.err
    good = ("method=halpern_restarted", "solve.size=3", "+solve.options.step_scale=1.5")
    assert lipllm("solve", *good).status == 0


def test_sweep_compares_methods_and_the_report_draws_them(lipllm):
    """Oracle: one row per method, fewest calls first, and the command that repeats the sweep."""
    done = lipllm("solve", "problem=saddle", "method=feg,forb", "solve.size=8", "-m")
    assert done.status == 0, done.err
    sweep = done.out.splitlines()[-1].removeprefix("sweep: ")
    done = lipllm("report", f"sweep={sweep}")
    folder, _ = _summary(done)
    page = (folder / "report.html").read_text()
    assert "Methods on saddle" in page
    assert "lipllm solve problem=saddle method=feg,forb solve.size=8 -m" in page
    table = page[page.index("calls to") :]
    assert table.index("<td>feg</td>") < table.index("<td>forb</td>")
    assert "<svg" in page[page.index("Methods on saddle") :]


def test_report_of_one_run_says_what_the_residual_allows(lipllm):
    """Oracle: the run's own summary."""
    folder, _ = _summary(lipllm("solve", "problem=saddle", "solve.size=8"))
    report, _ = _summary(lipllm("report", f"run={folder}"))
    page = (report / "report.html").read_text()
    assert "saddle by feg" in page
    assert "largest error that the residual allows" in page
    assert "The residual recomputed at the returned point" in page


def test_progress_is_logged_at_doubling_distances(monkeypatch, caplog):
    """Oracle: a clock that moves one second per iteration: news at 2, 4, 8, 16 seconds."""
    known = standard_problem("rotation", size=4)
    monkeypatch.setattr(solve_app, "time", _Clock(iter(range(1, 100))))
    with caplog.at_level("INFO"):
        callback = solve_app._progress(0.0)
        solve(known.problem, "halpern", atol=0.0, max_iterations=30, callback=callback)
    seconds = [int(record.message.split(" s: ")[0]) for record in caplog.records]
    assert seconds == [2, 4, 8, 16]


class _Clock:
    def __init__(self, ticks):
        self.ticks = ticks

    def perf_counter(self):
        """Return the next second."""
        return float(next(self.ticks))


def test_trace_keeps_ends_and_running_minimum():
    """Oracle: the whole trace of the result."""
    known = standard_problem("rotation", size=6)
    result = solve(known.problem, "halpern", atol=0.0, max_iterations=3000)
    rows = residual_trace(result, scale=3)
    assert len(rows) <= 501
    assert rows[0].iteration == 0
    assert rows[-1].iteration == len(result.trace) - 1
    residuals = [point.residual for point in result.trace]
    for row in rows:
        assert row.best == min(residuals[: row.iteration + 1])
        assert row.calls == 3 * result.trace[row.iteration].calls
