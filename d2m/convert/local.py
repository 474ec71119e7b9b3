"""Every sparse FFN learns by itself to answer as the dense one does, on the teacher's own inputs.

What enters a dense FFN comes from d2m.convert.teacher_inputs. A neuron's importance is the energy
of its part of the output, and the sparse FFN that comes of the split learns with AdamW to give the
dense output for random tokens of it; no other layer takes part, so one FFN and its optimiser are
all that is in memory. (Ours; the paper distils the whole model at once.)
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from d2m.convert.experts_fit import fitted, is_fitted
from d2m.distill.losses import balance_loss, choices
from d2m.families import Family
from d2m.families.ffn_sites import DenseFFN, read_ffn, sites_of, spec_at
from d2m.families.flow import generator_at
from d2m.model.routing import activate
from d2m.model.sparse_ffn import SparseFFN
from d2m.model.surgery import run_dense, stored_ffn
from d2m.recipe.recipe import Local, Recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

HELD_OUT = 8  # every such row of an FFN's inputs is for the errors alone
WARMUP = 0.05  # share of the steps in which the rate rises; then a cosine


def energy(x: Tensor, ffn: DenseFFN, activation: str) -> Tensor:
    """Importance [N] of an FFN's neurons: E[h_j^2] |w2_j|^2 over inputs x [T, D] (derived).

    The expected squared norm of what a neuron adds to the output.
    """
    up, bias, *_ = ffn.to(x.device, x.dtype)
    total = torch.zeros(ffn.neurons, dtype=torch.float64)
    for part in x.split(4096):
        hidden = activate(F.linear(part, up, bias), activation)
        total += hidden.double().square().sum(0).cpu()
    return (total / len(x) * ffn.fc2_w.double().square().sum(0).cpu()).float()


def learn_ffn(
    ffn: SparseFFN,
    dense: DenseFFN,
    activation: str,
    x: Tensor,
    local: Local,
    generator: torch.Generator,
) -> dict[str, float]:
    """Train `ffn` in place to answer x [T, D] as `dense` does: {"before", "after"}.

    Errors are relative and squared, |sparse - dense|^2 / |dense|^2, over rows that are held out.
    Where learning made it worse the values stay what they were.
    """
    device = x.device
    ffn.to(device)
    wide = dense.to(device, torch.float32)
    held = torch.arange(len(x), device=device) % HELD_OUT == 0
    taught, judged = x[~held].float(), x[held].float()

    def target(part: Tensor) -> Tensor:
        return run_dense(wide, part, activation)

    def error() -> float:
        with torch.no_grad():
            wrong, size = 0.0, 0.0
            for part in judged.split(4096):
                expected = target(part)
                wrong += float((ffn(part) - expected).double().square().sum())
                size += float(expected.double().square().sum())
        return wrong / max(size, 1e-30)

    before = error()
    start = {name: value.detach().clone() for name, value in ffn.state_dict().items()}
    with torch.enable_grad():  # a streamed conversion keeps none
        descend(ffn, target, taught, local, generator)
    after = error()
    if not after < before:  # NaN as well
        ffn.load_state_dict(start)
        after = before
    return {"before": before, "after": after}


def descend(
    ffn: SparseFFN,
    target: Callable[[Tensor], Tensor],
    taught: Tensor,
    local: Local,
    generator: torch.Generator,
) -> None:
    """AdamW on the relative squared error to `target` for random rows of `taught`.

    The experts' second matrix is stored times E and learns E times as fast, as in distillation
    (d2m.distill.learner).
    """
    parts: dict[float, list[Tensor]] = {1.0: [], float(ffn.num_experts): []}
    for name, parameter in ffn.named_parameters():
        parts[float(ffn.num_experts) if name == "experts.w2" else 1.0].append(parameter)
    groups = [{"params": part, "factor": factor} for factor, part in parts.items()]
    optimizer = torch.optim.AdamW(groups, lr=local.lr, betas=(0.9, 0.98), weight_decay=0)
    rise = max(1, round(WARMUP * local.steps))
    ffn.record = True
    for step in range(local.steps):
        rate = min(1.0, (step + 1) / rise) * (0.51 + 0.49 * math.cos(math.pi * step / local.steps))
        for group in optimizer.param_groups:
            group["lr"] = local.lr * rate * group["factor"]
        rows = torch.randint(len(taught), (local.tokens,), generator=generator).to(taught.device)
        with torch.no_grad():
            expected = target(taught[rows])
        loss = (ffn(taught[rows]) - expected).square().sum()
        loss = loss / expected.square().sum().clamp_min(1e-30)
        if local.balance and ffn.last_logits is not None:
            probabilities, counts = choices(ffn.last_logits, ffn.top_k)
            loss = loss + local.balance * balance_loss(probabilities, counts)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(ffn.parameters(), 1.0)
        optimizer.step()
    ffn.record, ffn.last_logits = False, None


class LocalDistillation:
    """What a streamed conversion asks of each block: its neurons' importance, and its learning.

    `inputs` of the block under way, by site name, come from TeacherInputs; `errors` holds what was
    learnt, by site name.
    """

    def __init__(self, recipe: Recipe, family: Family, device: str = "cpu") -> None:
        assert recipe.local is not None
        self.recipe, self.local, self.family, self.device = recipe, recipe.local, family, device
        self.inputs: dict[str, Tensor] = {}
        self.errors: dict[str, dict[str, float]] = {}

    def scores(self, name: str, ffn: DenseFFN) -> Tensor:
        """See d2m.convert.streamed.Scores."""
        activation = next(
            site.activation for site in self.family.blocks.sites if name.endswith(f".{site.module}")
        )
        return energy(self.inputs[name].to(self.device), ffn, activation)

    def learn(self, block: str, dense: Mapping[str, Tensor], tensors: dict[str, Any]) -> None:
        """Train the block's FFNs and put what they learnt into `tensors`, in their dtypes."""
        for name, _, site in sites_of(dense, self.family):
            spec = spec_at(self.recipe.spec, name, self.family)
            given = read_ffn(dense.__getitem__, block, site)
            if is_fitted(self.recipe):
                order = tensors[f"{name}.neurons"]
                what = given, site.activation, name, self.recipe, self.family
                for key, value in fitted(order, self.inputs[name], *what).items():
                    tensors[f"{name}.{key}"] = value.to(tensors[f"{name}.{key}"].dtype)
            ffn = stored_ffn(tensors, name, given, site, spec, torch.float32)
            at = generator_at(self.recipe.seed, "local", name)
            x = self.inputs[name].to(self.device)
            self.errors[name] = learn_ffn(ffn, given, site.activation, x, self.local, at)
            for key, value in ffn.state_dict().items():
                whole = f"{name}.{key}"
                tensors[whole] = value.detach().cpu().to(tensors[whole].dtype)
