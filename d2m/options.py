"""The options of the command line: their names, help and the parsing of lists in them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer


def numbers(name: str, text: str) -> tuple[int, ...]:
    """'0,1,2' -> (0, 1, 2) for the option `name`; ValueError otherwise."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ValueError(
            f"{name} is {text!r}, expected whole numbers with commas such as 1,2"
        ) from error


def knob(name: str, text: str | None) -> int | list[int] | None:
    """'2' -> 2, '2,2,1' -> [2, 2, 1] (one for every denoising step); ValueError otherwise."""
    values = numbers(name, text) if text is not None else ()
    if text is not None and not values:
        raise ValueError(f"{name} is {text!r}, expected a number, or one for every step: 2,2,1")
    return list(values) if len(values) > 1 else next(iter(values), None)


def levels(name: str, text: str | None) -> list[float] | None:
    """'1,0.7,0.3' -> [1.0, 0.7, 0.3]; None for None, ValueError otherwise."""
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{name} is {text!r}, expected numbers such as 1,0.7,0.3") from error


def capabilities(text: str) -> tuple[tuple[int, ...], bool]:
    """'portable,86,89' -> ((86, 89), True): compute capabilities, and whether portable is named."""
    parts = [part.strip() for part in text.split(",")]
    named = [part for part in parts if part != "portable"]
    return numbers("--sm", ",".join(named)), len(named) < len(parts)


def pairs(name: str, text: str, keys: Iterable[str]) -> dict[str, int]:
    """'size=64,shapes=6' -> {"size": 64, "shapes": 6}; ValueError otherwise."""
    values = {}
    for part in text.split(",") if text else ():
        key, _, value = part.partition("=")
        if key.strip() not in keys or not value.strip().isdecimal():
            raise ValueError(
                f"{name} has {part!r}, expected NAME=NUMBER with a name of {', '.join(keys)}"
            )
        values[key.strip()] = int(value)
    return values


# Everywhere
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Json = Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]
Backend = Annotated[str, typer.Option("--backend", help="auto, ort, ort-cuda, trt or trt-rtx.")]
# Drawing
Experts = Annotated[
    str, typer.Option("--experts", help="With plans: auto, plans (portable) or cubins (kernels).")
]
Verify = Annotated[
    str, typer.Option("--verify", help="cached: hashes of unchanged files are remembered; or full.")
]
PublicKey = Annotated[
    Path | None, typer.Option("--key", help="Public key by which BUNDLE must be signed.")
]
PrivateKey = Annotated[Path, typer.Option("--key", help="Private key, made with d2m keygen.")]
Steps = Annotated[int | None, typer.Option("--steps", help="Denoising steps.")]
Guidance = Annotated[float | None, typer.Option("--guidance", help="Guidance scale.")]
Negative = Annotated[
    str | None,
    typer.Option("--negative", help="What not to draw, with guidance by it (SD3, Qwen-Image)."),
]
Height = Annotated[int | None, typer.Option("--height", help="Pixels.")]
Width = Annotated[int | None, typer.Option("--width", help="Pixels.")]
TopK = Annotated[int | None, typer.Option("--top-k", help="Experts per token.")]
TopKSteps = Annotated[
    str | None, typer.Option("--top-k", help="Experts per token; or one number a step: 2,2,1.")
]
KappaSteps = Annotated[
    str | None, typer.Option("--kappa", help="Blocks that a group keeps; or one number a step.")
]
Kappa = Annotated[int | None, typer.Option("--kappa", help="Blocks that a group keeps.")]
Sigmas = Annotated[
    str | None, typer.Option("--sigmas", help="Noise levels before the shift, falling: 1,0.7,0.3.")
]
Seconds = Annotated[
    float | None,
    typer.Option("--budget", help="Seconds: picks steps, top-k, kappa that fit (d2m measure)."),
]
Offload = Annotated[
    str, typer.Option("--offload", help="none, or block: weights streamed through two blocks.")
]
Repeats = Annotated[int, typer.Option("--repeats", help="Drawings of every setting and prompt.")]
StepsList = Annotated[str | None, typer.Option("--steps", help="Numbers of steps: 2,4,8.")]
TopKList = Annotated[str | None, typer.Option("--top-k", help="Numbers of experts: 1,2.")]
KappaList = Annotated[str | None, typer.Option("--kappa", help="Numbers of blocks: 1,2.")]
Schedule = Annotated[
    str | None,
    typer.Option("--schedule", metavar="PROMPT", help="Blocks chosen per group and step for it."),
]
Count = Annotated[int, typer.Option("-n", "--n", help="Number of pictures.")]
Png = Annotated[Path, typer.Option("-o", "--out", help="PNG file to write; with -n out-0.png, ...")]
Again = Annotated[
    Path | None, typer.Option("--again", help="PNG of ours: draw the same again, and compare.")
]
BundleOption = Annotated[Path | None, typer.Option("--bundle", help="BUNDLE as an option.")]
# Serving
Host = Annotated[str, typer.Option("--host", help="Address to listen at; 0.0.0.0 for all.")]
Port = Annotated[int, typer.Option("--port", help="Port to listen at; 0 takes a free one.")]
Workers = Annotated[int, typer.Option("--workers", help="Threads that generate, in one process.")]
MaxQueue = Annotated[int, typer.Option("--max-queue", help="Requests that may wait; then 429.")]
MaxBatch = Annotated[
    int, typer.Option("--max-batch", help="Images drawn together; 1: every request alone.")
]
MaxImages = Annotated[int, typer.Option("--max-images", help="The most images of one request.")]
MaxSteps = Annotated[int, typer.Option("--max-steps", help="The most steps of one request.")]
MaxPixels = Annotated[
    int | None, typer.Option("--max-pixels", help="Of one image; 4 times the bundle's own size.")
]
Deadline = Annotated[float, typer.Option("--deadline", help="Seconds to an answer; then 504.")]
Drain = Annotated[
    float, typer.Option("--drain", help="Seconds to answer what was accepted after SIGTERM.")
]
KeyFile = Annotated[
    Path | None,
    typer.Option("--api-key-file", help="File with the key clients must give, or D2M_API_KEY."),
]
ModelAlias = Annotated[
    list[str] | None,
    typer.Option("--model-alias", help="Another name that clients may give; may be repeated."),
]
CorsOrigin = Annotated[
    list[str] | None,
    typer.Option("--cors-origin", help="Site whose pages may call it, '*' for all; repeatable."),
]
LogPrompts = Annotated[bool, typer.Option("--log-prompts", help="Write prompts to the log.")]
# Measuring
Versus = Annotated[
    Path | None, typer.Option("--vs", help="Baseline: the dense model's bundle, exported likewise.")
]
Runs = Annotated[int, typer.Option("--runs", help="Cold starts, and turns of every measurement.")]
Batches = Annotated[str, typer.Option("--batch", help="Images drawn at a time, e.g. 1,8.")]
Threads = Annotated[int | None, typer.Option("--threads", help="Of a CPU backend.")]
# Converting
Preset = Annotated[str, typer.Option("--preset", help="Recipe that comes with d2m.")]
RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", help="Recipe file (JSON), in place of a preset.")
]
Budget = Annotated[
    float | None,
    typer.Option("--budget", help="Groups and shared experts chosen for a share of dense FLOPs."),
]
TrainSteps = Annotated[int | None, typer.Option("--steps", help="Training steps over all stages.")]
Stages = Annotated[
    str, typer.Option("--stages", help="Stages to run, numbers or names, e.g. 1,2; all by default.")
]
Start = Annotated[
    Path | None, typer.Option("--start", help="Sparse pipeline whose weights training begins with.")
]
InitOnly = Annotated[bool, typer.Option("--init-only", help="Convert and train nothing.")]
Importance = Annotated[
    str,
    typer.Option(
        "--importance", help="Of neurons: calibration, magnitude (nothing runs), or a file."
    ),
]
RecipeSeed = Annotated[int | None, typer.Option("--seed", help="Seed, in place of the recipe's.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an unfinished conversion.")]
Report = Annotated[bool, typer.Option("--report/--no-report", help="Write report.html.")]
Data = Annotated[
    str,
    typer.Option(
        "--data", help="shapes, prompts.txt, a folder, .tar shards, or a Hugging Face dataset."
    ),
]
Cache = Annotated[
    Path | None, typer.Option("--cache", help="Folder that keeps encodings of --data.")
]
Size = Annotated[
    int | None, typer.Option("--size", help="Pixels of --data's pictures; the pipeline's own.")
]
Shuffle = Annotated[int, typer.Option("--shuffle", help="Samples of --data mixed in a buffer.")]
Skip = Annotated[int, typer.Option("--skip", help="Unreadable samples left out before it stops.")]
Columns = Annotated[
    str | None, typer.Option("--columns", help="PICTURE,CAPTION: columns or endings of --data.")
]
Score = Annotated[
    int | None,
    typer.Option("--score", help="Shapes judged for the report; 120 with --data shapes, else 0."),
]
Compare = Annotated[
    Path | None,
    typer.Option("--compare", help="summary.json of other models for the report's plot."),
]
Precision = Annotated[
    str | None,
    typer.Option("--precision", help="float32 or bfloat16, in place of the recipe's."),
]
Ema = Annotated[
    float | None, typer.Option("--ema", help="Decay of the weights' average, 0 for none.")
]
Accumulate = Annotated[
    int, typer.Option("--accumulate", help="Parts of a process's batch, run one after another.")
]
Checkpointing = Annotated[
    bool, typer.Option("--gradient-checkpointing", help="Keep blocks' inputs alone for backward.")
]
OffloadActivations = Annotated[
    bool, typer.Option("--offload-activations", help="Keep those in main memory.")
]
SaveSeconds = Annotated[
    float, typer.Option("--save-seconds", help="Time between two checkpoints of training.")
]
SparseOut = Annotated[Path, typer.Option("-o", "--out", help="Sparse pipeline directory to write.")]
# LoRA
Onto = Annotated[str, typer.Option("--onto", help="Sparse or dense pipeline directory.")]
LoraOut = Annotated[
    Path | None, typer.Option("-o", "--out", help="Pipeline directory to write; none: shares only.")
]
Scale = Annotated[float, typer.Option("--scale", help="Strength, times the LoRA's own.")]
Lossy = Annotated[bool, typer.Option("--lossy", help="Leave out what the model has no place for.")]
LoraSteps = Annotated[
    int | None, typer.Option("--steps", help="Denoising steps that OUT is drawn with by default.")
]
# Planning
PlanPreset = Annotated[
    str | None, typer.Option("--preset", help="Recipe that comes with d2m for such a model.")
]
Blocks = Annotated[
    str | None, typer.Option("--blocks", help="Keep so many of the blocks, e.g. 8D+38S.")
]
TextTokens = Annotated[int | None, typer.Option("--text-tokens", help="Length of the text.")]
Gpus = Annotated[
    str | None, typer.Option("--gpus", help="Numbers of GPUs to distil on, e.g. 1,8,32.")
]
GpuMemory = Annotated[float, typer.Option("--gpu-memory", help="GB of each of --gpus.")]
PlanCheckpointing = Annotated[
    bool, typer.Option("--gradient-checkpointing/--no-gradient-checkpointing", help="With --gpus.")
]
Rows = Annotated[int, typer.Option("--rows", help="Of a batch, run at once on each of --gpus.")]
# Exporting
BundleOut = Annotated[Path | None, typer.Option("-o", "--out", help="Bundle directory to write.")]
TritonRepo = Annotated[
    Path | None,
    typer.Option("--triton-repo", help="Model repository of NVIDIA Triton Inference Server."),
]
TritonInstances = Annotated[
    int, typer.Option("--triton-instances", help="Processes that draw, of every GPU or the CPU.")
]
TritonBatch = Annotated[int, typer.Option("--triton-batch", help="Images drawn together.")]
TritonBundle = Annotated[
    str | None,
    typer.Option("--triton-bundle", help="Where the server finds the bundle; else put beside it."),
]
Trt = Annotated[
    bool, typer.Option("--trt", help="Plans by TensorRT, or TensorRT-RTX where that is missing.")
]
TrtRtx = Annotated[bool, typer.Option("--trt-rtx", help="Plans by TensorRT-RTX.")]
Plugin = Annotated[
    bool, typer.Option("--plugin", help="Experimental: with --trt, experts as TensorRT plugins.")
]
Cubins = Annotated[
    bool, typer.Option("--cubins", help="Beside plans: segments with the experts' kernels between.")
]
Sm = Annotated[
    str, typer.Option("--sm", help="Compute capabilities of the plans, e.g. 86,89,120 or portable.")
]
Link = Annotated[
    bool, typer.Option("--link", help="Unchanged shards as hard links to SPARSE, on one disk.")
]
TopKs = Annotated[str, typer.Option("--top-k", help="Experts per token to offer.")]
Dtype = Annotated[str, typer.Option("--dtype", help="What ONNX computes in: fp32, bf16, fp16.")]
PlanDtype = Annotated[
    str | None, typer.Option("--plan-dtype", help="What plans compute in; bf16 beside fp32.")
]
Storage = Annotated[
    str | None, typer.Option("--storage", help="What weights are stored in; as they came.")
]
# Judging
Suite = Annotated[str, typer.Option("--suite", help="Only shapes so far.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="JSON file to write; - prints it.")]
Grid = Annotated[Path | None, typer.Option("--grid", help="Labelled picture of samples to write.")]
Batch = Annotated[int, typer.Option("--batch", help="Pictures drawn at a time.")]
Harder = Annotated[
    str, typer.Option("--world", help="A harder world, e.g. colours=8,shapes=6,max_count=5.")
]
