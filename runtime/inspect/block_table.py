"""The block forecast of a generation as a table for people: `d2m inspect --schedule`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from runtime.bundle.block_groups import can_forecast, groups_of
from runtime.images.given import example_images
from runtime.opened import Opened
from runtime.program.block_forecast import forecast
from runtime.request import check_request
from runtime.sampling import noise_levels, request_inputs


def group_rows(component: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A component's groups for people: name, blocks in the dense model's count, alpha."""
    # A block's index in the dense model's list: `transformer_blocks.3.blocks.4.` -> 4.
    blocks = [call["prefix"].rstrip(".").rpartition(".")[2] for call in component["program"]]
    return [
        {
            "name": name,
            "list": name.rpartition(".")[0],
            "blocks": [int(blocks[call]) for call in group["calls"]],
            "alpha": group["alpha"],
        }
        for name, group in groups_of(component)
    ]


def forecast_table(
    pipeline: Opened, prompt: str, *, steps: int | None = None, kappa: Any = None
) -> dict[str, Any]:
    """Which blocks every group runs in each step for `prompt`, as JSON values.

    Keys: prompt, steps, kappa (one a step), sigmas, groups: [{name, list, blocks, alpha, runs}],
    `runs` being the chosen blocks of each step. The pipeline's executor must have `block`, as all
    but ONNX Runtime's of whole graphs have (mode "blocks"). ValueError where that is not known
    before the first step.
    """
    component, where = pipeline.bundle.component("transformer"), pipeline.bundle.path
    if not groups_of(component):
        raise ValueError(
            f"bundle {where} has no groups of blocks, expected some: every block runs in every"
            " step; convert with groups (preset M, S or XS) for a block forecast."
        )
    if not can_forecast(component):
        name, group = next((n, g) for n, g in groups_of(component) if g["alpha"])
        raise ValueError(
            f"bundle {where} has no block forecast: the router of {name} has alpha"
            f" {group['alpha']:g} and so reads the image while it is generated, expected alpha 0;"
            " convert with blocks.alpha 0."
        )
    given = example_images(pipeline.manifest)
    request = check_request(pipeline.manifest, prompt, steps=steps, kappa=kappa, **given)
    sigmas = noise_levels(pipeline, len(request.kappa), request.latent_size)[:-1]
    block: Any = pipeline.executor("transformer").block  # type: ignore[attr-defined]
    chosen = forecast(component, block, request_inputs(pipeline, request), request.kappa)
    rows = group_rows(component)
    for row in rows:
        row["runs"] = []
        for starts, count in zip(chosen, request.kappa, strict=True):
            first = int(starts[row["name"]][0]) if row["name"] in starts else 0
            last = first + (count or 0) if row["name"] in starts else len(row["blocks"])
            row["runs"].append(row["blocks"][first:last])
    return {
        "prompt": prompt,
        "steps": len(request.kappa),
        "kappa": list(request.kappa),
        "sigmas": [float(sigma) for sigma in sigmas],
        "groups": rows,
    }


def columns(answer: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """`forecast_table`'s answer as columns and lines: a line per step, a column per group."""
    titles = {"transformer_blocks": "double", "single_transformer_blocks": "single"}
    head = ["step", "sigma", "kappa"]
    for row in answer["groups"]:
        head.append(f"{titles.get(row['list'], row['list'])} {span(row['blocks'])}")
    lines = [
        [step, f"{answer['sigmas'][step]:.3f}", answer["kappa"][step]]
        + [span(row["runs"][step]) for row in answer["groups"]]
        for step in range(answer["steps"])
    ]
    return head, lines


def span(blocks: Sequence[int]) -> str:
    """[3, 4, 5] -> "3-5", [4] -> "4"."""
    return str(blocks[0]) if len(blocks) == 1 else f"{blocks[0]}-{blocks[-1]}"
