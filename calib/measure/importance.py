"""How much every hidden neuron of a dense FFN matters: the score that splits it into experts.

Read: importance of a weight = |dL/dw * w| (first-order Taylor), summed over a neuron's weights.
Ours: L is the flow-matching loss on calibration batches (the distillation loss has no gradient
while student and teacher are equal), |.| is taken per batch, and the weights of a neuron are its
fc1 row, fc1 bias and fc2 column, of a gated one the rows (and biases) of its gate and of its value.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from d2m.families import Site, family_of_model
from d2m.families.ffn_sites import read_ffn, sites_of
from d2m.families.flow import generator_at
from d2m.families.inputs import noised, prediction, transformer_inputs
from d2m.families.site import up_rows

if TYPE_CHECKING:
    from torch import Tensor, nn

    from d2m.families.ffn_sites import DenseFFN
    from d2m.recipe.recipe import Batches, Progress, Recipe

Scores = Callable[[str, "DenseFFN"], "Tensor"]

WIDE = torch.float32  # thousands of bfloat16 values are summed in it


def neuron_importance(
    model: nn.Module,
    batches: Batches,
    recipe: Recipe,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Scores of every FFN site of a dense transformer by the recipe's `split`: name -> [N].

    "taylor" runs the model on the recipe's calibration batches; "magnitude" and "random" run
    nothing. float32 on the CPU. ValueError if the model has no dense FFN left.
    """
    if not _sites(model):
        raise ValueError("the model has no dense FFN to score; expected a dense transformer.")
    if recipe.split == "taylor":
        size = recipe.calibration.batch_size
        losses = (
            flow_matching_loss(
                model,
                batches(i, size),
                generator_at(seed, "taylor", i),
                recipe.t_mean,
                recipe.t_std,
            )
            for i in range(recipe.calibration.batches)
        )
        return taylor(model, losses, recipe.calibration.batches, progress)
    return scores_of(model, magnitudes if recipe.split == "magnitude" else uniform(seed))


def flow_matching_loss(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    generator: torch.Generator,
    mean: float = 1.2,
    std: float = 1.2,
) -> Tensor:
    """Mean squared error of the prediction (velocity, noise) at random times, one per sample.

    `batch` as `shapes_batches` returns it, with `guidance` [B] where it should not be 3.5.
    """
    x, t, aim = noised(model, batch, generator, mean, std)
    inputs = transformer_inputs(model, batch, x, t.to(x.dtype))
    found = prediction(model, model(**inputs, return_dict=False)[0], x)
    dtype = torch.promote_types(found.dtype, torch.float32)  # bf16 would round the mean
    return torch.nn.functional.mse_loss(found.to(dtype), aim.to(found.device, dtype))


def taylor(
    model: nn.Module, losses: Iterator[Tensor], count: int, progress: Progress | None = None
) -> dict[str, Tensor]:
    """sum over a neuron's weights of |dL/dw * w|, averaged over the losses: site -> [N].

    `losses` yields scalars computed by `model`, `count` of them. A gradient is scored and freed as
    soon as it is there, so no copy of the model's size is ever held.
    """
    scores: dict[str, Tensor] = {}
    with _scoring(model, scores):
        for done in range(count):
            next(losses).backward()
            if progress:
                progress("importance", done + 1, count)
    return {name: (score / count).float().cpu() for name, score in scores.items()}


@contextmanager
def _scoring(model: nn.Module, scores: dict[str, Tensor]) -> Iterator[None]:
    """Within: backward adds every FFN weight's score to `scores` instead of keeping gradients."""

    def score(site: str, width: int, axis: int | None, rows: int) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            values = (parameter.grad * parameter.detach()).abs()
            parameter.grad = None
            if axis is not None:
                values = values.sum(axis, dtype=torch.float64)
            # Of proj_out's columns, and of to_qkv_mlp_proj's rows, the FFN's are the last.
            for half in values[-rows * width :].split(width):
                scores[site] += half

        return hook

    with ExitStack() as stack:
        for parameter in model.parameters():
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
        model.requires_grad_(False)
        for name, block, site in _sites(model):
            ffn = read_ffn(model.get_parameter, block, site)
            width = ffn.neurons
            scores[name] = torch.zeros(width, dtype=torch.float64, device=ffn.fc2_w.device)
            for linear in site.linears:
                for parameter, axis in (("weight", 0 if linear == site.fc2 else 1), ("bias", None)):
                    if parameter == "bias" and (linear == site.fc2 or ffn.fc1_b is None):
                        continue
                    weight = model.get_parameter(f"{block}.{linear}.{parameter}")
                    rows = 1 if linear == site.fc2 or site.gate else up_rows(site.activation)
                    weight.requires_grad_(True)
                    hook = score(name, width, axis, rows)
                    stack.enter_context(weight.register_post_accumulate_grad_hook(hook))
        with torch.enable_grad():
            yield


def scores_of(model: nn.Module, scores: Scores) -> dict[str, Tensor]:
    """Scores that need the weights alone, FFN by FFN: site -> [N]. Runs nothing."""
    with torch.no_grad():
        return {
            name: scores(name, read_ffn(model.get_parameter, block, site)).cpu()
            for name, block, site in _sites(model)
        }


def magnitudes(name: str, ffn: DenseFFN) -> Tensor:
    """Sum of the absolute values of every neuron's weights (ours), float32 [N]."""
    rows = ffn.fc1_w.abs().sum(1, dtype=WIDE)
    if ffn.fc1_b is not None:
        rows = rows + ffn.fc1_b.abs().to(WIDE)
    first, *others = rows.split(ffn.neurons)
    return sum(others, first) + ffn.fc2_w.abs().sum(0, dtype=WIDE)


def uniform(seed: int) -> Scores:
    """Uniform scores by seed and site name: the baseline that Taylor must beat."""
    return lambda name, ffn: torch.rand(ffn.neurons, generator=generator_at(seed, "random", name))


def from_file(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Scores a person brings, or those of another conversion: a safetensors file, site -> [N].

    FileNotFoundError or ValueError, in one sentence, if it is no such file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"--importance is {str(path)!r}, no file; expected calibration, magnitude, or a "
            "safetensors file with a score for every hidden neuron of every FFN."
        )
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a safetensors file ({error}); expected one such as the "
            "importance.safetensors of a converted model."
        ) from error


def importance_from_option(how: str) -> tuple[Callable[..., dict[str, Tensor]], Scores | None, str]:
    """What `--importance` means: "calibration", "magnitude" or a file's path.

    Returns (scores of a whole model, as `neuron_importance` has them; scores of one FFN from its
    weights alone, None where the model has to run; a label that tells it from others).
    """
    from runtime.files.hashes import sha256

    if how == "calibration":
        return neuron_importance, None, how
    if how == "magnitude":
        return lambda model, *args, **options: scores_of(model, magnitudes), magnitudes, how
    known = from_file(how)

    def scores(name: str, ffn: DenseFFN) -> Tensor:
        if name not in known:
            raise ValueError(
                f"{how} has no scores of {name}; expected one for every FFN of the model."
            )
        return known[name]

    return lambda *args, **options: known, scores, f"file {sha256(how)}"


def _sites(model: nn.Module) -> list[tuple[str, str, Site]]:
    """The sites whose FFN is dense."""
    names = {name for name, _ in model.named_parameters()}
    found = sites_of(names, family_of_model(model))
    return [each for each in found if f"{each[1]}.{each[2].fc1}.weight" in names]
