"""The manifest of a bundle, checked to the last field: nothing after this needs to doubt it.

Unknown fields are left alone (a later minor version may add some); known ones must be right. A
sentence names the field, what it holds and what was expected.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Any

from runtime.bundle.block_groups import check_groups, check_kappa
from runtime.bundle.control_record import COMPONENT, check_control
from runtime.bundle.control_record import KIND as CONTROLNET
from runtime.families import FAMILIES
from runtime.files.checked_json import (
    array,
    integer,
    listed,
    mapping,
    number,
    one_of,
    show,
    text,
    wrong,
)
from runtime.files.tensors import naturals

FORMAT = 1
KINDS = ("sparse", "dense", CONTROLNET)
QUANTISED = ("int8", "uint8", "float8_e4m3fn")
DTYPES = ("float32", "bfloat16", "float16", "float64", "int64", "int32", "bool", *QUANTISED)
FLOATS = ("float32", "bfloat16", "float16")
MAX_FILE = 1 << 42  # 4 TiB: no weights file is larger
MAX_FILES = 10_000
MAX_CALLS = 4096  # blocks of a component
MAX_TENSORS = 256  # that go into a block or come out of it, weights not counted
MAX_TOKENS = 4096  # of a prompt
MAX_TEMPLATE = 10_000  # characters of what stands before or after a prompt
MAX_DIM = 1 << 40
MAX_PIXELS = 16384  # a side of an image
OPTIONAL = {"vae_encoder": 1}  # components that a bundle may have, and their outputs


def check(manifest: Any) -> None:
    """Raise ValueError (a clause, no full stop) where the manifest is not one of format 1."""
    if not isinstance(manifest, dict):
        raise ValueError(f"manifest.json holds {show(manifest)}, expected an object")
    version = manifest.get("format")
    if type(version) is not int or version != FORMAT:
        raise ValueError(
            f"its format is {show(version)}, expected {FORMAT}: it was made by another version"
            f" of d2m; use that version"
        )
    family = FAMILIES[one_of(manifest, "family", tuple(FAMILIES))]
    controlnet = one_of(manifest, "kind", KINDS) == CONTROLNET
    one_of(manifest, "compute_dtype", FLOATS)
    one_of(manifest, "storage_dtype", FLOATS)
    text(manifest, "d2m")
    text(manifest, "name")
    if "model" in manifest:
        text(manifest, "model")
    files = check_files(mapping(manifest, "files"))
    components = mapping(manifest, "components")
    for name in (COMPONENT,) if controlnet else family.components:
        mapping(components, name, "components")
    for name in components:
        check_component(mapping(components, name, "components"), f"components.{name}", files)
    plans = mapping(manifest, "plans") if "plans" in manifest else {}
    for target in plans:
        check_plan(mapping(plans, target, "plans"), f"plans.{target}", files)
    if controlnet:
        check_control(manifest)
        return
    present = {name: count for name, count in OPTIONAL.items() if name in components}
    for name, count in {**family.components, **present}.items():
        for side, wanted in (("inputs", 1), ("outputs", count)) if count else ():
            found = set(components[name][side]) - {"attention_mask"}  # which goes with input_ids
            if len(found) != wanted:
                words = "one tensor" if wanted == 1 else f"{wanted} tensors"
                raise wrong(f"components.{name}.{side}", components[name][side], words)
    if "quant" in manifest:
        quant = mapping(manifest, "quant")
        text(quant, "format", "quant")
        integer(quant, "bits", 1, 16, "quant")
        integer(quant, "block", 0, 1 << 20, "quant")
    check_top_k(manifest)
    check_kappa(manifest)
    check_settings(manifest)
    if type(manifest.get("guided", False)) is not bool:
        raise wrong("guided", manifest["guided"], "true or false")
    for name in family.tokenizers:
        where = f"tokenizers.{name}"
        row = mapping(mapping(manifest, "tokenizers"), name, "tokenizers")
        listed(row, "file", files, where)
        integer(row, "max_length", 1, MAX_TOKENS, where)
        integer(row, "pad_id", 0, 1 << 31, where)
        check_template(row, where)
    if "lora" in manifest:
        record = mapping(manifest, "lora")
        listed(record, "map", files, "lora")
        check_suffix(listed(record, "indices", files, "lora"), "lora.indices", ".safetensors")


def check_template(row: dict[str, Any], where: str) -> None:
    """A tokenizer's template, where it has one: texts around every prompt, and how it is padded."""
    for name in ("before", "after"):
        found = row.get(name, "")
        if not isinstance(found, str) or len(found) > MAX_TEMPLATE:
            raise wrong(f"{where}.{name}", found, f"a text of at most {MAX_TEMPLATE} characters")
    removed = array(row, "removed", 0, 16, "texts", where) if "removed" in row else []
    if not all(isinstance(each, str) and each for each in removed):
        raise wrong(f"{where}.removed", removed, "texts that are not empty")
    if "padding_side" in row:
        one_of(row, "padding_side", ("left", "right"), where)
    for name in ("stripped", "special_tokens"):
        if type(row.get(name, True)) is not bool:
            raise wrong(f"{where}.{name}", row[name], "true or false")


def check_files(files: dict[str, Any]) -> dict[str, Any]:
    """Names must stay inside the directory; sizes and hashes must be such."""
    if len(files) > MAX_FILES:
        raise wrong("files", f"{len(files)} entries", f"at most {MAX_FILES}")
    for name, row in files.items():
        if not inside(name):
            raise wrong("files", name, "a relative path inside the bundle, without '..'")
        where = f"files[{show(name)}]"
        if not isinstance(row, dict):
            raise wrong(where, row, "an object with sha256 and size")
        integer(row, "size", 0, MAX_FILE, where)
        digest = row.get("sha256")
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise wrong(f"{where}.sha256", digest, "64 hexadecimal digits")
    return files


def inside(name: str) -> bool:
    """Whether `name` is a plain relative path: no '..', drive, backslash, root or NUL in it."""
    parts = name.split("/")
    if not name or len(name) > 512 or any(c in name for c in "\\:\0") or not name.isprintable():
        return False
    return all(part not in ("", ".", "..") for part in parts) and not PurePosixPath(name).root


def check_component(row: dict[str, Any], where: str, files: dict[str, Any]) -> None:
    """A component: its files, tensors, block types, and a program that can run to its end."""
    check_suffix(listed(row, "onnx", files, where), f"{where}.onnx", ".onnx")
    check_suffix(listed(row, "weights", files, where), f"{where}.weights", ".safetensors")
    for name in array(row, "shards", 0, MAX_FILES, "files", where) if "shards" in row else []:
        if not isinstance(name, str) or name not in files:
            raise wrong(f"{where}.shards", name, "paths listed under files")
        check_suffix(name, f"{where}.shards", ".safetensors")
    for side in ("inputs", "outputs"):
        for name in mapping(row, side, where):
            check_tensor(mapping(row[side], name, f"{where}.{side}"), f"{where}.{side}.{name}")
    types = mapping(row, "types", where)
    if len(types) > MAX_CALLS:
        raise wrong(f"{where}.types", f"{len(types)} entries", f"at most {MAX_CALLS}")
    for name in types:
        check_type(mapping(types, name, f"{where}.types"), f"{where}.types.{name}", files)
    known = set(row["inputs"])
    for index, call in enumerate(array(row, "program", 1, MAX_CALLS, "calls", where)):
        here = f"{where}.program[{index}]"
        if not isinstance(call, dict):
            raise wrong(here, call, "an object with type and prefix")
        one_of(call, "type", tuple(types), here)
        text(call, "prefix", here)
        for name in types[call["type"]]["inputs"]:
            if name not in known:
                raise wrong(here, name, "an input of the component or output of an earlier call")
        own = types[call["type"]]["outputs"]
        names = own
        if "outputs" in call:
            names = array(call, "outputs", len(own), len(own), "tensor names", here)
        if not all(isinstance(name, str) for name in names):
            raise wrong(f"{here}.outputs", names, "a list of tensor names")
        known.update(names)
    for name in row["outputs"]:
        if name not in known:
            raise wrong(f"{where}.outputs", name, "a tensor that the program writes")
    for stem in mapping(row, "depths", where) if "depths" in row else ():
        integer(row["depths"], stem, 1, MAX_CALLS, f"{where}.depths")
    if "groups" in row:
        check_groups(row, where)


def check_suffix(name: str, where: str, suffix: str) -> None:
    """ONNX Runtime takes a file's format from its name: another one is not what was checked."""
    if not name.endswith(suffix):
        raise wrong(where, name, f"a file whose name ends in {suffix}")


def check_type(row: dict[str, Any], where: str, files: dict[str, Any]) -> None:
    """A block type: graphs by top_k ("" where it has none), tensor names, weights."""
    graphs = mapping(row, "graphs", where)
    if not graphs:
        raise wrong(f"{where}.graphs", graphs, "at least one graph")
    for key in graphs:
        if key != "" and not (key.isascii() and key.isdigit() and len(key) < 5):
            raise wrong(f"{where}.graphs", key, "the empty string or a number of experts")
        if key == "" and len(graphs) > 1:
            raise wrong(f"{where}.graphs", list(graphs), "one graph or a graph per top_k")
        check_suffix(listed(graphs, key, files, f"{where}.graphs"), f"{where}.graphs", ".onnx")
    for side in ("inputs", "outputs"):
        names = array(row, side, 0, MAX_TENSORS, "tensor names", where)
        if not all(isinstance(name, str) for name in names):
            raise wrong(f"{where}.{side}", names, "a list of tensor names")
    if "body" in row:
        text(row, "body", where)
    for name in mapping(row, "weights", where):
        weight = mapping(row["weights"], name, f"{where}.weights")
        check_tensor(weight, f"{where}.weights.{name}", named=False)


def check_tensor(row: dict[str, Any], where: str, *, named: bool = True) -> None:
    """{"dtype", "shape"}; dimensions are numbers, or names where `named`."""
    one_of(row, "dtype", DTYPES, where)
    for size in (shape := array(row, "shape", 0, 8, "dimensions", where)):
        number = type(size) is int and 0 <= size < MAX_DIM
        if not number and not (named and isinstance(size, str) and 0 < len(size) < 64):
            raise wrong(f"{where}.shape", shape, "a list of dimensions")


def check_top_k(manifest: dict[str, Any]) -> None:
    """Sparse bundles name a default number of experts, and the others that were exported."""
    top_k = manifest.get("top_k")
    if manifest["kind"] == "dense":
        if manifest.get("top_k_choices") or top_k is not None:
            raise wrong("top_k", top_k, "null, and no top_k_choices, in a dense bundle")
        return
    experts = integer(manifest, "num_experts", 1, 4096)
    choices = array(manifest, "top_k_choices", 1, experts + 1, "numbers of experts")
    if any(type(k) is not int or not 0 <= k <= experts for k in choices):
        raise wrong("top_k_choices", choices, f"numbers between 0 and num_experts = {experts}")
    if type(top_k) is not int or top_k not in choices:
        raise wrong("top_k", top_k, f"one of top_k_choices = {choices}")
    for component, row in manifest["components"].items():
        for name, kind in row["types"].items():
            missing = [k for k in choices if str(k) not in kind["graphs"]]
            if "" not in kind["graphs"] and missing:
                where = f"components.{component}.types.{name}.graphs"
                raise wrong(where, list(kind["graphs"]), f"a graph for top_k = {missing[0]}")


def check_settings(manifest: dict[str, Any]) -> None:
    """Defaults, latents and scheduler: numbers in the range where images are possible."""
    latents = mapping(manifest, "latents")
    integer(latents, "channels", 1, 4096, "latents")
    factor = integer(latents, "vae_scale_factor", 1, 256, "latents")
    patch = integer(latents, "patch", 1, 64, "latents")
    number(latents, "scaling_factor", 1e-6, 1e6, "latents")
    if latents.get("shift_factor") is not None:
        number(latents, "shift_factor", -1e6, 1e6, "latents")
    if "condition" in latents and manifest["family"] != "flux":
        raise wrong("latents.condition", latents["condition"], "none: FLUX.1 alone has it")
    FAMILIES[manifest["family"]].check(manifest)
    defaults = mapping(manifest, "defaults")
    integer(defaults, "steps", 1, 1000, "defaults")
    number(defaults, "guidance", 0, 1000, "defaults")
    for side in ("height", "width"):
        pixels = integer(defaults, side, 1, MAX_PIXELS, "defaults")
        if pixels % (factor * patch):
            raise wrong(f"defaults.{side}", pixels, f"a multiple of {factor * patch}")
    mapping(manifest, "scheduler")


def check_plan(row: dict[str, Any], where: str, files: dict[str, Any]) -> None:
    """A set of compiled plans: the library and release that built them, and where they run."""
    text(row, "api", where)
    text(row, "version", where)
    capabilities = array(row, "compute_capabilities", 0, 100, "numbers such as 89", where)
    if not all(type(number) is int and 10 <= number < 1000 for number in capabilities):
        raise wrong(f"{where}.compute_capabilities", capabilities, "a list of numbers such as 89")
    for name, sizes in (mapping(row, "profiles", where) if "profiles" in row else {}).items():
        if not naturals(sizes) or len(sizes) != 3:
            raise wrong(f"{where}.profiles.{name}", sizes, "three sizes: min, opt, max")
    for name in mapping(row, "files", where):
        listed(row["files"], name, files, f"{where}.files")
    if "segments" in row:
        check_segments(row, where, files)


def check_segments(row: dict[str, Any], where: str, files: dict[str, Any]) -> None:
    """Blocks cut at their experts: every step is a plan of the set, or a launch of its kernels."""
    for name in mapping(row, "experts", where):
        entry, here = mapping(row["experts"], name, f"{where}.experts"), f"{where}.experts.{name}"
        integer(entry, "top_k", 1, 4096, here)
        folder = text(entry, "kernels", here)
        if f"{folder}/kernels.json" not in files:
            raise wrong(f"{here}.kernels", folder, "a directory whose kernels.json is under files")
    known = {*row["files"], *row["experts"]}
    tensors = mapping(row, "tensors", where)
    for block in mapping(row, "segments", where):
        here = f"{where}.segments.{block}"
        steps = array(row["segments"], block, 1, 64, "launches", f"{where}.segments")
        for step in steps:
            if not isinstance(step, str) or step not in known or step not in tensors:
                raise wrong(here, step, "a plan of the set or one of its experts")
        if steps[-1] in row["experts"]:
            raise wrong(here, steps[-1], "a plan at the end, which writes the block's outputs")
    for name in row["experts"]:
        entry = mapping(tensors, name, f"{where}.tensors")
        what = "tensors: x, logits, w1, b1 (if any) and w2"
        array(entry, "inputs", 4, 5, what, f"{where}.tensors.{name}")
