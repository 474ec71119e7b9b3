"""The order in which a source's samples are seen: shuffled by seed, without end, from any position.

Shards are shuffled anew in every epoch, and samples mixed in a buffer; within an epoch every sample
comes once. The order is a function of (source, seed, buffer), so nothing has to be saved to go on
in the middle of an epoch: positions before the start are counted, not read.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, MutableMapping
from itertools import count, islice
from typing import TypeVar

from calib.source import Sample, Source

Item = TypeVar("Item")
Place = tuple[int, int]  # number of the shard in the epoch's order, row


def order(
    source: Source,
    seed: int,
    buffer: int,
    lengths: MutableMapping[str, int],
    start: int = 0,
) -> Iterator[tuple[int, Sample]]:
    """(epoch, sample) of position `start`, `start` + 1, ..., without end.

    Args:
        buffer: samples among which the next one is drawn; 1 keeps a shard's own order.
        lengths: rows of the shards, as far as known; what is learnt on the way is added. Shards
            before `start` whose length is unknown are counted once.

    ValueError if the source holds no sample, or a row of a shard has gone.
    """
    epoch, skip = 0, start
    if skip and all(shard in lengths for shard in source.shards):
        total = sum(lengths[shard] for shard in source.shards)
        epoch, skip = divmod(skip, total) if total else (0, 0)
    while True:
        seen = 0
        for sample in _epoch(source, seed, epoch, buffer, lengths, skip):
            seen += 1
            yield epoch, sample
        total = sum(lengths[shard] for shard in source.shards)
        if not total:
            raise ValueError(
                f"{source.name} holds no sample; expected pictures with captions, or prompts."
            )
        skip -= min(skip, total - seen)
        epoch += 1


def _epoch(
    source: Source,
    seed: int,
    epoch: int,
    size: int,
    lengths: MutableMapping[str, int],
    skip: int,
) -> Iterator[Sample]:
    """The samples of one epoch after the first `skip`, none where it has not as many."""
    shards = list(source.shards)
    # Seeding by text goes through SHA-512: the same everywhere, and far apart for near seeds.
    random.Random(f"{seed}/{epoch}/shards").shuffle(shards)
    picks = random.Random(f"{seed}/{epoch}/picks")
    waiting: list[Sample] = []
    first: Place | None = (0, 0)
    if skip:
        places = _places(source, shards, lengths)
        held: list[Place] = []
        if sum(1 for _ in islice(mixed(places, held, size, picks), skip)) < skip:
            return
        first = next(places, None)
        waiting = _read(source, shards, held)
    rest = iter(()) if first is None else _samples(source, shards, lengths, first)
    yield from mixed(rest, waiting, size, picks)


def mixed(
    items: Iterator[Item], held: list[Item], size: int, picks: random.Random
) -> Iterator[Item]:
    """The items in a mixed order, at most `size` of them held at a time, in the list `held`.

    Between two items `held` and the state of `picks` are all that is remembered.
    """
    for item in items:
        if len(held) < size:
            held.append(item)
            continue
        index = picks.randrange(size)
        out, held[index] = held[index], item
        yield out
    while held:
        index = picks.randrange(len(held))
        held[index], held[-1] = held[-1], held[index]
        yield held.pop()


def _places(
    source: Source, shards: list[str], lengths: MutableMapping[str, int]
) -> Iterator[Place]:
    for number, shard in enumerate(shards):
        if shard not in lengths:
            lengths[shard] = source.length(shard)
        for row in range(lengths[shard]):
            yield number, row


def _samples(
    source: Source, shards: list[str], lengths: MutableMapping[str, int], first: Place
) -> Iterator[Sample]:
    """The samples from a place on, in the order of the places."""
    number, row = first
    for shard in shards[number:]:
        end = row
        for sample in source.rows(shard, row):
            yield sample
            end += 1
        if lengths.setdefault(shard, end) != end:
            raise ValueError(
                f"{shard} of {source.name} has {end} rows and had {lengths[shard]}; expected data "
                "that stay as they are; for changed data take another --cache and output."
            )
        row = 0


def _read(source: Source, shards: list[str], places: list[Place]) -> list[Sample]:
    """The samples at these places, every shard read once and no further than needed."""
    rows: dict[int, set[int]] = defaultdict(set)
    for number, row in places:
        rows[number].add(row)
    found: dict[Place, Sample] = {}
    for number, wanted in rows.items():
        low, high = min(wanted), max(wanted)
        samples = islice(source.rows(shards[number], low), high - low + 1)
        found |= {
            (number, row): sample for row, sample in zip(count(low), samples) if row in wanted
        }
    try:
        return [found[place] for place in places]
    except KeyError as error:
        number, row = error.args[0]
        raise ValueError(
            f"row {row} of {shards[number]} of {source.name} has gone; expected data that stay as "
            "they are while a conversion runs."
        ) from error
