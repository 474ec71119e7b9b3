#!/usr/bin/env python
"""Make the editing teacher `models/shapes-edit` from `models/shapes-dense`.

    python -m scripts.teacher.edits --work runs/teacher-edits --threads 1

Three stages: the text encoders learn the words of instructions, both images of every pair are
encoded once, the transformer goes on by flow matching with the image before as reference tokens.
Each has its own checkpoint under --work; a killed run goes on where it stopped when the same
command is given again. The result is a genuine FluxKontextPipeline directory.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--init", type=Path, default=Path("models/shapes-dense"), help="(%(default)s)")
    add("--out", type=Path, default=Path("runs/shapes-edit"), help="result (%(default)s)")
    add("--work", type=Path, default=Path("runs/teacher-edits"), help="checkpoints (%(default)s)")
    add("--device", default="cpu", help="(%(default)s)")
    add("--seed", type=int, default=0, help="(%(default)s)")
    add("--edits", type=int, default=60_000, help="sampled and encoded once (%(default)s)")
    add("--batch", type=int, default=64, help="(%(default)s)")
    add("--text-steps", type=int, default=800, help="(%(default)s)")
    add("--flow-steps", type=int, default=2000, help="(%(default)s)")
    add("--lr", type=float, default=8e-4, help="(%(default)s)")
    add("--save-every", type=float, default=120.0, help="seconds (%(default)s)")
    add("--snapshot-every", type=int, default=500, help="steps; 0: never (%(default)s)")
    add("--no-compile", dest="compile", action="store_false", help="no torch.compile of the blocks")
    add("--bf16", action="store_true", help="bf16 autocast instead of float32")
    add("--threads", type=int, default=1, help="of torch (%(default)s)")
    add("--until", choices=("text", "flow"), default="flow", help="last stage (%(default)s)")
    return parser.parse_args(argv)


def main() -> None:
    args = options()
    import torch
    from diffusers import FluxTransformer2DModel

    from calib.shapes.world import World
    from scripts.teacher.cache import make_cache
    from scripts.teacher.edits.flow import Pairs, packed, train_edits
    from scripts.teacher.edits.subject import draw_edits, edits_subject, images
    from scripts.teacher.edits.words import train_words
    from scripts.teacher.loop import Run
    from scripts.teacher.pipeline import save_pipeline
    from scripts.teacher.state import load_state, save_state
    from scripts.teacher.vae import encode, train_vae

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    torch.backends.cuda.enable_flash_sdp(args.device != "cpu")
    run = Run(
        work=args.work,
        device=args.device,
        seed=args.seed,
        batch=args.batch,
        bf16=args.bf16,
        compile=args.compile,
        save_every=args.save_every,
    )
    run.work.mkdir(parents=True, exist_ok=True)
    world = World()
    subject = edits_subject(world)
    text, tokenizers = train_words(run, subject, args.init, args.text_steps)
    if args.until == "text":
        return

    print(f"rendering {args.edits} edits", flush=True)
    edits = draw_edits(world, args.edits, run.seed)
    before, after = images(world, edits)
    shown = torch.arange(len(edits))
    vae = train_vae(run, subject, after, shown, 0, args.init)
    kept = run.work / "latents.safetensors"
    if not kept.exists():
        save_state(kept, {"after": encode(run, vae, after), "before": encode(run, vae, before)}, {})
    latents = {
        name: (rows - vae.config.shift_factor) * vae.config.scaling_factor
        for name, rows in load_state(kept)[0].items()
    }
    captions = [edit.caption for edit in edits]
    labels = subject.labels(edits, run.seed)
    cache = make_cache(latents["after"], shown, labels, captions, text, tokenizers, run.device)
    pairs = Pairs(cache, packed(latents["before"]))

    def snapshot(transformer: torch.nn.Module) -> None:
        save_pipeline(args.out, subject, vae, text, tokenizers, transformer, 1.0, edits=True)

    start = FluxTransformer2DModel.from_pretrained(
        args.init, subfolder="transformer", torch_dtype=torch.float32
    )
    model = train_edits(
        run, subject, pairs, start, args.flow_steps, args.lr, snapshot, args.snapshot_every
    )
    snapshot(model)
    print(f"{args.out} is ready", flush=True)


if __name__ == "__main__":
    main()
