"""The order of samples: once an epoch, by seed, and the same from wherever it is entered."""

from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calib.data.shuffle import order
from calib.data.source import Sample, Source


def open_source(sizes, log=None, counted=None):
    """Shards of these sizes; `log` gets every row read, `counted` every length asked for."""
    names = tuple(f"shard {i}" for i in range(len(sizes)))

    def rows(shard, first):
        for row in range(first, sizes[names.index(shard)]):
            if log is not None:
                log.append((shard, row))
            yield Sample(f"{shard}/{row}", lambda: (b"", "x"))

    def length(shard):
        if counted is not None:
            counted.append(shard)
        return sizes[names.index(shard)]

    return Source("test", names, rows, length)


def keys(sizes, count, seed=0, window=4, lengths=None, start=0):
    found = order(open_source(sizes), seed, window, {} if lengths is None else lengths, start)
    return [(epoch, sample.key) for epoch, sample in islice(found, count)]


@given(
    sizes=st.lists(st.integers(0, 7), min_size=1, max_size=5).filter(sum),
    window=st.integers(1, 12),
    start=st.integers(0, 60),
    known=st.booleans(),
    seed=st.integers(0, 3),
)
@settings(max_examples=150, deadline=None)
def test_entered_anywhere_it_is_the_same(sizes, window, start, known, seed):
    whole = keys(sizes, start + 20, seed, window)
    lengths = {f"shard {i}": size for i, size in enumerate(sizes)} if known else {}
    assert keys(sizes, 20, seed, window, lengths, start) == whole[start:]
    total = sum(sizes)
    epochs = Counter(epoch for epoch, _ in whole)
    for epoch, count in epochs.items():
        rows = [key for at, key in whole if at == epoch]
        assert len(set(rows)) == count <= total  # none twice
    assert [epoch for epoch, _ in whole] == [i // total for i in range(start + 20)]


def test_shuffled_by_seed_and_epoch():
    sizes = [20, 20]
    first = [key for _, key in keys(sizes, 80, seed=1, window=10)]
    assert first[:40] != first[40:] and set(first[:40]) == set(first[40:])
    assert first != [key for _, key in keys(sizes, 80, seed=2, window=10)]
    plain = [key for _, key in keys(sizes, 40, seed=1, window=1)]  # a window of one mixes nothing
    assert sorted(plain[:20], key=lambda key: int(key.split("/")[1])) == plain[:20]
    assert plain != first[:40]
    # Rows are mixed within their window of a shard, and every window in its own way.
    rows = [[int(key.split("/")[1]) for key in first[at : at + 10]] for at in range(0, 40, 10)]
    assert [sorted(window)[0] for window in rows] == [0, 10, 0, 10]
    assert len({tuple(row % 10 for row in window) for window in rows}) == 4


def test_what_lies_before_the_start_is_counted_and_not_read():
    sizes = [1000] * 10
    log, counted = [], []
    source = open_source(sizes, log, counted)
    found = next(order(source, 0, 50, {}, 5500))
    assert found[1].key == keys(sizes, 5501, window=50)[-1][1]
    assert len(counted) <= 6 and len(set(counted)) == len(counted)
    assert len(log) == 50  # one window of one shard; not 5,500 rows
    lengths = dict.fromkeys(source.shards, 1000)
    counted.clear()
    assert next(order(source, 0, 50, lengths, 125_500))[0] == 12 and not counted


def test_memory_is_bounded_by_the_window():
    held = []
    found = order(open_source([100, 100], held), 0, 8, {})
    for taken, _ in enumerate(islice(found, 150), 1):
        assert len(held) - taken <= 8


def test_refusals():
    with pytest.raises(ValueError, match="holds no sample"):
        next(order(open_source([0, 0]), 0, 4, {}))
    with pytest.raises(ValueError, match="shard 0 of test had 5 rows and has fewer"):
        keys([3], 4, lengths={"shard 0": 5})
    with pytest.raises(ValueError, match="shard 0 of test had 50 rows and has fewer"):
        keys([3], 1, lengths={"shard 0": 50}, start=1, window=10)
    with pytest.raises(ValueError, match="shard 0 of test had 2 rows and has more"):
        keys([9], 5, lengths={"shard 0": 2})
    with pytest.raises(ValueError, match="shard 0 of test had 50 rows and has fewer"):
        keys([3], 1, lengths={"shard 0": 50}, start=40, window=10)  # behind its last row
