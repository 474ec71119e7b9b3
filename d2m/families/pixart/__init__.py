"""PixArt-Sigma: the row, and how the model and its pipeline are called.

Here too: `weights`, its list of weights for `d2m plan`; configs/, published configs.

The model predicts noise on a discrete schedule of alphas and, in channels that are dropped when it
generates, a variance. T5 alone writes the text, whose padding is masked. All blocks share one
modulation already (adaln-single), so there is none to compress. Letters: B batch, C latent
channels, h x w latent pixels, L text tokens, D width, N training timesteps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from d2m.families.encoders import T5_XXL, VAE_4
from d2m.families.family import BlockLayout, Data, Family, Names, Plan, square_defaults
from d2m.families.flow import Batch, Config, noisy
from d2m.families.latents import grid, pixels_of, spatial_noise
from d2m.families.pixart.weights import weights
from d2m.families.site import feed_forward

if TYPE_CHECKING:
    from torch import Tensor, nn

    from d2m.recipe.structure import Blocks

CONDITIONS = ("encoder_hidden_states", "encoder_attention_mask")
LONGEST = 300  # read: PixArtSigmaPipeline's max_sequence_length, tokens of T5
STEPS, GUIDANCE = 20, 4.5  # read: the pipeline's defaults
TRAIN_STEPS = 1000  # N (read); times are counted in N-ths


def generation_defaults(read: Callable[[str], Config]) -> dict[str, Any]:
    """See d2m.families.generation_defaults."""
    return square_defaults(read, "tokenizer", LONGEST, STEPS, GUIDANCE)


def check_blocks(blocks: Blocks, depth: Mapping[str, int]) -> None:
    """ValueError for groups and for blocks left out.

    A block here is given all blocks' modulation [B, 6 D] in place of the embedding [B, D] that a
    group's router reads, and returns the image's tokens alone.
    """
    for group in blocks.groups("double"):
        raise ValueError(
            f"the recipe's group {list(group)} is not possible: blocks of PixArt-Sigma get no"
            " embedding of the time that its router could read; expected groups of blocks in"
            " recipes of other families alone: take `groups` out of `blocks`."
        )
    if blocks.dropped("double"):
        raise ValueError(
            f"the recipe drops blocks {list(blocks.dropped('double'))}, which is not done for"
            " PixArt-Sigma yet; expected none: take `drop` out of `blocks`."
        )


# ---------------------------------------------------------------- the transformer


def timesteps(t: Tensor) -> Tensor:
    """Times [B] in [0, 1] -> the timesteps 0 to N - 1 of the discrete schedule, int64."""
    return (t.float() * TRAIN_STEPS).round().long().clamp(0, TRAIN_STEPS - 1)


def inputs(model: nn.Module, batch: Batch, x: Tensor, t: Tensor) -> dict[str, Tensor]:
    """Keyword inputs of forward. x [B, C, h, w], t [B] in [0, 1]."""
    found = {name: batch[name] for name in CONDITIONS}
    return found | {"hidden_states": x, "timestep": timesteps(t)}


def embedding(model: nn.Module, batch: Batch, t: Tensor) -> Tensor:
    """The embedded time [B, D]."""
    single: Any = model.adaln_single
    dtype = single.linear.weight.dtype
    return single.emb(timesteps(t), None, None, batch_size=len(t), hidden_dtype=dtype)


def noised(
    batch: Batch,
    generator: Any,
    mean: float = 1.2,
    std: float = 1.2,
    rows: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(sqrt(a) x_0 + sqrt(1 - a) noise, t [B], noise), a the product of alphas up to t.

    Times are random as in d2m.families.flow.noisy. batch: `latents` [B, C, h, w] and the
    scheduler's `alphas_cumprod` [B, N], alike in every row (see `position_ids`).
    """
    latents, alphas = batch["latents"], batch["alphas_cumprod"]
    _, t, velocity = noisy(latents, generator, mean, std, rows)
    noise = velocity + latents
    times = timesteps(t).to(alphas.device)[:, None]
    alpha = alphas.gather(1, times).to(latents.device, latents.dtype)[..., None, None]
    return alpha.sqrt() * latents + (1 - alpha).sqrt() * noise, t, noise


def predicted(output: Tensor) -> Tensor:
    """[B, 2 C, h, w] -> the noise [B, C, h, w]; the variance is dropped, as the pipeline does."""
    return output.chunk(2, dim=1)[0]


# ---------------------------------------------------------------- the pipeline


def text_length(pipe: Any) -> int:
    """What T5's tokenizer takes, at most LONGEST."""
    return min(pipe.tokenizer.model_max_length, LONGEST)


def encode_text(pipe: Any, captions: list[str], length: int) -> dict[str, Tensor]:
    """T5's states [B, L, width], and a mask [B, L] of their type: 1 at tokens, 0 at padding."""
    states, mask, _, _ = pipe.encode_prompt(
        captions, do_classifier_free_guidance=False, max_sequence_length=length
    )
    return {"encoder_hidden_states": states, "encoder_attention_mask": mask.to(states.dtype)}


def encode_images(pipe: Any, images: Tensor) -> Tensor:
    """Images uint8 [B, H, W, 3] -> [B, C, h, w]: the posterior's mean, scaled and not shifted."""
    encoded: Tensor = pipe.vae.encode(pixels_of(pipe, images)).latent_dist.mode()
    return encoded * pipe.vae.config.scaling_factor


def position_ids(pipe: Any, batch: Batch, height: int, width: int) -> dict[str, Tensor]:
    """`img_ids` [T, 3] and the scheduler's `alphas_cumprod` [B, N]."""
    latents, patch = batch["latents"], pipe.transformer.config.patch_size * pipe.vae_scale_factor
    ids = grid(height // patch, width // patch, latents.device)
    alphas = pipe.scheduler.alphas_cumprod.to(latents.device)
    return {"img_ids": ids, "alphas_cumprod": alphas.expand(len(latents), -1)}


def generate(pipe: Any, keywords: dict[str, Any]) -> Any:
    """The pipeline called at the very size asked for, with captions as they are.

    It knows FluxPipeline's `callback_on_step_end` as `callback`, with other arguments, and has a
    negative prompt by default, which encoded prompts exclude.
    """
    if "prompt_embeds" in keywords:
        keywords = {"negative_prompt": None, **keywords}
    keywords = {"use_resolution_binning": False, "clean_caption": False, **keywords}
    if callback := keywords.pop("callback_on_step_end", None):
        keywords["callback"] = lambda step, t, latents: callback(
            pipe, step, t, {"latents": latents}
        )
    return pipe(**keywords)


def times(scheduler: Any) -> Tensor:
    """The timesteps of the last generation, and 0, in N-ths."""
    import torch

    steps = scheduler.timesteps.float().cpu() / TRAIN_STEPS
    return torch.cat([steps, torch.zeros(1)])


PIXART = Family(
    names=Names(
        name="pixart",
        title="PixArt-Sigma",
        pipelines=("PixArtSigmaPipeline",),
        dense_class="PixArtTransformer2DModel",
        sparse_class="SparsePixArtTransformer2DModel",
        aliases=("Transformer2DModel",),  # read: what the published configs call it
        title_of=lambda config: "PixArt-Sigma",
        tags=("pixart-sigma",),
    ),
    blocks=BlockLayout(
        sites=(feed_forward("transformer_blocks", "ff", "image"),),
        kinds=(("double", "transformer_blocks"),),
        depths=(("double", "num_layers"),),
        streams=("image",),
        modulated=False,
        check_blocks=check_blocks,
    ),
    data=Data(
        inputs=inputs,
        embedding=embedding,
        noised=noised,
        predicted=predicted,
        text_length=text_length,
        encode_text=encode_text,
        encode_images=encode_images,
        position_ids=position_ids,
        noise=spatial_noise,
        prompt_embeds={
            "prompt_embeds": "encoder_hidden_states",
            "prompt_attention_mask": "encoder_attention_mask",
        },
        times=times,
        generate=generate,
        unconditional=0.1,
    ),
    plan=Plan(
        # read: diffusers' defaults, for fields that a config leaves out
        sizes={
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 28,
            "attention_head_dim": 72,
            "num_attention_heads": 16,
            "cross_attention_dim": 1152,
            "caption_channels": 4096,
        },
        others=("use_additional_conditions",),
        encoders={"text_encoder": T5_XXL, "vae": VAE_4},
        weights=weights,
        generation_defaults=generation_defaults,
    ),
)
