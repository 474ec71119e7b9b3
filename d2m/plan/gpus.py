"""What distillation takes of every GPU, estimated: how many GPUs of which memory a recipe needs.

Torch-free, from a config and a recipe. Weights, gradients and moments are counted one by one;
activations are what one block saves for its backward pass, counted on a CPU (see SAVED). Nothing
here was measured on a GPU; RESERVE is for what is not counted.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2m.families.weights import Stack, Structure, Weight, dim_of
from d2m.plan.count import plan, structure_of
from d2m.plan.model_config import subject_of
from d2m.plan.needs import component_bytes
from d2m.plan.presets import preset_file
from d2m.recipe import recipe as recipes
from d2m.units import GB, bytes_text

RESERVE = 6 * GB  # CUDA's context, NCCL's buffers, fragmentation: a guess, on the safe side
SAVED = 27  # numbers of 2 bytes a token and D that a block saves (counted: double, top_k 2, bf16)
FORMULA = """\
Bytes on each of N GPUs, with
  P   parameters of the dense model         F   the student's, neither the dense model's nor trained
  L   the student's that any stage trains   S   those of the stage that trains most
  G   its gates and routers                 B   the largest block
  M   blocks                                M'  blocks whose outputs a loss compares
  T   tokens, D width, R rows run at once   b   2 with bfloat16, 4 with float32 or one process
  e   4 where a stage averages, else 0      k   M; 0 with --offload-activations

  weights      (b (P + F) + 4 L) / N + 4 G        the student's frozen weights are the teacher's
  learning     (4 + 8 + e) S / N                  gradient, Adam's two moments, average
  blocks       3 b B + 8 B                        two whole, gradients of one, sums of two
  activations  R T D (2 max(k, M') + 10 M' + 2 x {saved})
               inputs of blocks; the teacher's features, and both in float32; one block's own
  encoders     b / 2 x {encoders} for FLUX.1     text encoders and VAE, whole
  reserve      {reserve}                             CUDA, NCCL, fragmentation

That is with --gradient-checkpointing; without it R T D (10 M' + 2 x {saved} M) of activations."""


@dataclass(frozen=True)
class Counted:
    """P, F, L, S, G, B, M, M', D, T and e of FORMULA, in this order."""

    dense: int
    frozen: int
    learnt: int
    stage: int
    routing: int
    block: int
    depth: int
    compared: int
    dim: int
    tokens: int
    average: int


def fits(
    model: str | os.PathLike[str],
    gpus: Sequence[int],
    memory: float,
    *,
    preset: str | None = None,
    recipe: str | os.PathLike[str] | None = None,
    precision: str = "bfloat16",
    rows: int = 1,
    checkpointing: bool = True,
    offload: bool = False,
    **size: Any,
) -> list[dict[str, Any]]:
    """Rows {gpus, memory, weights, learning, blocks, activations, encoders, reserve, total, fits,
    rows}, bytes a GPU, for every number of `gpus` with `memory` GB each.

    rows: of a batch that a process runs at once; in the result, the most that fit (0: none).
    size: height, width, text_tokens of `d2m.plan.count.plan`. Raises as that does, and ValueError
    for numbers below 1, a model that is sparse already, or neither preset nor recipe.
    """
    if precision not in recipes.PRECISIONS:
        raise ValueError(
            f"--precision is {precision!r}, expected one of {', '.join(recipes.PRECISIONS)}"
        )
    if not gpus or min(gpus) < 1 or memory <= 0 or rows < 1:
        raise ValueError(
            f"--gpus is {','.join(map(str, gpus))}, --gpu-memory {memory:g} and --rows {rows}, "
            "expected numbers of 1 or more"
        )
    found = counted(model, preset=preset, recipe=recipe, **size)
    known = component_bytes(model)
    result = []
    for number in gpus:
        b = 2 if precision == "bfloat16" and number > 1 else 4
        weights = b * (found.dense + found.frozen) + 4 * found.learnt
        row: dict[str, Any] = {
            "weights": weights // number + 4 * found.routing,
            "learning": (12 + found.average) * found.stage // number,
            "blocks": (3 * b + 8) * found.block,
            "encoders": known if Path(model).is_dir() else known * b // 2,
            "reserve": RESERVE,
        }
        fixed = sum(row.values())
        one = activations(found, checkpointing, offload)
        row["activations"] = rows * one
        total = fixed + row["activations"]
        most = max(0, int((memory * GB - fixed) // one))
        row |= {"gpus": number, "memory": int(memory * GB), "total": total}
        result.append(row | {"fits": total <= memory * GB, "rows": most})
    return result


def activations(found: Counted, checkpointing: bool, offload: bool) -> int:
    """Bytes of one row."""
    kept = 0 if offload else found.depth
    numbers = 2 * max(kept, found.compared) + 2 * SAVED
    if not checkpointing and not offload:
        numbers = 2 * SAVED * found.depth
    return found.tokens * found.dim * (numbers + 10 * found.compared)


# ---------------------------------------------------------------- counting


def counted(
    model: str | os.PathLike[str],
    *,
    preset: str | None = None,
    recipe: str | os.PathLike[str] | None = None,
    **size: Any,
) -> Counted:
    """The numbers of a dense model's conversion by a recipe that FORMULA is about."""
    subject = subject_of(model)
    if subject.sparse is not None or (preset is None) == (recipe is None):
        raise ValueError(
            f"--gpus counts the distillation of a dense model by a recipe; {subject.title} "
            + ("is sparse already." if subject.sparse is not None else "needs one: add --preset.")
        )
    answer = plan(model, preset=preset, recipe=recipe, **size)
    made = recipes.load(recipe or preset_file(str(preset), subject.family, subject.depth))
    structure = structure_of(made)
    config, image, text = subject.config, answer["image_tokens"], answer["text_tokens"]
    weights = subject.family.plan.weights
    sparse = weights(config, structure, image, text)
    dense = weights(config, Structure(), image, text)
    stages = [stage for stage in made.stages if not stage.skip]
    trained = [learning(sparse, made, stage.train) for stage in stages]
    words = {word for stage in stages for word in stage.train}
    depth = sum(row["kept"] for row in answer["blocks"].values())
    groups = sum(row["groups"] for row in answer["blocks"].values())
    rows = list(_each(sparse))
    routing = sum(count * weight.size for _, count, weight in rows if weight.float32)
    fresh = [(prefix, count, weight) for prefix, count, weight in rows if _new(weight)]
    never = sum(count * weight.size for _, count, weight in fresh)
    never -= learning(sparse, made, words, fresh)
    return Counted(
        dense=sum(count * weight.size for _, count, weight in _each(dense)),
        frozen=never,
        learnt=learning(sparse, made, words),
        stage=max(trained, default=0),
        routing=routing,
        block=max(sum(weight.size for weight in stack.weights) for stack in sparse if stack.prefix),
        depth=depth,
        compared=max((_compared(stage.losses, depth, groups) for stage in stages), default=0),
        dim=dim_of(config),
        tokens=image + text,
        average=4 if any(stage.ema for stage in stages) else 0,
    )


def _compared(losses: Mapping[str, float], depth: int, groups: int) -> int:
    """Blocks whose outputs a stage's losses compare with the teacher's."""
    return depth if "feature" in losses else groups if "group" in losses else 0


def learning(stacks: Sequence[Stack], recipe: recipes.Recipe, words: Any, among: Any = None) -> int:
    """Sharded parameters that stages of these words train (gates and routers are G).

    among: (prefix, count, weight) of those that are counted; None: all.
    """
    members = {kind: sum(map(len, recipe.blocks.groups(kind))) for kind in ("double", "single")}
    total = 0.0
    for prefix, count, weight in _each(stacks) if among is None else among:
        if weight.float32:
            continue
        kind = "single" if prefix.startswith("single") else "double"
        if _word(weight) in words or ("blocks" in words and prefix):
            total += count * weight.size
        elif "groups" in words and prefix:
            kept = sum(s.count for s in stacks if s.prefix == prefix)
            total += count * weight.size * min(1.0, members[kind] / max(1, kept))
    return round(total)


def _word(weight: Weight) -> str:
    """Which of `recipe.PARTS` a weight belongs to, "" for none of the narrow ones."""
    if weight.part == "adaln":
        return "adaln"
    for word in ("shared", "experts", "gate"):
        if f".{word}." in weight.name:
            return word
    return ""


def _new(weight: Weight) -> bool:
    """Whether a sharded weight of the student is none of the dense model's.

    The attention's half of a single block's `proj_out` is a copy: its columns are cut out.
    """
    cut = weight.name.startswith("proj_out.linear")
    return not weight.float32 and (cut or _word(weight) in ("shared", "experts"))


def _each(stacks: Sequence[Stack]) -> Any:
    for stack in stacks:
        for weight in stack.weights:
            yield stack.prefix, stack.count, weight


# ---------------------------------------------------------------- bytes_text


def fits_table(rows: Sequence[Mapping[str, Any]]) -> tuple[str, list[str], list[list[str]]]:
    """(title, header, rows) for `print_table`."""
    parts = ("weights", "learning", "blocks", "activations", "encoders", "reserve", "total")
    header = ["GPUs", *parts, "fits", "rows at once"]
    cells = [
        [
            f"{row['gpus']} x {row['memory'] / GB:g} GB",
            *(bytes_text(row[part]) for part in parts),
            "yes" if row["fits"] else "no",
            str(row["rows"]),
        ]
        for row in rows
    ]
    return "Distillation, memory of each GPU:", header, cells


def formula() -> str:
    """FORMULA with its constants."""
    return FORMULA.format(
        saved=SAVED, encoders=bytes_text(component_bytes("flux-dev")), reserve=bytes_text(RESERVE)
    )
