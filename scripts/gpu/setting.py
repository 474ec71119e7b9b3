"""What a run of the benchmark is made at: FLUX.1 [dev]'s sizes on a GPU, or toy ones on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from scripts.gpu.flux import Size

Record = dict[str, Any]
Cells = Iterator[tuple[str, Callable[[], Record]]]


@dataclass(frozen=True)
class Setting:
    """Sizes of a run: FLUX.1 [dev] at 1024 x 1024, or toy ones for a machine without a GPU."""

    device: torch.device
    dtype: torch.dtype
    size: Size
    image: int
    text: int
    batches: tuple[int, ...]
    square: int  # of the matrix product that measures the ceiling
    seconds: float  # per measurement
    checks: tuple[tuple[int, int, int, int], ...]  # (T, D, E, H) of the correctness runs

    def noise(self, *shape: int) -> torch.Tensor:
        """Standard normal numbers."""
        return torch.randn(shape, device=self.device, dtype=self.dtype)


def real(device: torch.device) -> Setting:
    checks = ((1, 3072, 12, 768), (77, 256, 12, 64), (512, 3072, 12, 768), (4608, 3072, 12, 768))
    size = Size(experts=12)
    return Setting(device, torch.bfloat16, size, 4096, 512, (1, 4, 8), 8192, 1.0, checks)


def toy(device: torch.device) -> Setting:
    size = Size(2, 16, 2, 3, 8, 24, 12, experts=12)
    return Setting(
        device, torch.float32, size, 16, 4, (1, 2), 64, 0.01, ((1, 32, 12, 8), (40, 32, 12, 8))
    )
