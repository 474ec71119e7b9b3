"""FLUX.1 [dev] and [schnell]: the row, and how the model and its pipeline are called.

Both are one class; [schnell] has no guidance embedding and is drawn in 4 steps from texts of at
most 256 tokens. Letters: B batch, T image tokens, C packed channels, L text tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from d2m.beside import CLIP_L, T5_XXL, VAE_16
from d2m.family import Batch, Config, Family, Site

if TYPE_CHECKING:
    from torch import Tensor, nn

    from d2m.anatomy import Stack

CONDITIONS = ("encoder_hidden_states", "pooled_projections", "img_ids", "txt_ids")
GUIDANCE = 3.5  # read: what FLUX.1 [dev] is drawn with; ours, where a batch brings none
# read: steps, guidance and the longest text with guidance embedding ([dev]), without ([schnell])
DRAWN = {True: (28, GUIDANCE, 512), False: (4, 0.0, 256)}


def titled(config: Config) -> str:
    """FLUX.1 [dev] or FLUX.1 [schnell], by the guidance embedding."""
    return f"FLUX.1 [{'dev' if config.get('guidance_embeds') else 'schnell'}]"


def drawing(read: Callable[[str], Config]) -> dict[str, Any]:
    """See d2m.draw.drawing_defaults: the VAE's size, and DRAWN."""
    guided = bool(read("transformer/config.json").get("guidance_embeds", False))
    size = read("vae/config.json").get("sample_size", 1024)
    size = size if isinstance(size, int) else 1024
    steps, guidance, most = DRAWN[guided]
    length = read("tokenizer_2/tokenizer_config.json").get("model_max_length", most)
    return {
        "height": size,
        "width": size,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        # transformers writes 1e30 for a tokenizer without a limit
        "max_sequence_length": min(length if isinstance(length, int) else most, most),
    }


def anatomy(config: Config, structure: Any, image: int, text: int) -> list[Stack]:
    """See d2m.anatomy."""
    from d2m.anatomy import anatomy as function

    return function(config, structure, image, text)


# ---------------------------------------------------------------- the transformer


def inputs(model: nn.Module, batch: Batch, x: Tensor, t: Tensor) -> dict[str, Tensor]:
    """Keyword inputs of forward. x [B, T, C], t [B] in [0, 1]: the model multiplies by 1000.

    batch: CONDITIONS, and `guidance` [B] where it should not be GUIDANCE (it is left out for a
    model without guidance embedding).
    """
    import torch

    found = {name: batch[name] for name in CONDITIONS}
    found |= {"hidden_states": x, "timestep": t}
    if model.config.guidance_embeds:  # type: ignore[union-attr]
        found["guidance"] = batch.get("guidance", torch.full_like(t, GUIDANCE))
    return found


def embedding(model: nn.Module, batch: Batch, t: Tensor) -> Tensor:
    """temb [B, D] of times t [B] in [0, 1], pooled text, and guidance [B] where a model has it."""
    import torch

    dtype = batch["pooled_projections"].dtype
    if hasattr(model, "x_embedder") and not model.x_embedder.weight.is_meta:
        dtype = model.x_embedder.weight.dtype
    times = [t.to(dtype) * 1000]
    if model.config.guidance_embeds:  # type: ignore[union-attr]
        guidance = batch.get("guidance", torch.full_like(t, GUIDANCE))
        times.append(guidance.to(dtype) * 1000)
    return model.time_text_embed(*times, batch["pooled_projections"])  # type: ignore[operator]


def random_text(config: Config, n: int, generator: Any) -> dict[str, Tensor]:
    """Random pooled text [n, P]."""
    import torch

    size = int(config["pooled_projection_dim"])
    return {"pooled_projections": torch.randn(n, size, generator=generator)}


# ---------------------------------------------------------------- the pipeline


def text_length(pipe: Any) -> int:
    """What T5's tokenizer takes, at most 512 tokens."""
    return min(pipe.tokenizer_2.model_max_length, DRAWN[True][2])


def encode_text(pipe: Any, captions: list[str], length: int) -> dict[str, Tensor]:
    """T5's states [B, L, width] and CLIP's pooled vector [B, P]."""
    states, pooled, _ = pipe.encode_prompt(captions, prompt_2=None, max_sequence_length=length)
    return {"encoder_hidden_states": states, "pooled_projections": pooled}


def encode_images(pipe: Any, images: Tensor) -> Tensor:
    """Images uint8 [B, H, W, 3] -> packed latents [B, T, C]: posterior's mean, scaled."""
    latents = encoded(pipe, images)
    return pipe._pack_latents(latents, *latents.shape)


def encoded(pipe: Any, images: Tensor) -> Tensor:
    """The same before packing, [B, C / 4, h, w]; any AutoencoderKL's."""
    vae = pipe.vae
    pixels = images.permute(0, 3, 1, 2).to(vae.device).to(vae.dtype) / 127.5 - 1
    latents = vae.encode(pixels).latent_dist.mode()
    return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def places(pipe: Any, batch: Batch, height: int, width: int) -> dict[str, Tensor]:
    """`img_ids` [T, 3] and `txt_ids` [L, 3], as FluxPipeline makes them."""
    import torch

    latents, states = batch["latents"], batch["encoder_hidden_states"]
    rows, columns = (size // (2 * pipe.vae_scale_factor) for size in (height, width))
    ids = pipe._prepare_latent_image_ids(len(latents), rows, columns, latents.device, latents.dtype)
    zeros = torch.zeros(states.shape[1], 3, device=latents.device, dtype=states.dtype)
    return {"img_ids": ids, "txt_ids": zeros}


def noise(pipe: Any, height: int, width: int, generator: Any) -> Tensor:
    """Pure noise of one picture, packed [T, C]."""
    import torch

    scale, channels = pipe.vae_scale_factor, pipe.transformer.config.in_channels // 4
    shape = (1, channels, height // scale, width // scale)
    return pipe._pack_latents(torch.randn(shape, generator=generator), *shape)[0]


def trajectory(
    pipe: Any, text: Batch, noise: Tensor, settings: Mapping[str, Any], keep: Callable[..., Any]
) -> None:
    """Draw from packed noise [1, T, C]; text: of one prompt, without the batch's dimension."""
    device = pipe.transformer.device
    pipe(
        prompt_embeds=text["encoder_hidden_states"][None].to(device),
        pooled_prompt_embeds=text["pooled_projections"][None].to(device),
        latents=noise,
        height=settings["height"],
        width=settings["width"],
        num_inference_steps=settings["num_inference_steps"],
        guidance_scale=settings["guidance_scale"],
        output_type="latent",
        callback_on_step_end=keep,
    )


FLUX = Family(
    name="flux",
    title="FLUX.1",
    pipelines=("FluxPipeline",),
    dense_class="FluxTransformer2DModel",
    sparse_class="SparseFluxTransformer2DModel",
    ratio=4,
    sites=(
        Site("transformer_blocks", "ff", "ff.net.0.proj", "ff.net.2", "image"),
        Site(
            "transformer_blocks",
            "ff_context",
            "ff_context.net.0.proj",
            "ff_context.net.2",
            "text",
        ),
        Site(
            "single_transformer_blocks",
            "proj_mlp",
            "proj_mlp",
            "proj_out",
            "both",
            rest="proj_out.linear",
            identity="act_mlp",
        ),
    ),
    kinds=(("double", "transformer_blocks"), ("single", "single_transformer_blocks")),
    depths=(("double", "num_layers"), ("single", "num_single_layers")),
    # read: diffusers' defaults, for fields that a config leaves out
    sizes={
        "patch_size": 1,
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
    },
    others=("guidance_embeds",),
    beside={"text_encoder": CLIP_L, "text_encoder_2": T5_XXL, "vae": VAE_16},
    titled=titled,
    drawing=drawing,
    anatomy=anatomy,
    inputs=inputs,
    embedding=embedding,
    random_text=random_text,
    text_length=text_length,
    encode_text=encode_text,
    encode_images=encode_images,
    places=places,
    noise=noise,
    trajectory=trajectory,
    tags=("flux",),
)
