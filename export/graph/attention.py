"""FLUX attention written for export: the same arithmetic as diffusers', in few ONNX nodes.

Set as an attention processor (diffusers' own extension point) on blocks that are about to be
traced; nothing else of a block is touched. QKV comes from the concatenated projection, softmax
stands between two plain matmuls (the form that TensorRT fuses into one kernel), norms are written
as x / sqrt(mean(x^2) + eps) * w (the form that ONNX Runtime fuses into one), and the rotation
splits pairs instead of slicing them. A double block is 125 nodes this way and 164 as diffusers
writes it, a single block 67 and 102.

Shape letters: B batch, T tokens, H heads, C channels of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

MASKED = 30000.0  # taken off a score: e^-30000 is 0 in every type, and float16 holds it


class ExportAttention:
    """Processor for FluxAttention with fused projections (`attn.fuse_projections()`)."""

    _attention_backend = None  # what diffusers reads on every processor
    _parallel_config = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        reach: Tensor | None = None,
        references: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """hidden_states [B, T, D] (and text [B, Tt, D]) -> outputs of the same shapes.

        reach [B, Tt + T]: 0 at tokens that nothing attends to and that attend to nothing, else 1.
        references: see `with_references`.
        """
        query, key, value = heads(attn.to_qkv(hidden_states), attn.head_dim)
        query, key = rms_norm(query, attn.norm_q), rms_norm(key, attn.norm_k)
        if encoder_hidden_states is not None:
            text_query, text_key, text_value = heads(
                attn.to_added_qkv(encoder_hidden_states), attn.head_dim
            )
            text_query = rms_norm(text_query, attn.norm_added_q)
            text_key = rms_norm(text_key, attn.norm_added_k)
            query = torch.cat([text_query, query], dim=2)
            key = torch.cat([text_key, key], dim=2)
            value = torch.cat([text_value, value], dim=2)
        if image_rotary_emb is not None:
            query, key = rotate(query, *image_rotary_emb), rotate(key, *image_rotary_emb)
        if references is not None:
            key, value = with_references(key, value, references)
        if reach is None:
            output = attended(query, key, value)
        else:
            output = attended(query, key, value, taken_off(reach, query.dtype)) * reach[..., None]
        if encoder_hidden_states is None:
            return output
        length = encoder_hidden_states.shape[1]
        return attn.to_out[0](output[:, length:]), attn.to_add_out(output[:, :length])


def with_references(key: Tensor, value: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [B, H, T, C], and behind them those of R more tokens that are attended to.

    references [B, R, 2 H C]: the keys, rotated, and the values side by side.
    """
    size = key.shape[-1]
    more = references.unflatten(-1, (2, -1, size)).permute(2, 0, 3, 1, 4)
    return torch.cat([key, more[0]], dim=2), torch.cat([value, more[1]], dim=2)


def attended(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """Three [B, H, T, C] -> softmax(q k^T / sqrt(C) + bias) v as tokens [B, T, H C].

    bias broadcasts to [B, H, T, T]. Scaled before the product: in float16 q k^T alone could
    overflow.
    """
    scores = torch.matmul(query * query.shape[-1] ** -0.5, key.transpose(-1, -2))
    if bias is not None:
        scores = scores + bias
    return torch.matmul(torch.softmax(scores, dim=-1), value).transpose(1, 2).flatten(2)


def taken_off(reach: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, N] of ones and zeros -> what is added to scores, [B, 1, 1, N]."""
    return ((reach.to(dtype) - 1) * MASKED)[:, None, None]


def heads(qkv: Tensor, size: int) -> tuple[Tensor, ...]:
    """[B, T, 3 H C] -> query, key, value [B, H, T, C]; size: C."""
    stacked = qkv.unflatten(-1, (3, -1, size)).permute(2, 0, 3, 1, 4)
    return stacked[0], stacked[1], stacked[2]  # one Gather each; unbind is a Slice and a Squeeze


def rms_norm(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """nn.RMSNorm over C: computed in float32 as torch does, returned in x's type."""
    wide = x.float()
    eps = norm.eps if norm.eps is not None else torch.finfo(x.dtype).eps
    normal = wide / torch.sqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if norm.weight is not None:
        normal = normal * norm.weight.float()
    return normal.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, H, T, C] by cos, sin [T, C], channel pairs (0, 1), (2, 3), ..."""
    real, imaginary = x.unflatten(-1, (-1, 2)).split(1, dim=-1)
    turned = torch.cat([-imaginary, real], dim=-1).flatten(-2)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)
