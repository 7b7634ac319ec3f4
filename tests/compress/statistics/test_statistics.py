"""One pass over the dense model, and what can be done with what it collected."""

import functools
import importlib.util
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.errors import DataError
from compress.adapters import adapter_for
from compress.statistics import collect as statistics_module
from compress.statistics.collect import collect
from compress.statistics.grams import Moments, Statistics
from compress.statistics.storage import Progress, load_statistics, save_statistics

EXACT = 1e-12
"""Float64 sums in another order."""
RANK = Path(__file__).with_name("statistics_rank.py")
ROOT = Path(__file__).parents[3]


def tokens(count: int = 5, length: int = 8) -> torch.Tensor:
    """Return random token sequences (count, length)."""
    return torch.randint(11, (count, length), generator=torch.Generator().manual_seed(0))


def flat(statistics: Statistics) -> dict[str, torch.Tensor]:
    """Return every number by name."""
    found = {}
    for part in ("fitted", "apart"):
        for name, moments in getattr(statistics, part).items():
            counts = torch.tensor([moments.count, moments.skipped], dtype=torch.float64)
            found[f"{part} {name}"] = torch.cat(
                [moments.second_II.flatten(), moments.first_I, counts]
            )
    return found


def assert_equal(first: Statistics, second: Statistics, tolerance: float = 0.0) -> None:
    """Compare every number; by default bit for bit."""
    torch.testing.assert_close(flat(first), flat(second), rtol=tolerance, atol=tolerance)


def stop_after(adapter, batches):
    """Make an adapter fail, as a killed process would, when it starts one more batch."""
    start, left = adapter.start, iter(range(batches))

    def limited(batch):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return start(batch)

    adapter.start = limited


@pytest.fixture
def small_batches(monkeypatch):
    """One sequence of eight tokens per batch; the file is written after every batch."""
    monkeypatch.setattr(statistics_module, "BATCH_NUMBERS", 8)
    monkeypatch.setattr(statistics_module, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(statistics_module, "SAVE_SHARE", float("inf"))


@pytest.mark.parametrize("holdout", [0.0, 0.4])
def test_collect_sees_what_enters_each_pruned_map(make_model, holdout):
    """Oracle: forward hooks on the maps during an ordinary forward pass."""
    model = make_model("maxmin")
    adapter = adapter_for(model)
    seen: dict[str, torch.Tensor] = {}
    for target in adapter.targets():
        adapter.module(target).register_forward_pre_hook(
            lambda module, args, name=target.name: seen.__setitem__(name, args[0].detach())
        )
    model(tokens())
    expected_BTI = dict(seen)
    statistics = collect(adapter, tokens(), adapter.targets(), holdout=holdout)
    assert set(statistics.fitted) == set(statistics.held) == set(expected_BTI)
    for name, x_BTI in expected_BTI.items():
        parts = (x_BTI[:3], x_BTI[3:]) if holdout else (x_BTI, x_BTI)
        for moments, part in zip((statistics.fitted, statistics.held), parts, strict=True):
            x_MI = part.reshape(-1, part.shape[-1])
            gram_II = moments[name].gram_II()
            torch.testing.assert_close(gram_II, x_MI.T @ x_MI / len(x_MI), rtol=EXACT, atol=EXACT)


def test_nothing_after_the_last_target_is_computed(make_model):
    """Oracle: a count of the calls of each layer."""
    model = make_model()
    adapter = adapter_for(model)
    calls = []
    for layer in model.layers:
        layer.mlp.up.register_forward_hook(
            lambda *_, index=layer.attention.index: calls.append(index)
        )
    collect(adapter, tokens(), [adapter.find("layers.0.mlp")], holdout=0.0)
    assert calls == [0]


def test_too_few_tokens_warn(make_model, caplog):
    """Fewer than two rows per input: the warning says how many would do; memory is stated."""
    adapter = adapter_for(make_model())
    with caplog.at_level(logging.INFO):
        collect(adapter, tokens(2), adapter.targets(), holdout=0.0)
    assert "16 calibration rows for 32 inputs" in caplog.text
    total = 2 * 8 * (8**2 + 32**2) / 1e6
    assert f"4 targets: {total:.3f} MB, the largest layers.0.mlp with 0.008 MB" in caplog.text


def test_one_sequence_is_used_for_both_parts(make_model):
    """With nothing to hold out the held-out statistics are the fitted ones."""
    adapter = adapter_for(make_model())
    statistics = collect(adapter, tokens(1), adapter.targets(), holdout=0.1)
    assert statistics.held is statistics.fitted


def test_parts_add_up_in_any_order(make_model):
    """Oracle: one pass over all inputs. Property: commutative and associative."""
    adapter = adapter_for(make_model("maxmin"))
    whole = collect(adapter, tokens(9), adapter.targets(), holdout=0.0)
    a, b, c = (
        collect(adapter, part, adapter.targets(), holdout=0.0)
        for part in tokens(9).split((2, 3, 4))
    )
    for merged in (a.merge(b).merge(c), a.merge(b.merge(c)), c.merge(a).merge(b)):
        assert_equal(merged, whole, EXACT)


def test_a_part_that_holds_nothing_out_leaves_the_held_out_inputs_alone(make_model):
    """Oracle: the parts' own sums."""
    adapter = adapter_for(make_model())
    with_held = collect(adapter, tokens(4), adapter.targets(), holdout=0.25)
    without = collect(adapter, tokens(1), adapter.targets(), holdout=0.25)
    for merged in (with_held.merge(without), without.merge(with_held)):
        assert merged.held["layers.0.mlp"].count == 8
        assert merged.fitted["layers.0.mlp"].count == 32


def test_statistics_of_other_targets_do_not_merge(make_model):
    """The message holds both sizes."""
    first, second = (Statistics(fitted={"a": Moments(size)}, apart={}) for size in (2, 3))
    with pytest.raises(DataError, match=r"\{'a': 2\} and of \{'a': 3\}.*merge parts of one"):
        first.merge(second)


@pytest.mark.parametrize("killed_after", [1, 4, 6])
def test_an_interrupted_pass_goes_on_bit_for_bit(make_model, tmp_path, small_batches, killed_after):
    """Oracle: the uninterrupted pass; the second call computes only what is missing."""
    path = tmp_path / "new" / "sums.st"
    run = functools.partial(collect, inputs=tokens(7), holdout=0.3)
    adapter = adapter_for(make_model("maxmin").float())
    whole = run(adapter, targets=adapter.targets())
    stop_after(adapter, killed_after)
    with pytest.raises(KeyboardInterrupt):
        run(adapter, targets=adapter.targets(), path=path)
    with pytest.raises(DataError, match=f"holds {killed_after} of 7 batches.*run the command"):
        load_statistics(path)
    adapter = adapter_for(make_model("maxmin").float())
    stop_after(adapter, 7 - killed_after)
    assert_equal(run(adapter, targets=adapter.targets(), path=path), whole)
    stop_after(adapter, 0)
    assert_equal(run(adapter, targets=adapter.targets(), path=path), whole)
    assert_equal(load_statistics(path), whole)
    assert [file.name for file in path.parent.iterdir()] == ["sums.st"]


def test_a_file_of_another_pass_is_refused(make_model, tmp_path):
    """Property: other weights, settings of the model, inputs, targets or holdout are noticed."""
    path = tmp_path / "sums.st"
    adapter = adapter_for(make_model())
    targets = adapter.targets()
    collect(adapter, tokens(), targets, path=path)
    others = [
        (adapter_for(make_model(seed=1)), tokens(), targets, 0.1),
        (adapter_for(make_model(attn_factor=0.5)), tokens(), targets, 0.1),
        (adapter_for(make_model().float()), tokens(), targets, 0.1),
        (adapter, tokens().flip(0), targets, 0.1),
        (adapter, tokens(), targets[1:], 0.1),
        (adapter, tokens(), targets, 0.4),
    ]
    for model, inputs, places, holdout in others:
        with pytest.raises(DataError, match=r"sums\.st: statistics of another model.*remove"):
            collect(model, inputs, places, holdout=holdout, path=path)


def test_damaged_and_foreign_files_are_refused(make_model, tmp_path):
    """Oracle: the file cut short, one bit flipped in a sum, another format, no file."""
    path = tmp_path / "sums.st"
    adapter = adapter_for(make_model())
    collect(adapter, tokens(), adapter.targets(), path=path)
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[-3] ^= 1
    damages = {good[:-100]: "not a complete", bytes(flipped): "damaged; remove it", b"": "not a"}
    for data, message in damages.items():
        path.write_bytes(data)
        with pytest.raises(DataError, match=rf"sums\.st: .*{message}"):
            collect(adapter, tokens(), adapter.targets(), path=path)
    path.write_bytes(safetensors_of_another_kind())
    with pytest.raises(DataError, match="format None, expected 'lipllm statistics 1'; name"):
        load_statistics(path)
    with pytest.raises(DataError, match="not a complete statistics file"):
        load_statistics(tmp_path / "none.st")


def safetensors_of_another_kind() -> bytes:
    """Return a file that holds a tensor."""
    import safetensors.torch

    return safetensors.torch.save({"weight": torch.zeros(2)})


def test_files_keep_every_number(tmp_path):
    """Oracle: what was written, skipped rows and an unfinished pass included."""
    moments = Moments(3)
    moments.update(torch.tensor([[1.0, 2.0, 3.0], [torch.nan, 0.0, 0.0]]))
    statistics = Statistics(fitted={"a/b": moments}, apart={})
    save_statistics(tmp_path / "sums.st", statistics)
    found = load_statistics(tmp_path / "sums.st")
    assert_equal(found, statistics)
    assert found.fitted["a/b"].skipped == 1
    save_statistics(tmp_path / "sums.st", statistics, Progress(done=1, batches=3))
    with pytest.raises(DataError, match="holds 1 of 3 batches"):
        load_statistics(tmp_path / "sums.st")


@pytest.mark.slow
def test_two_processes_collect_what_one_does(tmp_path, monkeypatch):
    """Oracle: one process; both get the sums of both, also from the files of a finished pass."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    common |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(RANK), str(tmp_path)],
            env=os.environ | common | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    outputs = [rank.communicate(timeout=100)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)[-2000:]
    spec = importlib.util.spec_from_file_location("statistics_rank", RANK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with torch.random.fork_rng():
        model, inputs = module.job()
    monkeypatch.setattr(statistics_module, "BATCH_NUMBERS", 16)
    adapter = adapter_for(model)
    alone = collect(adapter, inputs, adapter.targets())
    shares = [load_statistics(tmp_path / f"sums-{rank}-of-2.st") for rank in (0, 1)]
    assert {share.fitted["layers.0.mlp"].count for share in shares} == {4 * 16}
    assert_equal(shares[0].merge(shares[1]), alone, EXACT)
    for name in ("first", "second"):
        found = [load_statistics(tmp_path / f"{name}-{rank}.st") for rank in (0, 1)]
        assert_equal(found[0], found[1])
        assert_equal(found[0], alone, EXACT)
