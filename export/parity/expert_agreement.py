"""Which experts a backend chooses, from its routers' logits, against torch's choice.

Where two experts' gates are closer than rounding, the choice may differ and the image with it: so
agreement is reported with the margin, the difference between the last gate chosen and the
first one left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def chosen(logits: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits [T, E] -> sorted experts chosen [T, K], margin [T] (infinite where all are chosen).

    Softmax in float64, ties to the lowest index, as the op is defined.
    """
    logits = np.asarray(logits, np.float64)
    gates = np.exp(logits - logits.max(-1, keepdims=True))
    gates /= gates.sum(-1, keepdims=True)
    order = np.argsort(-gates, axis=-1, kind="stable")
    ranked = np.take_along_axis(gates, order, -1)
    last = logits.shape[-1]
    margin = (
        np.full(len(logits), np.inf) if top_k >= last else ranked[:, top_k - 1] - ranked[:, top_k]
    )
    return np.sort(order[:, :top_k], axis=-1), margin


def agreement(
    sites: Sequence[tuple[str, np.ndarray, np.ndarray]], top_k: int, margin: float
) -> dict[str, Any]:
    """Torch's and a backend's choices, over (site, torch's logits, backend's logits).

    `sure` counts tokens whose margin in torch exceeds `margin`; `flips` are tokens whose set of
    experts differs. Sites are listed worst first.
    """
    rows: list[dict[str, Any]] = []
    for name, expected, found in sites:
        first, gap = chosen(expected, top_k)
        second, _ = chosen(found, top_k)
        flipped = (first != second).any(-1)
        sure = gap > margin
        finite = gap[flipped]
        rows.append(
            {
                "site": name,
                "tokens": len(gap),
                "sure": int(sure.sum()),
                "flips": int(flipped.sum()),
                "sure_flips": int((flipped & sure).sum()),
                "largest_flip_margin": float(finite.max(initial=0.0)),
                "logits_max_abs": float(np.abs(expected - found).max(initial=0.0)),
            }
        )
    tokens, sure = (sum(row[name] for row in rows) for name in ("tokens", "sure"))
    flips, sure_flips = (sum(row[name] for row in rows) for name in ("flips", "sure_flips"))
    rows.sort(key=lambda row: (-row["sure_flips"], -row["flips"], -row["logits_max_abs"]))
    return {
        "top_k": top_k,
        "margin": margin,
        "tokens": tokens,
        "agreement": 1 - flips / max(tokens, 1),
        "sure_tokens": sure,
        "sure_agreement": 1 - sure_flips / max(sure, 1),
        "flips": flips,
        "largest_flip_margin": max((row["largest_flip_margin"] for row in rows), default=0.0),
        "sites": rows,
    }
