"""The dense pipeline that a conversion starts from: checked, and recognised by a fingerprint.

Torch-free, so that a wrong path is answered at once.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from d2m.families import Family, family_of
from d2m.families.family import check_adaln
from d2m.plan.model_config import sizes
from d2m.recipe.recipe import Recipe, hidden_sizes
from d2m.recipe.structure import KINDS, check_depth, check_shares
from runtime.files.checked_json import read_json
from runtime.files.kinds import kind


def dense_family(path: Path, recipe: Recipe) -> Family:
    """The family of the dense pipeline in `path`, once it is sure that the recipe fits it.

    FileNotFoundError or ValueError, in one sentence, if it is no pipeline, of no known family,
    already sparse, of other sizes than the recipe's ratios make up, or without blocks it names.
    """
    family = family_of(path)
    index = read_json(path / "model_index.json")
    name = (index.get("transformer") or [None, None])[1]
    if name not in (family.names.dense_class, *family.names.aliases):
        cure = f": {kind(path)[1]}" if name == family.names.sparse_class else "."
        raise ValueError(
            f"the transformer of {path} is a {name}; expected a dense {family.names.dense_class}"
            f"{cure}"
        )
    file = path / "transformer" / "config.json"
    raw = read_json(file)
    try:
        if not family.plan.sizes.keys() & raw.keys():
            raise ValueError("it names no size")
        config = sizes({"_class_name": family.names.dense_class, **raw}, "it")
    except ValueError as error:
        raise ValueError(
            f"{file} is not a {family.names.dense_class}'s config ({error}); copy the pipeline "
            "again."
        ) from error
    depth = dict.fromkeys(KINDS, 0) | {kind: config[key] for kind, key in family.blocks.depths}
    check_adaln(family, recipe.adaln.mode)
    check_depth(recipe.blocks, depth)
    check_shares(recipe.shares, depth)
    family.blocks.check_blocks(recipe.blocks, depth)
    places = [(kind, i) for kind in KINDS for i in range(max(1, len(recipe.shares.of(kind))))]
    for spec in dict.fromkeys(recipe.spec.at(*place) for place in places):
        hidden_sizes(family.blocks.hidden(config), spec)
    return family


def fingerprint(path: Path) -> str:
    """SHA-256 of a dense transformer's files: names, sizes and the first MiB of each.

    All of a small model; of a large one what two releases would surely differ in.
    """
    digest = hashlib.sha256()
    for file in sorted((path / "transformer").iterdir()):
        if file.suffix in (".json", ".safetensors"):
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
            with open(file, "rb") as stream:
                digest.update(stream.read(1 << 20))
    return digest.hexdigest()


def licence_of(path: Path) -> str | None:
    """The `license:` of the model card's front matter, which a conversion inherits; or None."""
    card = path / "README.md"
    if not card.is_file():
        return None
    front = re.match(r"---\n(.*?)\n---", card.read_text("utf-8", errors="replace"), re.DOTALL)
    found = re.search(r"^license:\s*(\S+)\s*$", front[1], re.MULTILINE) if front else None
    return found[1].strip("\"'") if found else None
