"""Qwen-Image's VAE for export: a video's on one frame, without its convolutions in time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.families.encoders import decoder_program, encoder_program
from export.graph.attention import attended, heads
from export.graph.program import Program


class FrameConv(nn.Module):
    """QwenImageCausalConv3d on one frame: before it are zeros, so the last slice in time is all."""

    def __init__(self, conv: Any) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.sides = (conv._padding[2], conv._padding[0])

    def forward(self, x: Tensor, cache: None = None) -> Tensor:
        """[B, C, 1, h, w] -> [B, C', 1, h, w]."""
        frame = F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, padding=self.sides)
        return frame[:, :, None]


class FrameAttention(nn.Module):
    """QwenImageAttentionBlock on one frame, in the form of export/graph/attention.py, which is
    fused."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm, self.to_qkv, self.proj = block.norm, block.to_qkv, block.proj

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, 1, h, w] -> the same shape."""
        frame = x[:, :, 0]
        tokens = self.to_qkv(self.norm(frame)).flatten(2).transpose(1, 2)
        query, key, value = heads(tokens, frame.shape[1])
        joined = attended(query, key, value).transpose(1, 2)
        return self.proj(joined.unflatten(2, frame.shape[2:]))[:, :, None] + x


def on_one_frame(module: nn.Module) -> None:
    """Put what one frame needs in place of a video's layers, in a module that is not used again."""
    for name, each in list(module.named_modules()):
        parent, _, child = name.rpartition(".")
        if child == "time_conv":  # of the frames after the first
            delattr(module.get_submodule(parent), child)
        elif type(each).__name__ == "QwenImageCausalConv3d":
            setattr(module.get_submodule(parent), child, FrameConv(each))
        elif type(each).__name__ == "QwenImageAttentionBlock":
            setattr(module.get_submodule(parent), child, FrameAttention(each))
        elif isinstance(each, nn.Upsample):
            each.mode = "nearest"  # the same, doubling; ONNX has no nearest-exact


class Decoder(nn.Module):
    """AutoencoderKLQwenImage.decode of one frame; parameter names are the model's."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.post_quant_conv = model.post_quant_conv
        self.decoder = model.decoder
        on_one_frame(self)

    def forward(self, latents: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, 3, H, W], cut to -1 to 1."""
        image: Tensor = self.decoder(self.post_quant_conv(latents[:, :, None]))
        return image[:, :, 0].clamp(-1, 1)


class ImageEncoder(nn.Module):
    """AutoencoderKLQwenImage.encode of one frame; parameter names are the model's."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.encoder = model.encoder
        self.quant_conv = model.quant_conv
        on_one_frame(self)

    def forward(self, image: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, C, h, w], the mean."""
        moments = self.quant_conv(self.encoder(image[:, :, None]))[:, :, 0]
        mean: Tensor = moments.chunk(2, dim=1)[0]
        return mean


def vae_program(model: Any, dtype: torch.dtype) -> Program:
    """The decoding half, for any size."""
    config = model.config
    return decoder_program(Decoder(model), dtype, (config.z_dim, 3), scale_factor(model))


def vae_encoder_program(model: Any, dtype: torch.dtype) -> Program:
    """The encoding half, for any size that it divides."""
    return encoder_program(ImageEncoder(model), dtype, model.config.z_dim, scale_factor(model))


def scale_factor(model: Any) -> int:
    """Pixels of the image's side to one of the latents'."""
    factor: int = 2 ** len(model.config.temperal_downsample)
    return factor
