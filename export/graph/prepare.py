"""A transformer made ready for tracing: its blocks in export's form.

Parameters keep the model's names, but for q, k and v, which are concatenated. All of it runs on
the meta device.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from d2m.model.experts_op import experts_op
from d2m.model.modulation import SharedAdaLN
from d2m.model.routing import activate
from d2m.model.sparse_ffn import SparseFFN
from export.graph.program import Tracing


class Sinusoid(nn.Module):
    """diffusers' Timesteps with its frequencies as numbers: [B] -> [B, channels] float32.

    Folded by the exporter they came out one bit off, which times 1000 is 2e-5 of temb (measured).
    """

    def __init__(self, timesteps: Any) -> None:
        super().__init__()
        half = timesteps.num_channels // 2
        exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32)
        exponent = exponent / (half - timesteps.downscale_freq_shift)
        self.register_buffer("frequencies", torch.exp(exponent), persistent=False)
        self.scale, self.flip = timesteps.scale, timesteps.flip_sin_to_cos

    def forward(self, timesteps: Tensor) -> Tensor:
        """As Timesteps.forward."""
        angle = self.scale * (timesteps[:, None].float() * self.frequencies)
        both = (torch.cos(angle), torch.sin(angle))
        return torch.cat(both if self.flip else both[::-1], dim=-1)


class FlatFFN(SparseFFN):
    """A SparseFFN that flattens batch and tokens once, for the shared expert too.

    In two dimensions a bias is part of ONNX Runtime's matmul, and the reshapes that the op needs
    anyway are shared (one pass over [T, D] and two nodes fewer).
    """

    def __init__(self, ffn: SparseFFN) -> None:
        nn.Module.__init__(self)
        self.shared, self.gate, self.experts = ffn.shared, ffn.gate, ffn.experts
        self.top_k, self.num_experts = ffn.top_k, ffn.num_experts

    def forward(self, x: Tensor) -> Tensor:
        """As SparseFFN.forward, for top_k from 1."""
        rows = x.reshape(-1, x.shape[-1])
        hidden = activate(linear(rows, self.shared.fc1), self.shared.activation)
        logits = torch.matmul(rows.float(), self.gate.weight.t())
        weights = self.experts
        given = (weights.w1, weights.b1, weights.w2, self.top_k, weights.activation)
        routed = experts_op(rows, logits, *given)
        return (linear(hidden, self.shared.fc2) + routed).reshape(x.shape)


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """A Linear as matmul and add, which TensorRT fuses better than Gemm."""
    product = torch.matmul(x, layer.weight.t())
    return product if layer.bias is None else product + layer.bias


def prepare(model: nn.Module, tracing: Tracing) -> nn.Module:
    """Concatenate QKV and set the modules that export well, in place; returns the model.

    Afterwards the parameters are those that a bundle holds: attn.to_qkv, attn.to_added_qkv (or
    attn.to_q and attn.to_kv, where queries are of one stream and keys of the other). Norms
    with shared modulation take it instead of temb (see Embed): their shared module is none.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, SparseFFN):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, FlatFFN(module))
        if isinstance(module, SharedAdaLN):
            taken: Any = nn.Identity()
            module._shared = (taken,)
        if hasattr(module, "time_proj"):
            module.time_proj = Sinusoid(module.time_proj)
        if hasattr(module, "fuse_projections") and hasattr(module, "to_q"):
            module.fuse_projections()
            parts = ("to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
            crossed = getattr(module, "is_cross_attention", False)  # its queries are others' tokens
            for part in parts if crossed else ("to_q", *parts):
                if hasattr(module, part):
                    delattr(module, part)
            module.set_processor(tracing.processor())
    tracing.prepare(model)
    return model
