"""Z-Image and Z-Image-Turbo: the row, and how the model and its pipeline are called.

Here too: `weights`, its list of weights for `d2m plan`; configs/, published configs.

One stream of image and text runs through the main blocks, `layers`; two blocks before them refine
the image, two the text, and stay dense. Its time runs from 0, noise, to 1, and it predicts the
velocity towards the image, so that what enters and leaves is turned around here. Guidance is
written as for other models: w means without + w (with - without), which is 1 more than the
pipeline's own number. Letters: B batch, C channels, h x w latent pixels, L text tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from d2m.families.encoders import QWEN3_4B_35, VAE_16
from d2m.families.family import BlockLayout, Data, Family, Names, Plan, longest_text, vae_halvings
from d2m.families.flow import Batch, Config
from d2m.families.latents import grid, spatial_latents, spatial_noise
from d2m.families.site import separate_gated
from d2m.families.zimage.weights import LIST, PATCH, filled, hidden_of, temb_width, weights

if TYPE_CHECKING:
    from torch import Tensor, nn

STATES, MASK = "encoder_hidden_states", "encoder_hidden_states_mask"
LONGEST = 512  # read: the pipeline's max_sequence_length
SIDE = 128  # read: the pipeline's default of 1024 pixels, in latents
STEPS, GUIDANCE = 50, 6.0  # read: the pipeline's defaults, its guidance of 5 written as others'


def generation_defaults(read: Callable[[str], Config]) -> dict[str, Any]:
    """See d2m.families.generation_defaults. No config tells Turbo, which takes 9 steps, guidance 1.

    (read: the pipeline's own example.)
    """
    side = SIDE * 2 ** vae_halvings(read("vae/config.json"))
    return {
        "height": side,
        "width": side,
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE,
        "max_sequence_length": longest_text(read, "tokenizer", LONGEST),
    }


def first_tokens(given: Mapping[str, Any]) -> int:
    """Tokens of the image, which comes first, with those that fill it up; given: of the model."""
    height, width = given["x"][0].shape[-2:]
    return filled(height * width // PATCH**2)


def router_reads(given: Mapping[str, Any], image: int) -> tuple[Any, ...]:
    """Of a block's keywords image, text, temb and mask; what fills both up counts (read)."""
    tokens, mask = given["x"], given["attn_mask"]
    own = None if mask is None else mask[:, image:]
    return tokens[:, :image], tokens[:, image:], given["adaln_input"], own


# ---------------------------------------------------------------- the transformer


def inputs(model: nn.Module, batch: Batch, x: Tensor, t: Tensor) -> dict[str, Any]:
    """Inputs of forward. x [B, C, h, w], t [B] in [0, 1], 1 pure noise.

    Texts are a list of [L_i, width], each filled up by the model itself.
    """
    states, mask = (batch[name].to(x.device) for name in (STATES, MASK))
    texts = [state[own.bool()] for state, own in zip(states, mask)]
    device = next(model.parameters()).device
    return {"x": x[:, :, None], "t": 1 - t, "cap_feats": [text.to(device) for text in texts]}


def embedding(model: Any, batch: Batch, t: Tensor) -> Tensor:
    """temb [B, 256] of times t [B] in [0, 1]."""
    dtype = model.t_embedder.mlp[0].weight.dtype
    temb: Tensor = model.t_embedder((1 - t.to(dtype)) * model.t_scale)
    return temb


def predicted(output: Any) -> Tensor:
    """What the model answers, B tensors [C, 1, h, w] -> the velocity [B, C, h, w] of others."""
    import torch

    return -torch.stack(list(output)).squeeze(2)


# ---------------------------------------------------------------- the pipeline


def text_length(pipe: Any) -> int:
    """What the tokenizer takes, the template's tokens among them, at most LONGEST."""
    return min(pipe.tokenizer.model_max_length, LONGEST)


def encode_text(pipe: Any, captions: list[str], length: int) -> dict[str, Tensor]:
    """States [B, L, width], zeros behind a text's end, and the mask [B, L] bool, L = `length`."""
    import torch
    import torch.nn.functional as F

    given = list(captions)  # the pipeline writes into the list
    texts, _ = pipe.encode_prompt(
        given, do_classifier_free_guidance=False, max_sequence_length=length
    )
    states = torch.stack([F.pad(text, (0, 0, 0, length - len(text))) for text in texts])
    places = torch.arange(length, device=states.device)
    masks = torch.stack([places < len(text) for text in texts])
    return {STATES: states, MASK: masks}


def position_ids(pipe: Any, batch: Batch, height: int, width: int) -> dict[str, Tensor]:
    """`img_ids` [T, 3]."""
    patch = 2 * pipe.vae_scale_factor
    return {"img_ids": grid(height // patch, width // patch, batch["latents"].device)}


def generate(pipe: Any, keywords: dict[str, Any]) -> Any:
    """The pipeline's answer: encoded texts are lists of their own tokens, guidance is 1 less."""
    given = dict(keywords)
    for prefix in ("", "negative_"):
        mask = given.pop(f"{prefix}prompt_embeds_mask", None)
        states = given.get(f"{prefix}prompt_embeds")
        if states is not None and mask is not None:
            texts = [state[own.bool()] for state, own in zip(states, mask)]
            given[f"{prefix}prompt_embeds"] = texts
    given["guidance_scale"] = max(0.0, given.get("guidance_scale", GUIDANCE) - 1)
    for name in ("prompt", "negative_prompt"):
        if isinstance(given.get(name), list):
            given[name] = list(given[name])
    return pipe(**given)


ZIMAGE = Family(
    names=Names(
        name="zimage",
        title="Z-Image",
        pipelines=("ZImagePipeline",),
        dense_class="ZImageTransformer2DModel",
        sparse_class="SparseZImageTransformer2DModel",
        title_of=lambda config: "Z-Image",
        tags=("z-image",),
    ),
    blocks=BlockLayout(
        sites=(separate_gated(LIST, "feed_forward", ("w1", "w3", "w2"), "both"),),
        kinds=(("double", LIST),),
        depths=(("double", "n_layers"),),
        hidden=hidden_of,
        streams=("image",),
        modulated=False,
        temb_width=temb_width,
        first_tokens=first_tokens,
        router_reads=router_reads,
    ),
    data=Data(
        inputs=inputs,
        embedding=embedding,
        text_length=text_length,
        encode_text=encode_text,
        encode_images=spatial_latents,
        position_ids=position_ids,
        noise=spatial_noise,
        prompt_embeds={"prompt_embeds": STATES, "prompt_embeds_mask": MASK},
        predicted=predicted,
        generate=generate,
        unconditional=0.1,
    ),
    plan=Plan(
        # read: diffusers' defaults, for fields that a config leaves out
        sizes={
            "in_channels": 16,
            "dim": 3840,
            "n_layers": 30,
            "n_refiner_layers": 2,
            "n_heads": 30,
            "cap_feat_dim": 2560,
        },
        encoders=lambda config: {"text_encoder": QWEN3_4B_35, "vae": VAE_16},
        weights=weights,
        generation_defaults=generation_defaults,
    ),
)
