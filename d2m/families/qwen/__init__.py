"""Qwen-Image: the row, and how the model and its pipeline are called.

Here too: `weights`, its list of weights for `d2m plan`; configs/, published configs.

Latents are packed as FLUX's; no pooled text: temb is the time's alone. One text encoder,
Qwen2.5-VL's language model, reads a template around the prompt. Texts are filled up to one length,
and the transformer masks what is filled. Letters: B batch, T image tokens, C packed channels, L
text tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from d2m.families.encoders import QWEN_VL, VAE_QWEN
from d2m.families.family import BlockLayout, Data, Family, Names, Plan
from d2m.families.flow import Batch, Config
from d2m.families.latents import grid, packed_noise, pixels_of
from d2m.families.qwen.weights import weights
from d2m.families.site import feed_forward

if TYPE_CHECKING:
    from torch import Tensor, nn

STATES, MASK = "encoder_hidden_states", "encoder_hidden_states_mask"
TEMPLATE_TOKENS = 34  # read: the template's tokens before the prompt, which the pipeline drops
LONGEST = 512  # read: the pipeline's max_sequence_length
STEPS, GUIDANCE, SIDE = 50, 4.0, 1024  # read: the pipeline's defaults


def generation_defaults(read: Callable[[str], Config]) -> dict[str, Any]:
    """See d2m.families.generation_defaults; guidance is the pipeline's true_cfg_scale."""
    length = read("tokenizer/tokenizer_config.json").get("model_max_length", LONGEST)
    length = length - TEMPLATE_TOKENS if isinstance(length, int) else LONGEST
    return {
        "height": SIDE,
        "width": SIDE,
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE,
        "max_sequence_length": max(1, min(length, LONGEST)),
    }


# ---------------------------------------------------------------- the transformer


def inputs(model: nn.Module, batch: Batch, x: Tensor, t: Tensor) -> dict[str, Any]:
    """Keyword inputs of forward. x [B, T, C], t [B] in [0, 1]: the model multiplies by 1000.

    The text is cut after the batch's longest, which changes nothing but the time it takes: what
    lies behind is masked.
    """
    mask = batch[MASK].bool()
    longest = int(mask.any(0).nonzero().max()) + 1
    rows, columns = (int(side) + 1 for side in batch["img_ids"][:, 1:].amax(0))
    return {
        "hidden_states": x,
        STATES: batch[STATES][:, :longest],
        MASK: mask[:, :longest],
        "timestep": t,
        "img_shapes": [[(1, rows, columns)]] * len(x),
    }


def embedding(model: nn.Module, batch: Batch, t: Tensor) -> Tensor:
    """temb [B, D] of times t [B] in [0, 1]."""
    embedder: Any = model.time_text_embed
    like = embedder.timestep_embedder.linear_1.weight  # of its hidden_states it reads the dtype
    temb: Tensor = embedder(t.to(like.dtype), like)
    return temb


def restore(model: Any) -> None:
    """The rotary tables, which are complex and no buffers."""
    rope = model.pos_embed
    model.pos_embed = type(rope)(rope.theta, rope.axes_dim, rope.scale_rope)


# ---------------------------------------------------------------- the pipeline


def text_length(pipe: Any) -> int:
    """What the tokenizer takes beside the template, at most LONGEST."""
    return max(1, min(pipe.tokenizer.model_max_length - TEMPLATE_TOKENS, LONGEST))


def encode_text(pipe: Any, captions: list[str], length: int) -> dict[str, Tensor]:
    """States [B, L, width], zeros behind a text's end, and the mask [B, L] bool, L = `length`.

    A caption at a time: a shorter one beside a longer one would see other rounding.
    """
    import torch
    import torch.nn.functional as F

    states, masks = [], []
    for caption in captions:
        encoded, _ = pipe.encode_prompt([caption], max_sequence_length=length)
        size = encoded.shape[1]
        states.append(F.pad(encoded, (0, 0, 0, length - size)))
        masks.append(torch.arange(length, device=encoded.device)[None] < size)
    return {STATES: torch.cat(states), MASK: torch.cat(masks)}


def encode_images(pipe: Any, images: Tensor) -> Tensor:
    """Images uint8 [B, H, W, 3] -> packed latents [B, T, C]: posterior's mean, normalised."""
    import torch

    vae = pipe.vae
    latents = vae.encode(pixels_of(pipe, images)[:, :, None]).latent_dist.mode()[:, :, 0]
    mean, std = (
        torch.tensor(each).to(latents).view(1, -1, 1, 1)
        for each in (vae.config.latents_mean, vae.config.latents_std)
    )
    latents = (latents - mean) / std
    packed: Tensor = pipe._pack_latents(latents, *latents.shape)
    return packed


def position_ids(pipe: Any, batch: Batch, height: int, width: int) -> dict[str, Tensor]:
    """`img_ids` [T, 3]."""
    patch = 2 * pipe.vae_scale_factor
    return {"img_ids": grid(height // patch, width // patch, batch["latents"].device)}


def generate(pipe: Any, keywords: dict[str, Any]) -> Any:
    """The pipeline's answer: its guidance has a name of its own, and wants a negative prompt."""
    given = dict(keywords)
    scale = given.pop("guidance_scale", GUIDANCE)
    if "prompt" in given:
        given.setdefault("negative_prompt", [""] * len(given["prompt"]))
    return pipe(**given, true_cfg_scale=scale)


QWEN = Family(
    names=Names(
        name="qwen",
        title="Qwen-Image",
        pipelines=("QwenImagePipeline",),
        dense_class="QwenImageTransformer2DModel",
        sparse_class="SparseQwenImageTransformer2DModel",
        title_of=lambda config: "Qwen-Image",
        tags=("qwen-image",),
    ),
    blocks=BlockLayout(
        sites=(
            feed_forward("transformer_blocks", "img_mlp", "image"),
            feed_forward("transformer_blocks", "txt_mlp", "text"),
        ),
        kinds=(("double", "transformer_blocks"),),
        depths=(("double", "num_layers"),),
        restore=restore,
    ),
    data=Data(
        inputs=inputs,
        embedding=embedding,
        text_length=text_length,
        encode_text=encode_text,
        encode_images=encode_images,
        position_ids=position_ids,
        noise=packed_noise,
        prompt_embeds={"prompt_embeds": STATES, "prompt_embeds_mask": MASK},
        generate=generate,
        unconditional=0.1,
    ),
    plan=Plan(
        # read: diffusers' defaults, for fields that a config leaves out
        sizes={
            "patch_size": 2,
            "in_channels": 64,
            "num_layers": 60,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 3584,
        },
        encoders={"text_encoder": QWEN_VL, "vae": VAE_QWEN},
        weights=weights,
        generation_defaults=generation_defaults,
        halvings=lambda vae: len(vae.get("temperal_downsample", (0, 0, 0))),
    ),
)
