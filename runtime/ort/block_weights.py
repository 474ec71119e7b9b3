"""Where a block's weights are when it runs: held from its first run on, or streamed from the file.

Streamed (`offload="block"`), a component takes two rooms of its largest block in place of all its
weights: while a block computes with one, a thread fills the other with the next block that will
run. So memory is bounded by the block, not by the model, and every step reads the weights anew.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from runtime.cuda.arena import SIZES, aligned, byte_size
from runtime.files.tensor_reader import TensorFiles
from runtime.lora.placement import Adapted, Adapters

if TYPE_CHECKING:
    from runtime.files.tensors import SafeTensors
    from runtime.ort.memory_places import Place, Room

Call = tuple[str, str]  # block type, weight prefix


class HeldWeights:
    """Weights stay where they were put for a block's first run; all graphs share them.

    Blocks say which calls come next (`expect`), then `take` and `release` the weights of each.
    """

    def __init__(self, component: Mapping[str, Any], tensors: SafeTensors, place: Place) -> None:
        self.types, self.place = component["types"], place
        self.tensors = Adapted(tensors)

    def expect(self, calls: Iterable[Call]) -> None:
        """The next calls, in their order."""

    def take(self, call: Call) -> tuple[Any, list[int]]:
        """(where the weights are, an address for each): they stay until `release`."""
        kind, prefix = call
        rows = self.types[kind]["weights"]
        wanted = [(prefix + local, row["dtype"]) for local, row in rows.items()]
        return prefix, self.place.keep(self.tensors, wanted)

    def release(self, where: Any) -> None:
        """The call has run."""

    def forget(self) -> None:
        """Nothing that was expected comes any more: a call failed or was cancelled."""

    def adapt(self, adapters: Adapters | None) -> None:
        """Weights are with these adapters from now on, None: as they are stored."""
        before, self.tensors = self.tensors, Adapted(self.tensors.base, adapters)
        self.place.renew(self.tensors, before.changed | self.tensors.changed)


class StreamedWeights:
    """Two rooms, filled in turn by one thread with the blocks that will run, in their order."""

    def __init__(self, component: Mapping[str, Any], tensors: SafeTensors, place: Place) -> None:
        self.types, self.files = component["types"], TensorFiles(tensors)
        self.tensors = Adapted(tensors)
        named = [*component["program"], *component.get("groups", {}).values()]
        self.layouts = {
            kind: layout(self.types[kind]["weights"].values())
            for kind in {row["type"] for row in named}
        }
        self.size = max(total for _, total in self.layouts.values())
        self.rooms: list[Room] = [place.room(self.size) for _ in named[:2]]
        self._free = list(range(len(self.rooms)))
        self._waiting: deque[Call] = deque()
        self._coming: deque[tuple[Call, int, Future[None]]] = deque()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="d2m-offload")

    def expect(self, calls: Iterable[Call]) -> None:
        """See HeldWeights; the first of them begin to be read."""
        self._waiting.extend(calls)
        self._begin()

    def take(self, call: Call) -> tuple[Any, list[int]]:
        """See HeldWeights; waits until the weights are there."""
        expected, room, filled = self._coming.popleft()
        assert expected == call, (expected, call)
        try:
            filled.result()
        except BaseException:
            self._free.append(room)
            raise
        base = self.rooms[room].address
        return room, [base + offset for offset in self.layouts[call[0]][0]]

    def release(self, where: Any) -> None:
        """See HeldWeights; the room is filled with the next call's."""
        self._free.append(where)
        self._begin()

    def forget(self) -> None:
        """See HeldWeights; waits for what is being read."""
        self._waiting.clear()
        while self._coming:
            _, room, filled = self._coming.popleft()
            if not filled.cancel():
                filled.exception()
            self._free.append(room)

    def adapt(self, adapters: Adapters | None) -> None:
        """See HeldWeights; they are added to every time a block is read."""
        self.tensors = Adapted(self.tensors.base, adapters)

    def _begin(self) -> None:
        while self._free and self._waiting:
            room, call = self._free.pop(0), self._waiting.popleft()
            self._coming.append((call, room, self._pool.submit(self.fill, room, call)))

    def fill(self, room: int, call: Call) -> None:
        """Read a call's weights into a room."""
        kind, prefix = call
        rows, (offsets, total) = self.types[kind]["weights"], self.layouts[kind]
        host = self.rooms[room].host
        for offset, (local, row) in zip(offsets, rows.items(), strict=True):
            size = self.files.tensors[prefix + local].size * SIZES[row["dtype"]]
            there = host[offset : offset + size]
            self.files.read(prefix + local, row["dtype"], there)
            self.tensors.change(prefix + local, row["dtype"], row["shape"], there)
        self.rooms[room].send(total)


def layout(rows: Iterable[Mapping[str, Any]]) -> tuple[list[int], int]:
    """Offsets of a block's weights one after the other, and the bytes of all."""
    offsets, total = [], 0
    for row in rows:
        offsets.append(total)
        total += aligned(byte_size(row["shape"], row["dtype"]))
    return offsets, total


Weights = HeldWeights | StreamedWeights
