"""What a directory holds: a sparse checkpoint, a dense pipeline, or a bundle and its plans.

Reads JSON and the headers of safetensors files, never a weight, and so answers at once for a
model of any size.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.bundle.control_record import KIND as CONTROLNET
from runtime.bundle.directory import Bundle, open_bundle
from runtime.bundle.manifest import inside
from runtime.families import family_of, title_of
from runtime.files.checked_json import printable, read_json
from runtime.files.kinds import not_a
from runtime.files.parameters import block_count, modulation, totals
from runtime.files.tensors import Tensor, read_header, shapes_of, weight_files
from runtime.images.given import taken_images
from runtime.inspect.backends_here import backends, onnx_body
from runtime.inspect.block_table import group_rows
from runtime.inspect.controlnet import controlnet_lines, inspect_controlnet
from runtime.program.executor import choose_backend
from runtime.trt.plan_choice import dotted

LIBRARIES = {"tensorrt_rtx": "TensorRT-RTX", "tensorrt": "TensorRT"}


def inspect(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Describe the directory as a dict of JSON values; `summary_lines` makes it readable.

    Raises FileNotFoundError where it is neither a pipeline nor a bundle, ValueError where a file
    in it is broken.
    """
    root = Path(path)
    if (root / "manifest.json").is_file():
        bundle = open_bundle(root, check="sizes", controlnet=None)
        controls = bundle.manifest["kind"] == CONTROLNET
        return inspect_controlnet(bundle) if controls else inspect_bundle(bundle)
    if (root / "model_index.json").is_file():
        return inspect_pipeline(root)
    cure = "d2m convert and d2m export write them"
    raise FileNotFoundError(not_a("a pipeline directory or a bundle", root, cure))


def inspect_pipeline(root: Path) -> dict[str, Any]:
    """A diffusers pipeline directory, sparse or dense."""
    index = read_json(root / "model_index.json")
    config = read_json(root / "transformer/config.json")
    named = [name for name, row in index.items() if loadable(row) and inside(name)]
    tensors: dict[str, dict[str, Tensor]] = {}
    for name in named:
        for path in weight_files(root / name):
            tensors.setdefault(name, {}).update(read_header(path))
    if "transformer" not in tensors:
        raise FileNotFoundError(
            f"{root / 'transformer'} has no .safetensors files, expected the transformer's weights."
        )
    shapes = shapes_of(tensors["transformer"])
    sites = [name.removesuffix(".experts.w1") for name in shapes if name.endswith(".experts.w1")]
    top_k = config.get("top_k") if sites else None
    if sites and (type(top_k) is not int or not 0 <= top_k <= shapes[f"{sites[0]}.experts.w1"][0]):
        raise ValueError(
            f"{root / 'transformer/config.json'} says top_k = {top_k!r}, expected a number of"
            " experts; convert again."
        )
    kappa = config.get("kappa") if config.get("groups") else None
    if kappa is not None and (type(kappa) is not int or kappa < 1):
        raise ValueError(
            f"{root / 'transformer/config.json'} says kappa = {kappa!r}, expected a number of"
            " blocks from 1; convert again."
        )
    recipe = root / "recipe.json"
    paths = [path for path in sorted(root.rglob("*")) if path.is_file()]
    files = {str(path.relative_to(root)): path.stat().st_size for path in paths}
    return {
        "what": "sparse checkpoint" if sites else "dense pipeline",
        "path": str(root),
        "class": str(config.get("_class_name")),
        "model": title_of(config),
        "blocks": {
            "double": block_count(shapes, "transformer_blocks"),
            "single": block_count(shapes, "single_transformer_blocks"),
        },
        "adaln": modulation(shapes),
        "groups": config_groups(config),
        "kappa": kappa,
        "experts": experts(shapes, sites, top_k) if sites else None,
        "parameters": {
            name: totals(shapes_of(found), top_k, kappa) for name, found in tensors.items()
        },
        "dtypes": dict(Counter(t.dtype for found in tensors.values() for t in found.values())),
        "recipe": read_json(recipe).get("name") if recipe.is_file() else None,
        "files": files,
        "bytes": sum(files.values()),
    }


def inspect_bundle(bundle: Bundle) -> dict[str, Any]:
    """A bundle: what it generates with, and where its plans run."""
    manifest = bundle.manifest
    files = {name: row["size"] for name, row in sorted(manifest["files"].items())}
    backend, reason = choose_backend(bundle)
    knobs = manifest.get("top_k"), manifest.get("kappa")
    return {
        "what": f"{manifest['kind']} bundle",
        "path": str(bundle.path),
        "name": manifest["name"],
        "family": manifest["family"],
        "model": manifest.get("model", family_of(manifest).title),
        "format": manifest["format"],
        "made_by": f"d2m {manifest['d2m']}",
        "digest": bundle.digest,
        "compute_dtype": manifest["compute_dtype"],
        "storage_dtype": manifest["storage_dtype"],
        **({"quant": manifest["quant"]["format"]} if "quant" in manifest else {}),
        "blocks": dict(Counter(c["type"] for c in bundle.component("transformer")["program"])),
        "adaln": modulation(shapes_of(bundle.weights("transformer").tensors)),
        "groups": group_rows(bundle.component("transformer")),
        "kappa": manifest.get("kappa"),
        "experts": bundle_experts(manifest),
        "parameters": {
            name: totals(shapes_of(bundle.weights(name).tensors), *knobs)
            for name in manifest["components"]
        },
        "images_in": taken_images(manifest),
        "defaults": manifest["defaults"],
        "scores": manifest.get("scores"),
        "plans": [
            plan(name, row, files) | {"experts": experts_of(bundle, row)}
            for name, row in sorted(manifest.get("plans", {}).items())
        ],
        "backend_here": {"name": backend, "reason": reason},
        "backends": backends(bundle),
        "files": files,
        "bytes": sum(files.values()),
    }


def bundle_experts(manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    """The routed experts of a bundle; None of a dense one."""
    if manifest["kind"] == "dense":
        return None
    known = {name: manifest[name] for name in ("num_experts", "top_k", "top_k_choices")}
    return known | {"onnx_body": onnx_body(manifest)}


def plan(target: str, row: Mapping[str, Any], files: Mapping[str, int]) -> dict[str, Any]:
    """A set of plans: how many, how large, and the machine and library they need."""
    library = f"{LIBRARIES.get(row['api'], row['api'])} {row['version']}, exactly"
    named = [dotted(int(number)) for number in row["compute_capabilities"]]
    gpu = "an NVIDIA GPU of compute capability "
    gpu += " or ".join(named) if named else "8.0, 8.6, 8.9, or 12.0 and later"
    return {
        "target": target,
        "api": row["api"],
        "version": row["version"],
        "needs": f"{gpu}, and {library}",
        "dtype": row.get("dtype"),
        "profiles": row.get("profiles", {}),
        "plans": len(row["files"]),
        "bytes": sum(files[name] for name in row["files"].values()),
    }


def experts_of(bundle: Bundle, row: Mapping[str, Any]) -> dict[str, Any] | None:
    """How a target can run the routed experts; None without any. Kernels are opened and checked."""
    if bundle.manifest["kind"] == "dense":
        return None
    if not row.get("segments"):
        return {"auto": "plans", "choices": ["plans"], "kernels": None}
    from runtime.bundle.kernel_package import open_kernels

    folders = sorted({entry["kernels"] for entry in row["experts"].values()})
    plans = [p for f in folders for p in open_kernels(bundle.path / f).manifest["plans"]]
    return {
        "auto": "cubins where they fit the GPU, else plans",
        "choices": ["plans", "cubins"],
        "kernels": {
            "sm": sorted({found["sm"] for found in plans}),
            "top_k": sorted({found["top_k"] for found in plans}),
        },
    }


def summary_lines(info: Mapping[str, Any]) -> list[str]:
    """`inspect`'s answer for people, one fact a line."""
    if "residuals" in info:
        return controlnet_lines(dict(info))
    total = info["parameters"]["transformer"]["total"]
    active = info["parameters"]["transformer"]["activated"]
    named = " + ".join(f"{count} {kind}" for kind, count in info["blocks"].items())
    title = f"{info['what']} {info.get('name') or info['path']}"
    # What both kinds have first, then what only a bundle or only a checkpoint says, files last.
    out = [title, f"transformer: {total:,} parameters, {active:,} activated ({active / total:.1%})"]
    out.append(f"blocks: {named}")
    if info["adaln"]["mode"] != "full":
        rank = f" of rank {info['adaln']['rank']}" if info["adaln"]["rank"] else ""
        out.append(f"AdaLN: {info['adaln']['mode']}{rank}, one modulation for all blocks")
    if info["groups"]:
        skipped = sum(len(row["blocks"]) - info["kappa"] for row in info["groups"])
        kept = f"each keeps kappa = {info['kappa']}, {skipped} blocks are skipped"
        out.append(f"groups: {len(info['groups'])}, {kept}")
        out += [
            f"  {row['list']} {row['blocks'][0]}-{row['blocks'][-1]}, alpha {row['alpha']:g}"
            for row in info["groups"]
        ]
    if info["experts"]:
        out.append("experts: " + ", ".join(f"{k} {v}" for k, v in info["experts"].items()))
    for name, row in info["parameters"].items():
        if name != "transformer":
            out.append(f"{name}: {row['total']:,} parameters")
    fields = "model family class recipe made_by compute_dtype storage_dtype quant digest"
    for field in fields.split():
        if info.get(field):
            out.append(f"{field.replace('_', ' ')}: {info[field]}")
    if "images_in" in info:
        taken = (f"{name} (up to {n})" if n > 1 else name for name, n in info["images_in"].items())
        out.append(f"images in: {', '.join(taken) or 'none, there is no vae_encoder'}")
    if info.get("defaults"):
        out.append("defaults: " + ", ".join(f"{k} {v}" for k, v in info["defaults"].items()))
    for row in info.get("plans", ()):
        size = f"{row['plans']} plans, {row['bytes'] / 1e6:.1f} MB, {row['dtype']}"
        out.append(f"plans {row['target']}: {size}; they need {row['needs']}")
        if row["experts"]:
            made = row["experts"]["kernels"]
            how = f"kernels for sm_{', sm_'.join(map(str, made['sm']))}" if made else "no kernels"
            out.append(f"experts of {row['target']}: {row['experts']['auto']} ({how})")
    if "plans" in info and not info["plans"]:
        out.append("plans: none")
    if "backend_here" in info:
        here = info["backend_here"]
        out.append(f"backend here: {here['name']} ({here['reason']})")
        for name, row in info["backends"].items():
            lacks = f"; not here: {row['lacks']}" if row["lacks"] else ""
            out.append(f"backend {name}: run on {row['tried']}{lacks}")
            if row["experts"]:
                out.append(f"  experts: {row['experts']}")
    out.append(f"files: {len(info['files'])}, {info['bytes'] / 1e6:.1f} MB")
    out += [f"  {size:>12,}  {name}" for name, size in info["files"].items()]
    return [printable(line) for line in out]


def experts(
    shapes: Mapping[str, tuple[int, ...]], sites: list[str], top_k: int | None
) -> dict[str, Any]:
    """The sparse FFNs of a checkpoint; of sizes that differ [smallest, largest]."""
    count, width, _ = shapes[f"{sites[0]}.experts.w1"]
    # Of w2 and fc2: where FFNs are gated the first matrices have two rows a neuron.
    hidden = {shapes.get(f"{site}.experts.w2", (0, 0))[1] for site in sites}
    shared = {shapes.get(f"{site}.shared.fc2.weight", (0, 0))[1] for site in sites}
    return {
        "num_experts": count,
        "top_k": top_k,
        "layers": len(sites),
        "width": width,
        "expert_hidden": min(hidden) if len(hidden) == 1 else [min(hidden), max(hidden)],
        "shared_hidden": min(shared) if len(shared) == 1 else [min(shared), max(shared)],
    }


def config_groups(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The groups of a sparse transformer's config, as runtime.inspect.block_table.group_rows."""
    lists = {"double": "transformer_blocks", "single": "single_transformer_blocks"}
    named = config.get("groups") or {}
    return [
        {
            "name": f"{lists[kind]}.{blocks[0]}",
            "list": lists[kind],
            "blocks": list(blocks),
            "alpha": config.get("alpha", 0.5),
        }
        for kind in lists
        for blocks in named.get(kind, ())
    ]


def loadable(row: Any) -> bool:
    """Whether an entry of model_index.json names a component that is there."""
    return isinstance(row, list) and len(row) == 2 and all(isinstance(x, str) for x in row)
