"""`d2m inspect`: what a directory holds.

directory      What a directory holds: a sparse checkpoint, a dense pipeline, or a bundle and
               its plans
backends_here  What every backend lacks here, how it runs the routed experts, and where it has
               run
block_table    The block schedule of a generation as a table for people: `d2m inspect
               --schedule`
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtime.files.lazy import lazy

if TYPE_CHECKING:
    from runtime.inspect.directory import inspect

__all__ = ["inspect"]
__getattr__, __dir__ = lazy(
    __name__,
    {
        "inspect": "runtime.inspect.directory",
    },
)
