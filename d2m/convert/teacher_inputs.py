"""What enters every FFN of a dense transformer that is larger than memory, block by block.

The model's own forward runs, once for every batch and all of them at the same time: a batch that
comes to a block waits until the others are there too. So the weights of one block are in memory at
once, each is read once, and no family's forward has to be written again.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2m.families import Family
from d2m.families.ffn_sites import sites_of
from d2m.shards import Shards

Call = Mapping[str, Any]  # keywords of the model's forward


class Stopped(Exception):
    """A batch's forward is not needed any more."""


def dense_skeleton(folder: Path, family: Family) -> nn.Module:
    """The dense model of a directory: parameters on the meta device, buffers as they are."""
    import diffusers
    from accelerate import init_empty_weights

    from d2m.model.components import quiet, read_config

    cls = getattr(diffusers, family.names.dense_class)
    with quiet(), init_empty_weights(include_buffers=False):
        model: nn.Module = cls(**read_config(folder, cls)).eval()
    return model


def load_outside(
    model: nn.Module, source: Shards, blocks: Sequence[str], dtype: torch.dtype, device: str
) -> None:
    """Give a skeleton the weights that belong to no block."""
    inside = tuple(f"{block}." for block in blocks)
    keys = [key for key in source.where if not key.startswith(inside)]
    load(model, source, keys, dtype, device)


def load(
    model: nn.Module, source: Shards, keys: Sequence[str], dtype: torch.dtype, device: str
) -> None:
    """Give a skeleton some of its weights."""
    state = {
        key: value.to(device, dtype if value.is_floating_point() else None)
        for key, value in source.read(keys).items()
    }
    model.load_state_dict(state, strict=False, assign=True)


class TeacherInputs:
    """Iterates over (block, {site name: x [rows, D]}): what enters the FFNs of each block.

    rows: how many tokens are kept of an FFN, chosen at random by `seed` and as many of every call.
    Everything is computed in `dtype` on `device`; what is kept lies on the CPU.
    RuntimeError where blocks run in another order than `blocks`, or a forward ends before.
    """

    def __init__(
        self,
        model: nn.Module,
        source: Shards,
        family: Family,
        blocks: Sequence[str],
        calls: Sequence[Call],
        *,
        rows: int,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        self.model, self.source, self.family = model, source, family
        self.blocks, self.calls = list(blocks), list(calls)
        self.rows, self.seed = max(1, rows // max(1, len(calls))), seed
        self.dtype, self.device = dtype, device
        self._arrived: queue.Queue[tuple[int, str | BaseException | None]] = queue.Queue()
        self._go = [threading.Semaphore(0) for _ in calls]
        self._stopped = False
        self._index = threading.local()
        self._kept: dict[str, list[Tensor]] = {}

    def __iter__(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        load_outside(self.model, self.source, self.blocks, self.dtype, self.device)
        hooks = [
            self.model.get_submodule(block).register_forward_pre_hook(self._waits_at(block))
            for block in self.blocks
        ]
        threads = [
            threading.Thread(target=self._forward, args=(index,), daemon=True)
            for index in range(len(self.calls))
        ]
        try:
            for index, thread in enumerate(threads):
                thread.start()
                self._expect(index, self.blocks[0])
            for number, block in enumerate(self.blocks):
                keys = [key for key in self.source.where if key.startswith(f"{block}.")]
                load(self.model, self.source, keys, self.dtype, self.device)
                capture = self._capture(block, keys)
                following = self.blocks[number + 1] if number + 1 < len(self.blocks) else None
                for index in range(len(threads)):
                    self._go[index].release()
                    self._expect(index, following)
                for hook in capture:
                    hook.remove()
                self._unload(block)
                kept = {name: torch.cat(parts) for name, parts in self._kept.items()}
                self._kept.clear()
                yield block, kept
        finally:
            self._stopped = True
            for go in self._go:
                go.release()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            for hook in hooks:
                hook.remove()

    def _forward(self, index: int) -> None:
        """A thread: one batch through the whole model."""
        self._index.value = index
        try:
            with torch.no_grad():
                self.model(**self.calls[index])
            self._arrived.put((index, None))
        except BaseException as error:  # whoever waits for it raises it
            self._arrived.put((index, error))

    def _waits_at(self, block: str) -> Any:
        def hook(module: nn.Module, arguments: Any) -> None:
            index = self._index.value
            self._arrived.put((index, block))
            self._go[index].acquire()
            if self._stopped:
                raise Stopped

        return hook

    def _expect(self, index: int, block: str | None) -> None:
        """Wait until a batch is at a block; None: at the end."""
        arrived, where = self._arrived.get()
        if isinstance(where, BaseException):
            raise where
        if (arrived, where) != (index, block):
            raise RuntimeError(f"the model runs {where or 'nothing'} after, expected {block}")

    def _capture(self, block: str, keys: Sequence[str]) -> list[Any]:
        """Hooks that keep random rows of what enters the block's FFNs."""
        hooks = []
        for name, _, site in sites_of(keys, self.family):

            def keep(module: nn.Module, arguments: Any, name: str = name) -> None:
                x = arguments[0].reshape(-1, arguments[0].shape[-1])
                at = torch.Generator().manual_seed(self.seed + 7919 * self._index.value)
                chosen = torch.randperm(len(x), generator=at)[: self.rows]
                self._kept.setdefault(name, []).append(x[chosen.to(x.device)].detach().cpu())

            linear = self.model.get_submodule(f"{block}.{site.fc1}")
            hooks.append(linear.register_forward_pre_hook(keep))
        return hooks

    def _unload(self, block: str) -> None:
        self.model.get_submodule(block).to("meta")
