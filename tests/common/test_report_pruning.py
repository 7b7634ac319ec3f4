"""Reports of single runs of compress and unlearn: what is known is drawn, for every kind of model.

Oracle: the number of charts and the words around them, by hand; no section is left out.
"""

import json

import pytest
from matplotlib.figure import Figure

from common.report import ReportConfig, story_page
from common.reporting import charts
from common.reporting.runs import read_story

LAYER = {"layer": 0, "components": 8, "kept_components": 4, "error": 0.01, "held_error": 0.02}
RECORD = {
    "tau": 1.25,
    "layers": [{**LAYER, "kind": "heads"}, {**LAYER, "kind": "mlp"}],
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Draw charts without laying them out and writing them, which takes most of the time."""

    def draw_only(draw, description, **_):
        draw(Figure().add_subplot())
        return f"<svg>{description}</svg>"

    monkeypatch.setattr(charts, "render", draw_only)


def add_run(directory, command, metrics, artifacts, **extra):
    """Write what a finished run leaves and return its page."""
    record = {"command": command, "config": {}, "config_hash": "ab" * 32}
    summary = {"command": command, "metrics": metrics, "artifacts": artifacts, "seconds": 1.5}
    write(directory / "run.json", record)
    write(directory / "summary.json", summary | extra)


def write(path, value):
    """Write JSON, making folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def page(directory):
    """Return the report of a run."""
    markup = story_page(read_story(directory), ReportConfig())
    assert "could not be drawn" not in markup
    return markup


def test_a_classifier_shows_accuracy_speed_and_places(tmp_path):
    """Quality, deviation, certificate, speed, kept shares, errors; the cap that was found."""
    metrics = {"compress/removed_fraction": 0.5, "compress/val_accuracy": 0.9}
    metrics |= {"compress/val_accuracy_before": 0.95, "compress/tightened": 3.5}
    add_run(tmp_path, "compress", metrics, {"bundle": "bundle", "frontier": "frontier.json"})
    write(tmp_path / "bundle" / "compression.json", RECORD)
    point = {"keep": 0.5, "order": "sequential", "removed_fraction": 0.5, "val_accuracy": 0.9}
    point |= {"certified_deviation": 0.5, "measured_deviation": 0.1, "cert_tightened": 3.0}
    point |= {"forward_speedup": 1.5, "flops_fraction": 0.6}
    write(tmp_path / "frontier.json", [point, point | {"keep": 0.25, "removed_fraction": 0.75}])
    found = page(tmp_path)
    for text in ("accuracy over", "RMS of the logits", "times faster", "components that stay",
                 "lost output energy", "0.950 &rarr; 0.900 accuracy",
                 "1.25&nbsp;&times;"):  # fmt: skip
        assert text in found, text
    assert found.count("<svg") == 7


def test_a_checkpoint_without_text_shows_fidelity_and_proves_nothing(tmp_path):
    """No deviation, no certificate; the cap of a refit without one is not named."""
    metrics = {"compress/removed_fraction": 0.5, "compress/fidelity": 0.8}
    add_run(tmp_path, "compress", metrics, {"checkpoint": "checkpoint"})
    write(tmp_path / "checkpoint" / "compression.json", RECORD | {"tau": None})
    point = {"keep": 0.5, "removed_fraction": 0.5, "fidelity": 0.8, "forward_speedup": 1.5}
    write(tmp_path / "frontier.json", [point])
    found = page(tmp_path)
    assert "output energy that is kept over" in found
    assert "Deviation" not in found
    assert "Certified" not in found
    assert "norms that the refit" not in found
    assert found.count("<svg") == 5


def test_an_old_run_without_frontier_and_cap_is_still_shown(tmp_path):
    """Records of earlier versions know no ``tau``; a run of one budget has places and a table."""
    metrics = {"compress/removed_fraction": 0.5, "compress/params": 1234}
    add_run(tmp_path, "compress", metrics, {"bundle": "bundle"})
    write(tmp_path / "bundle" / "compression.json", {"layers": RECORD["layers"]})
    found = page(tmp_path)
    assert "1,234" in found
    assert "No frontier" in found
    assert found.count("<svg") == 3


def standing(kind, value, **extra):
    """Return what one model knows."""
    names = [f"{part}_{kind}_{split}" for part in ("forget", "retain") for split in SPLITS]
    return {"figures": dict.fromkeys(names, value), "membership": None, "probe": None} | extra


SPLITS = ("train", "held")
RELEARNED = {"retain": None, "forget": 2, "goal": 0.5, "retain_curve": [0.1, 0.1, 0.2],
             "forget_curve": [0.1, 0.3, 0.6]}  # fmt: skip


@pytest.mark.parametrize("kind", ["acc", "bits_per_byte"])
def test_unlearning_is_drawn(tmp_path, kind):
    """Forget and retain, relearning, membership, edited maps; the retrained model beside them."""
    attack = {"auc": 0.6125, "error": 0.02}
    content = {
        "before": standing(kind, 0.9, membership=attack, relearning=None),
        "after": standing(kind, 0.125, membership=attack, relearning=RELEARNED),
        "retrained": standing(kind, 0.25, relearning=RELEARNED),
        "naive_before": 13.5,
        "naive_after": 13.25,
        "certified_deviation": 4.75,
        "maps": [{"name": "layers.1.mlp", "change": 0.3, "norm_growth": 1.0}],
    }
    write(tmp_path / "unlearning.json", content)
    add_run(tmp_path, "unlearn", {}, {}, notes={"erasure": "it is <not> erasure"})
    found = page(tmp_path)
    for text in ("steps of fine-tuning", "area under the curve", "0.613",
                 "retrained without the class", "13.2", "4.75", "it is &lt;not&gt; erasure",
                 "class, held out"):  # fmt: skip
        assert text in found, text
    assert found.count("<svg") == 5


def test_unlearning_of_earlier_versions_has_no_curve(tmp_path):
    """Steps without curves; nothing but the models before and after."""
    old = {"retain": 3, "forget": 1}
    content = {
        "before": standing("acc", 0.9, relearning=None),
        "after": standing("acc", 0.1, relearning=old),
        "retrained": None,
        "maps": [],
    }
    write(tmp_path / "unlearning.json", content)
    add_run(tmp_path, "unlearn", {}, {})
    found = page(tmp_path)
    assert "Steps on the rest until half is back" in found
    assert found.count("<svg") == 2
