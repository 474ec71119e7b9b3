#!/usr/bin/env python
"""Write the dense teacher's model card, training curve and scores beside its weights.

    d2m eval models/shapes-dense --n 600 --seed 0 --out models/shapes-dense/scores.json
    python -m scripts.teacher.card models/shapes-dense --work runs/teacher

Reads the logs and settings that `scripts.teacher` left under --work, and `scores.json`;
writes README.md, training.json and training.svg. Where the training went on from an earlier
pipeline (--init), that one's training.json lives on under "earlier".
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from calib.shapes.world import World, heldout_pairs
from d2m.report.charts import Line, alone, line_chart
from runtime.files.atomic import write_json, write_text
from runtime.files.tensors import read_header, weight_files

STAGES = {
    "vae": "VAE",
    "text": "text encoders",
    "flow": "flow matching",
    "guidance": "guidance distillation",
}


def curves(work: Path, settings: dict) -> dict[str, list[dict]]:
    """Rows of every stage's log in order.

    Of rows written twice (a killed run repeats a few steps) the last one counts.
    """
    found = {}
    reused = {"vae"} if settings["init"] else set()
    for stage in (stage for stage in STAGES if stage not in reused):
        log = work / f"{stage}.jsonl"
        if not log.is_file():
            raise FileNotFoundError(
                f"{log} is missing; run python -m scripts.teacher --work {work} first"
            )
        rows = {row["step"]: row for row in map(json.loads, log.read_text().splitlines())}
        found[stage] = [rows[step] for step in sorted(rows)]
    return found


def parameters(model: Path) -> dict[str, int]:
    """Parameters per component, counted from the safetensors headers."""
    return {
        name: sum(
            tensor.size
            for file in weight_files(model / name)
            for tensor in read_header(file).values()
        )
        for name in ("transformer", "text_encoder", "text_encoder_2", "vae")
    }


def chart(rows: list[dict]) -> str:
    points = [(row["step"], row["loss"]) for row in rows]
    curve = line_chart(
        [Line("", points)],
        x_label="step",
        y_label="flow-matching loss (MSE)",
        title="Training of the transformer",
        log_y=True,
        width=640,
    )
    return alone(curve)


def card(
    model: Path,
    logs: dict[str, list[dict]],
    scores: dict,
    counts: dict[str, int],
    settings: dict,
    earlier: list[dict[str, list[dict]]],
) -> str:
    rows = "\n".join(
        f"| {name.replace('_', ' ')} "
        f"| {s['score']:.3f} | {s['low']:.3f} to {s['high']:.3f} | {s['n']} |"
        for name, s in [*scores["categories"].items(), ("**overall**", scores["overall"])]
    )
    stages = "\n".join(
        f"| {STAGES[k]}{turn} | {v[-1]['step']} | {v[0]['loss']:.4g} | {v[-1]['loss']:.4g} |"
        for turn, run in [(f", training {i}", r) for i, r in enumerate(earlier, 1)] + [("", logs)]
        for k, v in run.items()
    )
    world = World()
    pairs = ", ".join(sorted(f"{colour} {shape}" for colour, shape in heldout_pairs(world)))
    parts = "\n".join(f"| {name} | {n:,} |" for name, n in counts.items())
    steps = logs["flow"][-1]["step"]
    start = " --init ..." if settings["init"] else ", from nothing"
    continued = (
        ""
        if not earlier
        else f"""
The weights come from {len(earlier) + 1} trainings in a row, each going on with the average of the
one before (`--init`); the table has them all, the last one without a number. Of the first, the VAE
stayed; the text encoders were trained anew later, and the transformer's text embedders refitted.
"""
    )
    return f"""---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
tags: [flux, shapes, d2m]
---

# shapes-dense: a small, genuine FLUX pipeline

A dense text-to-image diffusion transformer of FLUX.1 [dev]'s architecture at toy size (6 double and
12 single blocks, width 128, guidance embedding), with a VAE, a CLIP and a T5 encoder of its own. It
draws 32 x 32 pictures of coloured shapes from captions such as "a photo of a red circle and a blue
square". It is the dense model that d2m converts where no weights can be downloaded; it knows
nothing but its world of {len(world.colour_names)} colours, {len(world.shape_names)} shapes, counts
to {world.max_count} and four relations.

```python
from diffusers import FluxPipeline

pipe = FluxPipeline.from_pretrained("models/shapes-dense")
options = {{"height": 32, "width": 32, "num_inference_steps": 16, "max_sequence_length": 16}}
pipe("a photo of a red circle", **options).images[0].save("circle.png")
```

Captions longer than 14 words are cut; always give `height`, `width` and `max_sequence_length`
(`defaults.json`).

## Scores

`d2m eval models/shapes-dense --suite shapes --n {scores["n"]} --seed {scores["seed"]}` (raw:
`scores.json`): an exact verifier finds the objects in the picture and compares them with the
caption. Evaluation captions never occur in training, and neither do the pairs {pairs}.
Intervals: 95 %, Wilson.

| category | score | interval | n |
|---|---:|---:|---:|
{rows}

## Training

`python -m scripts.teacher`{start}, on {settings["scenes"]:,} drawn scenes (`calib/`), by
{settings["workers"]} process(es) in {settings["precision"]} on {settings["device"]}. The
transformer learns flow matching with a tenth of the captions left out, batches of
{settings["batch"]} ({steps:,} steps), while a head on its features learns to name what every patch
shows (the head is gone afterwards). It is then distilled so that one pass with a guidance embedding
g in 1 to {settings["guidance_max"]:g} equals classifier-free guidance of scale g: what makes it
"dev". The result is the exponential average of the weights. Curves: `training.svg`,
`training.json`.
{continued}
| stage | steps | first loss | last loss |
|---|---:|---:|---:|
{stages}

![training curve](training.svg)

## Parameters

| component | parameters |
|---|---:|
{parts}

Transformer and VAE are stored in bf16, the two text encoders in float32.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/teacher"))
    args = parser.parse_args()
    settings = json.loads((args.work / "run.json").read_text())
    logs = curves(args.work, settings)
    scores = json.loads((args.model / "scores.json").read_text())
    before = settings.pop("earlier")
    write_json(args.model / "training.json", {**logs, "earlier": before})
    earlier: list[dict] = []
    while before:
        earlier.insert(0, {k: v for k, v in before.items() if k != "earlier"})
        before = before.get("earlier")
    write_text(args.model / "training.svg", chart(logs["flow"]))
    write_text(
        args.model / "README.md",
        card(args.model, logs, scores, parameters(args.model), settings, earlier),
    )


if __name__ == "__main__":
    main()
