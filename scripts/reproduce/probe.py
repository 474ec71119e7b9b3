"""Which runs of blocks a linear map replaces best: depth pruning's choice, as PPCL looks for runs.

    python -m scripts.reproduce.probe --world emoji

For every run of neighbouring blocks of a kind, a linear map with a bias from the image tokens that
enter the run to those that leave it is fitted by least squares on half of the calibration batches;
its error on the other half, over the variance of what leaves, tells how much of the run is linear.
Our reading of "pluggable pruning with contiguous layer distillation"; nothing is trained. Written
to scripts/reproduce/linear-runs-WORLD.json together with the model it was measured on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.files.atomic import write_json

if TYPE_CHECKING:
    from torch import Tensor, nn

HERE = Path(__file__).parent
BATCHES, BATCH, LONGEST = 8, 32, 4
RIDGE = 1e-4  # of the inputs' mean square: keeps directions without any from blowing up


def file_of(dense: str | Path) -> Path:
    """Where the runs of a model are kept."""
    return HERE / f"linear-runs-{Path(dense).name.removesuffix('-dense')}.json"


def digest(dense: str | Path) -> str:
    """SHA-256 of the model's transformer."""
    found = hashlib.sha256()
    for path in sorted((Path(dense) / "transformer").glob("*.safetensors")):
        found.update(path.read_bytes())
    return found.hexdigest()


def read_runs(dense: str | Path) -> dict[str, dict[str, float]]:
    """Kind of block -> "first-last" -> error.

    FileNotFoundError or ValueError, with the cure, where nothing was measured of this model.
    """
    path, cure = file_of(dense), "measure them with `python -m scripts.reproduce.probe`"
    if not path.is_file():
        raise FileNotFoundError(f"{path} with the runs that are linear is missing; {cure}.")
    found = json.loads(path.read_text("utf-8"))
    if found["transformer"] != digest(dense):
        raise ValueError(f"{path} was measured on another model than {dense}; {cure}.")
    return found["runs"]


def linear_error(inputs: Tensor, outputs: Tensor) -> float:
    """Of the best linear map with a bias, inputs [N, D] -> outputs [N, D]: error over variance.

    Fitted on the first half of the rows, measured on the other, float64.
    """
    import torch

    x, y = inputs.double(), outputs.double()
    half = len(x) // 2
    centre, mean = x[:half].mean(0), y[:half].mean(0)
    a, b = x[:half] - centre, y[:half] - mean
    gram = a.T @ a
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    left = y[half:] - mean - (x[half:] - centre) @ torch.linalg.solve(gram, a.T @ b)
    return float(left.square().sum() / (y[half:] - y[half:].mean(0)).square().sum())


def measure(
    model: nn.Module, data: Sequence[Mapping[str, Tensor]], longest: int = LONGEST
) -> dict[str, dict[str, float]]:
    """Errors of all runs of two to `longest` blocks and of single ones, by kind.

    data: keyword inputs of the transformer. Blocks take and give image tokens as `hidden_states`.
    """
    import torch

    from d2m.families import family_of_model

    family = family_of_model(model)
    lists: dict[str, Any] = {kind: model.get_submodule(name) for kind, name in family.blocks.kinds}
    entered: dict[tuple[str, int], list[Tensor]] = {}
    left: dict[tuple[str, int], list[Tensor]] = {}
    hooks = []
    for kind, blocks in lists.items():
        for index, block in enumerate(blocks):

            def keep(
                _: Any, args: tuple, named: dict, answer: tuple, at: tuple[str, int] = (kind, index)
            ) -> None:
                image = named["hidden_states"] if "hidden_states" in named else args[0]
                entered.setdefault(at, []).append(image.flatten(0, 1))
                left.setdefault(at, []).append(answer[1].flatten(0, 1))

            hooks.append(block.register_forward_hook(keep, with_kwargs=True))
    try:
        with torch.no_grad():
            for inputs in data:
                model(**inputs, return_dict=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {
        kind: {
            f"{first}-{last}": round(
                linear_error(torch.cat(entered[kind, first]), torch.cat(left[kind, last])), 6
            )
            for first in range(len(blocks))
            for last in range(first, min(first + longest, len(blocks)))
        }
        for kind, blocks in lists.items()
    }


def main() -> None:
    """Measure the dense model and write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--world", default="emoji", help="(%(default)s)")
    parser.add_argument("--dense", help="default: models/WORLD-dense")
    args = parser.parse_args()
    dense = args.dense or f"models/{args.world}-dense"

    from calib.suites import suite_named
    from d2m.families.flow import generator_at
    from d2m.families.inputs import noised, transformer_inputs
    from d2m.generate import load_pipeline

    pipe = load_pipeline(dense, dtype="fp32")
    batches, model = suite_named(args.world).batches(pipe, 0), pipe.transformer
    data = []
    for index in range(BATCHES):
        batch = batches(index, BATCH)
        x, t, _ = noised(model, batch, generator_at(0, "probe", index))
        data.append(transformer_inputs(model, batch, x, t.to(x.dtype)))
    runs = measure(model, data)
    answer = {"transformer": digest(dense), "dense": dense, "runs": runs}
    write_json(file_of(dense), answer | {"samples": BATCHES * BATCH})
    for kind, errors in runs.items():
        print(kind, ", ".join(f"{name} {error:.4f}" for name, error in errors.items()))


if __name__ == "__main__":
    main()
