"""LoRA files for tests, on every Linear of a FLUX transformer, in the names that people use."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

RANK = 3
Factors = dict[str, tuple["Tensor", "Tensor"]]

# read: BFL's names of FLUX.1's layers, dots as underscores, and what they are in diffusers.
_DOUBLE = {
    "attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn_proj": ("attn.to_out.0",),
    "mlp_0": ("ff.net.0.proj",),
    "mlp_2": ("ff.net.2",),
    "mod_lin": ("norm1.linear",),
}
_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation_lin": ("norm.linear",),
}
_ENDS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in_in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in_out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in_in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in_out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in_in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in_out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer_linear": "proj_out",
    "final_layer_adaLN_modulation_1": "norm_out.linear",
    # Chroma's
    "distilled_guidance_layer_in_proj": "distilled_guidance_layer.in_proj",
    "distilled_guidance_layer_layers_1_in_layer": "distilled_guidance_layer.layers.1.linear_1",
    "distilled_guidance_layer_layers_1_out_layer": "distilled_guidance_layer.layers.1.linear_2",
}


def factors(model: torch.nn.Module, seed: int = 0, rank: int = RANK) -> Factors:
    """(up [O, R], down [R, I]) for every Linear of the model, in its dtype."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            up = torch.randn(module.out_features, rank, generator=generator, dtype=torch.float64)
            down = torch.randn(rank, module.in_features, generator=generator, dtype=torch.float64)
            kind = module.weight.dtype
            found[name] = (0.1 * up.to(kind), 0.1 * down.to(kind))
    return found


def peft(found: Factors, alpha: float | None = None) -> dict[str, Tensor]:
    """As diffusers and peft write it."""
    import torch

    tensors = {}
    for name, (up, down) in found.items():
        tensors[f"transformer.{name}.lora_A.weight"] = down
        tensors[f"transformer.{name}.lora_B.weight"] = up
        if alpha is not None:
            tensors[f"transformer.{name}.alpha"] = torch.tensor(alpha)
    return tensors


def kohya(model: torch.nn.Module, seed: int = 0, alpha: float | None = 1.0) -> dict[str, Tensor]:
    """As kohya's sd-scripts writes it: BFL's layers, of which some are several of diffusers'."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    shapes = {n: m.weight.shape for n, m in model.named_modules() if hasattr(m, "in_features")}
    layers: dict[str, tuple[str, ...]] = {}
    for i in range(len(model.transformer_blocks)):
        for part, names in _DOUBLE.items():
            block = f"transformer_blocks.{i}"
            layers[f"double_blocks_{i}_img_{part}"] = tuple(f"{block}.{n}" for n in names)
        for part, ends in (
            ("attn_qkv", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
            ("attn_proj", ("attn.to_add_out",)),
            ("mlp_0", ("ff_context.net.0.proj",)),
            ("mlp_2", ("ff_context.net.2",)),
            ("mod_lin", ("norm1_context.linear",)),
        ):
            layers[f"double_blocks_{i}_txt_{part}"] = tuple(f"{block}.{n}" for n in ends)
    for i in range(len(model.single_transformer_blocks)):
        for part, names in _SINGLE.items():
            block = f"single_transformer_blocks.{i}"
            layers[f"single_blocks_{i}_{part}"] = tuple(f"{block}.{n}" for n in names)
    layers |= {part: (name,) for part, name in _ENDS.items()}
    tensors = {}
    for layer, names in layers.items():
        if not shapes.keys() >= set(names):  # of the other model: FLUX.1's or Chroma's
            continue
        rows, columns = sum(shapes[name][0] for name in names), shapes[names[0]][1]
        up = 0.1 * torch.randn(rows, RANK, generator=generator)
        down = 0.1 * torch.randn(RANK, columns, generator=generator)
        tensors[f"lora_unet_{layer}.lora_down.weight"] = down
        tensors[f"lora_unet_{layer}.lora_up.weight"] = up
        if alpha is not None:
            tensors[f"lora_unet_{layer}.alpha"] = torch.tensor(alpha)
    return tensors


def write(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> Path:
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def fused(model: torch.nn.Module, found: Factors, scale: float = 1.0) -> torch.nn.Module:
    """The model with the products added, in place."""
    import torch

    with torch.no_grad():
        for name, (up, down) in found.items():
            model.get_submodule(name).weight += scale * (up @ down)
    return model
