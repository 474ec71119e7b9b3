"""`d2m parity`: the same latents and embeddings through torch and through a bundle.

Three comparisons, each with another purpose: every component alone; every block alone on the
inputs it has in torch, so that errors do not pile up and the block that errs is named; the whole
trajectory, where they do pile up, to the image. Besides these the experts, and the blocks of
groups, that routers choose.
Built on polygraphy's runners and comparator (export/parity/compare.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from export.parity.compare import Row
from export.parity.parts import (
    compare_blocks,
    compare_choices,
    compare_components,
    compare_experts,
    compare_ids,
    compare_trajectory,
    plans_in_use,
)
from export.parity.quantised_reference import quantise
from export.parity.torch_recording import as_stored, load_reference, record
from runtime.bundle.directory import open_bundle
from runtime.pipeline import Pipeline
from runtime.request import check_kappa
from runtime.sampling import prepare_latents

PROMPTS = ("a red circle", "two blue squares and a green triangle")
# Per compute dtype: largest relative error of a tensor, smallest PSNR of the image in dB, gate
# margin above which experts must agree. float32 is the requirement; the half types are ours: an
# error of 2^-8 (bfloat16) or 2^-11 (float16) per operation, a few operations deep.
LIMITS = {
    "float32": {"relative_error": 1e-4, "psnr": 45.0, "margin": 1e-4},
    "float16": {"relative_error": 5e-3, "psnr": 35.0, "margin": 5e-3},
    "bfloat16": {"relative_error": 3e-2, "psnr": 25.0, "margin": 3e-2},
    # Torch quantises as the bundle does. Numbers before a rounding differ in their last bits, and
    # one that lies at an edge then becomes the next number of 4 or 8 bits.
    "quantised": {"relative_error": 5e-3, "psnr": 30.0, "margin": 5e-3},
}
Progress = Callable[[str, int, int], None]


def parity(
    sparse_dir: str | Path,
    bundle: str | Path,
    *,
    backend: str = "ort",
    prompts: Sequence[str] = PROMPTS,
    seed: int = 0,
    steps: int | None = None,
    top_k: int | None = None,
    kappa: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare the pipeline in `sparse_dir` (sparse or dense) with the bundle exported from it.

    Torch computes in float32 on the CPU, on weights rounded as the bundle stores them. `steps`,
    `top_k` and `kappa` default to the bundle's. Returns what `--json` prints: `passed`, `failures`
    (sentences), `limits`, `components` and `blocks` (worst first), `experts` (None in a dense
    bundle), `groups` (the blocks that routers choose; None where none does), `trajectory` (per
    step, and `image_psnr`).
    Raises FileNotFoundError, ValueError, ImportError or OSError with one sentence.
    """
    report = progress or (lambda phase, done, total: None)
    opened = open_bundle(bundle)
    manifest = opened.manifest
    k = manifest["top_k"] if top_k is None else top_k
    kappa = check_kappa(manifest, kappa, 1)[0]
    count = steps or manifest["defaults"]["steps"]
    pipeline = Pipeline(opened, backend)
    target = plans_in_use(pipeline)
    dtype = manifest["plans"][target]["dtype"] if target else manifest["compute_dtype"]
    quant = manifest.get("quant")
    limits = LIMITS["quantised" if quant else dtype]
    report("torch", 0, 1)
    size = {name: manifest["defaults"][name] for name in ("height", "width")}
    latent = tuple(s // manifest["latents"]["vae_scale_factor"] for s in size.values())
    noise = prepare_latents(pipeline, range(seed, seed + len(prompts)), (latent[0], latent[1]))
    # The first, a middle and the last step: noise, half an image, an image.
    recorded = sorted({0, count // 2, count - 1})
    pipe = load_reference(sparse_dir, manifest["kind"], k, kappa)
    as_stored(pipe, opened)
    text_tokens = manifest["tokenizers"][pipeline.family.tokenizers[-1]]["max_length"]
    how: dict[str, Any] = {"steps": count, "guidance": manifest["defaults"]["guidance"], **size}
    how |= {"text_tokens": text_tokens - pipeline.family.dropped, "recorded": recorded}
    reference = record(pipe, prompts, noise, **how)
    report("torch", 1, 1)
    quantisation = None
    if quant is not None:
        # What quantising costs, block by block on the unquantised inputs; then against torch that
        # quantises too, which must come out the same.
        rows = compare_blocks(opened, pipeline.backend, reference, k, float("inf"), report)
        quantisation = quant | {"blocks": worst_first(rows)}
        quantise(pipe.transformer, opened)
        reference = record(pipe, prompts, noise, **how)
    limit = limits["relative_error"]
    components = compare_components(pipeline, reference, k, limit, kappa)
    components += compare_ids(pipeline, reference, prompts)
    blocks = compare_blocks(opened, pipeline.backend, reference, k, limit, report)
    experts = None
    if k:
        experts = compare_experts(
            opened, pipeline.backend, target, sparse_dir, reference, k, limits["margin"]
        )
    groups = None
    if kappa is not None:
        groups = compare_choices(opened, pipeline.backend, reference, kappa, limits["margin"])
    trajectory = compare_trajectory(pipeline, reference, noise, latent, k, count, report, kappa)
    result: dict[str, Any] = {
        "sparse": str(sparse_dir),
        "bundle": str(bundle),
        "backend": pipeline.backend,
        "dtype": dtype,
        "top_k": k,
        "kappa": kappa,
        "steps": count,
        "seed": seed,
        "prompts": list(prompts),
        "limits": limits,
        "components": worst_first(components),
        "blocks": worst_first(blocks),
        "experts": experts,
        "groups": groups,
        "quantisation": quantisation,
        "trajectory": trajectory,
    }
    result["failures"] = failures(result)
    result["passed"] = not result["failures"]
    return result


def worst_first(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows for JSON, the largest error first."""
    ordered = sorted(rows, key=lambda row: (not row, row.as_dict()["relative_error"]), reverse=True)
    return [row.as_dict() for row in ordered]


def failures(result: dict[str, Any]) -> list[str]:
    """What misses the limits, a sentence each; none means that the bundle is right."""
    limits, found = result["limits"], []
    for part in ("components", "blocks"):
        bad = [row for row in result[part] if not row["passed"]]
        if bad:
            worst = bad[0]
            found.append(
                f"{len(bad)} of {len(result[part])} tensors of the {part} miss their limit, the"
                f" worst is {worst['tensor']} of {worst['place']} with a relative error of"
                f" {worst['relative_error']:.2e}, expected at most {worst['limit']:.0e}."
            )
    for part, chooser, chosen in (
        ("experts", "tokens", "experts"),
        ("groups", "samples", "blocks"),
    ):
        row = result[part]
        if row and row["sure_agreement"] < 1:
            flips = sum(site["sure_flips"] for site in row["sites"])
            found.append(
                f"{flips} of {row['sure_tokens']} {chooser} choose other {chosen} although their"
                f" margin exceeds {limits['margin']:.0e}, the worst site is"
                f" {row['sites'][0]['site']}, expected none."
            )
    image = min(result["trajectory"]["image_psnr"])
    if not image > limits["psnr"]:
        found.append(f"an image has a PSNR of {image:.1f} dB, expected over {limits['psnr']} dB.")
    return found


def tables(result: dict[str, Any], rows: int = 8) -> list[Any]:
    """The result as rich renderables: worst tensors, experts, trajectory, verdict."""
    from rich.table import Table

    shown: list[Any] = []
    for part in ("components", "blocks"):
        table = Table(
            title=f"{part}, worst first ({len(result[part])} tensors)", title_justify="left"
        )
        for column in ("where", "tensor", "relative error", "cosine", "largest difference"):
            table.add_column(column, justify="left" if column in ("where", "tensor") else "right")
        for row in result[part][:rows]:
            numbers = (
                f"{row['relative_error']:.2e}",
                f"{row['cosine']:.8f}",
                f"{row['max_abs']:.2e}",
            )
            style = None if row["passed"] else "red"
            table.add_row(row["place"], row["tensor"], *numbers, style=style)
        shown.append(table)
    table = Table(title="trajectory", title_justify="left")
    for column in ("step", "relative error", "cosine"):
        table.add_column(column, justify="right")
    for row in result["trajectory"]["steps"]:
        table.add_row(str(row["step"]), f"{row['relative_error']:.2e}", f"{row['cosine']:.8f}")
    shown.append(table)
    for part, chooser in (("experts", "tokens"), ("groups", "choices of blocks")):
        if row := result[part]:
            shown.append(
                f"{part}: {row['agreement']:.4%} of {row['tokens']} {chooser} agree,"
                f" {row['sure_agreement']:.4%} where the margin exceeds {row['margin']:.0e}"
                f" ({row['sure_tokens']}); largest margin of a flip"
                f" {row['largest_flip_margin']:.1e}"
            )
    ratios = ", ".join(f"{value:.1f}" for value in result["trajectory"]["image_psnr"])
    shown.append(f"images: {ratios} dB PSNR")
    verdict = "passed" if result["passed"] else "FAILED: " + " ".join(result["failures"])
    shown.append(f"{result['backend']} ({result['dtype']}) against torch (float32): {verdict}")
    return shown
