"""Records of local certificates: honest ones pass, forged ones are named and refused."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from common.certificate import tensors_sha256
from common.errors import CertificateError, ConfigError, DataError
from common.models import LipschitzTransformer
from solvers.bounds import certify
from solvers.bounds.kform import minimise
from solvers.bounds.local import LocalCertificate, SearchSettings, certify_local, verify_local
from solvers.bounds.local.blocks import MlpKnown
from solvers.bounds.local.chain import Neighbourhood
from solvers.bounds.local.record import JSON_FILE, find_records
from solvers.bounds.local.shared import joined, shared_multipliers, token_form
from solvers.bounds.network import TightenSettings

TOKENS = [3, 0, 7, 7]
QUICK = SearchSettings(levels=4, cells=2, max_evals=2)
MODEL = {"heads": 2, "activation": "maxmin", "mlp_bias": True, "head_bias": True}

BuildModel = Callable[..., LipschitzTransformer]


@pytest.fixture(scope="module")
def model(build_model: BuildModel) -> LipschitzTransformer:
    """Return a small model with content heads and biases."""
    return build_model(**MODEL)


@pytest.fixture(scope="module")
def record(model: LipschitzTransformer) -> LocalCertificate:
    """Return an honest record."""
    certificate = certify(model, settings=TightenSettings(max_evals=2))
    return certify_local(model, TOKENS, certificate, settings=QUICK)


def test_an_honest_record_is_re_proved(
    model: LipschitzTransformer, record: LocalCertificate
) -> None:
    """Oracle: the checker; radii are positive and not below the global ones."""
    report = verify_local(model, record)
    assert report.positions == len(TOKENS)
    assert all(a >= b > 0 for a, b in zip(record.radii, record.global_radii, strict=True))
    assert all(a <= b for a, b in zip(record.lipschitz, record.global_lipschitz, strict=True))


def test_a_record_survives_its_files(
    model: LipschitzTransformer, record: LocalCertificate, tmp_path: Path
) -> None:
    """Oracle: every field, to the last digit, and the checker."""
    record.save(tmp_path / "around-0")
    loaded = LocalCertificate.load(tmp_path / "around-0")
    for field in dataclasses.fields(record):
        if field.name != "multipliers":
            assert getattr(loaded, field.name) == getattr(record, field.name)
    verify_local(model, loaded)
    assert find_records(tmp_path) == [tmp_path / "around-0"]


def test_without_a_certificate_operator_norms_are_used(build_model: BuildModel) -> None:
    """Oracle: the checker, and the radii of the same search with a certificate."""
    model = build_model(activation="silu")
    plain = certify_local(model, TOKENS, settings=QUICK)
    verify_local(model, plain)
    assert not any(name.startswith("blocks.") for name in plain.multipliers)
    assert min(plain.radii) > 0


def test_a_given_radius_is_the_only_level(model: LipschitzTransformer) -> None:
    """Oracle: the contract."""
    settings = SearchSettings(radius=0.01, cells=0)
    found = certify_local(model, TOKENS, settings=settings)
    assert (found.levels, found.epsilon) == ((0.01,), 0.01)
    assert max(found.radii) <= 0.01
    verify_local(model, found)


def _changed(record: LocalCertificate, name: str, index: int, value: Any) -> LocalCertificate:
    values = list(getattr(record, name))
    values[index] = value
    return dataclasses.replace(record, **{name: tuple(values)})


@pytest.mark.parametrize("name", ["radii", "global_radii"])
@pytest.mark.parametrize("index", [0, 3])
def test_radii_cannot_be_enlarged(
    model: LipschitzTransformer, record: LocalCertificate, name: str, index: int
) -> None:
    """Oracle: the stored margin is 1e-9, so one part in a million is too much."""
    larger = getattr(record, name)[index] * (1 + 1e-6)
    with pytest.raises(CertificateError, match=rf"{name}\[{index}\]"):
        verify_local(model, _changed(record, name, index, larger))


@pytest.mark.parametrize("name", ["lipschitz", "global_lipschitz"])
def test_bounds_cannot_be_lowered(
    model: LipschitzTransformer, record: LocalCertificate, name: str
) -> None:
    """Oracle: the stored margin is 1e-9."""
    smaller = getattr(record, name)[2] * (1 - 1e-6)
    with pytest.raises(CertificateError, match=rf"{name}\[2\]"):
        verify_local(model, _changed(record, name, 2, smaller))


@pytest.mark.parametrize("field", ["movement", "certified"])
def test_block_numbers_cannot_be_lowered(
    model: LipschitzTransformer, record: LocalCertificate, field: str
) -> None:
    """Oracle: the stored margin is 1e-9."""
    block = record.blocks[1]
    block = dataclasses.replace(block, **{field: getattr(block, field) * (1 - 1e-6)})
    with pytest.raises(CertificateError, match=rf"blocks\[1\].{field}"):
        verify_local(model, _changed(record, "blocks", 1, block))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": (3, 0, 7, 99)}, "ids from 0 to 10"),
        ({"tokens": ()}, "0 tokens"),
        ({"tokens": (3,) * 40}, "40 tokens"),
        ({"top": (0, 0)}, "one value per token"),
        ({"levels": (0.1,)}, "indices into 1 levels"),
        ({"levels": (math.nan,) * 4}, "positive finite"),
        ({"epsilon": -1.0}, "positive finite"),
        ({"epsilon": math.inf}, "positive finite"),
        ({"ball": math.nan}, "finite radius"),
        ({"blocks": ()}, "one for each of 4"),
        ({"radii": (math.nan,) * 4}, "radii"),
        ({"radii": (-1.0,) * 4}, "radii"),
        ({"lipschitz": (math.nan,) * 4}, "lipschitz"),
        ({"lipschitz": (math.inf,) * 4}, "lipschitz"),
        ({"config_sha256": "0"}, "configuration"),
        ({"weights_sha256": {}}, "weight tensor"),
        ({"multipliers": {}}, "multiplier tensor"),
    ],
)
def test_malformed_records_are_refused(
    model: LipschitzTransformer,
    record: LocalCertificate,
    change: dict[str, Any],
    message: str,
) -> None:
    """Oracle: one line that names the field."""
    with pytest.raises(CertificateError, match=message) as caught:
        verify_local(model, dataclasses.replace(record, **change))
    assert "\n" not in str(caught.value)


def test_other_tokens_need_another_proof(
    model: LipschitzTransformer, record: LocalCertificate
) -> None:
    """Oracle: the numbers of one sequence are not those of another."""
    with pytest.raises(CertificateError):
        verify_local(model, dataclasses.replace(record, tokens=(5, 0, 7, 7)))


def test_a_higher_level_is_no_better(model: LipschitzTransformer, record: LocalCertificate) -> None:
    """Oracle: a radius proved at a small distance is not proved by a larger one."""
    levels = tuple(level * 50 for level in record.levels)
    with pytest.raises(CertificateError, match="radii"):
        verify_local(model, dataclasses.replace(record, levels=levels))


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["local.1.lambda", "blocks.1.lambda"])
def test_multipliers_that_prove_nothing_are_refused(
    model: LipschitzTransformer, record: LocalCertificate, name: str, value: float
) -> None:
    """Oracle: the admissible range; the hashes are forged with them."""
    multipliers = {key: tensor.clone() for key, tensor in record.multipliers.items()}
    multipliers.setdefault(name, torch.ones(32, dtype=torch.float64))[0] = value
    forged = dataclasses.replace(
        record, multipliers=multipliers, multipliers_sha256=tensors_sha256(multipliers)
    )
    with pytest.raises(CertificateError, match="multiplier"):
        verify_local(model, forged)


@pytest.mark.parametrize("name", ["local.0.lambda", "local.1.other", "local.9.lambda", "x.1"])
def test_strange_multipliers_are_refused(
    model: LipschitzTransformer, record: LocalCertificate, name: str
) -> None:
    """Oracle: the list of blocks."""
    multipliers = dict(record.multipliers) | {name: torch.ones(3, dtype=torch.float64)}
    forged = dataclasses.replace(
        record, multipliers=multipliers, multipliers_sha256=tensors_sha256(multipliers)
    )
    with pytest.raises(CertificateError, match="belongs to no block"):
        verify_local(model, forged)


def test_other_weights_void_the_record(build_model: BuildModel, record: LocalCertificate) -> None:
    """Oracle: the hash of the changed tensor."""
    other = build_model(**MODEL)
    other.layers[1].mlp.up.weight[0, 0] += 1e-9
    with pytest.raises(CertificateError, match=r"layers\.1\.mlp\.up\.weight"):
        verify_local(other, record)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"format_version": 2}', '{"format_version": 1, "blocks": [3]}']
)
def test_damaged_files_are_named(record: LocalCertificate, tmp_path: Path, text: str) -> None:
    """Oracle: one line with the file."""
    record.save(tmp_path)
    (tmp_path / JSON_FILE).write_text(text)
    with pytest.raises(CertificateError, match=JSON_FILE) as caught:
        LocalCertificate.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_wrong_types_in_the_file_are_named(record: LocalCertificate, tmp_path: Path) -> None:
    """Oracle: the declared types."""
    record.save(tmp_path)
    content = json.loads((tmp_path / JSON_FILE).read_text())
    wrong = {"radii": "much", "tokens": [1.5], "epsilon": None, "blocks": [{}], "levels": [10**400]}
    for name, value in wrong.items():
        (tmp_path / JSON_FILE).write_text(json.dumps(content | {name: value}))
        with pytest.raises(CertificateError, match=JSON_FILE):
            LocalCertificate.load(tmp_path)
    with pytest.raises(CertificateError, match="no such file"):
        LocalCertificate.load(tmp_path / "nowhere")
    with pytest.raises(CertificateError, match="run directory"):
        find_records(tmp_path / "nowhere")


def test_a_hopeless_model_is_refused(build_model: BuildModel) -> None:
    """Oracle: the product of finite block constants overflows."""
    model = build_model(norm=1e50, content_heads=0, position_bias=True, activation="relu")
    with pytest.raises(CertificateError, match="overflows"):
        certify_local(model, TOKENS, settings=QUICK)


def test_impossible_requests_are_refused(
    model: LipschitzTransformer, build_model: BuildModel
) -> None:
    """Oracle: the contract of ``certify_local`` and its settings."""
    for tokens in ([], [0] * 17, [11], [-1]):
        with pytest.raises(DataError):
            certify_local(model, tokens)
    other = certify(build_model(seed=1, **MODEL), tighten=False)
    with pytest.raises(ConfigError, match="other weights"):
        certify_local(model, TOKENS, other)
    for change in ({"radius": 0.0}, {"levels": 0}, {"method": "magic"}, {"tol": -1.0}):
        with pytest.raises(ConfigError):
            SearchSettings(**change)


def test_shared_multipliers_lower_the_mean_of_the_tokens(build_model: BuildModel) -> None:
    """Oracle: the objective at the start; each token's bound holds for the shared multipliers."""
    model = build_model(activation="relu", mlp_bias=True, norm=2.0)
    tokens = torch.tensor(TOKENS)
    start = {"local.1.lambda": torch.ones(64, dtype=torch.float64)}
    near = Neighbourhood(model.config, model.state_dict(), start, tokens, 4.0)
    known = near.level(0.5, centred=True).known[1]
    assert isinstance(known, MlpKnown)
    form = joined([token_form(known, t) for t in range(4)])
    before = form.value(torch.zeros(64, dtype=torch.float64))
    solved = minimise(form, torch.zeros(64, dtype=torch.float64), gap=1e-3, max_evals=40)
    assert solved.dual <= solved.primal < 0.99 * before
    size = torch.ones(2, 4, dtype=torch.float64)
    known.around.lambda_N = solved.theta.exp()
    bound_T = known.sizes(size, 1e6, 1e6)[0]
    assert float(bound_T.mean()) == pytest.approx(solved.primal, rel=1e-6)
    for t in range(4):
        mid_N, spread_N = known.slopes.mid_TN[t], known.slopes.spread_TN[t]
        for _ in range(50):
            s_N = (2 * torch.rand(64, dtype=torch.float64) - 1).sign()
            block = known.around.map
            jacobian = (
                block.linear_CC + (block.outer_CN * (mid_N + spread_N * s_N)) @ block.inner_NC
            )
            assert float(torch.linalg.matrix_norm(jacobian, 2)) <= float(bound_T[t])


@pytest.mark.parametrize("method", ["lbfgs", "vr_halpern"])
def test_shared_multipliers_by_any_solver(build_model: BuildModel, method: str) -> None:
    """Oracle: the mean of the tokens at the start; none where the certified constant is as good."""
    model = build_model(activation="gelu", mlp_bias=True, norm=2.0)
    near = Neighbourhood(model.config, model.state_dict(), {}, torch.tensor(TOKENS), 4.0)
    known, start_N = near.level(0.3, centred=True).known[3], 3.0 * torch.ones(64).double()
    assert isinstance(known, MlpKnown)
    cells_M, options = torch.arange(4), {"method": method, "tol": 1e-3, "max_evals": 20}
    form = joined([token_form(known, t) for t in range(4)])
    first = form.value(start_N.log())
    found_N = shared_multipliers(known, start_N, cells_M, 2 * first, **options)
    assert found_N is not None
    assert form.value(found_N.log()) < 0.99 * first
    assert shared_multipliers(known, start_N, cells_M, 0.5, **options) is None
