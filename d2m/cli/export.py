"""d2m export: a sparse pipeline is compiled into a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from d2m.cli import options
from d2m.cli.progress import progress_bars
from d2m.cli.terminal import print_answer


def capabilities(text: str) -> tuple[tuple[int, ...], bool]:
    """'portable,86,89' -> ((86, 89), True): compute capabilities, and whether portable is named."""
    parts = [part.strip() for part in text.split(",")]
    named = [part for part in parts if part != "portable"]
    return options.numbers(",".join(named)), len(named) < len(parts)


def export(
    sparse: Annotated[
        Path, typer.Argument(metavar="SPARSE", help="Directory of a sparse or dense pipeline.")
    ],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Bundle directory to write.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle that is there.")] = False,
    trt: Annotated[
        bool,
        typer.Option("--trt", help="Plans by TensorRT, or TensorRT-RTX where that is missing."),
    ] = False,
    trt_rtx: Annotated[bool, typer.Option("--trt-rtx", help="Plans by TensorRT-RTX.")] = False,
    plugin: Annotated[
        bool, typer.Option("--plugin", help="Experimental: with --trt, experts as plugins.")
    ] = False,
    cubins: Annotated[
        bool, typer.Option("--cubins", help="Besides plans: segments with the experts' kernels.")
    ] = False,
    sm: Annotated[
        Any,
        typer.Option(
            metavar="SM[,SM...]",
            parser=capabilities,
            help="Compute capabilities of the plans, e.g. 86,89,120 or portable.",
        ),
    ] = "",
    top_k: Annotated[Any, options.numbers_option("Experts per token to offer.")] = "0,1,2,4",
    dtype: Annotated[str, typer.Option(help="What ONNX computes in: fp32, bf16, fp16.")] = "fp32",
    plan_dtype: Annotated[
        str | None, typer.Option(help="What plans compute in; bf16 beside fp32.")
    ] = None,
    storage: Annotated[
        str | None, typer.Option(help="Dtype of stored weights; by default the checkpoint's.")
    ] = None,
    link: Annotated[
        bool, typer.Option("--link", help="Unchanged shards as hard links to SPARSE, on one disk.")
    ] = False,
    triton_repo: Annotated[
        Path | None, typer.Option(help="Model repository of NVIDIA Triton Inference Server.")
    ] = None,
    triton_instances: Annotated[
        int, typer.Option(help="Processes that generate, of every GPU or the CPU.")
    ] = 1,
    triton_batch: Annotated[int, typer.Option(help="Images generated together.")] = 8,
    triton_bundle: Annotated[
        str | None, typer.Option(help="Where the server finds the bundle; else put beside it.")
    ] = None,
    json_: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Compile the pipeline SPARSE into a bundle that needs no torch.

    A bundle holds ONNX graphs, plans, weights, tokenizers and a manifest.
    With --triton-repo DIR also a model repository around it; SPARSE may be a bundle then.
    """
    ready = (sparse / "manifest.json").is_file()
    if out is None and not (ready and triton_repo is not None):
        raise ValueError("the bundle's directory is not given; add -o BUNDLE")
    if out is not None and ready:
        raise ValueError(f"{str(sparse)!r} is a bundle already; leave -o {out} out")
    if out is not None and not force and (out / "manifest.json").is_file():
        raise ValueError(f"{str(out)!r} is a bundle already; give another name, or add --force")
    repository: dict[str, Any] = {
        "instances": triton_instances,
        "max_batch": triton_batch,
        "at": triton_bundle,
    }
    if triton_repo is not None:
        from export.triton import check_options, write_repository

        check_options(**repository)
        if out is None:
            print_answer(write_repository(sparse, triton_repo, **repository), json_)
            return
    assert out is not None
    targets, portable = sm
    from d2m.plan.fits_here import check_export
    from export.bundle import export_bundle

    sets = (trt or trt_rtx) * (1 + (portable and bool(targets)))
    check_export(sparse, out, top_k=len(top_k), plans=sets, link=link, storage=storage)

    with progress_bars() as progress:
        answer = export_bundle(
            sparse,
            out,
            trt=trt,
            trt_rtx=trt_rtx,
            plugin=plugin,
            cubins=cubins,
            sm=targets,
            portable=portable,
            link=link,
            top_k=top_k,
            dtype=dtype,
            plan_dtype=plan_dtype,
            storage=storage,
            progress=progress,
        )
    if triton_repo is not None:
        answer["triton"] = write_repository(out, triton_repo, **repository)
    print_answer(answer, json_)
