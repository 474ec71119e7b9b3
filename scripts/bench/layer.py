"""What one FFN of the teacher can be distilled to alone: experts against as many fixed neurons.

    python -m scripts.bench.layer [MODEL] [--site single_transformer_blocks.6.proj_mlp]
                                  [--steps 300,3000] [--ways "width 1,1S12E2A"] [--json FILE]

The FFN's own inputs are recorded from calibration batches at random times, and each replacement
learns its outputs on them by Adam; the figure is |y - dense| / |dense - its mean| on inputs that
were held out. No other layer, no image and no stage takes part: what is left is whether routed
neurons can do what fixed ones do.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from calib.measure.importance import neuron_importance
from calib.shapes.batches import shapes_batches
from d2m.distill.losses import balance_loss, choices
from d2m.families import family_of_model
from d2m.families.ffn_sites import DenseFFN, read_ffn, sites_of
from d2m.families.flow import generator_at
from d2m.families.inputs import noised, transformer_inputs
from d2m.generate import load_pipeline
from d2m.model.sparse_ffn import SparseFFN
from d2m.model.surgery import convert_ffn, gate_weight, split_neurons
from d2m.recipe.recipe import Recipe, preset
from scripts.figures import ROOT, options, write_figures

HELD_OUT, BATCH, RATE = 8192, 2048, 4e-3
# name -> (shared neurons and an expert's over the width, experts, top_k)
WAYS = {
    "width 1": (1.0, 0.25, 12, 0),
    "width 1.5": (1.5, 0.25, 10, 0),
    "width 2": (2.0, 0.25, 8, 0),
    "1S12E2A": (1.0, 0.25, 12, 2),
}


def main() -> None:
    """Record, distil every way with every number of steps, print and write."""
    parser = options(__doc__)
    parser.add_argument("model", nargs="?", default=str(ROOT / "models" / "shapes-dense"))
    parser.add_argument("--site", default="single_transformer_blocks.6.proj_mlp")
    parser.add_argument("--steps", default="300,3000", help="(%(default)s)")
    parser.add_argument("--ways", default=",".join(WAYS), help="(%(default)s)")
    parser.add_argument(
        "--batches", type=int, default=60, help="of 64 training pictures (%(default)s)"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pipe, recipe = load_pipeline(arguments.model, device="cpu", dtype="fp32"), preset("L")
    batches = shapes_batches(pipe, seed=5)
    model = pipe.transformer
    weights = model.state_dict()
    found = {name: (block, site) for name, block, site in sites_of(weights, family_of_model(model))}
    block, site = found[arguments.site]
    scores = neuron_importance(model, batches, recipe, seed=5)[arguments.site]
    ffn = read_ffn(weights.__getitem__, block, site)
    x = inputs_of(model, f"{block}.{site.fc1}", batches, recipe, arguments.batches)
    rows: list[dict[str, Any]] = []
    for steps in map(int, arguments.steps.split(",")):
        for name in arguments.ways.split(","):
            began = time.monotonic()
            error = distilled(ffn, scores, WAYS[name], x, steps)
            rows.append({"way": name, "steps": steps, "error": round(error, 4)})
            print(json.dumps(rows[-1] | {"seconds": round(time.monotonic() - began)}), flush=True)
    if arguments.json:
        answer = {"site": arguments.site, "tokens": len(x), "batch": BATCH, "rate": RATE}
        write_figures(arguments.json, "scripts.bench.layer", answer | {"rows": rows})


def inputs_of(
    model: Any, name: str, batches: Callable[[int, int], Any], recipe: Recipe, count: int
) -> Tensor:
    """What reaches the linear `name`, [tokens, D], shuffled."""
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(
        lambda module, args: seen.append(args[0].reshape(-1, args[0].shape[-1]))
    )
    with torch.no_grad():
        for i in range(count):
            batch = batches(i, 64)
            generator = generator_at(5, "layer", i)
            x, t, _ = noised(model, batch, generator, recipe.t_mean, recipe.t_std)
            model(**transformer_inputs(model, batch, x, t))
    hook.remove()
    every = torch.cat(seen)
    return every[torch.randperm(len(every), generator=torch.Generator().manual_seed(0))]


def distilled(
    ffn: DenseFFN, scores: Tensor, way: tuple[float, float, int, int], x: Tensor, steps: int
) -> float:
    """The held-out error of one replacement after `steps`."""
    shared, size, experts, top_k = way
    dim = ffn.width
    first, own = round(shared * dim), round(size * dim)
    student = SparseFFN(dim, first, experts, own, top_k)
    order = split_neurons(scores, first, experts)
    tensors = convert_ffn(ffn, order, first, experts)
    student.load_state_dict({**tensors, "gate.weight": gate_weight("layer", experts, dim, 0)})
    student.record = top_k > 0
    used = student if top_k else student.shared
    optimizer = torch.optim.Adam(used.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    generator = torch.Generator().manual_seed(1)
    held_out, rest = x[:HELD_OUT], x[HELD_OUT:]
    for _ in range(steps):
        batch = rest[torch.randint(len(rest), (BATCH,), generator=generator)]
        target = dense(ffn, batch)
        loss = F.mse_loss(student(batch), target) / target.var()
        if student.last_logits is not None:
            loss = loss + 0.01 * balance_loss(*choices(student.last_logits, top_k))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        target = dense(ffn, held_out)
        return float((student(held_out) - target).norm() / (target - target.mean(0)).norm())


def dense(ffn: DenseFFN, x: Tensor) -> Tensor:
    """The teacher's FFN: [T, D] -> [T, D]."""
    fc1_w, fc1_b, fc2_w, fc2_b = ffn
    return F.linear(F.gelu(F.linear(x, fc1_w, fc1_b), approximate="tanh"), fc2_w, fc2_b)


if __name__ == "__main__":
    main()
