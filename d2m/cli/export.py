"""d2m export: a sparse pipeline is compiled into a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from d2m.cli import options
from d2m.cli.options import numbers_option, option
from d2m.cli.progress import progress_bars
from d2m.cli.terminal import print_answer


def capabilities(text: str) -> tuple[tuple[int, ...], bool]:
    """'portable,86,89' -> ((86, 89), True): compute capabilities, and whether portable is named."""
    parts = [part.strip() for part in text.split(",")]
    named = [part for part in parts if part != "portable"]
    return options.numbers(",".join(named)), len(named) < len(parts)


def is_controlnet(directory: Path) -> bool:
    """Whether a directory is what diffusers saves of a ControlNet, of whatever class."""
    from runtime.files.checked_json import read_json

    file = directory / "config.json"
    if not file.is_file() or (directory / "model_index.json").is_file():
        return False
    return "ControlNet" in str(read_json(file).get("_class_name"))


def export(
    sparse: Annotated[
        Path, typer.Argument(metavar="PIPELINE", help="Sparse or dense pipeline directory.")
    ],
    out: Annotated[Path | None, option("Bundle directory to write.", "-o", "--out")] = None,
    force: Annotated[bool, option("Replace an existing bundle.", "--force")] = False,
    trt: Annotated[
        bool, option("Build plans with TensorRT, or TensorRT-RTX where that is missing.", "--trt")
    ] = False,
    trt_rtx: Annotated[bool, option("Build plans with TensorRT-RTX.", "--trt-rtx")] = False,
    plugin: Annotated[
        bool, option("Experimental: run the experts as TensorRT plugins (with --trt).", "--plugin")
    ] = False,
    cubins: Annotated[
        bool, option("Also build plans that call the experts' own CUDA kernels.", "--cubins")
    ] = False,
    sm: Annotated[
        Any,
        option(
            "Compute capabilities to build for, e.g. 86,89,120 or portable.",
            metavar="SM[,SM...]",
            parser=capabilities,
        ),
    ] = "",
    top_k: Annotated[Any, numbers_option("Numbers of experts per token to export.")] = "0,1,2,4",
    dtype: Annotated[str, option("Compute dtype of the ONNX graphs: fp32, bf16 or fp16.")] = "fp32",
    plan_dtype: Annotated[
        str | None, option("Compute dtype of the plans; by default --dtype, but bf16 for fp32.")
    ] = None,
    storage: Annotated[
        str | None, option("Dtype of the stored weights; by default the checkpoint's.")
    ] = None,
    quant: Annotated[
        str, option("Format of the transformer's weights: none, int8, int4, fp8 or nvfp4.")
    ] = "none",
    keep: Annotated[
        list[str] | None,
        option("Weights that are not quantised, e.g. '*.attn.*'; may be repeated.", "--keep"),
    ] = None,
    link: Annotated[
        bool, option("Hard-link unchanged weight files instead of copying them.", "--link")
    ] = False,
    add_vae_encoder: Annotated[
        Path | None,
        option("Add PIPELINE's VAE encoder to this bundle, made before; no other file changes."),
    ] = None,
    base: Annotated[
        Path | None, option("Of a ControlNet as PIPELINE: the bundle that it is to control.")
    ] = None,
    triton_repo: Annotated[
        Path | None, option("Also write a model repository for NVIDIA Triton Inference Server.")
    ] = None,
    triton_instances: Annotated[int, option("Triton: model instances per GPU, or on the CPU.")] = 1,
    triton_batch: Annotated[int, option("Triton: largest batch.")] = 8,
    triton_bundle: Annotated[
        str | None,
        option("Triton: path of the bundle on the server; by default inside the repository."),
    ] = None,
    json_: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Compile PIPELINE into a bundle that needs no torch.

    A bundle holds ONNX graphs, TensorRT plans, weights, tokenizers and a manifest.
    With --triton-repo DIR or --quant, PIPELINE may be a bundle that is already exported.
    With --base BUNDLE, PIPELINE is a ControlNet's directory (docs/controlnet.md).
    """
    if add_vae_encoder is not None:
        from export.add_encoder import add_vae_encoder as add

        if out is not None:
            raise ValueError(f"--add-vae-encoder changes a bundle in place; leave -o {out} out")
        with progress_bars() as progress:
            answer = add(sparse, add_vae_encoder, progress=progress)
        print_answer(answer, json_)
        return
    ready = (sparse / "manifest.json").is_file()
    if out is None and not (ready and triton_repo is not None):
        raise ValueError("the bundle's directory is not given; add -o BUNDLE")
    if out is not None and ready and quant == "none":
        raise ValueError(f"{str(sparse)!r} is a bundle already; leave -o {out} out")
    if out is not None and not force and (out / "manifest.json").is_file():
        raise ValueError(f"{str(out)!r} is a bundle already; give another name, or add --force")
    repository: dict[str, Any] = {"instances": triton_instances, "max_batch": triton_batch}
    repository["at"] = triton_bundle
    if triton_repo is not None:
        from export.triton import check_options, write_repository

        check_options(**repository)
        if out is None:
            print_answer(write_repository(sparse, triton_repo, **repository), json_)
            return
    assert out is not None
    plans: dict[str, Any] = {"trt": trt, "trt_rtx": trt_rtx, "plan_dtype": plan_dtype}
    plans |= dict(zip(("sm", "portable"), sm, strict=True))
    if base is not None or is_controlnet(sparse):
        from export.control.bundle import export_controlnet

        if base is None:
            raise ValueError(
                f"{str(sparse)!r} is a ControlNet; add --base BUNDLE, which it controls"
            )
        if quant != "none" or plugin or cubins or link or triton_repo is not None:
            raise ValueError(
                "a ControlNet is exported without --quant, --plugin, --cubins, --link and"
                " --triton-repo; leave them out"
            )
        with progress_bars() as progress:
            answer = export_controlnet(
                sparse, out, base, storage=storage, **plans, progress=progress
            )
        print_answer(answer, json_)
        return
    if ready:
        from export.requantise import quantise_bundle

        if trt or trt_rtx:
            raise ValueError(f"{str(sparse)!r} is a bundle; plans are built from its pipeline")
        with progress_bars() as progress:
            answer = quantise_bundle(sparse, out, quant=quant, keep=keep or (), progress=progress)
        print_answer(answer, json_)
        return
    targets, portable = sm
    from d2m.plan.fits_here import check_export
    from export.bundle import export_bundle

    sets = (trt or trt_rtx) * (1 + (portable and bool(targets)))
    check_export(sparse, out, top_k=len(top_k), plans=sets, link=link, storage=storage)

    plans |= {"plugin": plugin, "cubins": cubins}
    weights: dict[str, Any] = {"dtype": dtype, "storage": storage, "link": link}
    weights |= {"quant": quant, "keep": keep or ()}
    with progress_bars() as progress:
        answer = export_bundle(sparse, out, top_k=top_k, **weights, **plans, progress=progress)
    if triton_repo is not None:
        answer["triton"] = write_repository(out, triton_repo, **repository)
    print_answer(answer, json_)
