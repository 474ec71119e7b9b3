"""A dense LoRA on a sparse model: every row of its change goes where the neuron went.

With all experts on at unit gates the result is the dense model with the LoRA, as far as the sparse
one was the dense one (ours).
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2m import __version__
from d2m.families import family_of
from d2m.families.generation_defaults import DEFAULTS_FILE, generation_defaults, write_defaults
from d2m.lora.card import write_card_and_report
from d2m.lora.file import Change, read_lora
from d2m.lora.parts import KINDS, Part, dense_linears, parts_of
from d2m.model.components import check_components
from d2m.plan.hub import locate
from d2m.shards import IMPORTANCE, INDEX, Shards, open_shards, write_index, write_shard
from runtime.files.atomic import replace_dir, temporary_sibling
from runtime.files.checked_json import read_json

KEPT = ("config.json", ".md", ".txt")  # files beside a transformer's weights
PASSED_ON = ("model_index.json", DEFAULTS_FILE, "recipe.json", IMPORTANCE)  # of the whole model
LEGAL = ("LICENSE", "LICENCE", "NOTICE")


def lora(
    file: str | os.PathLike[str],
    onto: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    scale: float = 1.0,
    lossy: bool = False,
    steps: int | None = None,
) -> dict[str, Any]:
    """Add a dense model's LoRA to the sparse (or dense) pipeline `onto`, written as `out`.

    Args:
        file: LoRA of the dense model, safetensors, in names that runtime.lora.names knows.
        onto: pipeline directory, or the hub id of a dense one.
        out: directory to write, shard by shard; None tells the shares alone.
        scale: strength, times the file's own.
        lossy: leave out what the model has no place for (modulation that its blocks share, blocks
            that were dropped), in place of refusing.
        steps: denoising steps that `out` takes by default, for LoRAs distilled to fewer.

    Returns layers, rank (the largest), scale, shares (of the change's squared Frobenius norm, by
    KINDS without those that are 0), routed_share, out.

    Raises FileNotFoundError or ValueError, in one sentence, for a file that is no LoRA of this
    model, an output in use, or a change without a place.
    """
    path = locate(onto)
    family = family_of(path)
    if steps is not None and (steps < 1 or out is None):
        raise ValueError(f"--steps is {steps}; expected 1 or more, and an output with -o.")
    if not math.isfinite(scale):
        raise ValueError(f"--scale is {scale}; expected a finite number, such as 1.")
    if out is not None and Path(out).exists() and (Path(out).is_file() or any(Path(out).iterdir())):
        raise ValueError(f"{out} exists and is not empty; choose another output, or remove it.")
    check_components(path)
    config = read_json(path / "transformer/config.json")
    shards = open_shards(path / "transformer")
    changes = read_lora(file, dense_linears(config, family))
    parts = {name: parts_of(name, config, shards, family) for name in changes}
    shares = shares_of(changes, parts)
    if shares.get("nowhere") and not lossy:
        lost = [name for name, rows in parts.items() if any(p.tensor is None for p in rows)]
        raise ValueError(
            f"{shares['nowhere']:.1%} of the LoRA's change has no place in {onto}, whose blocks "
            f"share their modulation or were dropped ({len(lost)} layers, the first {lost[0]}); "
            "--lossy leaves it out, and fusing into the dense model before converting keeps it."
        )
    rank = max(change.rank for change in changes.values())
    answer = {"layers": len(changes), "rank": rank, "scale": scale, "shares": shares}
    if out is not None:
        with _written(path, Path(out), shards, changes, parts, scale) as made:
            if steps is not None:
                own = generation_defaults(path) if (path / DEFAULTS_FILE).is_file() else {}
                write_defaults(made, **own | {"num_inference_steps": steps})
            digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()
            told = {"file": Path(file).name, "sha256": digest, **answer}
            facts = {"d2m": __version__, "name": Path(out).name, "lora": told}
            write_card_and_report(made, path, str(onto), facts, generation_defaults(made))
    routed = {"routed_share": shares.get("routed", 0.0)}
    return answer | routed | {"out": None if out is None else str(out)}


def shares_of(
    changes: Mapping[str, Change], parts: Mapping[str, Iterable[Part]]
) -> dict[str, float]:
    """Of the change's squared Frobenius norm in the dense model, what lies in parts of every kind.

    They sum to 1; kinds without any are left out. {} for a LoRA of zeros.
    """
    sums: dict[str, float] = defaultdict(float)
    for name, change in changes.items():
        for part in parts[name]:
            sums[part.kind] += change.squared_norm(part.rows, part.columns)
    total = sum(sums.values())
    return {kind: sums[kind] / total for kind in KINDS if sums[kind]} if total else {}


def with_changes(
    tensors: Mapping[str, Tensor],
    changes: Mapping[str, Change],
    parts: Mapping[str, Iterable[Part]],
    scale: float = 1.0,
) -> dict[str, Tensor]:
    """Some of the model's tensors with what the LoRA adds to them; the others are passed on.

    Sums are made in float32 at least and rounded to the tensor's own dtype once. ValueError for
    one that is not finite then.
    """
    result = dict(tensors)
    for name, change in changes.items():
        for part in parts[name]:
            if part.tensor is None or part.tensor not in result:
                continue
            weight = result[part.tensor]
            dtype = torch.promote_types(weight.dtype, torch.float32)
            added = part.arrange(change.part(part.rows, part.columns, dtype))
            made = weight.clone()
            made[part.region] = (weight[part.region].to(dtype) + scale * added).to(weight.dtype)
            if not torch.isfinite(made.float()).all():
                raise ValueError(
                    f"{part.tensor} is NaN or infinite with the LoRA at scale {scale:g}; expected "
                    f"finite numbers in {weight.dtype}: try a smaller --scale."
                )
            result[part.tensor] = made
    return result


@contextmanager
def _written(
    source: Path,
    out: Path,
    shards: Shards,
    changes: Mapping[str, Change],
    parts: Mapping[str, Iterable[Part]],
    scale: float,
) -> Iterator[Path]:
    """The pipeline of `source` with the changed transformer, one shard in memory.

    Within: its directory, which is `out` afterwards. Of files that tell about the model as a whole
    only those are passed on that are true of this one, too.
    """
    made = temporary_sibling(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:

        def passed_on(folder: str, names: list[str]) -> list[str]:
            """The transformer's weights in whatever file, such as a variant: they are unfused."""
            if Path(folder) == source / "transformer":
                return [name for name in names if not name.endswith(KEPT)]
            if Path(folder) == source:
                files = [name for name in names if (source / name).is_file()]
                return [n for n in files if n not in PASSED_ON and not n.startswith(LEGAL)]
            return []

        shutil.copytree(source, made, ignore=passed_on)
        files = sorted(set(shards.where.values()))
        for file in files:
            tensors = shards.read(name for name, where in shards.where.items() if where == file)
            changed = with_changes(tensors, changes, parts, scale)
            write_shard(made / "transformer" / file, changed)
        if (source / "transformer" / INDEX).is_file():
            write_index(made / "transformer", files)
        yield made
        replace_dir(made, out)
    finally:
        shutil.rmtree(made, ignore_errors=True)
