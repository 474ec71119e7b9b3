"""What a model will cost before it is made: parameters, FLOPs and memory, from numbers alone.

Torch-free: a plan needs a model's config and a recipe, no weights. Figures are of one denoising
step of one image; `d2m.families.weights` says what is counted as a FLOP.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from d2m.families.family import Family, check_adaln
from d2m.families.weights import COMPONENTS, Stack, Structure, dim_of
from d2m.plan.model_config import Subject, subject_of
from d2m.plan.presets import preset_file
from d2m.recipe import recipe as recipes
from d2m.recipe.recipe import SparseSpec, hidden_sizes
from d2m.recipe.structure import KINDS, active_blocks, check_depth, check_shares

FIELDS = ("params", "activated", "flops", "dense_params", "dense_flops")
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def plan(
    model: str | os.PathLike[str],
    *,
    preset: str | None = None,
    recipe: str | os.PathLike[str] | None = None,
    blocks: str | None = None,
    height: int | None = None,
    width: int | None = None,
    text_tokens: int | None = None,
    top_k: int | None = None,
) -> dict[str, Any]:
    """Count the model in directory `model` (or a shipped config's name) as a recipe would make it.

    Args:
        preset, recipe: what makes the dense model sparse; without either a dense model is counted
            as it is. A sparse one has its own structure and takes neither.
        blocks: such as "8D+38S": only so many of the model's blocks are left.
        height, width: of the image in pixels, text_tokens: of the prompt; None: the model's own.
        top_k: experts a token uses, in place of the recipe's.

    Returns JSON values: `total_params`, `activated_params` (K of E experts and kappa blocks of a
    group, the gates and routers that choose them counted), `flops`, `flops_vs_dense`,
    `ffn_activated_share` (of the matrices of an FFN that runs), `components` (part -> params,
    activated, flops, dense_params, dense_flops), `dense` (params and flops of the dense model with
    all its blocks), `blocks` (kind -> dense, kept, groups, active), `memory` (dtype -> bytes of
    weights and buffers; gates and routers stay float32), and the input: `model`, `recipe`
    (its name, None for a dense model), `adaln`, `num_experts`, `top_k`, `height`, `width`,
    `image_tokens`, `text_tokens`.

    Raises FileNotFoundError or ValueError, in one sentence, for everything that does not fit.
    """
    subject = subject_of(model)
    depth = _kept(blocks, subject)
    family = subject.family
    config = {**subject.config, **{field: depth[kind] for kind, field in family.blocks.depths}}
    structure, name = _structure(subject, depth, preset, recipe, top_k)
    given = {"height": height, "width": width, "text_tokens": text_tokens}
    size = {k: int(getattr(subject, k)) if v is None else v for k, v in given.items()}
    image, text = _tokens(size, subject.pixels)
    weights = family.plan.weights
    # Twice: as the recipe makes it, and dense with all its blocks, which shares refer to.
    stacks = weights(config, structure, image, text)
    whole = weights(subject.config, Structure(), image, text)
    components = _components(stacks, whole)
    total = {key: sum(row[key] for row in components.values()) for key in FIELDS}
    spec = structure.spec
    return {
        "model": subject.title,
        "family": family.names.title_of(subject.config),
        "recipe": name,
        "blocks": _blocks(subject, depth, structure),
        "adaln": dataclasses.asdict(structure.adaln),
        "num_experts": spec.num_experts if spec else None,
        "top_k": spec.top_k if spec else None,
        **size,
        "image_tokens": image,
        "total_params": total["params"],
        "activated_params": total["activated"],
        "flops": total["flops"],
        "flops_vs_dense": total["flops"] / total["dense_flops"],
        "ffn_activated_share": used_share(family.blocks.hidden(config), spec, family),
        "dense": {"params": total["dense_params"], "flops": total["dense_flops"]},
        "components": components,
        "memory": {dtype: _memory(stacks, bytes_) for dtype, bytes_ in BYTES.items()},
    }


# ---------------------------------------------------------------- arguments


def _kept(blocks: str | None, subject: Subject) -> dict[str, int]:
    """Blocks left of the model's, by kind."""
    if blocks is None:
        return subject.depth
    found = re.fullmatch(r"(\d{1,5})D\+(\d{1,5})S", blocks.replace(" ", "").upper())
    if not found:
        raise ValueError(f"--blocks is {blocks!r}, expected double and single ones as in 8D+38S")
    kept = {kind: int(number) for kind, number in zip(KINDS, found.groups())}
    for kind, count in subject.depth.items():
        if kept[kind] > count:
            raise ValueError(
                f"--blocks is {blocks!r}, but {subject.title} has {count} {kind} blocks; expected "
                "as many at most"
            )
    return kept


def _structure(
    subject: Subject,
    depth: Mapping[str, int],
    preset: str | None,
    recipe: str | os.PathLike[str] | None,
    top_k: int | None,
) -> tuple[Structure, str | None]:
    """The structure to count and its recipe's name; the dense one and None without a recipe."""
    if preset is not None and recipe is not None:
        raise ValueError(f"--preset {preset} and --recipe {str(recipe)!r} are given; leave one out")
    given = preset is not None or recipe is not None
    if subject.sparse is not None and given:
        raise ValueError(
            f"{subject.title} is already sparse; leave --preset and --recipe out, or plan from the "
            "dense model"
        )
    source = subject.title
    if preset is not None:
        recipe = preset_file(preset, subject.family, depth)
    if recipe is not None:
        made, source = recipes.load(recipe), f"recipe {recipe}"
    elif subject.sparse is not None:
        made = recipes.from_dict(subject.sparse, source)
    else:
        if top_k is not None:
            raise ValueError(f"--top-k is {top_k}, but a dense model has no experts; add --preset")
        return Structure(), None
    structure = structure_of(made)
    check_depth(structure.blocks, depth)
    subject.family.blocks.check_blocks(structure.blocks, depth)
    check_adaln(subject.family, structure.adaln.mode)
    check_shares(made.shares, depth)
    dim = dim_of(subject.config)
    if (structure.adaln.rank or 1) > dim:
        raise ValueError(
            f"{source}: adaln.rank is {structure.adaln.rank}; expected 1 to {dim}, the width."
        )
    spec = structure.spec
    if spec is not None and top_k is not None:
        if not 0 <= top_k <= spec.num_experts:
            raise ValueError(f"--top-k is {top_k}, expected 0 to {spec.num_experts}")
        structure = dataclasses.replace(structure, spec=dataclasses.replace(spec, top_k=top_k))
    return structure, made.name


def structure_of(recipe: recipes.Recipe) -> Structure:
    """What of a recipe is counted."""
    return Structure(recipe.spec, recipe.blocks, recipe.adaln)


def _tokens(size: Mapping[str, int], pixels: int) -> tuple[int, int]:
    """Image and text tokens."""
    for name in ("height", "width"):
        if size[name] < pixels or size[name] % pixels:
            raise ValueError(
                f"--{name} is {size[name]}, expected a multiple of {pixels}, the side in pixels of "
                "what one token of this model shows"
            )
    if size["text_tokens"] < 1:
        raise ValueError(f"--text-tokens is {size['text_tokens']}, expected 1 or more")
    return (size["height"] // pixels) * (size["width"] // pixels), size["text_tokens"]


# ---------------------------------------------------------------- what it comes to


def _components(stacks: Sequence[Stack], whole: Sequence[Stack]) -> dict[str, dict[str, int]]:
    """Part -> its sums in the planned and in the dense model; parts of neither are left out."""
    rows = {part: dict.fromkeys(FIELDS, 0) for part in COMPONENTS}
    for stack in stacks:
        for weight in stack.weights:
            rows[weight.part]["params"] += stack.count * weight.size
            rows[weight.part]["activated"] += stack.active * weight.used
            rows[weight.part]["flops"] += stack.active * weight.flops
    for stack in whole:
        for weight in stack.weights:
            rows[weight.part]["dense_params"] += stack.count * weight.size
            rows[weight.part]["dense_flops"] += stack.count * weight.flops
    return {part: row for part, row in rows.items() if any(row.values())}


def used_share(hidden: int, spec: SparseSpec | None, family: Family) -> float:
    """The share of an FFN's matrices that a token uses: (r_s + K r_n) / r, .375 for 1S12E2A.

    hidden: neurons of the dense FFN.

    The mean over all FFNs where they differ: two in a double block, one in a single.
    """
    if spec is None:
        return 1.0
    used = []
    for kind, name in family.blocks.kinds:
        sites = sum(site.blocks == name for site in family.blocks.sites)
        for i in range(len(spec.shares.of(kind)) or 1):
            shared, expert = hidden_sizes(hidden, spec.at(kind, i))
            used += [(shared + spec.top_k * expert) / hidden] * sites
    return sum(used) / len(used)


def _blocks(
    subject: Subject, depth: Mapping[str, int], structure: Structure
) -> dict[str, dict[str, int]]:
    """Kind -> blocks of the dense model, those kept, groups, and blocks that run in a step."""
    blocks, active = structure.blocks, active_blocks(structure.blocks, depth)
    return {
        kind: {
            "dense": subject.depth[kind],
            "kept": depth[kind] - len(blocks.dropped(kind)),
            "groups": len(blocks.groups(kind)),
            "active": active[kind],
        }
        for kind in KINDS
    }


def _memory(stacks: Sequence[Stack], bytes_: int) -> int:
    """Bytes of all weights and buffers at `bytes_` each; what is kept in float32 takes 4."""
    return sum(
        stack.count * (weight.size * (4 if weight.float32 else bytes_) + weight.buffer)
        for stack in stacks
        for weight in stack.weights
    )
