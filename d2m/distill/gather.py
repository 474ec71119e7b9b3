"""Parts of sharded tensors and the whole of them: gathered, handed out, written, clipped.

A process's part of a parameter is an ordinary tensor in the parameter's own memory, so AdamW and
averages need to know nothing of sharding. Whole tensors exist one at a time: torch's
`get_model_state_dict` would gather all of them in the first process before the first is written,
and `set_model_state_dict` sends every process every whole tensor, in the dtype it has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from d2m.distill import checkpoint
from d2m.distill.processes import Crew, broadcast, mean
from d2m.shards import order


def local(parameter: Tensor) -> Tensor:
    """This process's part of a parameter, in the same memory; an unsharded one as it is."""
    if not isinstance(parameter, DTensor):
        return parameter
    return nn.Parameter(parameter.detach().to_local(), requires_grad=parameter.requires_grad)


def gathered(part: Tensor, like: Tensor) -> Tensor:
    """The whole of what every process has a part of, laid out as the parameter `like`."""
    if not isinstance(like, DTensor):
        return part.detach()
    whole = DTensor.from_local(
        part.detach(),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
    return whole.full_tensor()


def distributed_state(
    tensors: Mapping[str, Tensor], student: nn.Module, crew: Crew
) -> dict[str, Tensor]:
    """A checkpoint's tensors, whole in the first process -> every process's part, on the CPU.

    `PREFIX/NAME` is laid out as the student's parameter NAME, anything else stays whole.
    """
    headers = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    found: dict[str, Tensor] = {}
    parameters = dict(student.named_parameters())
    for name, (shape, dtype) in broadcast(crew, headers).items():
        like = parameters.get(name.partition("/")[2])
        part = distributed(tensors.get(name), shape, dtype, like, crew)
        found[name] = local(part).detach().cpu().clone()
    return found


def save(
    folder: Path,
    stage: int,
    step: int,
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    student: nn.Module,
    crew: Crew,
) -> None:
    """`checkpoint.save` of tensors of which every process has a part, in the same format.

    The whole tensors go through the first process one at a time, so that any number of processes
    can read the file, and one alone.
    """
    parameters = dict(student.named_parameters())
    likes = {name: parameters.get(name.partition("/")[2], part) for name, part in tensors.items()}
    kinds = {name: (part.dtype, likes[name].shape) for name, part in tensors.items()}

    def whole(name: str) -> Tensor:
        return gathered(tensors[name], likes[name]).cpu()

    if crew.leads:
        checkpoint.save(folder, stage, step, (kinds, whole), facts)
    else:
        for name in order(kinds):
            gathered(tensors[name], likes[name])


def collect(student: nn.Module, whole: nn.Module | None, names: Iterable[str]) -> None:
    """Put what was learnt into the first process's whole student, which becomes float32."""
    for name in names:
        parameter = student.get_parameter(name)
        value = gathered(local(parameter), parameter)
        if whole is not None:
            home = whole.get_parameter(name)
            home.data = value.float().to(home.device, copy=True)
    if whole is not None:
        whole.float()


def to_cpu(*models: nn.Module) -> None:
    """Move models to the CPU in place; what they share stays shared."""
    moved: dict[int, Tensor] = {}
    for model in models:
        for tensor in (*model.parameters(), *model.buffers()):
            pointer = tensor.data_ptr()
            if pointer not in moved:
                moved[pointer] = tensor.detach().cpu()
            tensor.data = moved[pointer]


def clip_shared(
    parameters: Mapping[str, Tensor], own: Mapping[str, Tensor], largest: float, crew: Crew
) -> Tensor:
    """Average the gradients of what every process holds whole, then clip as `clip_grad_norm_` does.

    own: this process's parts of `parameters`, with gradients, which FSDP has averaged where they
    are sharded. Returns the norm of the whole gradient.
    """
    whole = [part for name, part in own.items() if part is parameters[name]]
    gradients: list[Any] = [part.grad for part in whole]
    for part, average in zip(whole, mean(crew, gradients)):
        part.grad = average.to(part.dtype)
    kept = {id(part) for part in whole}
    shards = [part.grad for part in own.values() if id(part) not in kept]
    device = next(iter(own.values())).device

    def squares(gradients: list[Any]) -> Tensor:
        norms = torch._foreach_norm(gradients) if gradients else []
        return torch.stack([*norms, torch.zeros((), device=device)]).square().sum()

    (of_shards,) = mean(crew, [squares(shards)])
    norm = (of_shards * crew.size + squares([part.grad for part in whole])).sqrt()
    torch._foreach_mul_(
        [part.grad for part in own.values()], (largest / (norm + 1e-6)).clamp(max=1.0)
    )
    return norm


def distributed(
    value: Tensor | None, shape: torch.Size, dtype: torch.dtype, like: Tensor | None, crew: Crew
) -> Tensor:
    """A tensor of the first process in all of them, laid out as `like`; whole without sharding.

    Sharded ones are scattered: a process is sent its own part alone.
    """
    device = torch.device(crew.device)
    if crew.leads:
        assert value is not None and value.shape == shape
        whole = value.detach().to(device, dtype).contiguous()
    else:
        whole = torch.empty(shape, dtype=dtype, device=device)
    if isinstance(like, DTensor):
        return distribute_tensor(whole, like.device_mesh, like.placements)
    dist.broadcast(whole, src=0)
    return whole.clone()  # never the memory of the first process's own model
