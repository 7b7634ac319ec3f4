"""A slice of the soundness campaign, its record, and how it resumes and reports."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import ConfigError, DataError
from common.models.config import ACTIVATIONS
from common.report import ReportConfig, story_page
from common.reporting.runs import read_story
from solvers import campaign_app
from solvers.bounds.campaign import (
    HEADS,
    POSITIONS,
    SPECTRA,
    CampaignSettings,
    Case,
    cases,
    random_pairs,
)

Command = Callable[..., Any]
SLICE = CampaignSettings(
    configurations=84, draws=1, pairs=20, restarts=4, steps=4, max_evals=4, stream_steps=2
)
TINY = (
    "campaign.configurations=2",
    "campaign.draws=1",
    "campaign.pairs=5",
    "campaign.restarts=2",
    "campaign.steps=1",
    "campaign.max_evals=2",
    "campaign.stream_steps=1",
)


@pytest.mark.parametrize("configuration", [0, 13, 22, 30, 37, 54, 65, 83])
def test_no_attack_exceeds_a_bound(configuration: int) -> None:
    """Oracle: attack <= bound, for the network and every block; the checker accepts the proof."""
    case = Case(configuration=configuration, draw=configuration % 3)
    row = case.attempt(SLICE)
    assert 0 < row["ratio"] <= 1
    assert 0 < row["block_ratio"] <= 1


def test_the_cases_meet_every_value_and_most_pairs() -> None:
    """Oracle: the lists of what a certificate may be asked to cover."""
    rows = [case.describe() for case in cases(CampaignSettings())]
    assert {row["heads"] for row in rows} == set(HEADS)
    assert {row["depth"] for row in rows} == {1, 2, 3, 4, 5, 6}
    assert {row["activation"] for row in rows} == set(ACTIVATIONS)
    # Two draws of a configuration are two of the three sorts of weights; three draws are all.
    sorts = {(row["heads"], row["spectrum"]) for row in rows}
    assert len(sorts) == len(HEADS) * CampaignSettings().draws
    assert {spectrum for _, spectrum in sorts} == set(SPECTRA)
    for field in ("position", "biases", "grouped", "residual"):
        met = {(row["heads"], row[field]) for row in rows}
        assert len(met) == len(HEADS) * len({row[field] for row in rows}), field
    met = {(row["activation"], row["position"]) for row in rows}
    assert len(met) == len(ACTIVATIONS) * len(POSITIONS)
    norms = [row["w_max"] for row in rows]
    assert 0.5 <= min(norms) < 0.6
    assert 3.5 < max(norms) <= 4.0


def test_models_have_the_stated_norms_and_depend_on_the_case_alone() -> None:
    """Oracle: singular values; equality of two builds, another draw differs."""
    case = Case(configuration=9, draw=1)
    model, row = case.model(), case.describe()
    up = model.layers[0].mlp.up.weight
    scale = (up.shape[1] / up.shape[0]) ** 0.5
    assert float(torch.linalg.matrix_norm(up, 2)) * scale == pytest.approx(row["w_max"])
    torch.manual_seed(123)
    assert torch.equal(case.model().layers[0].mlp.up.weight, up)
    assert not torch.equal(dataclasses.replace(case, draw=4).model().layers[0].mlp.up.weight, up)


def test_random_pairs_stay_in_the_ball(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the norms of what the model is given; a linear map's ratio is below its norm."""
    model, seen = Case(configuration=1, draw=0).model(), []
    stream = model.stream
    monkeypatch.setattr(model, "stream", lambda x: seen.append(x) or stream(x))
    random_pairs(model, 3.0, 50, 6, 0)
    assert 2.5 < float(seen[0].norm(dim=-1).max()) <= 3.0
    away = (seen[0][:50] - seen[0][50:]).norm(dim=-1).amax(-1)
    assert float(away.min()) < 0.03
    assert float(away.max()) > 2.0


def test_command_records_resumes_and_reports(
    tmp_path: Path, lipllm: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: one row per model, no model twice after an interruption, the report's section."""
    attempt, calls = Case.attempt, []

    def interrupted(case: Case, settings: CampaignSettings) -> dict[str, Any]:
        calls.append(case.configuration)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return attempt(case, settings)

    monkeypatch.setattr(Case, "attempt", interrupted)
    assert lipllm("campaign", *TINY).status == 130
    done = lipllm("campaign", *TINY)
    assert done.status == 0, done.err
    assert calls == [0, 1, 1]
    rows = campaign_app.read_record(done.directory / campaign_app.RECORD_FILE)
    assert [row["configuration"] for row in rows] == [0, 1]
    assert done.metrics["campaign/pairs"] == 10
    assert done.metrics["campaign/violations"] == 0
    page = story_page(read_story(done.directory), ReportConfig())
    assert "10 random (weights, inputs, perturbations)" in page
    assert "<svg" in page


def test_a_violation_is_an_error_after_everything_is_recorded(
    lipllm: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: exit status 2, one line with the case."""
    row = Case(configuration=0, draw=0).describe()
    row |= {"pairs": 1, "restarts": 1, "ratio": 1.001, "block_ratio": 0.5, "seconds": 0.0}
    monkeypatch.setattr(Case, "attempt", lambda *_: dict(row))
    done = lipllm("campaign", *TINY)
    assert done.status == 2
    assert "a proof is wrong" in done.err


def test_bad_settings_and_records_are_refused(tmp_path: Path) -> None:
    """Oracle: the contract."""
    with pytest.raises(ConfigError, match=r"campaign\.draws"):
        CampaignSettings(draws=0)
    with pytest.raises(DataError, match="no record"):
        campaign_app.read_record(tmp_path)
