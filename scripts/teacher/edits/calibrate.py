"""What the judge of edits says where the answer is known.

    python -m scripts.teacher.edits.calibrate models/shapes-dense

"truth": images drawn as the instructions ask; "vae": the same encoded and decoded, the ceiling of a
model with this VAE; "unedited": the images before; "mismatched": the truth of another instruction
of the same kind.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from calib.shapes.edit_suite import evaluate
from calib.shapes.edits import KINDS, eval_edits
from calib.shapes.world import World
from d2m.cli.terminal import say
from d2m.generate import load_pipeline
from scripts.emoji_calibration import replay
from scripts.emoji_gallery import through_vae
from scripts.figures import machine, write_figures

BATCH = 20


def main() -> None:
    """Judge and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="pipeline whose VAE is meant")
    parser.add_argument("-n", type=int, default=600, help="edits (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("results/edit/calibration.json"))
    args = parser.parse_args()
    world, pipe = World(), load_pipeline(args.model)
    pairs = [edit.images(world) for edit in eval_edits(world, args.n, 0)]
    before, after = (np.stack(images) for images in zip(*pairs))
    decoded: list[Image.Image] = []
    for start in range(0, args.n, BATCH):
        decoded += through_vae(pipe, after[start : start + BATCH])
    truth = [Image.fromarray(image) for image in after]
    step = len(KINDS)
    shown = {
        "truth": truth,
        "vae": decoded,
        "unedited": [Image.fromarray(image) for image in before],
        "mismatched": truth[step:] + truth[:step],
    }
    answer: dict[str, Any] = {"n": args.n}
    for name, row in shown.items():
        coming = replay(row)
        found, _ = evaluate(lambda prompts, seeds, _: coming(prompts, seeds), args.n, 0, world)  # noqa: B023
        answer[name] = {key: found[key] for key in ("overall", "categories")}
        say(f"{name}: {found['overall']}")
    answer["machine"] = machine(torch.get_num_threads(), "torch", "diffusers")
    write_figures(args.out, "scripts.teacher.edits.calibrate", answer)


if __name__ == "__main__":
    main()
