"""FFNs of a real size that learn by themselves: time and peak memory of `d2m convert --local`.

    python -m scripts.bench.local [--blocks 1D+1S] [--model flux2-klein-4b] [--json FILE]

The pipeline is synthetic (random weights of FLUX.1 [dev]'s sizes, or of a FLUX.2's), the pictures
are noise: what is shown is that the blocks of such a model learn in so much memory, not how well.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from scripts.bench.big import ANY_DEPTH, RECIPE, run
from scripts.figures import machine, options, write_figures


def pictures(folder: Path, count: int, side: int) -> None:
    """Pictures of noise with captions beside them."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        noise = np.random.default_rng(index).integers(0, 256, (side, side, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"a picture of noise, number {index}")


def main() -> None:
    """Make, convert, print, write."""
    parser = options(__doc__)
    parser.add_argument("--blocks", default="1D+1S", help="double and single (%(default)s)")
    parser.add_argument("--model", help="flux2-klein-4b or -9b, whole, in place of FLUX.1")
    parser.add_argument("--work", type=Path, default=Path("out/local"), help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="of every FFN (%(default)s)")
    parser.add_argument("--tokens", type=int, default=256, help="of a step (%(default)s)")
    parser.add_argument("--samples", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--size", type=int, default=256, help="pixels (%(default)s)")
    arguments = parser.parse_args()
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    dense, sparse, recipe = work / "dense", work / "sparse", work / "recipe.json"
    pictures(work / "pictures", arguments.samples, arguments.size)
    local = {"steps": arguments.steps, "tokens": arguments.tokens, "rows": 4096, "batch_size": 1}
    local["samples"] = arguments.samples
    source = ANY_DEPTH if arguments.model else RECIPE
    recipe.write_text(json.dumps({**json.loads(source.read_text()), "local": local}))
    make = ["scripts.bench.random_flux", str(dense), "--blocks", arguments.blocks]
    if arguments.model:
        make = ["scripts.bench.random_flux2", str(dense), "--model", arguments.model]
    if not dense.exists():
        run([sys.executable, "-m", *make])
    command = ["convert", str(dense), "-o", str(sparse), "--recipe", str(recipe), "--local"]
    command += ["--data", str(work / "pictures"), "--size", str(arguments.size)]
    measured = run([sys.executable, "-m", "d2m", *command])
    errors = json.loads((sparse / "local.json").read_text())
    print(json.dumps(measured), json.dumps(errors), sep="\n")
    what = {"model": arguments.model} if arguments.model else {"blocks": arguments.blocks}
    answer = {"machine": machine(1, "torch", "diffusers"), **what, "local": local}
    answer |= {"size": arguments.size, "measured": measured, "errors": errors}
    if arguments.json:
        write_figures(arguments.json, "scripts.bench.local", answer)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
