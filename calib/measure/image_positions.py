"""Which experts each part of the image uses: counts of choices by image position.

Shape letters: B batch, T image tokens, E experts, K chosen, P cells of the image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from d2m.distill.losses import choices

if TYPE_CHECKING:
    from torch import Tensor

MOST = 8  # ours: cells along a side; more than that is more than a page can show


def image_cells(img_ids: Tensor, most: int = MOST) -> tuple[Tensor, tuple[int, int]]:
    """The cell [T] of every image token, row by row, and (rows, columns) of cells.

    `img_ids` [T, 3] are FLUX's: row in column 1, column in column 2. An image of more than `most`
    tokens a side is cut into `most` equal parts, the same token being always in the same one.
    """
    places = img_ids[:, 1:3].round().long().cpu()
    sides = places.max(0).values + 1
    parts = sides.clamp_max(most)
    cells = places * parts // sides
    rows, columns = (int(part) for part in parts)
    return cells[:, 0] * columns + cells[:, 1], (rows, columns)


def choices_by_cell(logits: Tensor, top_k: int, cells: Tensor, count: int) -> Tensor:
    """How often tokens of each cell chose each expert, [E, count], float64.

    `logits` [B, .., E] whose last T tokens are the image's (text stands before it), `cells` [T].
    """
    tokens = cells.numel()
    image = logits.detach()[:, -tokens:].transpose(0, 1)  # [T, B, E]
    _, counts = choices(image, top_k)  # [T, E]
    answer = torch.zeros(count, counts.shape[-1], dtype=torch.float64)
    return answer.index_add_(0, cells, counts.double().cpu()).T


def position_figures(counts: Tensor) -> dict[str, Any]:
    """Figures of one layer from its counts [E, P].

    `share` [E][P]: the expert's share of the choices made in a cell (over the experts they sum to
    1); `information`: how much of the choice the position tells, 0 nothing, 1 all: the mutual
    information of expert and cell over log E, less what chance alone would show (Miller-Madow).
    """
    total = counts.sum().clamp_min(1)
    joint = counts / total
    experts, cells = joint.sum(1), joint.sum(0)
    expected = experts[:, None] * cells
    ratio = torch.where(joint > 0, joint / expected.clamp_min(1e-300), torch.ones_like(joint))
    bits = (joint * ratio.log()).sum()
    used = ((experts > 0).sum() - 1).clamp_min(0) * ((cells > 0).sum() - 1).clamp_min(0)
    width = torch.log(torch.tensor(float(max(len(experts), 2)), dtype=torch.float64))
    information = ((bits - used / (2 * total)) / width).clamp(0, 1)
    share = counts / counts.sum(0).clamp_min(1)
    return {
        "share": [[round(float(x), 4) for x in row] for row in share],
        "information": round(float(information), 6),
    }
