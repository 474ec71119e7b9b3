"""`d2m export CONTROLNET --base BUNDLE`: a ControlNet becomes a bundle of its own.

It computes in the types of the bundle that it is to control, whose image sizes its plans are built
for; any other bundle of a model of the same widths, types and sizes takes it too. Built under a
temporary name and whole or not at all; a tensor at a time is in memory.
"""

from __future__ import annotations

import importlib
import itertools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2m import __version__
from export.bundle import full_disk_named, torch_dtype, write_graphs, write_manifest
from export.checks import DTYPES, check_arguments, need_extra, plan_apis
from runtime.bundle.control_record import COMPONENT, KIND
from runtime.bundle.directory import Bundle, open_bundle
from runtime.bundle.trial import made_here
from runtime.control.controlnet import token_width
from runtime.files.atomic import replace_dir, temporary_dir, write_bytes
from runtime.files.checked_json import read_json
from runtime.files.hashes import sha256
from runtime.files.kinds import not_a
from runtime.files.parameters import count
from runtime.trt.launch_schedule import plan_key

if TYPE_CHECKING:
    import torch

    from export.control.program import Control
    from export.graph.program import Program

Progress = Callable[[str, int, int], None]
CLASSES = {
    "FluxControlNetModel": "export.control.flux:FLUX",
    "SD3ControlNetModel": "export.control.sd3:SD3",
}
SIZES = {  # a field of the config -> the transformer's input of that width
    "in_channels": "hidden_states",
    "joint_attention_dim": "encoder_hidden_states",
    "pooled_projection_dim": "pooled_projections",
}


def export_controlnet(
    source: str | Path,
    out: str | Path,
    base: str | Path,
    *,
    trt: bool = False,
    trt_rtx: bool = False,
    sm: Sequence[int] = (),
    storage: str | None = None,
    plan_dtype: str | None = None,
    portable: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Export the ControlNet that diffusers saved in `source`, for the bundle `base`.

    Other arguments are those of export.bundle.export_bundle. Returns out, name, kind,
    compute_dtype, controls, parameters, files, bytes, plans. Raises what it raises.
    """
    folder_in, final = Path(source), Path(out)
    opened = open_bundle(base, check="sizes")
    if not (folder_in / "config.json").is_file():
        cure = "give it as diffusers saves it, with config.json and safetensors"
        raise FileNotFoundError(not_a("a ControlNet's directory", folder_in, cure))
    compute: str = opened.manifest["compute_dtype"]
    dtype = next(short for short, name in DTYPES.items() if name == compute)
    check_arguments(folder_in, final, dtype, storage, plan_dtype, sm, trt or trt_rtx)
    need_extra()
    from export.checkpoint.weights import Checkpoint, place, refuse_unknown, write
    from export.control.program import control_program

    control = control_of(folder_in)
    config = check_fits(folder_in, control, opened)
    model = empty_controlnet(folder_in, control, opened)
    checkpoint = Checkpoint(folder_in)
    targets = [(), sm] if portable and sm else [sm]
    apis = plan_apis(trt, trt_rtx, targets)
    final.parent.mkdir(parents=True, exist_ok=True)
    with full_disk_named(final), temporary_dir(final) as folder:
        program = control_program(model, control, torch_dtype(dtype), progress)
        check_width(folder_in, program, opened)
        own, kind = checkpoint.main_dtype(), torch_dtype(storage) if storage else None
        shared = shared_tensors(opened, checkpoint)
        placed = place(
            program, lambda name: kind or (own if name in shared else checkpoint.dtype(name))
        )
        refuse_unknown(checkpoint, placed)
        file = folder / f"{COMPONENT}.safetensors"
        digest = write(file, placed, lambda name: read(name, shared, opened, checkpoint), progress)
        counts = {stem: len(linears) for stem, linears in control.stacks(model).items()}
        manifest: dict[str, Any] = {
            "format": 1,
            "d2m": __version__,
            "family": control.family,
            "kind": KIND,
            "name": folder_in.resolve().name,
            "model": control.cls,
            "compute_dtype": compute,
            "storage_dtype": DTYPES[storage] if storage else str(own).removeprefix("torch."),
            "components": {COMPONENT: write_graphs(folder, COMPONENT, program, None)},
            "control": {"residuals": counts, **control.record(config)},
            "parameters": {"total": count(checkpoint.shapes(), None, None)["total"]},
            "plans": {},
        }
        if apis:
            kind_of_plans = plan_dtype or ("bf16" if dtype == "fp32" else dtype)
            same = kind_of_plans == dtype
            if not same:
                program = control_program(model, control, torch_dtype(kind_of_plans), progress)
            write_plans(folder, manifest, program, opened, apis, targets, kind_of_plans, progress)
        write_manifest(folder, manifest, {file.name: digest}, progress, controlnet=True)
        replace_dir(folder, final)
    made_here(sha256(final / "manifest.json"))
    sizes = [row["size"] for row in manifest["files"].values()]
    return {
        "out": str(final),
        **{name: manifest[name] for name in ("name", "kind", "model", "compute_dtype")},
        "controls": counts,
        "parameters": manifest["parameters"]["total"],
        "files": len(sizes),
        "bytes": sum(sizes),
        "plans": {
            target: {"version": row["version"], "dtype": row["dtype"], "files": len(row["files"])}
            for target, row in manifest["plans"].items()
        },
    }


def control_of(directory: Path) -> Control:
    """The row of a ControlNet's class; ValueError for a class that export does not know."""
    name = read_json(directory / "config.json").get("_class_name")
    if name not in CLASSES:
        raise ValueError(
            f"{directory} is a {name}, expected one of {', '.join(CLASSES)}: other ControlNets are"
            " not exported."
        )
    module, _, row = CLASSES[name].partition(":")
    found: Control = getattr(importlib.import_module(module), row)
    return found


def check_fits(directory: Path, control: Control, base: Bundle) -> dict[str, Any]:
    """The ControlNet's config; ValueError where the bundle's transformer is of other sizes."""
    from d2m.model.components import read_config

    config = read_config(directory, controlnet_class(control))
    try:
        control.check(config)
    except ValueError as error:
        raise ValueError(f"{directory} {error}") from None
    if base.manifest["family"] != control.family:
        raise ValueError(
            f"{directory} is a {control.cls}, but {base.path} is of the family"
            f" {base.manifest['family']}, expected {control.family}; name a bundle of it."
        )
    inputs, patch = base.component("transformer")["inputs"], base.manifest["latents"]["patch"]
    for field, name in SIZES.items():
        wanted = inputs[name]["shape"][-1]
        if field == "in_channels" and control.family == "sd3":
            wanted //= patch**2
        if config[field] not in (wanted, None):
            raise ValueError(
                f"{directory} has {field} {config[field]}, expected {wanted}, which {base.path}"
                " has; take a ControlNet of the same model."
            )
    return config


def check_width(directory: Path, program: Program, base: Bundle) -> None:
    """ValueError unless residuals are as wide as the transformer's tokens."""
    ours = next(iter(program.outputs.values())).shape[-1]
    theirs = token_width(base.component("transformer"))
    if ours != theirs:
        raise ValueError(
            f"{directory} is {ours} wide, expected {theirs}, the width of {base.path}; take a"
            " ControlNet of the same model."
        )


def controlnet_class(control: Control) -> Any:
    """diffusers' class."""
    import diffusers

    return getattr(diffusers, control.cls)


def empty_controlnet(directory: Path, control: Control, base: Bundle) -> Any:
    """Its structure without weights, prepared for tracing."""
    import torch

    from d2m.model.components import empty_model
    from export.graph.prepare import prepare
    from export.graph.trace import keep_float32

    model: Any = empty_model(directory, controlnet_class(control))
    if getattr(model, "pos_embed", True) is None:  # SD3.5 large's: the transformer's own
        from diffusers.models.embeddings import PatchEmbed

        with torch.device("meta"):
            model.pos_embed = PatchEmbed(
                height=model.config.sample_size,
                width=model.config.sample_size,
                patch_size=model.config.patch_size,
                in_channels=model.config.in_channels,
                embed_dim=model.inner_dim,
                pos_embed_max_size=base.manifest["latents"]["grid"],
            )
    keep_float32(model)
    return prepare(model, control.tracing)


def shared_tensors(base: Bundle, checkpoint: Any) -> set[str]:
    """Weights that a ControlNet without an embedding of patches takes from the transformer's."""
    own = set(checkpoint.names())
    if base.manifest["family"] != "sd3" or any(name.startswith("pos_embed.") for name in own):
        return set()
    return {name for name in base.weights("transformer").tensors if name.startswith("pos_embed.")}


def read(name: str, shared: set[str], base: Bundle, checkpoint: Any) -> torch.Tensor:
    """One tensor of the ControlNet, or of the transformer that it shares it with."""
    import torch

    if name not in shared:
        found: torch.Tensor = checkpoint.get(name)
        return found
    return torch.from_numpy(base.weights("transformer").array(name, "float32"))


def write_plans(
    folder: Path,
    manifest: dict[str, Any],
    program: Program,
    base: Bundle,
    apis: Sequence[str],
    targets: Sequence[Sequence[int]],
    dtype: str,
    progress: Progress | None,
) -> None:
    """Plans of every block graph for the sizes of the base's images; a union's text is longer."""
    from export.plans.build import build_plans, default_profiles

    profiles = default_profiles(base.manifest)
    if manifest["control"]["modes"]:
        profiles["text_tokens"] = [size + 1 for size in profiles["text_tokens"]]
    with tempfile.TemporaryDirectory(prefix=".graphs.", dir=folder) as scratch:
        graphs = {}
        for kind, row in program.types.items():
            key = plan_key(COMPONENT, kind, "")
            graphs[key] = Path(scratch) / f"{kind}.onnx"
            write_bytes(graphs[key], row.graphs[""].SerializeToString())
        options: dict[str, Any] = {"dtype": DTYPES[dtype], "profiles": profiles}
        for api, sm in itertools.product(apis, targets):
            manifest["plans"] |= build_plans(
                graphs, folder, api=api, sm=sm, **options, progress=progress
            )
