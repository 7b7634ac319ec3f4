"""The report: one self-contained page, everything escaped, missing input said and survived."""

import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from matplotlib.figure import Figure

from common import report as report_module
from common.errors import ConfigError, DataError
from common.ledger import Run
from common.report import ReportConfig, report, story_page
from common.reporting import charts
from common.reporting.charts import TONES
from common.reporting.page import escape
from common.reporting.runs import read_story, read_sweep

EVIL = '<script>alert("x")</script> & \x1b[31m'


class Page(HTMLParser):
    """Collects tags, addresses and text, and checks that elements nest."""

    def __init__(self, markup):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.links, self.text = [], [], [], []
        self.feed(markup)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        """Note the tag and anything that could load something."""
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href", "srcset")]
        assert not any(key.startswith("on") for key, _ in attrs)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        """Treat a self-closing element of a chart."""
        self.handle_starttag(tag, attrs)
        if tag not in ("meta", "br"):
            self.open.pop()

    def handle_endtag(self, tag):
        """Check that the innermost element ends."""
        assert self.open.pop() == tag

    def handle_data(self, data):
        """Collect the text outside styles."""
        if "style" not in self.open:
            self.text.append(data)

    @property
    def words(self):
        """All text, spaces normalised."""
        return re.sub(r"\s+", " ", "".join(self.text))


def write(path, value):
    """Write JSON, making folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def add_run(directory, command, metrics, *, started=0.0, overrides=(), **extra):
    """Write what a finished run leaves."""
    config = {"name": None} | extra.pop("config", {})
    record = {"command": command, "config": config, "started": started, "config_hash": "ab" * 32}
    write(directory / "run.json", record | {"objective": extra.pop("objective", None)})
    summary = {"command": command, "metrics": metrics, "seconds": 1.5, "config_hash": "ab" * 32}
    summary |= {"artifacts": {}, "versions": {"torch": "2.13.0"}} | extra
    write(directory / "summary.json", summary)
    listed = "".join(f"- {text}\n" for text in overrides) or "[]\n"
    write(directory / ".hydra" / "overrides.yaml", listed)


def certificate(scale):
    """Return the content of a certificate file with two blocks."""
    blocks = [
        {"kind": kind, "layer": 0, "naive": 3.0 * scale, "tightened": 2.0, "components": extra}
        for kind, extra in (("attention", {"attack": 1.5}), ("mlp", {}))
    ]
    totals = {"reference": 4.0, "naive": 41.5, "tightened": 17.25, "attack": 3.5}
    return {"blocks": blocks, **totals, "reference_sound": False}


@pytest.fixture
def pipeline(tmp_path):
    """Return the folder of a finished pipeline."""
    return make_pipeline(tmp_path / "demo")


@pytest.fixture(scope="module")
def markup(tmp_path_factory):
    """Return the page of a finished pipeline."""
    root = make_pipeline(tmp_path_factory.mktemp("report") / "demo")
    return story_page(read_story(root), ReportConfig(samples=2, title=EVIL))


@pytest.fixture
def quick(monkeypatch):
    """Draw charts without laying them out and writing them, which takes most of the time."""

    def draw_only(draw, description, **_):
        draw(Figure().add_subplot())
        return "<svg></svg>"

    monkeypatch.setattr(charts, "render", draw_only)


def make_pipeline(root):
    """Write what a finished pipeline leaves."""
    add_run(root, "pipeline", {}, overrides=["trainer.max_steps=10"])
    metrics = {"train/val_bits_per_byte": 2.345, "data/unigram_entropy_bits": 4.729}
    data = {"source": "stdlib", "tokenizer": "byte"}
    add_run(root / "train", "train", metrics, started=1.0, artifacts={"bundle": "bundle"},
            config={"data": data})  # fmt: skip
    rows = ["step,train/loss,train/val_loss_nats,train/bound_naive,train/max_activation"]
    rows += [f"{s},{5 / s},{4 / s if s % 2 else ''},{s * 1.5},0.5" for s in range(1, 9)]
    write(root / "train" / "metrics.csv", "\n".join(rows))
    write(root / "train" / "corpus.json", {"source": "stdlib", "text_sha256": "cd" * 32})
    for stage, scale in (("train", 1.0), ("compress", 100.0)):
        write(root / stage / "bundle" / "manifest.json", {"fingerprint": f"{stage}-print"})
        write(root / stage / "bundle" / "certificate.json", certificate(scale))
    add_run(root / "certify", "certify", {"cert/seconds": 3.0}, started=2.0,
            artifacts={"bundle": "../train/bundle"})  # fmt: skip
    metrics = {"compress/removed_fraction": 0.25, "compress/certified_deviation": 0.875}
    add_run(root / "compress", "compress", metrics, started=3.0, artifacts={"bundle": "bundle"})
    point = {"removed_fraction": 0.2, "val_bits_per_byte": 2.5, "certified_deviation": 0.8}
    point |= {"measured_deviation": 0.01}
    write(root / "compress" / "frontier.json", [point, point | {"removed_fraction": 0.4}])
    add_run(root / "generate", "generate", {"serve/kv_kept_fraction": 0.5}, started=4.0)
    points = [
        {"policy": policy, "budget": budget, "kl_vs_full": 1 / budget, "kept_fraction": 0.5,
         "measured_deviation": 0.1, "certified_deviation": None, "tokens_per_s": 9.0}
        for policy in ("window", EVIL) for budget in (16, 32)
    ]  # fmt: skip
    full = {"policy": "full", "budget": None, "kl_vs_full": 0.0, "kept_fraction": 1.0}
    write(root / "generate" / "kv_frontier.json", [full, *points])
    sample = {"prompt": "def ", "full": f"f(): {EVIL}", "compressed": "g()"}
    write(root / "generate" / "samples.json", [sample] * 5)
    return root


def test_pipeline_page_is_whole_and_self_contained(markup):
    """Oracle: the numbers of the input, well-nested HTML, no script, no outside address."""
    page = Page(markup)
    assert all(link.startswith("#") for link in page.links)
    assert not {"script", "img", "link", "iframe", "object"} & set(page.tags)
    assert "@import" not in markup
    assert "url(http" not in markup
    for text in ("2.35", "4.73", "17.2", "41.5", "25 %", "0.875", "lipllm pipeline "
                 "trainer.max_steps=10", "train-print", "compress-print", "cd" * 32, "torch 2.13.0",
                 "2.345 bits per byte", "4.729 bits per byte"):  # fmt: skip
        assert text in page.words.replace("\xa0", " "), text
    assert page.tags.count("svg") == 9
    assert page.words.count("the text differs") == 2
    for kind in ("proved", "measured", "estimate"):
        assert f'class="kind {kind}"' in markup
    assert "Traceback" not in markup
    assert "could not be drawn" not in markup


def test_every_figure_says_what_kind_it_is(markup):
    """Oracle: each caption carries at least one of the three badges."""
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", markup, flags=re.DOTALL)
    assert len(captions) == markup.count("<figure>") > 8
    assert all('class="kind' in caption for caption in captions)


def test_text_is_escaped(markup):
    """Oracle: markup in samples, policy and run names never becomes an element."""
    assert "<script" not in markup
    assert "\x1b" not in markup
    assert markup.count("&lt;script&gt;") >= 4
    assert escape('<&">\x00\n') == "&lt;&amp;&quot;&gt;\ufffd\n"


def test_colours_follow_the_page(markup):
    """Oracle: no placeholder colour is left, every variable is defined for light and dark."""
    assert not any(colour in markup for colour in TONES.values())
    for name in set(re.findall(r"var\(--(\w+)\)", markup)):
        assert markup.count(f"--{name}:") == 2, name


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ("train", "metrics.csv of train is missing"),
        ("compress", "compress stage has not finished"),
        ("generate", "No samples"),
    ],
)
def test_missing_stage_is_said(quick, pipeline, stage, expected):
    """Oracle: the rest of the page is still there."""
    for path in sorted((pipeline / stage).rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    page = Page(story_page(read_story(pipeline), ReportConfig()))
    assert expected in page.words
    assert "Origin" in page.words


def test_commands_outside_the_pipeline_have_no_section(quick, pipeline):
    """Oracle: their headings; they appear as soon as the folder holds such a run."""
    found = story_page(read_story(pipeline), ReportConfig())
    heads = ("Unlearning", "Pruning methods", "Cache policies")
    assert not [head for head in heads if f"<h2>{head}</h2>" in found]
    add_run(pipeline / "bench", "bench", {})
    assert "<h2>Cache policies</h2>" in story_page(read_story(pipeline), ReportConfig())


@pytest.mark.parametrize(
    "name",
    [
        "train/metrics.csv",
        "train/summary.json",
        "train/bundle/certificate.json",
        "compress/frontier.json",
        "generate/kv_frontier.json",
        "generate/samples.json",
    ],
)
@pytest.mark.parametrize("content", ["", '[{"policy": 3}]', '{"blocks": 4}'])
def test_damaged_input_costs_only_its_section(quick, pipeline, name, content):
    """Oracle: whatever a file holds, a well-formed page comes out."""
    write(pipeline / name, content)
    page = Page(story_page(read_story(pipeline), ReportConfig()))
    assert "Origin" in page.words


def test_bounds_that_overflow_are_shown_by_their_logarithm(quick, pipeline):
    """Oracle: null with a finite logarithm is a power of ten, never a blank."""
    content = certificate(1.0) | {"naive": None, "log10_naive": 412.34, "log10_tightened": 1.2}
    write(pipeline / "train" / "bundle" / "certificate.json", content)
    assert "10<sup>412.3</sup>" in story_page(read_story(pipeline), ReportConfig())


def test_single_run_shows_its_own_sections(quick, pipeline):
    """Oracle: a training run alone has curves and no empty pruning section."""
    page = Page(story_page(read_story(pipeline / "train"), ReportConfig()))
    assert "Loss." in page.words
    assert "Pruning" not in page.words


def as_config(**keys):
    """Return a configuration like the command's."""
    node = {"_target_": "common.report.ReportConfig"}
    return SimpleNamespace(report=node | keys.pop("report", {}), get=keys.get)


def as_run(directory):
    """Return the run of a report command."""
    directory.mkdir(parents=True, exist_ok=True)
    return Run(command="report", directory=directory, config={}, config_hash="x")


def test_report_stage_finds_its_pipeline(quick, pipeline):
    """Oracle: as last stage the report is about the folder it lies in."""
    run = as_run(pipeline / "report")
    write(run.directory / "run.json", {"command": "report"})
    outcome = report(as_config(), run)
    assert outcome.artifacts["report"] == pipeline / "report" / "report.html"
    text = outcome.artifacts["report"].read_text("utf-8")
    assert "2.345" in text
    assert outcome.metrics == {"report/bytes": float(len(text.encode()))}


def test_report_of_a_named_or_the_latest_run(quick, pipeline, tmp_path):
    """Oracle: ``run=DIR``; without it the newest pipeline; without any a remedy."""
    run = as_run(tmp_path / "elsewhere" / "2026")
    assert report(as_config(run=str(pipeline)), run).artifacts["report"].exists()
    with pytest.raises(DataError, match="run=nowhere: no such directory"):
        report(as_config(run="nowhere"), run)
    with pytest.raises(DataError, match="give one with run=DIR"):
        report(as_config(), run)
    with pytest.raises(DataError, match="no run in it"):
        report(as_config(run=str(tmp_path / "elsewhere")), run)
    (tmp_path / "runs" / "pipeline").mkdir(parents=True)
    pipeline.rename(tmp_path / "runs" / "pipeline" / "demo")
    assert report(as_config(), run).artifacts["report"].exists()


@pytest.fixture
def sweep(tmp_path):
    """Return the folder of a sweep of two settings, one with numbers."""
    root = tmp_path / "sweep"
    for model in ("paper", "default"):
        for rate in (0.001, 0.1):
            loss = 2.0 + rate + (model == "paper")
            metrics = {"train/val_bits_per_byte": loss, "cert/naive": 5.0, "train/steps": 10.0}
            cell = root / f"model={model},optim.lr={rate}"
            overrides = [f"model={model}", f"+optim.lr={rate}", "seed=1"]
            add_run(cell, "train", metrics, overrides=overrides, objective=loss)
    add_run(root / "report", "report", {})
    return root


def test_sweep_table_is_ordered_and_complete(sweep, tmp_path, capsys):
    """Oracle: four rows, best first; only settings that differ are columns; CSV has all."""
    run = as_run(tmp_path / "out")
    outcome = report(as_config(sweep=str(sweep)), run)
    assert outcome.metrics["report/runs"] == 4
    page = Page(outcome.artifacts["report"].read_text("utf-8"))
    assert all(link.startswith("#") for link in page.links)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["model", "optim.lr", "train/val_bits_per_byte"]
    assert [line.split()[:2] for line in lines[1:5]] == [
        ["default", "0.001"], ["default", "0.1"], ["paper", "0.001"], ["paper", "0.1"],
    ]  # fmt: skip
    table = outcome.artifacts["comparison"].read_text().splitlines()
    heads = "run,status,model,optim.lr,seed,train/val_bits_per_byte,cert/naive,train/steps"
    assert table[0] == heads
    assert len(table) == 5
    assert page.tags.count("svg") == 1
    assert "lipllm train model=paper +optim.lr=0.1 seed=1" in page.words


def test_sweep_of_pipelines_counts_each_once(pipeline, tmp_path):
    """Oracle: the stages inside a pipeline's folder are not cells."""
    (tmp_path / "many").mkdir()
    pipeline.rename(tmp_path / "many" / "a")
    assert [cell.name for cell in read_sweep(tmp_path / "many")] == ["pipeline"]


def test_sweep_of_one_run_without_settings(quick, tmp_path):
    """Oracle: nothing differs, nothing breaks."""
    add_run(tmp_path / "s" / "only", "train", {"train/steps": 1.0})
    outcome = report(as_config(sweep=str(tmp_path / "s")), as_run(tmp_path / "o"))
    Page(outcome.artifacts["report"].read_text("utf-8"))


def test_empty_sweep_is_refused(tmp_path):
    """Oracle: the message names the folder."""
    (tmp_path / "s").mkdir()
    for name in ("s", "missing"):
        with pytest.raises(DataError, match=f"sweep=.*{name}"):
            read_sweep(tmp_path / name)


@pytest.mark.parametrize("settings", [{"samples": -1}, {"workspace": "a"}, {"title": 3}])
def test_impossible_settings(settings):
    """Oracle: refused by name."""
    with pytest.raises(ConfigError, match=next(iter(settings))):
        ReportConfig(**settings)


def test_workspace_without_login_is_one_line(quick, pipeline, tmp_path, monkeypatch):
    """Oracle: the service's refusal becomes a message with the remedy."""

    class Workspace:
        def save(self):
            raise RuntimeError("not logged in\nmore")

    monkeypatch.setattr("common.dashboard.build_workspace", lambda *_: Workspace())
    config = as_config(run=str(pipeline), report={"workspace": "me/lipllm"})
    with pytest.raises(ConfigError, match=r"me/lipllm: not saved \(not logged in\)"):
        report(config, as_run(tmp_path / "o"))
    assert report_module.REPORT_FILE in {path.name for path in (tmp_path / "o").iterdir()}
