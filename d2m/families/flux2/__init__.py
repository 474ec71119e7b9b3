"""FLUX.2 [klein] 4B and 9B, distilled and base, and [dev]: the row, and how all are called.

Here too: `weights`, its list of weights for `d2m plan`; configs/, published configs;
presets/.

[klein] reads Qwen3's states, [dev] Mistral 3's, of three layers side by side; texts are filled up
to one length and not masked. [dev] embeds guidance; [klein] base is guided by a negative prompt,
which the pipeline leaves empty; distilled [klein] takes neither. Letters: B batch, T image tokens,
C packed channels, L text tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from d2m.families.encoders import MISTRAL_3, QWEN3_4B, QWEN3_8B, VAE_FLUX2, EncoderSize
from d2m.families.family import BlockLayout, Data, Family, Names, Plan, longest_text, vae_halvings
from d2m.families.flow import Batch, Config
from d2m.families.flux2.weights import FFN, hidden_of, weights
from d2m.families.latents import pixels_of
from d2m.families.site import beside_attention, fused_gated

if TYPE_CHECKING:
    from torch import Tensor, nn

CONDITIONS = ("encoder_hidden_states", "img_ids", "txt_ids")
KEPT = "Flux2KleinKVPipeline"  # distilled, without an argument for guidance
LONGEST = 512  # read: the pipelines' max_sequence_length
SIDE = 128  # read: the pipelines' default_sample_size, in latents
GUIDANCE = 4.0  # read: the pipelines' default
STEPS, FEW = 50, 4  # read: the pipelines' default; distilled [klein] is made for 4
# read: whose states the pipelines give the transformer, by the text encoder's class
LAYERS = {"Qwen3ForCausalLM": (9, 18, 27), "Mistral3ForConditionalGeneration": (10, 20, 30)}


def title_of(config: Config) -> str:
    """FLUX.2 [dev] or FLUX.2 [klein], by the guidance embedding."""
    return f"FLUX.2 [{'dev' if embeds_guidance(config) else 'klein'}]"


def embeds_guidance(config: Config) -> bool:
    """Whether a transformer embeds guidance; its class does where a config does not say."""
    return config.get("guidance_embeds") is not False


def is_guided(index: Config) -> bool:
    """Whether a pipeline is guided by a negative prompt, by its model_index.json: [klein] base."""
    return index.get("_class_name") == "Flux2KleinPipeline" and not index.get("is_distilled")


def generation_defaults(read: Callable[[str], Config]) -> dict[str, Any]:
    """See d2m.families.generation_defaults."""
    index = read("model_index.json")
    distilled = bool(index.get("is_distilled")) or index.get("_class_name") == KEPT
    side = SIDE * 2 ** vae_halvings(read("vae/config.json"))
    return {
        "height": side,
        "width": side,
        "num_inference_steps": FEW if distilled else STEPS,
        "guidance_scale": 1.0 if distilled else GUIDANCE,
        "max_sequence_length": longest_text(read, "tokenizer", LONGEST),
    }


def encoders(config: Config) -> Mapping[str, EncoderSize]:
    """Of published models, by the width of the text that a transformer reads."""
    texts = {7680: QWEN3_4B, 12288: QWEN3_8B}
    text = texts.get(config.get("joint_attention_dim", 0), MISTRAL_3)
    return {"text_encoder": text, "vae": VAE_FLUX2}


# ---------------------------------------------------------------- the transformer


def inputs(model: nn.Module, batch: Batch, x: Tensor, t: Tensor) -> dict[str, Tensor]:
    """Keyword inputs of forward. x [B, T, C], t [B] in [0, 1]: the model multiplies by 1000.

    batch: CONDITIONS, and `guidance` [B] where it should not be GUIDANCE (it is left out for a
    model without guidance embedding).
    """
    found = {name: batch[name] for name in CONDITIONS} | {"hidden_states": x, "timestep": t}
    if embeds_guidance(model.config):  # type: ignore[arg-type]
        found["guidance"] = _guidance(batch, t)
    return found


def embedding(model: nn.Module, batch: Batch, t: Tensor) -> Tensor:
    """temb [B, D] of times t [B] in [0, 1], and guidance [B] where a model has it."""
    dtype = t.dtype
    if hasattr(model, "x_embedder") and not model.x_embedder.weight.is_meta:
        dtype = model.x_embedder.weight.dtype
    guidance = None
    if embeds_guidance(model.config):  # type: ignore[arg-type]
        guidance = _guidance(batch, t).to(dtype) * 1000
    return model.time_guidance_embed(t.to(dtype) * 1000, guidance)  # type: ignore[operator]


def _guidance(batch: Batch, t: Tensor) -> Tensor:
    import torch

    found: Tensor = batch.get("guidance", torch.full_like(t, GUIDANCE))
    return found


# ---------------------------------------------------------------- the pipeline


def text_length(pipe: Any) -> int:
    """What the tokenizer takes, with the template's tokens, at most LONGEST."""
    tokenizer = getattr(pipe.tokenizer, "tokenizer", pipe.tokenizer)  # [dev] has a processor
    return min(tokenizer.model_max_length, LONGEST)


def encode_text(pipe: Any, captions: list[str], length: int) -> dict[str, Tensor]:
    """States [B, L, width of three layers], of the padding too: nothing is masked."""
    states, _ = pipe.encode_prompt(captions, max_sequence_length=length)
    return {"encoder_hidden_states": states}


def packed(pipe: Any, latents: Tensor) -> Tensor:
    """The VAE's latents [n, C, h, w] -> [n, T, 4 C], by the statistics of its batch norm."""
    patches = pipe._patchify_latents(latents)
    norm = pipe.vae.bn
    mean, variance = (
        each.view(1, -1, 1, 1).to(patches) for each in (norm.running_mean, norm.running_var)
    )
    patches = (patches - mean) / (variance + pipe.vae.config.batch_norm_eps).sqrt()
    tokens: Tensor = pipe._pack_latents(patches)
    return tokens


def encode_images(pipe: Any, images: Tensor) -> Tensor:
    """Images uint8 [B, H, W, 3] -> packed latents [B, T, C]: posterior's mean, normalised."""
    return packed(pipe, pipe.vae.encode(pixels_of(pipe, images)).latent_dist.mode())


def position_ids(pipe: Any, batch: Batch, height: int, width: int) -> dict[str, Tensor]:
    """`img_ids` [T, 4], (0, row, column, 0), and `txt_ids` [L, 4], (0, 0, 0, place)."""
    import torch

    states, patch = batch["encoder_hidden_states"], 2 * pipe.vae_scale_factor
    image = torch.empty(1, 1, height // patch, width // patch)
    found = {"img_ids": pipe._prepare_latent_ids(image), "txt_ids": pipe._prepare_text_ids(states)}
    return {name: ids[0].to(batch["latents"].device) for name, ids in found.items()}


def noise(pipe: Any, height: int, width: int, generator: Any) -> Tensor:
    """Pure noise of one image, packed: [T, C]."""
    import torch

    patch, channels = 2 * pipe.vae_scale_factor, pipe.transformer.config.in_channels
    drawn = torch.randn((channels, height // patch, width // patch), generator=generator)
    return drawn.flatten(1).t().contiguous()


def guided(pipe: Any) -> bool:
    """Whether a pipeline in memory is guided by a negative prompt."""
    return is_guided({"_class_name": type(pipe).__name__, **pipe.config})


def generate(pipe: Any, keywords: dict[str, Any]) -> Any:
    """The pipeline's answer; latents are packed [n, T, C] and normalised on both sides.

    A negative prompt is encoded here, and left out where the pipeline is not guided by one.
    """
    given = dict(keywords)
    if type(pipe).__name__ == KEPT:
        given.pop("guidance_scale", None)
    negative = given.pop("negative_prompt", None)
    if not guided(pipe):
        given.pop("negative_prompt_embeds", None)
    elif negative is not None and given.get("guidance_scale", GUIDANCE) > 1:
        length = {"max_sequence_length": given.get("max_sequence_length", LONGEST)}
        given["negative_prompt_embeds"], _ = pipe.encode_prompt(negative, **length)
    if given.get("latents") is not None and given["latents"].ndim == 3:
        side = 2 * pipe.vae_scale_factor
        rows, columns = (given[name] // side for name in ("height", "width"))
        given["latents"] = given["latents"].transpose(1, 2).unflatten(2, (rows, columns))
    answer = pipe(**given)
    if given.get("output_type") == "latent" and answer.images.ndim == 4:  # [klein] unpacks them
        answer.images = packed(pipe, answer.images)
    return answer


FLUX2 = Family(
    names=Names(
        name="flux2",
        title="FLUX.2",
        pipelines=("Flux2KleinPipeline", "Flux2Pipeline", KEPT),
        dense_class="Flux2Transformer2DModel",
        sparse_class="SparseFlux2Transformer2DModel",
        title_of=title_of,
        tags=("flux2",),
    ),
    blocks=BlockLayout(
        sites=(
            fused_gated("transformer_blocks", "ff", FFN, "image"),
            fused_gated("transformer_blocks", "ff_context", FFN, "text"),
            beside_attention("single_transformer_blocks", "attn", "both"),
        ),
        kinds=(("double", "transformer_blocks"), ("single", "single_transformer_blocks")),
        depths=(("double", "num_layers"), ("single", "num_single_layers")),
        hidden=hidden_of,
        modulated=False,
        embedder="time_guidance_embed",
    ),
    data=Data(
        inputs=inputs,
        embedding=embedding,
        text_length=text_length,
        encode_text=encode_text,
        encode_images=encode_images,
        position_ids=position_ids,
        noise=noise,
        prompt_embeds={"prompt_embeds": "encoder_hidden_states"},
        generate=generate,
        unconditional=0.1,
        guided=guided,
    ),
    plan=Plan(
        # read: diffusers' defaults, for fields that a config leaves out
        sizes={
            "patch_size": 1,
            "in_channels": 128,
            "num_layers": 8,
            "num_single_layers": 48,
            "attention_head_dim": 128,
            "num_attention_heads": 48,
            "joint_attention_dim": 15360,
        },
        others=("guidance_embeds", "mlp_ratio"),
        encoders=encoders,
        weights=weights,
        generation_defaults=generation_defaults,
    ),
)
