"""One FFN of a teacher, sparse and pruned, learning alone: held-out error against steps.

    python -m scripts.reproduce.ffn_alone --world emoji --ffn transformer_blocks.2.ff

Every number of steps is a training of its own, whose rate falls to the end of it
(d2m.convert.local). Errors are |y - dense|^2 / |dense|^2 on inputs that were held out. Writes
results/WORLD/ffn-alone.json and ffn-alone.svg.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from d2m.cli.progress import progress_bars
from d2m.recipe.recipe import Local, Recipe
from runtime.files.atomic import write_json, write_text
from scripts.figures import machine
from scripts.reproduce import baselines

ROWS = 65536  # inputs of the FFN, of which an eighth are held out


def kinds(recipe: Recipe) -> dict[str, Recipe]:
    """What is compared, by label: the MoE in two ways, and FFNs cut to two widths."""
    return {
        "1S12E2A, experts by rank": recipe,
        "1S12E2A, by coactivation": replace(recipe, experts="coactivation", router="energy"),
        "cut to 1.5": baselines.width_pruned(recipe, 1.5),
        "cut to 2.0": baselines.width_pruned(recipe, 2.0),
    }


def learnt(
    x: Any, dense: Any, site: Any, name: str, recipe: Recipe, family: Any, local: Local
) -> dict[str, float]:
    """Errors before and after `local.steps` of one FFN made by a recipe, from inputs x [T, D]."""
    import torch

    from d2m.convert.experts_fit import fitted, is_fitted
    from d2m.convert.local import energy, learn_ffn
    from d2m.families.ffn_sites import spec_at
    from d2m.families.flow import generator_at
    from d2m.model.surgery import convert_ffn, gate_weight, split_neurons, stored_ffn
    from d2m.recipe.recipe import hidden_sizes

    spec = spec_at(recipe.spec, name, family)
    shared, _ = hidden_sizes(dense.neurons, spec)
    order = split_neurons(energy(x, dense, site.activation), shared, spec.num_experts)
    tensors = convert_ffn(dense, order, shared, spec.num_experts)
    tensors["gate.weight"] = gate_weight(name, spec.num_experts, dense.width, recipe.seed)
    if is_fitted(recipe):
        tensors |= fitted(order, x, dense, site.activation, name, recipe, family)
    named = {f"{name}.{key}": value for key, value in tensors.items()}
    ffn = stored_ffn(named, name, dense, site, spec, torch.float32)
    at = generator_at(recipe.seed, "alone", name)
    return learn_ffn(ffn, dense, site.activation, x, local, at)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--world", default="emoji", help="(%(default)s)")
    parser.add_argument("--ffn", default="transformer_blocks.2.ff", help="(%(default)s)")
    parser.add_argument("--steps", default="400,3200", help="with commas (%(default)s)")
    parser.add_argument("--samples", type=int, default=4096, help="of the teacher (%(default)s)")
    parser.add_argument("--tokens", type=int, default=1024, help="a step (%(default)s)")
    parser.add_argument("--lr", type=float, default=3e-3, help="(%(default)s)")
    parser.add_argument("--results", type=Path, help="default: results/WORLD")
    options = parser.parse_args()
    import torch

    from calib.suites import suite_named
    from d2m.convert.experts_fit import ffn_inputs
    from d2m.convert.in_memory import CALIBRATION
    from d2m.families import family_of_model
    from d2m.families.ffn_sites import read_ffn, sites_of
    from d2m.generate import load_pipeline
    from d2m.plan.presets import recipe_named
    from d2m.report.charts import Line, alone, line_chart

    folder = Path("models") / f"{options.world}-dense"
    recipe = recipe_named("L", folder)
    # Inputs enough that no FFN learns them by heart.
    calibration = replace(recipe.calibration, batches=max(1, options.samples // 64), batch_size=64)
    pipe = load_pipeline(folder, dtype="fp32")
    model = pipe.transformer.requires_grad_(False)
    family = family_of_model(model)
    batches = suite_named(options.world).batches(pipe, recipe.seed + CALIBRATION)
    looked_at = replace(recipe, calibration=calibration)
    x = ffn_inputs(model, batches, looked_at, family, ROWS)[options.ffn]
    sites = sites_of([name for name, _ in model.named_parameters()], family)
    block, site = next(each[1:] for each in sites if each[0] == options.ffn)
    dense = read_ffn(model.get_parameter, block, site)
    counts = [int(each) for each in options.steps.split(",")]
    found: dict[str, dict[str, float]] = {}
    with progress_bars() as progress:
        for number, (label, made) in enumerate(kinds(recipe).items()):
            found[label] = {}
            for done, steps in enumerate(counts):
                progress("trainings", number * len(counts) + done, len(counts) * 4)
                balance = 0.01 if made.top_k else 0.0
                local = Local(steps=steps, tokens=options.tokens, lr=options.lr, balance=balance)
                errors = learnt(x, dense, site, options.ffn, made, family, local)
                found[label]["0"] = errors["before"]
                found[label][str(steps)] = errors["after"]
        progress("trainings", len(counts) * 4, len(counts) * 4)
    results = options.results or Path("results") / options.world
    given = {"ffn": options.ffn, "lr": options.lr, "tokens": options.tokens, "rows": len(x)}
    facts = machine(torch.get_num_threads(), "torch", "diffusers")
    write_json(results / "ffn-alone.json", {"errors": found, "settings": given, "machine": facts})
    lines = [
        Line(label, [(int(steps), error) for steps, error in errors.items() if int(steps)])
        for label, errors in found.items()
    ]
    chart = line_chart(
        lines,
        x_label="steps",
        y_label="relative squared error",
        title=f"One FFN of the {options.world} teacher, learning alone",
        log_y=True,
        width=640,
    )
    write_text(results / "ffn-alone.svg", alone(chart))
    for label, errors in found.items():
        print(label, {steps: round(error, 4) for steps, error in errors.items()})


if __name__ == "__main__":
    main()
