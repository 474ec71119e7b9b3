"""How close to its teacher a model with shared modulation starts: single against low rank.

    python -m scripts.bench.adaln [MODEL] [--json FILE]

For every mode: weights of the modulation, its own relative error on held-out data, and the relative
error of the transformer's output with everything else as in the teacher.
"""

from __future__ import annotations

import copy
import json

import torch
import torch.nn.functional as F

from calib.shapes.batches import shapes_batches
from d2m.convert.modulation_fit import compress_adaln, modulation_moments
from d2m.families.flow import generator_at, noisy
from d2m.families.inputs import global_embedding, transformer_inputs
from d2m.generate import load_pipeline
from d2m.model.modulation import norms
from d2m.recipe.recipe import preset
from d2m.recipe.structure import AdaLN, lowrank_default
from scripts.figures import options, write_figures


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("model", nargs="?", default="models/shapes-dense")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pipe = load_pipeline(arguments.model, device="cpu", dtype="fp32")
    dense, recipe = pipe.transformer, preset("L")
    moments = modulation_moments(dense, shapes_batches(pipe, seed=1), recipe, seed=1)
    batch = shapes_batches(pipe, seed=2)(0, 32)
    x, t, _ = noisy(batch["latents"], generator_at(2, "held out"), recipe.t_mean, recipe.t_std)
    inputs = transformer_inputs(dense, batch, x, t)
    rows = []
    with torch.no_grad():
        s = F.silu(global_embedding(dense, batch, t))
        names = norms(dense)
        targets = {name: dense.get_submodule(name).linear(s) for name in names}
        output = dense(**inputs).sample
        best = lowrank_default(dense.inner_dim, sum(names.values()))
        for mode, rank in [
            ("single", None),
            *(("lowrank", r) for r in sorted({2, 4, best, 16, 32, 64, dense.inner_dim})),
        ]:
            model = compress_adaln(copy.deepcopy(dense), AdaLN(mode, rank), moments)
            temb = global_embedding(model, batch, t)
            found = {name: model.get_submodule(name).modulation(temb) for name in names}
            squares = sum((found[n] - targets[n]).square().sum() for n in names)
            parts = ("modulation", *names)
            weights = sum(p.numel() for n, p in model.named_parameters() if n.startswith(parts))
            error = (model(**inputs).sample - output).norm() / output.norm()
            share = (squares / sum(a.square().sum() for a in targets.values())).sqrt()
            row = {"mode": mode, "rank": rank, "weights": weights}
            rows.append(row | {"modulation_error": float(share), "output_error": float(error)})
            print(json.dumps(rows[-1]))
    if arguments.json:
        answer = {"model": arguments.model, "rows": rows}
        write_figures(arguments.json, "scripts.bench.adaln", answer)


if __name__ == "__main__":
    main()
