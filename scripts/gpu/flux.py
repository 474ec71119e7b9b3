"""A FLUX transformer in torch alone, dense or sparse: for machines without diffusers.

Shape letters: B batch, T image tokens, L text tokens, D width, N heads. Parameters have the names
that a bundle's transformer.safetensors has, so the shapes model loads (`load_bundle`), and a test
holds its output against ONNX Runtime's. Modulation (AdaLN) is a Linear of its own in every block,
as d2m converts it; the paper's presets share it, which at B = 1 saves about 6 GB of reading a step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2m.families import FLUX
from d2m.model.sparse_ffn import AttentionPlusFFN, SparseFFN
from d2m.plan.presets import presets_for
from d2m.recipe import recipe
from d2m.recipe.structure import active_blocks


@dataclass(frozen=True)
class Size:
    """Of a transformer; experts 0 is dense. FLUX.1 [dev] by default (read: its config.json)."""

    heads: int = 24
    head_dim: int = 128
    double: int = 19
    single: int = 38
    channels: int = 64
    text_width: int = 4096
    pooled: int = 768
    experts: int = 0
    top_k: int = 2

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


@cache
def presets() -> dict[str, tuple[int, int]]:
    """Blocks that run in one step, (double, single), of every preset for FLUX.1 [dev]."""
    size = Size()
    depth = {"double": size.double, "single": size.single}
    files = presets_for(FLUX, depth)
    found = {name: active_blocks(recipe.load(path).blocks, depth) for name, path in files.items()}
    return {name: (active["double"], active["single"]) for name, active in found.items()}


class Modulation(nn.Module):
    """silu and a Linear: [B, D] -> `parts` tensors [B, 1, D]; called `linear` in checkpoints."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, parts * width)
        self.parts = parts

    def forward(self, temb: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(temb))[:, None].chunk(self.parts, dim=-1)


def norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, N, T, head_dim] by angles [T, head_dim], pairs side by side."""
    real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-imaginary, real), dim=-1).flatten(-2)
    return (x.float() * cos + turned * sin).to(x.dtype)


class Attention(nn.Module):
    """Of both streams (added=True) or of one joined stream, without its output projection there."""

    def __init__(self, size: Size, added: bool) -> None:
        super().__init__()
        width, dim = size.width, size.head_dim
        self.heads, self.added = size.heads, added
        self.to_qkv = nn.Linear(width, 3 * width)
        self.norm_q, self.norm_k = nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)
        if added:
            self.to_added_qkv = nn.Linear(width, 3 * width)
            self.norm_added_q = nn.RMSNorm(dim, eps=1e-6)
            self.norm_added_k = nn.RMSNorm(dim, eps=1e-6)
            self.to_out = nn.ModuleList([nn.Linear(width, width)])
            self.to_add_out = nn.Linear(width, width)

    def split(self, both: Tensor, norms: tuple[nn.Module, nn.Module]) -> tuple[Tensor, ...]:
        """[B, T, 3D] -> q, k, v [B, N, T, head_dim]."""
        parts = both.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return norms[0](parts[0]), norms[1](parts[1]), parts[2]

    def forward(self, image: Tensor, text: Tensor | None, cos: Tensor, sin: Tensor) -> Any:
        q, k, v = self.split(self.to_qkv(image), (self.norm_q, self.norm_k))
        if text is not None:
            added = self.split(self.to_added_qkv(text), (self.norm_added_q, self.norm_added_k))
            q, k, v = (torch.cat(pair, dim=2) for pair in zip(added, (q, k, v)))
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v)
        y = y.transpose(1, 2).flatten(2)
        if text is None:
            return y
        length = text.shape[1]
        return self.to_out[0](y[:, length:]), self.to_add_out(y[:, :length])


class DenseFFN(nn.Module):
    """D -> hidden -> D with tanh GELU; 4 D is FLUX's, 1.5 D has the sparse one's operations."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def ffn(size: Size) -> nn.Module:
    width = size.width
    if not size.experts:
        return DenseFFN(width, 4 * width)
    return SparseFFN(width, width, size.experts, 3 * width // size.experts, size.top_k)


class Block(nn.Module):
    """image [B, T, D], text [B, L, D] -> text, image: called as diffusers calls its blocks."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor],
        joint_attention_kwargs: None = None,
    ) -> tuple[Tensor, Tensor]:
        return self.run(hidden_states, encoder_hidden_states, temb, image_rotary_emb)


class Double(Block):
    """Both streams attend together, each with its FFN."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.norm1, self.norm1_context = Modulation(size.width, 6), Modulation(size.width, 6)
        self.attn = Attention(size, added=True)
        self.ff, self.ff_context = ffn(size), ffn(size)

    def run(self, image: Tensor, text: Tensor, temb: Tensor, rotary: Any) -> tuple[Tensor, Tensor]:
        shift, scale, gate, shift2, scale2, gate2 = self.norm1(temb)
        tshift, tscale, tgate, tshift2, tscale2, tgate2 = self.norm1_context(temb)
        inside = norm(image, scale, shift), norm(text, tscale, tshift)
        one, two = self.attn(*inside, *rotary)
        image, text = image + gate * one, text + tgate * two
        image = image + gate2 * self.ff(norm(image, scale2, shift2))
        return text + tgate2 * self.ff_context(norm(text, tscale2, tshift2)), image


class Single(Block):
    """One joined stream; attention and FFN side by side."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        width = size.width
        self.norm = Modulation(width, 3)
        self.attn = Attention(size, added=False)
        self.sparse = bool(size.experts)
        self.proj_mlp = ffn(size) if self.sparse else nn.Linear(width, 4 * width)
        self.proj_out = AttentionPlusFFN(width) if self.sparse else nn.Linear(5 * width, width)

    def run(self, image: Tensor, text: Tensor, temb: Tensor, rotary: Any) -> tuple[Tensor, Tensor]:
        length = text.shape[1]
        x = torch.cat([text, image], dim=1)
        shift, scale, gate = self.norm(temb)
        inside = norm(x, scale, shift)
        wide = self.proj_mlp(inside)
        if not self.sparse:
            wide = F.gelu(wide, approximate="tanh")
        y = torch.cat([self.attn(inside, None, *rotary), wide], dim=-1)
        x = x + gate * self.proj_out(y)
        return x[:, :length], x[:, length:]


class TwoLayers(nn.Module):
    def __init__(self, first: int, width: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(first, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class Embedding(nn.Module):
    """Timestep and guidance (both times 1000 already) and pooled text -> [B, D]."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.timestep_embedder = TwoLayers(256, size.width)
        self.guidance_embedder = TwoLayers(256, size.width)
        self.text_embedder = TwoLayers(size.pooled, size.width)

    def forward(self, time: Tensor, guidance: Tensor, pooled: Tensor) -> Tensor:
        def waves(t: Tensor) -> Tensor:
            rates = torch.exp(-math.log(10000) / 128 * torch.arange(128, device=t.device))
            angles = t[:, None].float() * rates
            return torch.cat([angles.cos(), angles.sin()], dim=-1).to(pooled.dtype)

        times = self.timestep_embedder(waves(time)) + self.guidance_embedder(waves(guidance))
        return times + self.text_embedder(pooled)


class Flux(nn.Module):
    """One step: the arguments are named as a bundle's component `transformer` names them."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size, self.inner_dim = size, size.width
        self.active: tuple[int, int] = (size.double, size.single)
        self.x_embedder = nn.Linear(size.channels, size.width)
        self.context_embedder = nn.Linear(size.text_width, size.width)
        self.time_text_embed = Embedding(size)
        self.transformer_blocks = nn.ModuleList(Double(size) for _ in range(size.double))
        self.single_transformer_blocks = nn.ModuleList(Single(size) for _ in range(size.single))
        self.norm_out = Modulation(size.width, 2)
        self.proj_out = nn.Linear(size.width, size.channels)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        guidance: Tensor,
        rope_cos: Tensor,
        rope_sin: Tensor,
    ) -> Tensor:
        """[B, T, channels], [B, L, text_width], [B, pooled], [B], [B], tables -> as the first."""
        image, text = self.x_embedder(hidden_states), self.context_embedder(encoder_hidden_states)
        times = (timestep.to(image.dtype) * 1000, guidance.to(image.dtype) * 1000)
        temb = self.time_text_embed(*times, pooled_projections)
        double, single = self.active
        blocks = (*self.transformer_blocks[:double], *self.single_transformer_blocks[:single])
        for block in blocks:
            text, image = block(
                hidden_states=image,
                encoder_hidden_states=text,
                temb=temb,
                image_rotary_emb=(rope_cos, rope_sin),
                joint_attention_kwargs=None,
            )
        scale, shift = self.norm_out(temb)
        return self.proj_out(norm(image, scale, shift))


def build(size: Size, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Flux:
    """Random weights of 1/sqrt(inputs), made on the device; routers stay in float32."""
    torch.manual_seed(seed)
    with torch.device("meta"):
        model = Flux(size)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if ".gate." in name else dtype)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if ".norm_" in name and parameter.ndim == 1:
            parameter.fill_(1.0)
        elif parameter.ndim == 1:
            parameter.zero_()
        else:
            fan_in = parameter.shape[-2] if ".experts." in name else parameter.shape[-1]
            parameter.normal_(std=fan_in**-0.5)
    return model
