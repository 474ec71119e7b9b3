"""Tiny but genuine FLUX pipelines for tests: the real classes, random weights everywhere.

No weight, bias, norm scale or modulation is left at zero or one, so that nothing passes by zeros.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from diffusers import FluxPipeline, FluxTransformer2DModel

MAX_SEQUENCE_LENGTH = 16
IMAGE_SIZE = 16  # pixels; VAE f2 and 2x2 packing make 4 x 4 = 16 image tokens
WORDS = (
    "a an the of and in on to left right above below photo one two three four red green blue "
    "yellow purple white orange cyan black circle circles square squares triangle triangles "
    "cross crosses star stars ring rings is are with"
).split()
TRANSFORMER_CONFIG = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}


def randomize(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Fill every parameter from `seed`: matrices at 1/sqrt(fan in), scales about 1, biases .1."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim >= 2:
                embedding = name.rpartition(".")[0].endswith(("embedding", "shared"))
                fan_in = 1 if embedding else math.prod(parameter.shape[1:])
                noise = noise * fan_in**-0.5
            elif name.endswith("weight"):
                noise = 1 + 0.2 * noise
            else:
                noise = 0.1 * noise
            parameter.copy_(noise.to(parameter.dtype))
    return module


def tiny_transformer(
    seed: int = 0, dtype: torch.dtype | None = None, **config: object
) -> FluxTransformer2DModel:
    """2 double and 2 single blocks, 2 heads of 16 (D = 32); `config` overrides fields."""
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(**{**TRANSFORMER_CONFIG, **config})
    randomize(model, seed)
    return model.to(dtype=dtype).eval() if dtype is not None else model.eval()


def tiny_inputs(
    seed: int = 0,
    dtype: torch.dtype | None = None,
    batch: int = 2,
    image_tokens: int = 16,
    text_tokens: int = 8,
    in_channels: int = 16,
) -> dict[str, torch.Tensor]:
    """Keyword inputs of a tiny transformer's forward (image_tokens must be a square number)."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    dtype = dtype or torch.float32
    side = math.isqrt(image_tokens)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    img_ids = torch.zeros(side, side, 3)
    img_ids[..., 1] = torch.arange(side)[:, None]
    img_ids[..., 2] = torch.arange(side)[None, :]
    return {
        "hidden_states": noise(batch, image_tokens, in_channels),
        "encoder_hidden_states": noise(batch, text_tokens, 32),
        "pooled_projections": noise(batch, 32),
        "timestep": torch.rand(batch, generator=generator).to(dtype),
        "guidance": torch.full((batch,), 3.5, dtype=dtype),
        "img_ids": img_ids.reshape(-1, 3).to(dtype),
        "txt_ids": torch.zeros(text_tokens, 3, dtype=dtype),
    }


def clip_tokenizer(length: int = MAX_SEQUENCE_LENGTH):
    """A real CLIP byte-pair tokenizer: one token a word of WORDS, characters otherwise."""
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz0123456789,.-'"
    pieces = [*letters, *(letter + "</w>" for letter in letters)]
    merges = []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merge = (parts[0], parts[1])
            if merge not in merges:
                merges.append(merge)
            parts = [parts[0] + parts[1], *parts[2:]]
            if parts[0] not in pieces:
                pieces.append(parts[0])
    specials = ["<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: index for index, piece in enumerate([*pieces, *specials])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length)


def t5_tokenizer(length: int = MAX_SEQUENCE_LENGTH):
    """A real T5 unigram tokenizer: one token a word of WORDS, characters otherwise."""
    from transformers import T5TokenizerFast

    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -8.0)]
    vocab += [("\u2581" + word, -2.0) for word in WORDS]
    vocab += [(letter, -9.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789,.-'"]
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=length)


def build_pipeline(seed: int = 0) -> FluxPipeline:
    """The tiny pipeline in memory (float32)."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    clip, t5 = clip_tokenizer(), t5_tokenizer()
    clip_config = CLIPTextConfig(
        vocab_size=len(clip),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_SEQUENCE_LENGTH,
        bos_token_id=clip.bos_token_id,
        eos_token_id=clip.eos_token_id,
        pad_token_id=clip.pad_token_id,
        projection_dim=32,
    )
    t5_config = T5Config(
        vocab_size=len(t5),
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        feed_forward_proj="gated-gelu",
        pad_token_id=t5.pad_token_id,
        eos_token_id=t5.eos_token_id,
        decoder_start_token_id=t5.pad_token_id,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.7,
        shift_factor=0.1,
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=randomize(vae, seed + 1).eval(),
        text_encoder=randomize(CLIPTextModel(clip_config), seed + 2).eval(),
        tokenizer=clip,
        text_encoder_2=randomize(T5EncoderModel(t5_config), seed + 3).eval(),
        tokenizer_2=t5,
        transformer=tiny_transformer(seed),
    )


def tiny_pipeline(directory: str | Path, seed: int = 0) -> Path:
    """Save the tiny pipeline under `directory` and return the path."""
    path = Path(directory)
    pipe = build_pipeline(seed)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(path)
    return path
