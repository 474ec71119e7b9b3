"""What an executor of plans holds on a device: weights, and two regions that grow when needed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from runtime.cuda.arena import SIZES, aligned
from runtime.files.tensors import SafeTensors
from runtime.lora.placement import Adapted


class Memory:
    """Device memory of one executor; given back when it is collected.

    weights   (name in the safetensors file, dtype) -> address; uploaded once, never moved
    regions   "arena": the tensors between launches, "scratch": plans' working memory. Both are
              used by one launch after the other, so the largest need is enough for all. Others are
              what executors hand to one another.
    `moved(region)` is called when a region has grown, and so lies elsewhere.
    """

    def __init__(
        self, device: Any, tensors: SafeTensors | Adapted, moved: Callable[[str], None]
    ) -> None:
        self.device, self.tensors, self.moved = device, tensors, moved
        self.weights: dict[tuple[str, str], int] = {}
        self.regions = {"arena": (0, 0), "scratch": (0, 0)}  # address, bytes
        self._owned: set[int] = set()
        weakref.finalize(self, free_all, device, self._owned)

    def reserve(self, region: str, size: int, *, keep: bool = False) -> int:
        """The region's address, with room for `size` bytes at least; `keep`: with its contents."""
        address, have = self.regions.get(region, (0, 0))
        if address and size <= have:
            return address
        if address and keep:
            self.moved(region)
            larger = self.allocate(size)
            self.device.move(larger, address, have)
            self.regions[region] = (larger, size)
            self._owned.discard(address)
            self.device.free(address)
            return larger
        if address:  # first, so that old and new need not fit side by side
            self.regions[region] = (0, 0)
            self._owned.discard(address)
            self.device.free(address)
        self.moved(region)
        address = self.allocate(size)
        self.regions[region] = (address, size)
        return address

    def upload_weights(self, wanted: Iterable[tuple[str, str]]) -> None:
        """Copy the weights that are not on the device yet, in one allocation, cast once."""
        new = [key for key in dict.fromkeys(wanted) if key not in self.weights]
        sizes = [aligned(self.tensors.size_as(name, dtype) * SIZES[dtype]) for name, dtype in new]
        if not new:
            return
        address = self.allocate(sum(sizes))
        for (name, dtype), size in zip(new, sizes, strict=True):
            self.device.upload(address, np.ascontiguousarray(self.tensors.array(name, dtype)))
            self.weights[name, dtype] = address
            address += size

    def renew(self, tensors: Adapted, names: Iterable[str]) -> None:
        """Weights come from `tensors` from now on; of those that are here, `names` change where
        they are, after everything queued, for uploads are queued too."""
        self.tensors, stale = tensors, set(names)
        for (name, dtype), address in self.weights.items():
            if name in stale:
                self.device.upload(address, np.ascontiguousarray(tensors.array(name, dtype)))

    def allocate(self, size: int) -> int:
        """New memory, owned by this object."""
        address = int(self.device.malloc(size))
        self._owned.add(address)
        return address


def free_all(device: Any, owned: set[int]) -> None:
    """Free what an executor held."""
    while owned:
        device.free(owned.pop())
