"""The order of samples: once an epoch, by seed, and the same from wherever it is entered."""

from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calib.order import order
from calib.source import Sample, Source


def source_of(sizes, log=None, counted=None):
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


def keys(sizes, count, seed=0, buffer=4, lengths=None, start=0):
    found = order(source_of(sizes), seed, buffer, {} if lengths is None else lengths, start)
    return [(epoch, sample.key) for epoch, sample in islice(found, count)]


@given(
    sizes=st.lists(st.integers(0, 7), min_size=1, max_size=5).filter(sum),
    buffer=st.integers(1, 12),
    start=st.integers(0, 60),
    known=st.booleans(),
    seed=st.integers(0, 3),
)
@settings(max_examples=150, deadline=None)
def test_entered_anywhere_it_is_the_same(sizes, buffer, start, known, seed):
    whole = keys(sizes, start + 20, seed, buffer)
    lengths = {f"shard {i}": size for i, size in enumerate(sizes)} if known else {}
    assert keys(sizes, 20, seed, buffer, lengths, start) == whole[start:]
    total = sum(sizes)
    epochs = Counter(epoch for epoch, _ in whole)
    for epoch, count in epochs.items():
        rows = [key for at, key in whole if at == epoch]
        assert len(set(rows)) == count <= total  # none twice
    assert [epoch for epoch, _ in whole] == [i // total for i in range(start + 20)]


def test_shuffled_by_seed_and_epoch():
    sizes = [20, 20]
    first = [key for _, key in keys(sizes, 80, seed=1, buffer=10)]
    assert first[:40] != first[40:] and set(first[:40]) == set(first[40:])
    assert first != [key for _, key in keys(sizes, 80, seed=2, buffer=10)]
    plain = [key for _, key in keys(sizes, 40, seed=1, buffer=1)]  # a buffer of one mixes nothing
    assert sorted(plain[:20], key=lambda key: int(key.split("/")[1])) == plain[:20]
    assert plain != first[:40]


def test_what_lies_before_the_start_is_counted_and_not_read():
    sizes = [1000] * 10
    log, counted = [], []
    source = source_of(sizes, log, counted)
    found = next(order(source, 0, 50, {}, 5500))
    assert found[1].key == keys(sizes, 5501, buffer=50)[-1][1]
    assert len(counted) <= 6 and len(set(counted)) == len(counted)
    assert len(log) < 1500  # what lies in the buffer, in two shards or so; not 5,500
    lengths = dict.fromkeys(source.shards, 1000)
    counted.clear()
    assert next(order(source, 0, 50, lengths, 125_500))[0] == 12 and not counted


def test_memory_is_bounded_by_the_buffer():
    held = []
    found = order(source_of([100, 100], held), 0, 8, {})
    for taken, _ in enumerate(islice(found, 150), 1):
        assert len(held) - taken <= 8


def test_refusals():
    with pytest.raises(ValueError, match="holds no sample"):
        next(order(source_of([0, 0]), 0, 4, {}))
    with pytest.raises(ValueError, match="shard 0 of test has 3 rows and had 5"):
        keys([3], 4, lengths={"shard 0": 5})
    with pytest.raises(ValueError, match="has gone"):
        keys([3], 1, lengths={"shard 0": 50}, start=1, buffer=10)
