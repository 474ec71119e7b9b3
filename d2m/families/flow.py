"""Flow matching: the noisy latents a teacher and its student are compared on.

`x_t = (1 - t) x_0 + t noise`, velocity `noise - x_0`, t in [0, 1] with 1 pure noise, as in FLUX
and SD3. Latents are [B, T, C] where tokens are packed, else [B, C, h, w].
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Config = Mapping[str, Any]  # of a model, as its config.json
Batch = Mapping[str, "Tensor"]


def generator_at(seed: int, *place: int | str) -> torch.Generator:
    """A CPU generator for one place of a run, e.g. (seed, stage, step).

    Its numbers depend on nothing that was random before, so a resumed run needs no saved random
    state; and a run on CUDA has the CPU's numbers.
    """
    import torch

    text = "/".join(str(part) for part in (seed, *place))
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return torch.Generator().manual_seed(number % 2**63)


def noisy(
    latents: Tensor,
    generator: torch.Generator,
    mean: float = 1.2,
    std: float = 1.2,
    rows: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Random times and noise: (x_t, t [B], velocity), all on `latents`' device and of its shape.

    rows (first, N): `latents` are the B rows from `first` on of a batch of N, with their times and
    noise of it.

    t = sigmoid(N(mean, std)). A mean of log(s) is what shifting a sampler's schedule by s does to
    the logit-normal density (derived); 1.2 and 1.2 served best for the shapes teacher (ours).
    """
    import torch

    first, whole = rows or (0, latents.shape[0])
    part = slice(first, first + latents.shape[0])
    t = torch.sigmoid(torch.randn(whole, generator=generator) * std + mean)[part]
    noise = torch.randn((whole, *latents.shape[1:]), generator=generator)[part]
    t, noise = t.to(latents.device), noise.to(latents.device, latents.dtype)
    at = t.to(latents.dtype).view(-1, *[1] * (latents.ndim - 1))
    return torch.lerp(latents, noise, at), t, noise - latents


def flow_matching(
    batch: Batch,
    generator: torch.Generator,
    mean: float = 1.2,
    std: float = 1.2,
    rows: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`noisy` of a batch's latents: (x_t, t [B], velocity)."""
    return noisy(batch["latents"], generator, mean, std, rows)


def training_point(
    batch: Batch,
    generator: torch.Generator,
    mean: float,
    std: float,
    noised: Callable[..., tuple[Tensor, Tensor, Tensor]],
    rows: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Where teacher and student are compared: (x_t [B, ...], t [B]).

    The batch's own `noisy` and `time` where it has them, points of the teacher's own way; else
    what the family's `noised` makes, of `rows` as in `noisy`.
    """
    if "noisy" in batch:
        return batch["noisy"], batch["time"]
    x, t, _ = noised(batch, generator, mean, std, rows)
    return x, t
