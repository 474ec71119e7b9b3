"""Tiny but genuine pipelines of every family: the real classes, random weights everywhere.

A family is a row of FAMILIES: how its pipeline is built, and what its tests need to know of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.tiny.chroma import chroma
from tests.tiny.flux2 import klein_base
from tests.tiny.pipeline import (
    IMAGE_SIZE,
    MAX_SEQUENCE_LENGTH,
    WORDS,
    build_pipeline,
    clip_tokenizer,
    randomize,
    t5_tokenizer,
    tiny_transformer,
)
from tests.tiny.zimage import zimage

SD3_CONFIG = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 80,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 72,
    "out_channels": 4,
    "pos_embed_max_size": 12,
    "dual_attention_layers": (0,),
    "qk_norm": "rms_norm",
}

PIXART_CONFIG = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "cross_attention_dim": 32,
    "caption_channels": 48,
    "interpolation_scale": 2,
    "use_additional_conditions": False,
}


@dataclass(frozen=True)
class Tiny:
    """A family's tiny pipeline.

    build(): the pipeline in memory; title: what d2m calls it; groups: blocks of a group that it can
    have; refused: blocks of one that it cannot have, or (); kinds: block types of its program;
    modulated: whether its blocks have modulation to share; size: of pictures that it draws.
    """

    build: Callable[[], Any]
    family: str
    title: str
    groups: dict[str, list[list[int]]]
    kinds: tuple[str, ...]
    refused: dict[str, list[list[int]]] | None = None
    modulated: bool = True
    size: tuple[int, int] = (12, 16)


def schnell() -> Any:
    """FLUX.1 [schnell]: no guidance embedding, a scheduler without dynamic shifting."""
    pipe = build_pipeline()
    pipe.register_modules(transformer=tiny_transformer(guidance_embeds=False))
    return pipe


def sd3() -> Any:
    """SD3.5 medium's ways: a block with a second attention, norms of queries and keys."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel

    base = build_pipeline()
    t5 = t5_tokenizer()
    t5_config = T5Config(**{**base.text_encoder_2.config.to_dict(), "d_model": 80})
    transformer = SD3Transformer2DModel(**SD3_CONFIG)
    return StableDiffusion3Pipeline(
        transformer=randomize(transformer, 0).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=base.vae,
        text_encoder=clip(CLIPTextModelWithProjection, 4, 32),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(CLIPTextModelWithProjection, 5, 40),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=randomize(T5EncoderModel(t5_config), 6).eval(),
        tokenizer_3=t5,
    )


def pixart() -> Any:
    """PixArt-Sigma's ways: noise and variance predicted, a masked text, DPM-Solver++.

    Its VAE has what all published ones have: an attention, and a convolution of the latents.
    """
    from diffusers import (
        AutoencoderKL,
        DPMSolverMultistepScheduler,
        PixArtSigmaPipeline,
        PixArtTransformer2DModel,
    )
    from transformers import T5Config, T5EncoderModel

    base = build_pipeline()
    t5_config = T5Config(**{**base.text_encoder_2.config.to_dict(), "d_model": 48})
    whole = {"mid_block_add_attention": True, "use_quant_conv": True, "use_post_quant_conv": True}
    vae = AutoencoderKL.from_config({**base.vae.config, **whole, "shift_factor": None})
    return PixArtSigmaPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=randomize(T5EncoderModel(t5_config), 6).eval(),
        vae=randomize(vae, 1).eval(),
        transformer=randomize(PixArtTransformer2DModel(**PIXART_CONFIG), 0).eval(),
        scheduler=DPMSolverMultistepScheduler(),
    )


def clip(cls: Any, seed: int, width: int) -> Any:
    """A CLIP text encoder with a projection as wide as itself."""
    from transformers import CLIPTextConfig

    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_SEQUENCE_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        projection_dim=width,
    )
    return randomize(cls(config), seed).eval()


QWEN_CONFIG = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": (4, 6, 6),
}


def qwen() -> Any:
    """Qwen-Image: texts that are masked, a video's VAE, a shift that grows with the picture."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )

    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.7, 1.0, 2.0],
    )
    tokenizer = qwen_tokenizer()
    return QwenImagePipeline(
        transformer=randomize(QwenImageTransformer2DModel(**QWEN_CONFIG), 0).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, shift_terminal=0.02, max_shift=0.9, max_image_seq_len=8192
        ),
        vae=randomize(vae, 1).eval(),
        text_encoder=qwen_encoder(len(tokenizer)),
        tokenizer=tokenizer,
    )


def qwen_encoder(words: int) -> Any:
    """Qwen2.5-VL with two layers; its eye, which no prompt opens, has one."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": words,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]},
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    vision |= {"patch_size": 4, "out_hidden_size": 32, "fullatt_block_indexes": [0]}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return randomize(Qwen2_5_VLForConditionalGeneration(config), 2).eval()


def qwen_tokenizer() -> Any:
    """A real Qwen2 byte-pair tokenizer: one token a word of WORDS and of the pipeline's template,
    so that the template begins with 34 tokens as with the large vocabulary."""
    from transformers import Qwen2Tokenizer

    template = (
        "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial"
        " relationships of the objects and background"
    )
    words = ["system", "user", "assistant", *template.replace(",", "").split(), *WORDS]
    ranks: dict[tuple[str, str], int] = {}
    for word in (form for each in words for form in (each, "\u0120" + each)):
        parts = list(word)
        while pairs := [pair for pair in zip(parts, parts[1:]) if pair in ranks]:
            first = min(pairs, key=ranks.__getitem__)
            at = list(zip(parts, parts[1:])).index(first)
            parts[at : at + 2] = ["".join(first)]
        while len(parts) > 1:
            ranks[parts[0], parts[1]] = len(ranks)
            parts[:2] = [parts[0] + parts[1]]
    letters = sorted(set("abcdefghijklmnopqrstuvwxyzD0123456789,.:-'\u0120\u010a"))
    pieces = [*letters, *dict.fromkeys("".join(pair) for pair in ranks)]
    vocab = {piece: index for index, piece in enumerate(["<|endoftext|>", *pieces])}
    return Qwen2Tokenizer(
        vocab=vocab,
        merges=list(ranks),
        model_max_length=34 + MAX_SEQUENCE_LENGTH,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )


FAMILIES = {
    "schnell": Tiny(
        schnell,
        "flux",
        "FLUX.1 [schnell]",
        {"double": [[0, 1]], "single": [[0, 1]]},
        ("embed", "double", "double", "single", "single", "final"),
    ),
    "klein-base": Tiny(
        klein_base,
        "flux2",
        "FLUX.2 [klein]",
        {"double": [[0, 1]], "single": [[1, 2]]},
        ("embed", "double", "double", "single", "single", "single", "final"),
        modulated=False,
    ),
    "sd3": Tiny(
        sd3,
        "sd3",
        "Stable Diffusion 3.5 medium",
        {"double": [[0, 1]]},
        ("embed", "dual", "joint", "last", "final"),
        refused={"double": [[1, 2]]},
    ),
    "pixart": Tiny(
        pixart,
        "pixart",
        "PixArt-Sigma",
        {},
        ("embed", "cross", "cross", "final"),
        refused={"double": [[0, 1]]},
        modulated=False,
        size=(16, 24),  # its pipeline takes multiples of 8
    ),
    "qwen": Tiny(
        qwen,
        "qwen",
        "Qwen-Image",
        {"double": [[0, 1]]},
        ("embed", "joint", "joint", "joint", "final"),
    ),
    "chroma": Tiny(
        chroma,
        "chroma",
        "Chroma",
        {"double": [[0, 1]], "single": [[0, 1]]},
        ("embed", "double", "double", "single", "single", "final"),
        modulated=False,
    ),
    "zimage": Tiny(
        zimage,
        "zimage",
        "Z-Image",
        {"double": [[0, 1]]},
        ("embed", "layer", "layer", "layer", "final"),
        modulated=False,
    ),
}
SIZE = IMAGE_SIZE
