"""What the emoji judge says where the answer is known: of the truth, through a VAE, of mismatches.

    python -m scripts.emoji_calibration models/emoji-dense --out results/emoji/calibration.json

"truth": images drawn as their captions ask; "vae": the same encoded and decoded, the ceiling of a
model with this VAE; "mismatched": the same judged by the caption four places on, one of its own
category.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from calib.emoji.render import render_batch
from calib.emoji.suite import evaluate
from calib.emoji.world import CATEGORIES, World, eval_scenes
from calib.score.loop import Generate
from d2m.cli.terminal import say
from d2m.generate import load_pipeline
from scripts.emoji_gallery import through_vae
from scripts.figures import machine, write_figures

BATCH = 20  # a multiple of the categories


def replay(images: Sequence[Image.Image]) -> Generate:
    """A generator that hands out these images, in their order."""
    coming = iter(images)

    def generate(prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        return [next(coming) for _ in prompts]

    return generate


def main() -> None:
    """Judge and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("-n", type=int, default=1000, help="images (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("results/emoji/calibration.json"))
    args = parser.parse_args()
    world, pipe = World(), load_pipeline(args.model)
    scenes = eval_scenes(world, args.n, 0)
    images = render_batch(scenes, world, np.random.default_rng(0))
    decoded: list[Image.Image] = []
    for start in range(0, args.n, BATCH):
        decoded += through_vae(pipe, images[start : start + BATCH])
    truth = [Image.fromarray(image) for image in images]
    step = len(CATEGORIES)
    shown = {"truth": truth, "vae": decoded, "mismatched": truth[step:] + truth[:step]}
    answer: dict[str, Any] = {"n": args.n}
    for name, row in shown.items():
        found, _ = evaluate(replay(row), args.n, 0, world)
        answer[name] = {key: found[key] for key in ("overall", "categories", "recall")}
        at = {key: found["recall"][key]["overall"]["score"] for key in ("at_1", "at_5")}
        say(f"{name}: exact {found['overall']['score']}, recall {at}")
    error = np.stack([np.asarray(image, np.float32) for image in decoded]) - images
    answer["vae_psnr_db"] = round(float(20 * np.log10(255) - 10 * np.log10((error**2).mean())), 2)
    answer["machine"] = machine(torch.get_num_threads(), "torch", "diffusers")
    write_figures(args.out, "scripts.emoji_calibration", answer)


if __name__ == "__main__":
    main()
