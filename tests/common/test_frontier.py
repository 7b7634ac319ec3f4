"""The frontier of a sweep: brute force, hand-made sweeps and the published rows are the oracles."""

import dataclasses
import itertools
import json
import math
import random
import re

import pytest

from common.errors import DataError
from common.reporting import charts
from common.reporting.frontier import constants, frontier, pareto, read_points, tones
from common.reporting.published import NOTES, PUBLISHED, published
from common.reporting.radius import certified_curve, radius_section
from common.reporting.runs import read_sweep
from common.reporting.sweep import comparison

SHAKESPEARE_NOTE = "published, reference formula, unsound for 4 heads, first 1.5k characters"


@pytest.fixture
def quick(monkeypatch):
    """Record what would be drawn: the description of each chart, on a canvas that is not kept."""
    from matplotlib.figure import Figure

    described = []

    def draw_only(draw, description, **_):
        draw(Figure().add_subplot())
        described.append(description)
        return "<svg></svg>"

    monkeypatch.setattr(charts, "render", draw_only)
    return described


def write(path, value):
    """Write JSON or text, making folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def add_cell(root, w_max, optim, accuracy, naive, *, seed=0, source="shakespeare", **extra):
    """Write what a finished training cell leaves; ``extra`` are further or other metrics."""
    directory = root / f"constraint.w_max={w_max},optim={optim},seed={seed}"
    config = {
        "seed": seed,
        "data": {"source": source},
        "optim": {"matrices": optim},
        "constraint": {"kind": "exact_cap", "w_max": w_max},
    }
    write(directory / "run.json", {"command": "train", "config": config, "objective": 1 - accuracy})
    metrics = {"train/val_acc_full": accuracy, "cert/naive": naive} | extra
    metrics = {name: value for name, value in metrics.items() if value is not None}
    write(directory / "summary.json", {"command": "train", "metrics": metrics, "seconds": 2.5})
    overrides = f"- constraint.w_max={w_max}\n- optim={optim}\n- seed={seed}\n"
    write(directory / ".hydra" / "overrides.yaml", overrides)
    return directory


def add_failure(root, name="optim=adamw,seed=7", reason="constraint.kind=soft_cap: <no norm>"):
    """Write what a cell that failed before it began leaves."""
    write(root / name / ".hydra" / "overrides.yaml", "- optim=adamw\n- seed=7\n")
    write(root / name / "error.txt", reason)


def add_margins(directory, radii, shares, *, stream=2.0, unit=1.5, positions=640, kind="embedding"):
    """Write the margins of a cell."""
    content = {"radii": radii, "shares": shares, "inputs": positions, "unit": kind}
    content |= {"naive_bound": stream, "unit_length": unit}
    write(directory / "margins.json", content)


@pytest.fixture
def sweep(tmp_path):
    """Return a sweep of six cells, one failed and one unfinished."""
    root = tmp_path / "sweep"
    for w_max, optim in itertools.product((0.7, 1.4, 2.8), ("muon", "adamw")):
        accuracy = 0.3 + 0.05 * w_max - 0.03 * (optim == "adamw")
        directory = add_cell(root, w_max, optim, accuracy, 10**w_max, **{
            "train/val_acc_ref": accuracy - 0.02,
            "train/val_loss_nats": 3 - w_max / 4,
            "cert/reference": w_max,
            "cert/tightened": 10**w_max / 2,
        })  # fmt: skip
        add_margins(directory, [0.0, 0.3, 3.0], [accuracy, accuracy / 2, 0.01])
    add_failure(root)
    write(root / "optim=muon,seed=9" / "run.json", {"command": "train", "config": {"seed": 9}})
    write(root / "optim=muon,seed=9" / ".hydra" / "overrides.yaml", "- optim=muon\n- seed=9\n")
    write(root / "multirun.yaml", "hydra: {}")
    return root


@pytest.mark.parametrize("count", [0, 1, 2, 40])
@pytest.mark.parametrize("grid", [0.0, 1.0])
def test_pareto_against_brute_force(count, grid):
    """Oracle: a point belongs if nothing else is as good in both and better in one."""
    generator = random.Random(count)
    values = [(generator.random() * 5, generator.random() * 5) for _ in range(count)]
    if grid:
        values = [(float(round(x)), float(round(y))) for x, y in values]
    undominated = {
        (x, y)
        for x, y in values
        if not any(a <= x and b >= y and (a, b) != (x, y) for a, b in values)
    }
    front = [values[index] for index in pareto(values)]
    assert set(front) == undominated
    assert front == sorted(undominated)


def test_points_carry_the_proved_constant(sweep):
    """Oracle: the hand-written metrics; unfinished and failed cells are no points."""
    points = {(p.optimizer, p.log10_bound): p for p in read_points(read_sweep(sweep))}
    assert len(points) == 6
    point = next(p for p in points.values() if p.cell.metrics["cert/reference"] == 1.4)
    assert point.log10_bound == pytest.approx(1.4 - math.log10(2))
    assert point.which == "tightened"
    assert {p.constraint for p in points.values()} == {"exact_cap"}
    assert {p.optimizer for p in points.values()} == {"muon", "adamw"}


@pytest.mark.parametrize(
    ("metrics", "stored", "expected"),
    [
        ({}, {}, {}),
        ({"cert/naive": 100.0}, {}, {"naive": 100.0, "log10_naive": 2.0}),
        ({"cert/log10_naive": 412.3}, {}, {"log10_naive": 412.3}),
        (
            {"cert/naive": 100.0},
            {"tightened": 10.0, "naive": 90.0, "blocks": []},
            {"naive": 90.0, "log10_naive": math.log10(90), "tightened": 10.0,
             "log10_tightened": 1.0},
        ),
        (
            {"cert/naive": 100.0},
            {"tightened": 100.0, "blocks": [], "settings": {"tighten": False}},
            {"naive": 100.0, "log10_naive": 2.0},
        ),
        ({"cert/naive": "x"}, {"tightened": "y", "blocks": []}, {}),
    ],
)  # fmt: skip
def test_constants_prefer_the_stored_certificate(tmp_path, metrics, stored, expected):
    """Oracle: written by hand; without tightening nothing is called tightened."""
    directory = add_cell(tmp_path / "s", 1.0, "muon", 0.3, None, **metrics)
    if stored:
        summary = json.loads((directory / "summary.json").read_text())
        write(directory / "summary.json", summary | {"artifacts": {"bundle": "bundle"}})
        write(directory / "bundle" / "certificate.json", stored)
    [cell] = read_sweep(tmp_path / "s")
    assert constants(cell) == pytest.approx(expected)


def test_page_shows_every_cell(quick, sweep):
    """Oracle: the numbers of the fixture in the table, the failure's reason, the counts."""
    compared = comparison(read_sweep(sweep), "name")
    heads = ["constraint.w_max", "optim", "seed", "train/val_acc_full", "train/val_acc_ref"]
    heads += ["train/val_loss_nats", "cert/reference", "cert/naive", "cert/tightened"]
    assert compared.heads == [*heads, "seconds", "status"]
    assert len(compared.rows) == 8
    assert compared.rows[0][:4] == ["2.8", "muon", "0", "0.44"]
    assert compared.rows[0][4:] == ["0.42", "2.3", "2.8", "630.957", "315.479", "2.5", "finished"]
    status = {(row[2], row[-1]) for row in compared.rows[-2:]}
    reason = "failed: constraint.kind=soft_cap: <no norm>"
    assert status == {("7", reason), ("9", "unfinished")}
    assert "certified at 25 %" in compared.document
    assert "8 runs, best first, 1 failed, 1 unfinished." in compared.document
    assert "&lt;no norm&gt;" in compared.document
    assert "<no norm>" not in compared.document
    assert "lipllm train constraint.w_max=2.8 optim=muon seed=0" in compared.document
    assert compared.table_csv.splitlines()[0].startswith("run,status,")
    assert len(compared.table_csv.splitlines()) == 9


def test_charts_say_in_words_what_they_show(quick, sweep):
    """Oracle: the best accuracy and the constant it is reached at, from the fixture."""
    comparison(read_sweep(sweep), "name")
    accuracy, loss, radius = quick
    assert accuracy.startswith("validation accuracy against the proved Lipschitz constant, 6")
    assert accuracy.endswith("0.335 at 2.51, 0.370 at 12.6, 0.440 at 315")
    assert loss.endswith("2.825 at 2.51, 2.650 at 12.6, 2.300 at 315")
    assert radius.startswith("certified accuracy against radius, 6 models; best: 22 % at 1 %")


def test_published_rows_are_present_and_labelled(quick, sweep):
    """Oracle: the rows of the source; each is called published, none is called proved."""
    markup = frontier(read_points(read_sweep(sweep)))
    assert NOTES["shakespeare"] == SHAKESPEARE_NOTE
    assert markup.count(SHAKESPEARE_NOTE) >= 3
    assert "Published, not proved" in markup
    for shown in ("0.467", "0.543", "0.615", "0.617", "0.61", "1.767", "1.230", "0.892", "1.99"):
        assert shown in markup, shown
    assert len(published("shakespeare")) == 6
    assert "&#9675;" in markup


@pytest.mark.parametrize("source", ["stdlib", "digits"])
def test_other_data_has_no_published_rows(quick, tmp_path, source):
    """Oracle: figures of another task would mislead."""
    add_cell(tmp_path / "s", 1.0, "muon", 0.9, 3.0, source=source)
    markup = frontier(read_points(read_sweep(tmp_path / "s")))
    assert "ublished" not in markup


def test_published_rows_are_complete():
    """Oracle: every task has its warning, every row a source; constants are positive numbers."""
    assert {row.task for row in PUBLISHED} == set(NOTES)
    for row in PUBLISHED:
        assert row.source
        assert 0 < row.accuracy < 1
        assert math.isfinite(row.log10_reference)
    [headline] = [row for row in PUBLISHED if "headline" in row.name and row.task == "shakespeare"]
    assert (headline.accuracy, headline.log10_reference) == (0.6, pytest.approx(math.log10(2)))


def test_missing_metrics_cost_only_their_column(quick, tmp_path):
    """Oracle: a run without loss, one without any constant, one whose constant overflowed."""
    root = tmp_path / "s"
    add_cell(root, 1.0, "muon", 0.4, 5.0)
    add_cell(root, 2.0, "muon", 0.5, None)
    add_cell(root, 3.0, "muon", 0.6, None, **{"cert/log10_naive": 412.34})
    compared = comparison(read_sweep(root), "s")
    assert [row[-2] for row in compared.rows] == ["1e412.3", "", "5"]
    assert "10<sup>412.3</sup>" in compared.document
    assert len(read_points(read_sweep(root))) == 2
    assert len(quick) == 1


def test_sweep_of_failures_alone(quick, tmp_path):
    """Oracle: a page with the reasons; a folder without any cell is refused."""
    add_failure(tmp_path / "s")
    compared = comparison(read_sweep(tmp_path / "s"), "s")
    assert "1 failed" in compared.document
    assert compared.rows[0][-1].startswith("failed: constraint.kind")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no summary"):
        read_sweep(tmp_path / "empty")


def test_models_of_two_architectures_are_told_apart(quick, tmp_path):
    """Oracle: the model's name joins the optimizer's where models differ."""
    for model in ("paper", "default"):
        directory = add_cell(tmp_path / model, 1.0, "muon", 0.4, 5.0)
        write(directory / ".hydra" / "overrides.yaml", f"- model={model}\n")
    names = {point.optimizer for point in read_points(read_sweep(tmp_path))}
    assert names == {"muon, paper model", "muon, default model"}


def test_colours_tell_optimizers_or_else_constraints_apart(sweep, tmp_path):
    """Oracle: two optimizers, two colours; one optimizer, a colour for each constraint."""
    points = read_points(read_sweep(sweep))
    assert set(tones(points)) == {"muon", "adamw"}
    muon = [point for point in points if point.optimizer == "muon"]
    other = dataclasses.replace(muon[0], constraint="stiefel")
    assert set(tones([*muon, other])) == {"exact_cap", "stiefel"}
    assert len(set(tones([*muon, other]).values())) == 2


def test_certified_curve_is_in_embedding_distances(tmp_path):
    """Oracle: margin / (constant of the blocks * median distance), by hand; shares step down."""
    directory = add_cell(tmp_path / "s", 1.0, "muon", 0.4, 5.0)
    add_margins(directory, [0.0, 0.3, 3.0], [0.4, 0.2, 0.01], stream=2.0, unit=1.5)
    [cell] = read_sweep(tmp_path / "s")
    curve = certified_curve(cell)
    assert curve.radii == pytest.approx((0.0, 0.1, 1.0))
    assert [curve.at(r) for r in (0.0, 0.05, 0.0999, 0.11, 1.0, 1.01)] == [
        0.4, 0.2, 0.2, 0.01, 0.01, 0.0,
    ]  # fmt: skip


def test_tightened_certificate_enlarges_the_radii(tmp_path):
    """Oracle: the product of the stored block constants replaces the naive one."""
    directory = add_cell(tmp_path / "s", 1.0, "muon", 0.4, 5.0)
    add_margins(directory, [3.0], [0.4], stream=2.0, unit=1.5)
    summary = json.loads((directory / "summary.json").read_text())
    write(directory / "summary.json", summary | {"artifacts": {"bundle": "bundle"}})
    blocks = [{"tightened": 0.8}, {"tightened": 1.25}]
    write(directory / "bundle" / "certificate.json", {"blocks": blocks})
    [cell] = read_sweep(tmp_path / "s")
    assert certified_curve(cell).radii == pytest.approx((2.0,))
    assert certified_curve(cell).radii[0] <= 2.0


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        {},
        {"unit": "miles", "radii": [1.0], "shares": [0.1], "unit_length": 1, "naive_bound": 1},
        {"unit": "pixels", "radii": [1.0], "shares": [0.1, 0.2]},
    ],
)
def test_damaged_margins_cost_only_their_curve(quick, sweep, content):
    """Oracle: the other five curves are still there."""
    path = sorted(sweep.glob("*/margins.json"))[0]
    write(path, content)
    compared = comparison(read_sweep(sweep), "name")
    assert quick[-1].startswith("certified accuracy against radius, 5 models")
    assert len(compared.rows) == 8


def test_image_sweep_is_in_pixels(quick, tmp_path):
    """Oracle: accuracy against the bound, radii in l2 of pixels, no published row for digits."""
    root = tmp_path / "s"
    for w_max, accuracy in ((1.0, 0.8), (2.0, 0.9)):
        directory = add_cell(root, w_max, "muon", accuracy, 10 * w_max, source="digits")
        add_margins(directory, [1.0, 4.0], [accuracy, 0.1], stream=4.0, unit=1.0, kind="pixels")
    compared = comparison(read_sweep(root), "digits")
    assert quick[0].endswith("0.800 at 10, 0.900 at 20")
    assert quick[1].endswith("best: 90 % at 0.1, 90 % at 0.25, 10 % at 0.5, 10 % at 1")
    assert "certified at 0.25" in compared.document
    assert "640 images" in compared.document
    assert "ublished" not in compared.document


def test_sweep_without_margins_has_no_radius_section(quick, tmp_path):
    """Oracle: absence."""
    add_cell(tmp_path / "s", 1.0, "muon", 0.4, 5.0)
    assert radius_section(read_points(read_sweep(tmp_path / "s"))) == ""


def test_whole_page_is_self_contained(sweep):
    """Oracle: three drawings with text, no address, no placeholder colour, badges everywhere."""
    markup = comparison(read_sweep(sweep), "name").document
    assert markup.count("<svg ") == 3
    assert not re.search(r'(src|href)="(?!#)', markup)
    assert not any(colour in markup for colour in charts.TONES.values())
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", markup, flags=re.DOTALL)
    assert len(captions) == 3
    assert all('class="kind' in caption for caption in captions)
    assert all('aria-label="' in part.split(">", 1)[0] for part in markup.split("<svg ")[1:])
