"""The order in which a source's samples are seen: shuffled by seed, without end, from any position.

Every epoch has its own permutation of the shards, and of the rows in every window of a shard, so
within an epoch every sample comes once. All of them are functions of (source, seed, window): where
a position lies follows from the lengths of the shards before it, and nothing has to be saved or
read again to go on in the middle of an epoch.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, MutableMapping
from itertools import islice

from calib.data.source import Sample, Source


def order(
    source: Source, seed: int, window: int, lengths: MutableMapping[str, int], start: int = 0
) -> Iterator[tuple[int, Sample]]:
    """(epoch, sample) of position `start`, `start` + 1, ..., without end.

    Args:
        window: samples of a shard, one after another, that are mixed and held in memory; 1 keeps a
            shard's own order.
        lengths: rows of the shards, as far as known; what is learnt on the way is added. Shards
            before `start` whose length is unknown are counted once.

    ValueError if the source holds no sample, or a shard has other rows than it had.
    """
    epoch, skip = 0, start
    if skip and all(shard in lengths for shard in source.shards):
        total = sum(lengths[shard] for shard in source.shards)
        epoch, skip = divmod(skip, total) if total else (0, 0)
    while True:
        shards = list(source.shards)
        # Seeding by text goes through SHA-512: the same everywhere, and far apart for near seeds.
        random.Random(f"{seed}/{epoch}/shards").shuffle(shards)
        for shard in shards:
            if skip and shard not in lengths:
                lengths[shard] = source.length(shard)
            if skip and skip >= lengths[shard]:
                skip -= lengths[shard]
                continue
            for sample in _rows(source, shard, f"{seed}/{epoch}", window, lengths, skip):
                yield epoch, sample
            skip = 0
        if not any(lengths[shard] for shard in source.shards):
            raise ValueError(
                f"{source.name} holds no sample; expected pictures with captions, or prompts."
            )
        epoch += 1


def _rows(
    source: Source, shard: str, seed: str, window: int, lengths: MutableMapping[str, int], skip: int
) -> Iterator[Sample]:
    """The samples of one shard after the first `skip`, every window of rows permuted by itself."""
    first = skip - skip % window
    rows = source.rows(shard, first)
    while True:
        mixed = list(islice(rows, window))
        end = first + len(mixed)
        if len(mixed) < window:
            lengths.setdefault(shard, end)
        # Before a row of it is given out: of other rows the permutation would be another one.
        if end != min(first + window, known := lengths.get(shard, end)):
            raise ValueError(
                f"{shard} of {source.name} had {known} rows and has "
                f"{'fewer' if end < known else 'more'}; expected data that stay as they are; for "
                "changed data take another --cache and output."
            )
        random.Random(f"{seed}/{shard}/{first}").shuffle(mixed)
        yield from mixed[skip % window :]
        if len(mixed) < window:
            return
        first, skip = end, 0
