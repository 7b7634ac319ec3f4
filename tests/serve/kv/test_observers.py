"""Observers: right for chunks and decode rows alike, and after compaction, reuse and replay."""

# Legend: T tokens, H query heads, K key/value heads, S slots, D head width.

from types import SimpleNamespace

import pytest
import torch

from serve.engine.evidence import sources
from serve.kernels import compact_kv
from serve.kv.observer import Attended
from serve.kv.observers import AttentionMass, QueryMoments, QueryWindow

FLOAT64 = 1e-12  # sums of a few dozen terms of size about 1
LENGTH, BLOCK = 21, 4
KINDS = {
    "window": lambda decoder: QueryWindow(decoder, 6),
    "mass": AttentionMass,
    "moments": lambda decoder: QueryMoments(decoder, 3),
}


def make_decoder(cache):
    """Return three layers: full, sliding and positional alone; only the first is watched."""
    bias = torch.randn(6, cache.context, dtype=torch.float64)
    specs = (
        cache.make_spec(bias_HT=bias),
        cache.make_spec(bias_HT=bias, sliding_window=8),
        cache.make_spec(bias_HT=bias, content_heads=0),
    )
    return SimpleNamespace(layers=specs, device=torch.device("cpu"), dtype=torch.float64)


def make_texts(decoder, count):
    """Return queries (T, H, D) and pools of sequences whose keys lie in order of position."""
    spec, texts = decoder.layers[0], []
    for _ in range(count):
        q = torch.randn(LENGTH, spec.heads, spec.head_dim, dtype=torch.float64)
        q[:, spec.content_heads :] = 0
        pages = -(-LENGTH // BLOCK)
        k = torch.randn(pages, spec.kv_heads, BLOCK, spec.head_dim, dtype=torch.float64)
        pos = torch.arange(pages * BLOCK).view(pages, 1, BLOCK).expand(-1, spec.kv_heads, -1)
        texts.append((q, k, pos.int()))
    return texts


def show(observer, texts, rows, chunks, layer=0):
    """Let an observer see texts side by side: chunks one by one, single tokens as decode rows."""
    k_pool, pos_pool = (torch.cat([text[i] for text in texts]) for i in (1, 2))
    tables = torch.arange(len(k_pool)).view(len(texts), -1)
    start = 0
    for count in chunks:
        stop = start + count
        groups = [[i] for i in range(len(texts))] if count > 1 else [list(range(len(texts)))]
        for group in groups:
            event = Attended(
                layer=layer,
                rows=[rows[i] for i in group],
                q_RTHD=torch.stack([texts[i][0][start:stop] for i in group]),
                positions_RT=torch.arange(start, stop).expand(len(group), -1),
                k_pool=k_pool,
                pos_pool=pos_pool,
                tables_RW=tables[group][:, : -(-stop // BLOCK)],
                lengths_R=torch.full((len(group),), stop),
            )
            observer.attended(event)
        start = stop


def differ(first, second):
    """Return the largest difference, after cutting or padding slots with zeros."""
    assert first.keys() == second.keys()
    worst = 0.0
    for name, x in first.items():
        y = second[name]
        width = max(x.shape[-1], y.shape[-1])
        x, y = (torch.nn.functional.pad(v, (0, width - v.shape[-1])) for v in (x, y))
        worst = max(worst, float((x - y).abs().max()))
    return worst


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunks", [[LENGTH], [8, 8, 5], [2, 7, *[1] * 12], [20, 1]])
def test_chunks_and_batches_do_not_matter(cache, kind, chunks):
    """Oracle: the same texts token by token, each alone."""
    torch.manual_seed(0)
    decoder = make_decoder(cache)
    texts = make_texts(decoder, 3)
    together = KINDS[kind](decoder)
    rows = [together.open() for _ in texts]
    show(together, texts, rows, chunks)
    for row, text in zip(rows, texts, strict=True):
        alone = KINDS[kind](decoder)
        own = alone.open()
        show(alone, [text], [own], [1] * LENGTH)
        expected = alone.observed((0,), [own])
        assert differ(together.observed((0,), [row]), expected) < FLOAT64
        assert max(float(x.abs().max()) for x in expected.values()) > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_one_text_as_many_decode_rows(cache, kind):
    """Oracle: the same text as one chunk; the evaluation runs texts this way."""
    torch.manual_seed(1)
    decoder = make_decoder(cache)
    text = make_texts(decoder, 1)[0]
    results = []
    for as_rows in (False, True):
        observer = KINDS[kind](decoder)
        row = observer.open()
        q, positions = text[0][None], torch.arange(LENGTH)[None]
        count = LENGTH if as_rows else 1
        event = Attended(
            layer=0,
            rows=[row] * count,
            q_RTHD=q.transpose(0, 1) if as_rows else q,
            positions_RT=positions.T if as_rows else positions,
            k_pool=text[1],
            pos_pool=text[2],
            tables_RW=torch.arange(len(text[1])).expand(count, -1),
            lengths_R=torch.arange(LENGTH) + 1 if as_rows else torch.tensor([LENGTH]),
        )
        observer.attended(event)
        results.append(observer.observed((0,), [row]))
    assert differ(*results) < FLOAT64


@pytest.mark.parametrize("kind", KINDS)
def test_a_closed_row_starts_from_nothing(cache, kind):
    """Oracle: a fresh observer; the row's former text, and its neighbours, leave no trace."""
    torch.manual_seed(2)
    decoder = make_decoder(cache)
    texts = make_texts(decoder, 5)
    observer = KINDS[kind](decoder)
    rows = [observer.open() for _ in texts]
    show(observer, texts, rows, [LENGTH])
    before = observer.observed((0,), [rows[4]])
    observer.close(rows[1])
    observer.close(rows[3])
    again = [observer.open(), observer.open()]
    assert set(again) == {rows[1], rows[3]}
    show(observer, texts[:2], again, [9])
    fresh = KINDS[kind](decoder)
    own = [fresh.open(), fresh.open()]
    show(fresh, texts[:2], own, [9])
    assert differ(observer.observed((0,), again), fresh.observed((0,), own)) < FLOAT64
    assert differ(observer.observed((0,), [rows[4]]), before) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_no_policy_scores_are_not_observed(cache, kind):
    """Property: sliding windows and layers without content cost nothing."""
    decoder = make_decoder(cache)
    observer = KINDS[kind](decoder)
    rows = [observer.open()]
    for layer in (1, 2):
        show(observer, make_texts(decoder, 1), rows, [LENGTH], layer=layer)
        assert observer.observed((layer,), rows) == {}


def test_sources_are_where_the_kernel_took_the_slots_from():
    """Oracle: a pool of random keys, compacted in place."""
    torch.manual_seed(3)
    keep = torch.stack([torch.randperm(20)[:9].sort().values for _ in range(6)]).view(2, 3, 9)
    keys = torch.randn(2, 3, 20, 5)
    moved = keys.clone()
    table = torch.arange(2)[:, None]
    compact_kv([moved], table, keep, table)
    index = sources(keep, 20)[..., None].expand(-1, -1, -1, 5)
    assert torch.equal(moved[:, :, :9], keys.gather(2, index))
    assert not torch.equal(sources(keep, 20), keep)


def test_mass_follows_the_slots(cache):
    """Oracle: the sums before, looked up by position; evicted slots leave nothing behind."""
    torch.manual_seed(4)
    decoder = make_decoder(cache)
    texts, observer = make_texts(decoder, 2), AttentionMass(decoder)
    rows = [observer.open() for _ in texts]
    show(observer, texts, rows, [LENGTH])
    before = observer.observed((0,), rows)["mass"]
    keep = torch.stack([torch.randperm(LENGTH)[:8].sort().values for _ in range(6)]).view(2, 3, 8)
    source = sources(keep, before.shape[2])
    observer.moved((0, 1), rows, torch.cat((source, source)))
    after = observer.observed((0,), rows)["mass"]
    assert torch.equal(after[:, :, :8], before.gather(2, source))
    assert not after[:, :, 8:].any()


def test_mass_of_all_queries_is_their_number(cache):
    """Property: every query gives each of its heads a total weight of one."""
    decoder = make_decoder(cache)
    observer = AttentionMass(decoder)
    row = observer.open()
    show(observer, make_texts(decoder, 1), [row], [12, 9])
    mass = observer.observed((0,), [row])["mass"]
    assert float((mass.sum(-1) - 2 * LENGTH).abs().max()) < 1e-10
    assert bool((mass >= 0).all())
