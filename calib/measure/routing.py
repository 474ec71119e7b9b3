"""Routing statistics: what a sparse model's experts and blocks are used for, on calibration data.

Shape letters: B batch, T tokens, E experts, K chosen. A layer is a SparseFFN, named as in the
dense model; a bucket is a range of the time t in [0, 1], 1 being pure noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from calib.measure.blocks_run import tallies
from calib.measure.image_positions import choices_by_cell, image_cells, position_figures
from d2m.distill.features import without_padding
from d2m.distill.losses import choices, dead_experts, load_figures
from d2m.families.flow import generator_at
from d2m.families.inputs import transformer_inputs
from d2m.model.block_group import block_groups
from d2m.model.grouping import dense_name
from d2m.model.surgery import restored, sparse_ffns

if TYPE_CHECKING:
    from torch import Tensor, nn

    from d2m.recipe.recipe import Batches

EDGES = (0.0, 0.25, 0.5, 0.75, 1.0)
TEXT = ".ff_context"  # FFNs of text tokens alone, which have no place in the image


def routing_statistics(logits: Tensor, top_k: int) -> dict[str, Any]:
    """Figures of one layer from recorded router logits [.., E].

    `load` [E]: each expert's share of all choices (sums to 1), `gate` [E]: its mean gate before
    the choice (sums to 1), `token_entropy`: mean entropy of a token's gate over log E,
    `dead_experts` their indices, and from `d2m.distill.losses.load_figures` `entropy` of the load,
    `busiest`, `dead`. ValueError without tokens.
    """
    flat = logits.reshape(-1, logits.shape[-1])
    if not flat.numel():
        raise ValueError(f"logits of shape {list(logits.shape)} hold no token; expected some.")
    totals: dict[str, Tensor] = {}
    _add(totals, flat, top_k)
    return _figures(totals)


def routing_table(
    model: nn.Module,
    batches: Batches,
    *,
    top_k: int | None = None,
    count: int = 4,
    batch_size: int = 16,
    edges: Sequence[float] = EDGES,
    categories: Sequence[str] = (),
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Run `model` on noisy batches and collect every layer's routing in every time bucket.

    Args:
        batches: (step, batch size) -> dict, as `calib.shapes.batches.shapes_batches`.
        top_k: experts a token uses meanwhile; None leaves the model's own.
        count: batches per bucket, whose times are spread evenly over it.
        edges: bounds of the buckets, rising from 0 to 1.
        categories: names of the kinds of prompt that a batch's `category` [B] numbers.

    Returns plain numbers, the model is left as it was:
    `top_k`, `edges`; `layers`: {name: {"all": figures, "buckets": [figures, ...]}} with the figures
    of `routing_statistics`; `positions`: {"rows", "columns", "layers": {name: figures}} with those
    of `calib.measure.image_positions.position_figures`, for layers with image tokens; `groups`:
    {name: `calib.measure.blocks_run.Tally.figures`}, empty without groups of blocks that choose.

    Raises ValueError if the model has no routed experts, top_k is 0, or the edges do not rise.
    """
    ffns = sparse_ffns(model)
    if not ffns:
        raise ValueError("the model has no routed experts; expected a converted model.")
    used = next(iter(ffns.values())).top_k if top_k is None else top_k
    if used < 1:
        raise ValueError("top_k is 0, so nothing is routed; expected 1 or more.")
    if categories and "category" not in batches(0, 1):
        raise ValueError(
            f"the batches have no 'category', but {len(categories)} categories are named; add it, "
            "each sample's number among them, or name none."
        )
    if len(edges) < 2 or any(low >= high for low, high in zip(edges, edges[1:])):
        raise ValueError(f"edges {list(edges)} do not rise; expected e.g. {list(EDGES)}.")
    buckets = len(edges) - 1
    totals: dict[str, list[dict[str, Tensor]]] = {
        name: [{} for _ in range(buckets)] for name in ffns
    }
    groups = block_groups(model)
    chosen = tallies(groups, buckets, categories)
    seen: dict[str, Tensor] = {}
    shape = (0, 0)
    with torch.no_grad(), _recording(model, used), without_padding(model):
        for step in range(count * buckets):
            bucket = step % buckets
            batch = batches(step, batch_size)
            low, high = edges[bucket], edges[bucket + 1]
            _run(model, batch, low, high, generator_at(seed, "routing", step))
            cells, shape = image_cells(batch["img_ids"])
            for name, ffn in ffns.items():
                if ffn.last_logits is None:  # of a block that no sample chose
                    continue
                _add(totals[name][bucket], ffn.last_logits, used)
                if not name.endswith(TEXT):
                    cell = choices_by_cell(ffn.last_logits, used, cells, shape[0] * shape[1])
                    seen[name] = seen[name] + cell if name in seen else cell
                ffn.last_logits = None
            for name, tally in chosen.items():
                logits = groups[name].last_logits
                assert logits is not None, name
                tally.add(logits, bucket, batch["category"] if categories else None)
            if progress:
                progress("routing statistics", step + 1, count * buckets)
    # A layer in a group may have seen no token in some bucket, or in none at all.
    layers = {}
    for name, parts in totals.items():
        nothing = _nothing(ffns[name].num_experts)
        parts = [part or nothing for part in parts]
        together = {key: sum(part[key] for part in parts) for key in nothing}
        figures = {"all": _figures(together), "buckets": [_figures(part) for part in parts]}
        layers[dense_name(name)] = figures
    where = {dense_name(name): position_figures(counts) for name, counts in seen.items()}
    return {
        "top_k": used,
        "edges": list(edges),
        "layers": layers,
        "positions": {"rows": shape[0], "columns": shape[1], "layers": where},
        "groups": {name: tally.figures() for name, tally in chosen.items()},
    }


@contextmanager
def _recording(model: nn.Module, top_k: int) -> Iterator[None]:
    """Within: SparseFFNs use top_k experts, they and groups keep their logits; restored after."""
    ffns, groups = sparse_ffns(model).values(), block_groups(model).values()
    modules: list[Any] = [*ffns, *groups]
    with restored(ffns, "top_k", "record"), restored(groups, "record"):
        try:
            for module in modules:
                module.record = True
            for ffn in ffns:
                ffn.top_k = top_k
            yield
        finally:
            for module in modules:
                module.last_logits = None


def _run(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    low: float,
    high: float,
    generator: torch.Generator,
) -> None:
    """One forward pass at times spread evenly over [low, high)."""
    latents = batch["latents"]
    size = latents.shape[0]
    t = low + (high - low) * (torch.arange(size) + 0.5) / size
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    t = t.to(latents)
    x = torch.lerp(latents, noise, t[:, None, None])
    inputs = transformer_inputs(model, batch, x, t)
    model(**inputs, return_dict=False)


def _add(totals: dict[str, Tensor], logits: Tensor, top_k: int) -> None:
    probabilities, counts = choices(logits.reshape(-1, logits.shape[-1]), top_k)
    values = {
        "tokens": torch.tensor(float(probabilities.shape[0]), dtype=torch.float64),
        "counts": counts.double().cpu(),
        "gates": probabilities.sum(0, dtype=torch.float64).cpu(),
        "entropy": -torch.xlogy(probabilities, probabilities).sum(dtype=torch.float64).cpu(),
    }
    for key, value in values.items():
        totals[key] = totals[key] + value if key in totals else value


def _nothing(experts: int) -> dict[str, Tensor]:
    """The totals of a layer that no token reached: in a group, every sample chose another block."""
    zeros = torch.zeros(experts, dtype=torch.float64)
    return {"tokens": zeros.sum(), "counts": zeros, "gates": zeros, "entropy": zeros.sum()}


def _figures(totals: Mapping[str, Tensor]) -> dict[str, Any]:
    """Sums over tokens -> the figures of `routing_statistics`."""
    tokens, counts = totals["tokens"].clamp_min(1), totals["counts"]
    experts = len(counts)
    width = torch.log(torch.tensor(float(max(experts, 2)), dtype=torch.float64))
    return {
        "tokens": int(totals["tokens"]),
        "load": [round(float(x), 6) for x in counts / counts.sum().clamp_min(1)],
        "gate": [round(float(x), 6) for x in totals["gates"] / tokens],
        "token_entropy": round(float(totals["entropy"] / tokens / width), 6),
        "dead_experts": dead_experts(counts.tolist()),
        **load_figures(counts.tolist()),
    }
