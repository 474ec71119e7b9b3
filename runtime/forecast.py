"""The block schedule of a whole generation before its first step: what routers of alpha 0 choose.

Such routers read the global embedding alone: time, guidance and pooled text, all of them known
before anything is drawn. Executors then ask none of them between blocks, and `d2m inspect
--schedule` shows the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.groups import choosing, groups_of, known_beforehand, starts_of

if TYPE_CHECKING:
    from runtime.pipeline import Pipeline

Arrays = Mapping[str, np.ndarray]
Block = Callable[[str, str, Arrays], Mapping[str, np.ndarray]]  # (type, prefix, inputs) -> outputs


def forecast(
    component: Mapping[str, Any],
    block: Block,
    feeds: Iterable[Arrays],
    kappas: Sequence[int | None],
) -> list[dict[str, np.ndarray]]:
    """For every step: group -> first call that runs, [B], counted in the group.

    `feeds` are the component's inputs at each step; `block` runs one block type. All groups must
    have alpha 0; groups that keep all of their calls are left out.
    """
    found = []
    for feed, kappa in zip(feeds, kappas, strict=True):
        starts: dict[str, np.ndarray] = {}
        asked = choosing(component, kappa)
        env = embedding(component, block, feed, {n for _, g in asked for n in reads(component, g)})
        for name, group in asked:
            inputs = {tensor: env[tensor] for tensor in reads(component, group)}
            (logits,) = block(group["type"], group["prefix"], inputs).values()
            starts[name] = starts_of(logits, kappa or 0)
        found.append(starts)
    return found


def reads(component: Mapping[str, Any], group: Mapping[str, Any]) -> list[str]:
    """The tensors that a group's router reads."""
    names: list[str] = component["types"][group["type"]]["inputs"]
    return names


def embedding(
    component: Mapping[str, Any], block: Block, feed: Arrays, wanted: set[str]
) -> dict[str, np.ndarray]:
    """The program's tensors `wanted`, from the first calls that write them."""
    env: dict[str, np.ndarray] = dict(feed)
    have: set[str] = set()
    for call in component["program"]:
        if wanted <= have:
            break
        kind = component["types"][call["type"]]
        inputs = {name: env[name] for name in kind["inputs"]}
        env |= block(call["type"], call["prefix"], inputs)
        have.update(kind["outputs"])
    return env


def block_number(prefix: str) -> int:
    """A block's index in the dense model's list: `transformer_blocks.3.blocks.4.` -> 4."""
    return int(prefix.rstrip(".").rpartition(".")[2])


def group_rows(component: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A component's groups for people: name, blocks in the dense model's count, alpha."""
    program = component["program"]
    return [
        {
            "name": name,
            "list": name.rpartition(".")[0],
            "blocks": [block_number(program[call]["prefix"]) for call in group["calls"]],
            "alpha": group["alpha"],
        }
        for name, group in groups_of(component)
    ]


def schedule(
    pipeline: Pipeline, prompt: str, *, steps: int | None = None, kappa: Any = None
) -> dict[str, Any]:
    """Which blocks every group runs in each step for `prompt`, as JSON values.

    Keys: prompt, steps, kappa (one a step), sigmas, groups: [{name, list, blocks, alpha, runs}],
    `runs` being the chosen blocks of each step. The pipeline's executor must have `block`, as all
    but ONNX Runtime's of whole graphs have (mode "blocks"). ValueError where that is not known
    beforehand.
    """
    from runtime.arguments import check_request

    component, where = pipeline.bundle.component("transformer"), pipeline.bundle.path
    if not groups_of(component):
        raise ValueError(
            f"bundle {where} has no groups of blocks, expected some: every block runs in every"
            " step; convert with groups (preset M, S or XS) for a schedule."
        )
    if not known_beforehand(component):
        name, group = next((n, g) for n, g in groups_of(component) if g["alpha"])
        raise ValueError(
            f"bundle {where} has no schedule beforehand: the router of {name} has alpha"
            f" {group['alpha']:g} and so reads the picture as it is drawn, expected alpha 0;"
            " convert with blocks.alpha 0."
        )
    request = check_request(pipeline.manifest, prompt, steps=steps, kappa=kappa)
    size = request.latent_size
    conditions = pipeline.encode(request.prompts)
    sigmas = pipeline.levels(len(request.kappa), size)[:-1]
    noise = pipeline.noise([0], size)
    feeds = pipeline.feeds(noise, conditions, sigmas, size, request.guidance)
    block: Any = pipeline.executor("transformer").block  # type: ignore[attr-defined]
    chosen = forecast(component, block, map(pipeline.cast, feeds), request.kappa)
    rows = group_rows(component)
    for row in rows:
        row["runs"] = []
        for starts, kept in zip(chosen, request.kappa, strict=True):
            first = int(starts[row["name"]][0]) if row["name"] in starts else 0
            last = first + (kept or 0) if row["name"] in starts else len(row["blocks"])
            row["runs"].append(row["blocks"][first:last])
    return {
        "prompt": prompt,
        "steps": len(request.kappa),
        "kappa": list(request.kappa),
        "sigmas": [float(sigma) for sigma in sigmas],
        "groups": rows,
    }


def columns(answer: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """`schedule`'s answer as a table: a line per step, a column per group."""
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
