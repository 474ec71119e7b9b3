#!/usr/bin/env python
"""Make the dense teacher `models/shapes-dense` from nothing.

    python -m scripts.teacher --out models/shapes-dense --work runs/teacher

Four stages: VAE, text encoders, flow-matching transformer, guidance distillation; each with its own
checkpoint under --work (safetensors, never pickle). A killed run goes on where it stopped when the
same command is given again. The result is a genuine diffusers FluxPipeline directory in bf16.

Under torchrun (`torchrun --nproc-per-node 2 -m scripts.teacher ...`) several processes
share every step of the transformer's stages: on a CPU one per core beats one with several threads.

The stages mirror how FLUX.1 [dev] came to be (ours, in miniature): a flow-matching model trained
with caption dropout and then distilled so that one forward pass with a guidance embedding generates
what two passes of classifier-free guidance would.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.teacher.subject import WORLDS

if TYPE_CHECKING:
    from scripts.teacher.loop import Run


def options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--world", choices=WORLDS, default="shapes", help="what it learns (%(default)s)")
    add("--out", type=Path, help="result (models/WORLD-dense)")
    add("--work", type=Path, help="checkpoints; the same one resumes (runs/teacher-WORLD)")
    add("--device", help="default: cuda where there is one, else cpu")
    add("--seed", type=int, default=0, help="(%(default)s)")
    add("--size", type=int, help="side of the images in pixels (the world's own)")
    add("--init", type=Path, help="pipeline to start from: its transformer learns on")
    add("--keep-text", action="store_true", help="with --init: its text encoders, too")
    add("--scenes", type=int, default=160_000, help="sampled and encoded once (%(default)s)")
    add("--batch", type=int, default=64, help="of the transformer's stages (%(default)s)")
    add("--vae-steps", type=int, default=1600, help="(%(default)s)")
    add(
        "--decoder-steps",
        type=int,
        default=0,
        help="with --init: of the VAE's decoder alone; latents stay (%(default)s)",
    )
    add("--text-steps", type=int, default=1600, help="(%(default)s)")
    add("--flow-steps", type=int, default=11_000, help="(%(default)s)")
    add("--guidance-steps", type=int, default=600, help="(%(default)s)")
    add("--guidance-max", type=float, default=5.0, help="largest scale distilled (%(default)s)")
    add("--lr", type=float, default=1.6e-3, help="of flow; guidance takes a quarter (%(default)s)")
    add("--save-every", type=float, default=60.0, help="seconds between checkpoints (%(default)s)")
    add("--snapshot-every", type=int, default=1000, help="steps; 0: never (%(default)s)")
    add("--snapshot", type=Path, help="pipeline written every so often (<work>/snapshot)")
    add("--no-compile", dest="compile", action="store_false", help="no torch.compile of the blocks")
    add("--no-bf16", dest="bf16", action="store_false", help="float32 instead of bf16 autocast")
    add("--threads", type=int, default=0, help="of torch; 0: as torch sees fit (%(default)s)")
    stages = ("vae", "text", "flow", "guidance")
    add("--until", choices=stages, default="guidance", help="last stage (%(default)s)")
    args = parser.parse_args(argv)
    args.out = args.out or Path(f"models/{args.world}-dense")
    args.work = args.work or Path(f"runs/teacher-{args.world}")
    return args


def settings(args: argparse.Namespace, run: Run) -> dict[str, Any]:
    """What the model card says of a run; the logs of the run it goes on from, too."""
    log = args.init and args.init / "training.json"
    return {
        "world": args.world,
        "until": args.until,
        "keep_text": args.keep_text,
        "scenes": args.scenes,
        "batch": args.batch,
        "workers": run.workers,
        "device": run.device,
        "precision": "bf16 autocast" if run.bf16 else "float32",
        "flow_steps": args.flow_steps,
        "guidance_steps": args.guidance_steps,
        "guidance_max": args.guidance_max,
        "init": bool(args.init),
        "earlier": json.loads(log.read_text()) if log and log.exists() else None,
    }


def main() -> None:
    args = options()
    import torch
    from diffusers import FluxTransformer2DModel

    from runtime.files.atomic import write_json
    from scripts.teacher.cache import make_cache
    from scripts.teacher.flow import train_flow, train_guidance
    from scripts.teacher.loop import Run
    from scripts.teacher.pipeline import save_pipeline
    from scripts.teacher.refit import refitted
    from scripts.teacher.subject import subject_named
    from scripts.teacher.text import load_text, train_text
    from scripts.teacher.vae import latents_of, train_vae

    rank, workers = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if workers > 1:
        if not (args.work / "latents.safetensors").exists():
            sys.exit(
                f"--work {args.work} has no latents.safetensors: run this once with --until text "
                "in a single process, only the transformer's stages are shared"
            )
        torch.distributed.init_process_group("gloo" if device == "cpu" else "nccl")
    run = Run(
        work=args.work,
        device=device,
        rank=rank,
        workers=workers,
        seed=args.seed,
        batch=args.batch,
        bf16=args.bf16,
        compile=args.compile,
        save_every=args.save_every,
    )
    if args.threads:
        torch.set_num_threads(args.threads)
    # At 32 tokens the CPU's flash kernel is slower than plain products.
    torch.backends.cuda.enable_flash_sdp(run.device != "cpu")
    torch.manual_seed(run.seed)
    run.work.mkdir(parents=True, exist_ok=True)
    if not rank:
        write_json(run.work / "run.json", settings(args, run))
    subject = subject_named(args.world, args.size)

    print(f"rendering {args.scenes} training scenes", flush=True)
    scenes = subject.draw(args.scenes, run.seed)
    images, shown = subject.pictures(scenes, run.seed)
    vae = train_vae(run, subject, images, shown, args.vae_steps, args.init, args.decoder_steps)
    if args.until == "vae":
        return
    latents = latents_of(run, vae, images, trained=bool(args.init))
    kept = bool(args.init and args.keep_text)
    if kept:
        text, tokenizers = load_text(args.init, subject, run.device)
    else:
        text, tokenizers = train_text(run, subject, args.text_steps)
    if args.until == "text":
        return
    labels = subject.labels(scenes, run.seed)
    captions = [scene.caption for scene in scenes]
    cache = make_cache(latents, shown, labels, captions, text, tokenizers, run.device)

    def snapshot(transformer: torch.nn.Module, guidance: float = 1.0) -> None:
        out = args.snapshot or run.work / "snapshot"
        save_pipeline(out, subject, vae, text, tokenizers, transformer, guidance)

    every = args.snapshot_every
    start = None
    if kept:
        start = FluxTransformer2DModel.from_pretrained(
            args.init, subfolder="transformer", torch_dtype=torch.float32
        )
    elif args.init:
        start = refitted(args.init, subject, captions, text, tokenizers, run.device)
    model = train_flow(run, subject, cache, args.flow_steps, args.lr, snapshot, every, start)
    if args.until == "flow":
        if not run.rank:
            snapshot(model)
        return
    steps, lr = args.guidance_steps, args.lr / 4
    guided = partial(snapshot, guidance=3.5)
    model = train_guidance(run, model, cache, steps, lr, guided, every, args.guidance_max)
    if run.rank:
        return
    save_pipeline(args.out, subject, vae, text, tokenizers, model)
    print(f"{args.out} is ready", flush=True)


if __name__ == "__main__":
    main()
