"""Samples for a batch, by its place in a run: read, decoded, and those that cannot be left out.

A batch of B at step n holds the samples at positions n B to n B + B - 1 of the source's order, so
it is a function of (seed, step, B) alone. The place of a sample that cannot be read is taken by one
from behind the batch, which depends on nothing else either.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any, TypeVar

from calib.data.shuffle import order
from calib.data.source import UNREADABLE, Damaged, Sample, Source

Decoded = TypeVar("Decoded")
SHOWN = 3  # samples left out that are told one by one (ours)


class Unreadable:
    """The samples that could not be read, by key, and how many there may be before a run stops.

    The whole conversion shares one: calibration meets the same ones as training.
    """

    def __init__(self, name: str, limit: int, log: Callable[[str], None] = print):
        if limit < 0:
            raise ValueError(f"--skip is {limit}, expected a number of samples, 0 for none")
        self.name, self.limit, self.log = name, limit, log
        self.reasons: dict[str, str] = {}

    def add(self, key: str, error: BaseException) -> None:
        """Count a sample once; ValueError when there are more than the limit."""
        if key in self.reasons:
            return
        reason = " ".join(str(error).split()) or type(error).__name__
        self.reasons[key] = reason
        first = next(iter(self.reasons))
        if len(self.reasons) > self.limit:
            raise ValueError(
                f"{len(self.reasons)} samples of {self.name} cannot be read, more than --skip "
                f"{self.limit} allows (the first: {first}: {self.reasons[first]}); repair or "
                "remove them, or allow more with --skip, then continue with --resume."
            )
        if len(self.reasons) <= SHOWN:
            self.log(f"skipped: {key}: {reason}.")

    def nearly_all(self, tried: set[str]) -> str:
        """A sentence for samples of which too few can be read to make a batch."""
        key, reason = next(iter(self.reasons.items()))
        return (
            f"{self.name}: {len(tried - self.reasons.keys())} of {len(tried)} samples can be read "
            f"(the first that cannot: {key}: {reason}); expected pictures with captions."
        )


def feed(
    source: Source,
    seed: int,
    window: int,
    lengths: MutableMapping[str, int],
    unreadable: Unreadable,
    decode: Callable[[int, Any, str], Decoded],
) -> Callable[[int, int], list[Decoded]]:
    """A function (first position, count) -> so many decoded samples.

    decode: (epoch, file of the picture or a Pair, caption) -> anything; Damaged for a picture that
    is none.
    Positions that follow those of the call before are read on, others sought. ValueError when more
    samples are unreadable than allowed, or next to all are.
    """
    ahead: deque[tuple[int, Sample]] = deque()
    base = 0  # the position of the first in `ahead`
    coming: Iterator[tuple[int, Sample]] | None = None

    def at(position: int) -> tuple[int, Sample]:
        nonlocal base, coming
        reach = base + len(ahead)
        if coming is None or not base <= position <= reach:
            ahead.clear()
            base, coming = position, order(source, seed, window, lengths, position)
        while base + len(ahead) <= position:
            ahead.append(next(coming))
        return ahead[position - base]

    def samples(start: int, count: int) -> list[Decoded]:
        nonlocal base
        while ahead and base < start:
            ahead.popleft()
            base += 1
        good: list[Decoded] = []
        position, tried = start, set[str]()
        while len(good) < count:
            epoch, sample = at(position)
            tried.add(sample.key)
            try:
                data, caption = sample.read()
            except UNREADABLE as error:
                unreadable.add(sample.key, error)
            else:
                try:
                    good.append(decode(epoch, data, caption))
                except Damaged as error:  # no other: a full disk is no fault of the sample
                    unreadable.add(sample.key, error)
            position += 1
            if position - start > 2 * (count + unreadable.limit) + 1000:
                raise ValueError(unreadable.nearly_all(tried))
        return good

    return samples
