"""FLUX.1 [dev] and [schnell]: the row, and how the model and its pipeline are called.

Here too: `weights`, its list of weights for `d2m plan`; configs/, published configs;
presets/.

Both are one class; [schnell] has no guidance embedding and generates in 4 steps from texts of at
most 256 tokens. Letters: B batch, T image tokens, C packed channels, L text tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from d2m.families.encoders import CLIP_L, T5_XXL, VAE_16
from d2m.families.family import BlockLayout, Data, Family, Names, Plan, longest_text
from d2m.families.flow import Batch, Config
from d2m.families.flux.weights import weights
from d2m.families.latents import joint_ids, packed_latents, packed_noise, random_pooled_text
from d2m.families.site import feed_forward, joint_output

if TYPE_CHECKING:
    from torch import Tensor, nn

CONDITIONS = ("encoder_hidden_states", "pooled_projections", "img_ids", "txt_ids")
GUIDANCE = 3.5  # read: what FLUX.1 [dev] generates with; ours, where a batch brings none
# read: steps, guidance and the longest text with guidance embedding ([dev]), without ([schnell])
DEFAULTS = {True: (28, GUIDANCE, 512), False: (4, 0.0, 256)}
FILL = (50, 30.0, 512)  # read: of FLUX.1 Fill


def title_of(config: Config) -> str:
    """FLUX.1 [dev] or FLUX.1 [schnell], by the guidance embedding; or a model that reads more than
    latents, by its channels."""
    read, written = config.get("in_channels", 64), config.get("out_channels")
    if written and read != written:
        return f"FLUX.1 {'Canny or Depth' if read == 2 * written else 'Fill'} [dev]"
    return f"FLUX.1 [{'dev' if config.get('guidance_embeds') else 'schnell'}]"


def generation_defaults(read: Callable[[str], Config]) -> dict[str, Any]:
    """See d2m.families.generation_defaults: the VAE's size, and DEFAULTS or FILL's."""
    config = read("transformer/config.json")
    guided = bool(config.get("guidance_embeds", False))
    size = read("vae/config.json").get("sample_size", 1024)
    size = size if isinstance(size, int) else 1024
    fills = "Fill" in title_of(config)
    steps, guidance, most = FILL if fills else DEFAULTS[guided]
    return {
        "height": size,
        "width": size,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "max_sequence_length": longest_text(read, "tokenizer_2", most),
    }


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


# ---------------------------------------------------------------- the pipeline


def text_length(pipe: Any) -> int:
    """What T5's tokenizer takes, at most 512 tokens."""
    return min(pipe.tokenizer_2.model_max_length, DEFAULTS[True][2])


def encode_text(pipe: Any, captions: list[str], length: int) -> dict[str, Tensor]:
    """T5's states [B, L, width] and CLIP's pooled vector [B, P]."""
    states, pooled, _ = pipe.encode_prompt(captions, prompt_2=None, max_sequence_length=length)
    return {"encoder_hidden_states": states, "pooled_projections": pooled}


FLUX = Family(
    names=Names(
        name="flux",
        title="FLUX.1",
        pipelines=("FluxPipeline", "FluxFillPipeline", "FluxControlPipeline"),
        editors=("FluxKontextPipeline",),
        dense_class="FluxTransformer2DModel",
        sparse_class="SparseFluxTransformer2DModel",
        title_of=title_of,
        tags=("flux",),
    ),
    blocks=BlockLayout(
        sites=(
            feed_forward("transformer_blocks", "ff", "image"),
            feed_forward("transformer_blocks", "ff_context", "text"),
            joint_output("single_transformer_blocks"),
        ),
        kinds=(("double", "transformer_blocks"), ("single", "single_transformer_blocks")),
        depths=(("double", "num_layers"), ("single", "num_single_layers")),
    ),
    data=Data(
        inputs=inputs,
        embedding=embedding,
        random_text=random_pooled_text,
        text_length=text_length,
        encode_text=encode_text,
        encode_images=packed_latents,
        position_ids=joint_ids,
        noise=packed_noise,
        prompt_embeds={
            "prompt_embeds": "encoder_hidden_states",
            "pooled_prompt_embeds": "pooled_projections",
        },
    ),
    plan=Plan(
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
        encoders={"text_encoder": CLIP_L, "text_encoder_2": T5_XXL, "vae": VAE_16},
        weights=weights,
        generation_defaults=generation_defaults,
    ),
)
