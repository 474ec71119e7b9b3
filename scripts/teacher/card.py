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
from typing import Any

from calib.shapes.world import World, heldout_pairs
from d2m.plan.model_config import read_json
from d2m.report.charts import Line, alone, line_chart
from runtime.files.atomic import write_json, write_text
from runtime.files.tensors import read_header, weight_files
from scripts.figures import fill

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
    if settings.get("keep_text"):
        reused.add("text")
    reused |= {stage for stage in ("flow", "guidance") if settings.get(f"{stage}_steps") == 0}
    for stage in (stage for stage in STAGES if stage not in reused):
        log = work / f"{stage}.jsonl"
        if stage == "guidance" and settings.get("until") == "flow":
            continue
        if not log.is_file():
            raise FileNotFoundError(
                f"{log} is missing; run python -m scripts.teacher --work {work} first"
            )
        rows = {row["step"]: row for row in map(json.loads, log.read_text().splitlines())}
        found[stage] = [rows[step] for step in sorted(rows)]
    return found


def parameters(model: Path) -> dict[str, int]:
    """Parameters per component, counted from the safetensors headers."""
    names = ("transformer", "text_encoder", "text_encoder_2", "vae")
    files = {name: weight_files(model / name) for name in names}
    return {
        name: sum(t.size for f in fs for t in read_header(f).values()) for name, fs in files.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/teacher"))
    args = parser.parse_args()
    run = json.loads((args.work / "run.json").read_text())
    logs = curves(args.work, run)
    before = run.pop("earlier")
    write_json(args.model / "training.json", {**logs, "earlier": before})
    earlier: list[dict] = []
    while before:
        earlier.insert(0, {k: v for k, v in before.items() if k != "earlier"})
        before = before.get("earlier")
    flow = next(each["flow"] for each in (logs, *reversed(earlier)) if "flow" in each)
    curve = line_chart(
        [Line("", [(row["step"], row["loss"]) for row in flow])],
        x_label="step",
        y_label="flow-matching loss (MSE)",
        title="Training of the transformer",
        log_y=True,
        width=640,
    )
    write_text(args.model / "training.svg", alone(curve))
    name = run.get("world", "shapes")
    facts: dict[str, Any] = {"scores": read_json(args.model / "scores.json"), "world": name}
    if name == "shapes":
        shapes = World()
        pairs = ", ".join(sorted(map(" ".join, heldout_pairs(shapes))))
        more = {"shapes": shapes, "pairs": pairs}
    else:
        config = read_json(args.model / "transformer/config.json")
        more = {"config": config, "defaults": read_json(args.model / "defaults.json")}
    here = Path(__file__)
    facts["intro"] = fill(here.with_name(f"card-{name}.md.j2"), **facts, **more).rstrip() + "\n"
    facts |= {"parameters": parameters(args.model), "stages": STAGES}
    facts |= {"run": run, "logs": logs, "earlier": earlier}
    text = fill(here.with_name("card.md.j2"), **facts)
    write_text(args.model / "README.md", text)


if __name__ == "__main__":
    main()
