"""The table of all methods: rows, verdicts, resumption, the command and its report."""

import csv
import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from common.bundle import save_bundle
from common.errors import CertificateError, ConfigError, DataError
from common.ledger import Run
from common.models import LipschitzMLP, LipschitzTransformer, ModelConfig
from common.reporting.runs import StageRun, Story
from common.reporting.study import HEADS, text_rows
from common.reporting.study import study as study_section
from common.tokenizer import ByteTokenizer
from common.tracking import is_declared
from compress.compensate import METHODS
from compress.flops import token_flops
from compress.hold import certified_limit
from compress.measure import Reference
from compress.pruner import prune_model
from compress.scoring.fidelity import SCORES
from compress.settings import CompressConfig
from compress.study.config import Case, StudyConfig, cases
from compress.study.table import Study
from compress.study.verdict import TIE, mark
from compress.study_app import study as command
from solvers.bounds import certify

CONF = Path(__file__).parents[3] / "conf"
SMALL = {
    "keeps": (0.5,),
    "heads": (0.5,),
    "scores": ("obs", "energy"),
    "comps": ("none", "lsq_capped"),
    "rounds": 1,
    "tighten": False,
}
TIMES = ("seconds", "shape")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Return a certified byte model, untrained."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = ModelConfig(
            vocab_size=256, width=16, layers=2, heads=2, context=16, activation="maxmin"
        )
        model = LipschitzTransformer(config)
    path = tmp_path_factory.mktemp("dense") / "bundle"
    return save_bundle(path, model, ByteTokenizer(), certificate=certify(model, tighten=False))


@pytest.fixture(scope="module")
def texts():
    """Return calibration tokens and validation windows."""
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randint(256, (64, 16), generator=generator),
        torch.randint(256, (8, 17), generator=generator),
    )


def make_study(dense, texts, base=None, **changes):
    """Return a study of a few rows."""
    settings = StudyConfig(**(SMALL | changes))
    base = base or CompressConfig(eval_tokens=128)
    return Study(dense, dense.certificate, settings, base, texts, 1.0)


@pytest.fixture(scope="module")
def whole(dense, texts, tmp_path_factory):
    """Return the content of an uninterrupted study."""
    return make_study(dense, texts).run(tmp_path_factory.mktemp("whole") / "study.json")


def untimed(content):
    """Return the rows without what a clock says, in a fixed order."""
    rows = [{k: v for k, v in p.items() if k not in TIMES} for p in content["points"]]
    return sorted(rows, key=lambda row: json.dumps(row, sort_keys=True))


def test_grid_covers_the_registries():
    """Oracle: the product of both registries and all budgets, plus sequence and rotation."""
    found = list(cases(StudyConfig(), "obs+lsq_capped"))
    budgets = 5 + 2
    assert len(found) == budgets * (len(SCORES) * len(METHODS) + 2)
    assert len(set(found)) == len(found)
    assert {(c.score, c.comp) for c in found} >= {(s, c) for s in SCORES for c in METHODS}
    assert {(c.score, c.comp) for c in found if c.order == "sequential"} == {("obs", "lsq_capped")}


def test_rows_are_what_the_parts_say(dense, texts, whole):
    """Oracle: the pruner with its own survey, the measurement, the certificate, the shapes."""
    [point] = [
        p for p in whole["points"]
        if (p["kind"], p["score"], p["comp"]) == ("mlp", "energy", "lsq_capped")
    ]  # fmt: skip
    settings = CompressConfig(keep=0.5, score="energy", comp="lsq_capped", order="one_shot")
    pruning = prune_model(dense.model, texts[0], settings)
    quality = Reference(dense.model, texts[1], 1.0).quality(pruning.model)
    assert point["val_bits_per_byte"] == pytest.approx(quality.bits_per_byte, rel=1e-6)
    assert point["kl_nats"] == pytest.approx(quality.kl_nats, rel=1e-3)
    assert point["cert_naive"] == pytest.approx(certify(pruning.model, tighten=False).naive)
    assert point["params"] == pruning.model.num_parameters
    assert point["flops"] == token_flops(pruning.model.config)
    assert point["certified_deviation"] >= point["measured_deviation"] > 0


def test_rows_share_the_times_of_their_shape(whole):
    """Oracle: the budgets; scores, compensations and orders change no shape."""
    shapes = {}
    for point in whole["points"]:
        shapes.setdefault((point["kind"], point["score"] == "rotation"), set()).add(point["shape"])
    assert all(len(keys) == 1 for keys in shapes.values())
    assert set(whole["shapes"]) == set.union(*shapes.values())
    for times in whole["shapes"].values():
        assert times["forward"]["ratio"] > 0
        assert times["decode"]["length"] == 8


def test_rotation_has_the_parameters_of_its_budget(whole):
    """Oracle: the default's row; one direction more or less is the precision."""
    for kind in ("mlp", "heads"):
        points = [p for p in whole["points"] if p["kind"] == kind]
        [turned] = [p["params"] for p in points if p["score"] == "rotation"]
        [own] = {p["params"] for p in points if p["score"] != "rotation"}
        per_direction = whole["dense"]["params"] / 16
        assert abs(turned - own) <= per_direction
        assert [p["certified_deviation"] for p in points if p["score"] == "rotation"] == [None]


@pytest.mark.parametrize("after", [1, 8])
def test_an_interrupted_study_goes_on(dense, texts, whole, tmp_path, monkeypatch, after):
    """Oracle: the uninterrupted one; no row is made twice."""
    made, make = [], Study._point

    def stop(self, case, shapes):
        if len(made) == after:
            raise KeyboardInterrupt
        made.append(case)
        return make(self, case, shapes)

    path = tmp_path / "study.json"
    monkeypatch.setattr(Study, "_point", stop)
    with pytest.raises(KeyboardInterrupt):
        make_study(dense, texts).run(path)
    assert len(json.loads(path.read_text())["points"]) == after
    monkeypatch.setattr(Study, "_point", lambda *args: (made.append(args[1]), make(*args))[1])
    content = make_study(dense, texts).run(path)
    assert len(made) == len(set(made)) == len(whole["points"])
    assert untimed(content) == untimed(whole)


def test_a_wider_grid_keeps_the_rows(dense, texts, tmp_path, monkeypatch):
    """Oracle: the cases that are made on the second call; none on the third."""
    path, made, make = tmp_path / "study.json", [], Study._point
    make_study(dense, texts, scores=("obs",)).run(path)
    monkeypatch.setattr(Study, "_point", lambda *args: (made.append(args[1]), make(*args))[1])
    make_study(dense, texts).run(path)
    assert {case.score for case in made} == {"energy"}
    made.clear()
    make_study(dense, texts, keeps=()).run(path)
    assert made == []


@pytest.mark.parametrize("tighten", [False, True])
def test_rows_are_certified_alike(dense, texts, tmp_path, tighten):
    """Oracle: bounds from the row's own norms, where all rows are; else the search's proof."""
    proof = certify(dense.model)
    path = tmp_path / "tightened"
    tightened = save_bundle(path, dense.model, ByteTokenizer(), certificate=proof)
    study = make_study(tightened, texts, tighten=tighten)
    limit = certified_limit(study.dense, proof)
    settings = CompressConfig(keep=0.5, order="one_shot")
    pruning = prune_model(study.dense, texts[0], settings, limit=limit)
    assert pruning.proof.multipliers
    found = study._proof(pruning.model, pruning.kept, pruning.proof)
    assert bool(found.multipliers) == tighten
    assert (found is pruning.proof) == tighten


@pytest.mark.parametrize("what", ["text", "settings", "measurement", "file"])
def test_rows_of_something_else_are_not_mixed(dense, texts, tmp_path, what):
    """Oracle: one line that names the file and the remedy."""
    path, small = tmp_path / "study.json", {"keeps": (), "rotation": False, "scores": ("obs",)}
    make_study(dense, texts, **small).run(path)
    base = CompressConfig(eval_tokens=128, ridge=1e-3) if what == "settings" else None
    if what == "text":
        texts = (texts[0], texts[1].flip(0))
    if what == "measurement":
        small["rounds"] = 2
    if what == "file":
        path.write_text("{")
    with pytest.raises(DataError, match=r"choose another hydra\.run\.dir") as info:
        make_study(dense, texts, base, **small).run(path)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keeps": [0.5, 1.5]}, r"study\.keeps=1\.5: expected 0\.0 to 1\.0"),
        ({"heads": [0]}, r"study\.heads=0\.0: expected a finite number above 0"),
        ({"scores": ["best"]}, r"study\.scores='best': expected one of obs"),
        ({"comps": ["auto"]}, r"study\.comps='auto': expected one of none"),
        ({"tighten": "obs"}, r"study\.tighten='obs'"),
        ({"rounds": 0}, r"study\.rounds=0"),
        ({"length": "long"}, r"length='long'"),
        ({"length": 17}, r"study\.length=17: expected at most the model's context of 16"),
        ({"keeps": [], "heads": []}, r"study\.keeps=\[\] and study\.heads=\[\]: expected at least"),
        ({"speed": True}, "speed"),
    ],
)
def test_bad_settings_are_one_line(dense, tmp_path, changes, message):
    """Oracle: the setting, its value and what was expected; nothing is written."""
    cfg, run = configure(dense, tmp_path, **changes)
    with pytest.raises(ConfigError, match=message) as info:
        command(cfg, run)
    assert "\n" not in str(info.value)
    assert not any(run.directory.iterdir())


def row(comp, bits, naive=1.0, order="one_shot", score="obs", keep=0.5):
    """Return what a verdict looks at."""
    return {"kind": "mlp", "keep": keep, "score": score, "comp": comp, "order": order} | {
        "val_bits_per_byte": bits,
        "cert_naive": naive,
        "cert_tightened": None,
    }


def test_verdict_by_hand():
    """Oracle: written out; growth disqualifies, rounding does not, neither does the order count."""
    points = [
        row("lsq_capped", 2.0 + TIE),
        row("lsq_capped", 1.9, order="sequential"),
        row("lsq", 1.5, naive=1.1),
        row("none", 2.0, naive=1 + 5e-7),
        row("scalar", 2.1),
        row("none", 1.8, score="rotation"),
        row("lsq_capped", 3.0, keep=0.9),
    ]
    verdicts = mark(points, {"cert_naive": 1.0}, "obs+lsq_capped")
    assert [point["mark"] for point in points] == ["tied", "", "", "best", "", "", "best"]
    assert [point["keeps_certificate"] for point in points] == [True, True, False, *[True] * 4]
    light, half = verdicts
    assert (light["keep"], light["gap"], light["rotation_gap"]) == (0.9, 0.0, None)
    assert (half["best"], half["tied"]) == ("obs+none", True)
    assert half["gap"] == pytest.approx(TIE)
    assert half["sequential_gap"] == pytest.approx(-0.1)
    assert half["rotation_gap"] == pytest.approx(0.2 + TIE)


@pytest.mark.parametrize(("bits", "naive"), [(2.0 + 2 * TIE, 1.0), (2.0, 1.1)])
def test_a_default_that_is_behind_or_breaks_the_certificate(bits, naive):
    """Oracle: it is not called tied."""
    points = [row("lsq_capped", bits, naive), row("none", 2.0)]
    [verdict] = mark(points, {"cert_naive": 1.0}, "obs+lsq_capped")
    assert (verdict["best"], verdict["tied"]) == ("obs+none", False)
    assert verdict["keeps_certificate"] == (naive == 1.0)


def configure(bundle, tmp_path, **changes):
    """Return the command's configuration and run, on a small text."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i}: the square is {i * i}\n" for i in range(2000)))
    node = OmegaConf.load(CONF / "compress" / "default.yaml")
    node = OmegaConf.merge(node, {"tokens": 2048, "eval_tokens": 256})
    own = OmegaConf.load(CONF / "study" / "default.yaml")
    small = {name: list(v) if isinstance(v, tuple) else v for name, v in SMALL.items()}
    cfg = OmegaConf.create(
        {
            "bundle": str(bundle.path),
            "device": "cpu",
            "seed": 0,
            "compress": node,
            "study": OmegaConf.merge(own, small, changes),
            "data": {
                "_target_": "common.corpus.DataConfig",
                "source": "local",
                "path": str(text),
                "cache": str(tmp_path / "cache"),
            },
        }
    )
    OmegaConf.set_readonly(cfg, True)
    directory = tmp_path / "run"
    directory.mkdir()
    return cfg, Run(command="study", directory=directory, config={}, config_hash="")


def test_command_writes_the_table(dense, tmp_path, capsys):
    """Oracle: declared metrics, one CSV line per row, the best marked on the terminal."""
    outcome = command(*configure(dense, tmp_path))
    assert all(is_declared(name) for name in outcome.metrics)
    content = json.loads(outcome.artifacts["study"].read_text())
    lines = list(csv.reader(outcome.artifacts["table"].read_text().splitlines()))
    assert lines[0] == HEADS
    assert len(lines) - 1 == len(content["points"]) == outcome.metrics["study/rows"] == 12
    assert outcome.metrics["study/budgets"] == 2
    assert outcome.metrics["study/certificate_growth"] <= 1 + 1e-6
    shown = capsys.readouterr().out
    assert shown.count("best") == 2
    assert "obs+lsq_capped (default)" in shown


def test_force_makes_all_rows_again(dense, tmp_path, monkeypatch):
    """Oracle: rows of other settings are refused without it; with it every row is made."""
    small = {"scores": ["obs"], "comps": ["lsq_capped"], "rotation": False, "deviation": False}
    cfg, run = configure(dense, tmp_path, heads=[], **small)
    (run.directory / "study.json").write_text('{"identity": {}, "points": []}')
    with pytest.raises(DataError, match="force=true"):
        command(cfg, run)
    made, make = [], Study._point
    monkeypatch.setattr(Study, "_point", lambda *args: (made.append(args[1]), make(*args))[1])
    forced = OmegaConf.merge(cfg, {"force": True})
    for _ in range(2):
        command(forced, run)
    assert len(made) == 2 * len(set(made)) == 4


def test_a_bundle_without_certificate_names_the_remedy(dense, tmp_path):
    """Oracle: the command that makes one."""
    bare = save_bundle(tmp_path / "bare", dense.model, dense.tokenizer)
    with pytest.raises(CertificateError, match="run: lipllm certify bundle="):
        command(*configure(bare, tmp_path))


def test_a_classifier_is_refused_by_its_kind(dense, tmp_path):
    """Oracle: the message names what it is, what the table is of, and the remedy."""
    model = LipschitzMLP((4, 4, 2), "relu", False)
    other = save_bundle(tmp_path / "images", model, None)
    with pytest.raises(ConfigError, match="a classifier, expected a language model; sweep"):
        command(*configure(other, tmp_path))


def test_terminal_rows_keep_the_default_and_the_rotation(whole):
    """Oracle: the best one, the default in both orders and the rotation, per budget."""
    rows = text_rows(whole, most=1)
    assert len(text_rows(whole)) == len(whole["points"])
    for kind in ("mlp", "heads"):
        methods = [row[2] for row in rows if row[0] == kind]
        assert methods.count("obs+lsq_capped (default)") == 2
        assert methods.count("rotation+none") == 1


def test_report_shows_the_table(whole, tmp_path):
    """Oracle: three charts per kind, every caption labelled, each row, the command."""
    (tmp_path / "study.json").write_text(json.dumps(whole))
    run = StageRun(
        name="study",
        directory=tmp_path,
        summary={"metrics": {"study/rows": 12}},
        record={"command": "study"},
        overrides=("bundle=b",),
    )
    markup = study_section(Story(root=run, stages={"study": run}))
    assert markup.count("<svg ") == 6
    captions = markup.split("<figcaption>")[1:]
    assert all('class="kind' in caption.split("</figcaption>")[0] for caption in captions)
    assert "lipllm study bundle=b" in markup
    assert markup.count("<tr>") >= 12
    empty = StageRun(name="study", directory=tmp_path / "none", summary={}, record={})
    assert "not finished" in study_section(Story(root=empty, stages={"study": empty}))


def test_a_case_knows_its_row(whole):
    """Oracle: every stored row is exactly one case of the grid."""
    grid = list(cases(StudyConfig(**SMALL), "obs+lsq_capped"))
    for point in whole["points"]:
        assert sum(case.is_of(point) for case in grid) == 1
    assert not any(
        Case(kind="mlp", keep=0.4, score="obs", comp="none").is_of(p) for p in whole["points"]
    )
