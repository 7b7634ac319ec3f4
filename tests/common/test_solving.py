"""The report of solver runs: courses, levels, labels, and traces that are missing or damaged."""

import json

import pytest

from common.reporting.convergence import Course, convergence_chart, convergence_svg, series
from common.reporting.runs import read_run, read_story
from common.reporting.solving import calls_to, comparison_of_methods, read_course, solving

EVIL = '<script>alert("x")</script>'


def add_solve(directory, method, rows, *, problem="saddle", overrides=(), objective=None, **config):
    """Write what ``lipllm solve`` leaves; ``rows`` are (calls, residual)."""
    directory.mkdir(parents=True)
    settings = {"problem": problem, "method": method, "size": None, "problem_options": {}} | config
    record = {"command": "solve", "objective": objective, "started": 0.0}
    record["config"] = {"problem": problem, "method": method, "solve": settings, "seed": 0}
    (directory / "run.json").write_text(json.dumps(record))
    residual = rows[-1][1] if rows else 1.0
    summary = {"command": "solve", "metrics": {"solve/residual": residual}, "seconds": 1.0}
    summary |= {"artifacts": {"trace": "trace.csv"}, "notes": {"outcome": "converged"}}
    (directory / "summary.json").write_text(json.dumps(summary))
    lines = ["iteration,calls,residual,best,lipschitz"]
    lines += [f"{i},{calls},{r},{r},1.0" for i, (calls, r) in enumerate(rows)]
    (directory / "trace.csv").write_text("\n".join(lines))
    (directory / ".hydra").mkdir()
    listed = [f"problem={problem}", f"method={method}", *overrides]
    (directory / ".hydra" / "overrides.yaml").write_text("".join(f"- {x}\n" for x in listed))
    return read_run(directory)


def test_calls_to_a_level():
    """Oracle: the rows by eye."""
    course = Course(label="a", calls=[1, 10, 100], best=[1.0, 0.1, 0.01])
    assert [calls_to(course, level) for level in (2.0, 0.1, 0.05, 0.001)] == [1, 10, 100, None]


def test_comparison_has_one_section_per_instance_and_orders_by_calls(tmp_path):
    """Oracle: two problems, one of them at two sizes; the cheaper method stands first."""
    slow = [(1, 1.0), (10, 0.1), (1000, 0.01)]
    fast = [(1, 1.0), (10, 0.01)]
    cells = [
        add_solve(tmp_path / "a", "eag", slow, objective=1000.0),
        add_solve(tmp_path / "b", "feg", fast, objective=10.0),
        add_solve(tmp_path / "c", "feg", fast, objective=10.0, size=8),
        add_solve(tmp_path / "d", "forb", fast, problem="rotation", objective=10.0),
        add_solve(tmp_path / "e", "eag", fast, overrides=["+solve.options.step_scale=0.5"]),
    ]
    markup = comparison_of_methods(cells)
    titles = ("Methods on saddle<", "Methods on saddle, size=8", "Methods on rotation")
    places = [markup.index(title) for title in titles]
    assert places == sorted(places)
    assert markup.count("<svg") == 3
    first = markup[: markup.index("Methods on saddle, size=8")]
    table = first[first.index("<table") :]
    order = [table.index(f"<td>{m}</td>") for m in ("feg", "eag", "eag step_scale=0.5")]
    assert order == sorted(order)
    assert "calls to 1e-01" in table
    assert "calls to 1e-02" in table


def test_sweeps_of_other_commands_have_no_comparison_of_methods(tmp_path):
    """Oracle: nothing."""
    cell = add_solve(tmp_path / "a", "eag", [(1, 1.0)])
    assert comparison_of_methods([]) == ""
    cell.record["command"] = "train"
    assert comparison_of_methods([cell]) == ""


@pytest.mark.parametrize("damage", ["", "no,such,columns\n1,2,3\n", "calls,best\nx,y\n", None])
def test_missing_and_damaged_traces_cost_only_the_chart(tmp_path, damage):
    """Oracle: the figures of the summary are still there."""
    cell = add_solve(tmp_path / "a", "eag", [(1, 0.5)])
    if damage is None:
        (tmp_path / "a" / "trace.csv").unlink()
    else:
        (tmp_path / "a" / "trace.csv").write_text(damage)
    assert read_course(cell).calls == []
    assert "<td>eag</td>" in comparison_of_methods([cell])
    assert "0.500" in solving(read_story(tmp_path / "a"))


def test_residuals_of_zero_and_infinity_can_be_drawn():
    """Oracle: an SVG element without points that a logarithm cannot hold."""
    course = Course(label="a", calls=[0, 1, 2, 3], best=[float("inf"), 1.0, 1e-9, 0.0])
    assert convergence_chart([course]).startswith("<svg ")
    assert convergence_chart([Course(label="b", calls=[], best=[])]).startswith("<svg ")


def test_standalone_chart_brings_its_colours():
    """Oracle: every colour that is used is defined in the document, for light and dark."""
    svg = convergence_svg([Course(label="a", calls=[1, 9], best=[1.0, 0.1])])
    assert svg.startswith('<svg xmlns="http://www.w3.org/2000/svg"')
    assert "prefers-color-scheme: dark" in svg
    for part in svg.split("var(--")[1:]:
        assert f"--{part.partition(')')[0]}:" in svg


def test_many_methods_stay_distinguishable():
    """Oracle: twelve lines, twelve pairs of colour and dash."""
    lines = series([Course(label=str(i), calls=[1], best=[1.0]) for i in range(12)])
    assert len({(line.tone, line.dashed) for line in lines}) == 12


def test_names_are_escaped(tmp_path):
    """Oracle: no tag survives."""
    cell = add_solve(tmp_path / "a", EVIL, [(1, 0.5)], problem=EVIL)
    assert "<script" not in comparison_of_methods([cell])
    assert "<script" not in solving(read_story(tmp_path / "a"))
