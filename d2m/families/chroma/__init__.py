"""Chroma: the row, and how the model and its pipeline are called.

Here too: `weights`, its list of weights for `d2m plan`; configs/, published configs; presets/.

FLUX.1's blocks without modulation of their own: one approximator makes all vectors of modulation
[B, N, D] of the time alone, and every block gets its 12 or 3 of them. T5 reads the text alone; its
padding is masked but for one token (read: so it was trained). diffusers 0.42 makes that mask of
floats, which torch's attention adds to scores in place of masking by it; here the pipeline always
gets encoded texts with masks that are true and false, which mask. Letters: B batch, T image tokens,
C packed channels, L text tokens, D width, N vectors of modulation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from d2m.families.chroma.weights import LISTS, vectors, weights
from d2m.families.encoders import T5_XXL, VAE_16
from d2m.families.family import BlockLayout, Data, Family, Names, Plan, longest_text, vae_halvings
from d2m.families.flow import Batch, Config
from d2m.families.latents import joint_ids, packed_latents, packed_noise
from d2m.families.site import feed_forward, joint_output

if TYPE_CHECKING:
    from torch import Tensor, nn

STATES, MASK = "encoder_hidden_states", "encoder_hidden_states_mask"
APPROXIMATOR = "distilled_guidance_layer"
LONGEST = 512  # read: the pipeline's max_sequence_length
SIDE = 128  # read: the pipeline's default_sample_size, in latents
STEPS, GUIDANCE = 35, 5.0  # read: the pipeline's defaults


def generation_defaults(read: Callable[[str], Config]) -> dict[str, Any]:
    """See d2m.families.generation_defaults."""
    side = SIDE * 2 ** vae_halvings(read("vae/config.json"))
    return {
        "height": side,
        "width": side,
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE,
        "max_sequence_length": longest_text(read, "tokenizer", LONGEST),
    }


# ---------------------------------------------------------------- the transformer


def inputs(model: nn.Module, batch: Batch, x: Tensor, t: Tensor) -> dict[str, Tensor]:
    """Keyword inputs of forward. x [B, T, C], t [B] in [0, 1]: the model multiplies by 1000.

    Its mask [B, L + T] is true for the text's tokens that count and for all of the image.
    """
    import torch

    mask = batch[MASK].to(x.device).bool()
    whole = torch.cat([mask, mask.new_ones(x.shape[:2])], dim=1)
    found = {name: batch[name] for name in (STATES, "img_ids", "txt_ids")}
    return found | {"hidden_states": x, "timestep": t, "attention_mask": whole}


def embedding(model: Any, batch: Batch, t: Tensor) -> Tensor:
    """What routers read of times t [B] in [0, 1]: the mean of all vectors of modulation, [B, D]."""
    return modulations_of(model, t).mean(1)


def modulations_of(model: Any, t: Tensor) -> Tensor:
    """All vectors of modulation [B, N, D] of times t [B] in [0, 1]."""
    dtype = model.x_embedder.weight.dtype
    made: Tensor = getattr(model, APPROXIMATOR)(model.time_text_embed(t.to(dtype) * 1000))
    return made


def vectors_of(config: Config, blocks: str, index: int) -> list[int]:
    """Which vectors of modulation a block reads: those of all single blocks come first, then of the
    double ones the image's, then their texts'."""
    if blocks == LISTS["single"]:
        return list(range(3 * index, 3 * index + 3))
    image = 3 * config["num_single_layers"] + 6 * index
    text = image + 6 * config["num_layers"]
    return [*range(image, image + 6), *range(text, text + 6)]


def waves(config: Config) -> Tensor:
    """Which vector is which, as the approximator reads it (read): [N, channels / 2]."""
    import torch
    from diffusers.models.embeddings import get_timestep_embedding

    places, channels = torch.arange(vectors(config)) * 1000, config["approximator_num_channels"]
    found: Tensor = get_timestep_embedding(
        places, 2 * (channels // 4), flip_sin_to_cos=True, downscale_freq_shift=0
    )
    return found


def restore(model: Any) -> None:
    """`waves`, which are no part of a state dict."""
    model.time_text_embed.mod_proj = waves(model.config)


# ---------------------------------------------------------------- the pipeline


def text_length(pipe: Any) -> int:
    """What T5's tokenizer takes, at most LONGEST."""
    return min(pipe.tokenizer.model_max_length, LONGEST)


def encode_text(pipe: Any, captions: list[str], length: int) -> dict[str, Tensor]:
    """T5's states [B, L, width], and the mask [B, L] bool: a text and one token of its padding."""
    states, _, mask, *_ = pipe.encode_prompt(
        captions, do_classifier_free_guidance=False, max_sequence_length=length
    )
    return {STATES: states, MASK: mask.bool()}


def generate(pipe: Any, keywords: dict[str, Any]) -> Any:
    """The pipeline's answer; prompts are encoded here, so that masks are true and false."""
    given = {"guidance_scale": GUIDANCE, "max_sequence_length": LONGEST} | keywords
    many = given.pop("num_images_per_prompt", 1)
    prompt, negative = given.pop("prompt", None), given.pop("negative_prompt", None)
    prompts = [prompt] if isinstance(prompt, str) else prompt
    count = len(given["prompt_embeds"] if prompts is None else prompts)
    if given["guidance_scale"] > 1 and given.get("negative_prompt_embeds") is None:
        negative = negative or ""
        negatives = [negative] * count if isinstance(negative, str) else negative
    else:
        negatives = None
    for prefix, texts in (("", prompts), ("negative_", negatives)):
        if texts is not None:
            found = encode_text(pipe, list(texts), given["max_sequence_length"])
            given[f"{prefix}prompt_embeds"] = found[STATES].repeat_interleave(many, 0)
            given[f"{prefix}prompt_attention_mask"] = found[MASK].repeat_interleave(many, 0)
        elif given.get(name := f"{prefix}prompt_attention_mask") is not None:
            given[name] = given[name].bool()
    return pipe(**given)


CHROMA = Family(
    names=Names(
        name="chroma",
        title="Chroma",
        pipelines=("ChromaPipeline",),
        dense_class="ChromaTransformer2DModel",
        sparse_class="SparseChromaTransformer2DModel",
        title_of=lambda config: "Chroma",
        tags=("chroma",),
    ),
    blocks=BlockLayout(
        sites=(
            feed_forward("transformer_blocks", "ff", "image"),
            feed_forward("transformer_blocks", "ff_context", "text"),
            joint_output("single_transformer_blocks"),
        ),
        kinds=(("double", "transformer_blocks"), ("single", "single_transformer_blocks")),
        depths=(("double", "num_layers"), ("single", "num_single_layers")),
        modulated=False,
        embedder=APPROXIMATOR,
        vectors=vectors_of,
        recomputed=False,  # read: single blocks get no mask then
        restore=restore,
    ),
    data=Data(
        inputs=inputs,
        embedding=embedding,
        text_length=text_length,
        encode_text=encode_text,
        encode_images=packed_latents,
        position_ids=joint_ids,
        noise=packed_noise,
        prompt_embeds={"prompt_embeds": STATES, "prompt_attention_mask": MASK},
        generate=generate,
        unconditional=0.1,
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
            "approximator_num_channels": 64,
            "approximator_hidden_dim": 5120,
            "approximator_layers": 5,
        },
        encoders={"text_encoder": T5_XXL, "vae": VAE_16},
        weights=weights,
        generation_defaults=generation_defaults,
    ),
)
