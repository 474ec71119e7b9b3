"""The shapes model that ships with d2m, its transformer run by torch on any device.

Text encoders and VAE stay in ONNX Runtime; the transformer is a `Flux` whose weights are the
bundle's. So a machine with torch and no diffusers generates end to end with the kernels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from d2m.families import FLUX
from d2m.model.block_group import block_groups
from d2m.model.grouping import group_blocks
from d2m.recipe.structure import Blocks
from scripts.gpu.flux import Flux, Size
from scripts.gpu.timing import backend


def size_of(bundle: Any, top_k: int) -> Size:
    """The size, read off the program and the weights' shapes."""
    program = bundle.component("transformer")["program"]
    tensors = {name: spec.shape for name, spec in bundle.weights("transformer").tensors.items()}
    width, text = tensors["x_embedder.weight"][1], tensors["context_embedder.weight"][0]
    head_dim = tensors["transformer_blocks.0.attn.norm_q.weight"][0]
    double, single = (sum(row["type"] == kind for row in program) for kind in ("double", "single"))
    experts = tensors["transformer_blocks.0.ff.experts.w1"][0]
    pooled = tensors["time_text_embed.text_embedder.linear_1.weight"][0]
    channels = tensors["x_embedder.weight"][0]
    heads = width // head_dim
    return Size(heads, head_dim, double, single, channels, text, pooled, experts, top_k)


def groups_of(bundle: Any) -> Blocks | None:
    """The bundle's groups of blocks, None where it has none."""
    found: dict[str, list[tuple[int, ...]]] = {"double": [], "single": []}
    row = bundle.component("transformer")
    for group in row.get("groups", {}).values():
        calls = [row["program"][index] for index in group["calls"]]
        members = tuple(int(call["prefix"].strip(".").rsplit(".", 1)[1]) for call in calls)
        found[calls[0]["type"]].append(members)
    if not any(found.values()):
        return None
    alphas = {group["alpha"] for group in row["groups"].values()}
    assert len(alphas) == 1, alphas
    single = tuple(sorted(found["single"]))
    return Blocks(tuple(sorted(found["double"])), single, bundle.manifest["kappa"], alphas.pop())


def load_bundle(bundle: Any, top_k: int, device: torch.device, dtype: torch.dtype) -> Flux:
    """A Flux with the bundle's weights; a bundle holds Linear weights as [in, out]."""
    model = Flux(size_of(bundle, top_k))
    if blocks := groups_of(bundle):
        group_blocks(model, blocks, FLUX)
    model.eval().requires_grad_(False)
    tensors = bundle.weights("transformer")
    linears = {
        f"{name}.weight" for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)
    }
    for name, parameter in model.named_parameters():
        array = torch.from_numpy(np.array(tensors.array(name, "float32")))
        parameter.data = (array.t() if name in linears else array).contiguous()
        parameter.data = parameter.data.to(device, torch.float32 if routes(name) else dtype)
    return model.to(device)


def routes(name: str) -> bool:
    """Whether a parameter chooses experts or blocks: those stay in float32."""
    return ".gate." in name or ".router." in name


class Transformer:
    """An executor of the component `transformer` (see runtime.program.executor.Executor).

    It runs what the model was loaded with: ValueError for another top_k or kappa.
    """

    def __init__(self, model: Flux, device: torch.device, dtype: torch.dtype, compiled: bool):
        self.model, self.device, self.dtype = model, device, dtype
        self.run = torch.compile(model, backend=backend(device)) if compiled else model

    @torch.no_grad()
    def __call__(
        self,
        inputs: dict[str, np.ndarray],
        top_k: int | None = None,
        kappa: int | None = None,
        starts: Any = None,
        cache: Any = None,
        residuals: Any = None,
    ) -> dict[str, Any]:
        kappas = {group.kappa for group in block_groups(self.model).values()}
        others = {top_k} - {None, self.model.size.top_k} or {kappa} - {None} - kappas
        if others or starts or cache or residuals:
            raise ValueError(
                f"top_k is {top_k}, kappa {kappa}; this transformer was loaded with its bundle's"
            )
        wide = ("timestep", "guidance", "rope_cos", "rope_sin")
        given = {
            name: torch.from_numpy(np.ascontiguousarray(array)).to(
                self.device, torch.float32 if name in wide else self.dtype
            )
            for name, array in inputs.items()
        }
        return {"sample": self.run(**given).float().cpu().numpy()}


def pipeline(
    device: torch.device, dtype: torch.dtype, top_k: int | None = None, compiled: bool = False
) -> Any:
    """The default bundle as a callable whose transformer runs in torch on `device`."""
    from runtime.pipeline import Pipeline

    pipe = Pipeline(None, "ort")
    k = top_k or pipe.manifest["top_k"]
    model = load_bundle(pipe.bundle, k, device, dtype)
    pipe._executors["transformer"] = Transformer(model, device, dtype, compiled)
    return pipe
