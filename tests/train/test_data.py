"""Training windows: a batch is a pure function of seed and number; resume needs a counter."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.corpus import DataConfig, prepare_corpus
from common.errors import DataError
from train.batch_stream import NumberedBatches
from train.data import TokenDataModule, window_batch


@pytest.fixture
def corpus(tmp_path, text_path):
    """A prepared byte corpus."""
    config = DataConfig(source="local", path=str(text_path), cache=str(tmp_path / "cache"))
    return prepare_corpus(config)


def module(corpus, **changes):
    """A data module of 8-token windows."""
    settings = {"seed": 1, "val_windows": 7, "val_batch_size": 3} | changes
    return TokenDataModule(corpus, 8, 4, **settings)


def take(data, count):
    """The first batches of a fresh loader."""
    stream = iter(data.train_dataloader())
    return [next(stream) for _ in range(count)]


def test_window_batch_is_pure_and_cuts_real_text():
    """Oracle: windows of a counting sequence count; equal arguments give equal batches."""
    ids = np.arange(100, dtype=np.uint8)
    first = window_batch(ids, 9, 5, seed=3, index=7)
    assert first.shape == (5, 10)
    assert first.dtype == torch.int64
    assert torch.equal(first - first[:, :1], torch.arange(10).expand(5, 10))
    assert torch.equal(first, window_batch(ids, 9, 5, seed=3, index=7))
    for other in ({"seed": 4}, {"index": 8}):
        changed = {"seed": 3, "index": 7} | other
        assert not torch.equal(first, window_batch(ids, 9, 5, **changed))


def test_window_batch_reaches_both_ends():
    """Property: the first and the last possible window both occur, and nothing beyond."""
    ids = np.arange(12, dtype=np.uint8)
    starts = window_batch(ids, 9, 200, seed=0, index=0)[:, 0]
    assert set(starts.tolist()) == {0, 1, 2}


def test_stream_continues_where_it_stopped(corpus):
    """Oracle: the uninterrupted stream; prefetched batches do not count."""
    whole = take(module(corpus), 5)
    stopped = module(corpus)
    take(stopped, 4)
    stopped.consumed = 2
    resumed = module(corpus)
    resumed.load_state_dict(stopped.state_dict())
    for a, b in zip(whole[2:], take(resumed, 3), strict=True):
        assert torch.equal(a, b)


def test_ranks_see_different_batches_and_disjoint_validation(corpus):
    """Property: training batches differ, validation windows are shared out without overlap."""
    shards = []
    for rank in (0, 1):
        data = module(corpus)
        data.trainer = SimpleNamespace(global_rank=rank, world_size=2)
        shards.append((take(data, 1)[0], torch.cat(list(data.val_dataloader()))))
    assert not torch.equal(shards[0][0], shards[1][0])
    merged = torch.cat([shards[0][1], shards[1][1]])
    expected = corpus.windows("val", 8, 7)
    assert sorted(merged.tolist()) == sorted(expected.tolist())


def test_no_rank_is_left_without_validation(corpus):
    """Fewer windows than ranks: all see all, and the mean over ranks stays the same."""
    data = module(corpus, val_windows=2)
    data.trainer = SimpleNamespace(global_rank=2, world_size=3)
    (batch_BT,) = data.val_dataloader()
    assert torch.equal(batch_BT, corpus.windows("val", 8, 2))


def test_ranks_share_out_one_sequence_of_batches():
    """Oracle: the numbers themselves; two ranks take turns in what one process sees."""
    alone = NumberedBatches(lambda number: number, first=6)
    ranks = [
        iter(NumberedBatches(lambda number: number, first=3, rank=rank, world=2)) for rank in (0, 1)
    ]
    for expected, number in zip(range(6, 10), alone, strict=False):
        assert number == expected == next(ranks[expected % 2])


def test_position_survives_a_change_of_the_number_of_ranks(corpus):
    """Oracle: six batches of two ranks are twelve of one, and four of three."""
    for world, expected in ((1, 12), (2, 6), (3, 4)):
        data = module(corpus)
        data.trainer = SimpleNamespace(global_rank=0, world_size=world)
        data.load_state_dict({"consumed": 6, "world": 2})
        assert data.consumed == expected


def test_short_corpus_is_a_data_error(tmp_path):
    """One line that names the context and the remedy."""
    path = tmp_path / "short.txt"
    path.write_text("too short")
    corpus = prepare_corpus(DataConfig(source="local", path=str(path), cache=str(tmp_path / "c")))
    with pytest.raises(DataError, match="context of 8"):
        module(corpus)
