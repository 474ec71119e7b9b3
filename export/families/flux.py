"""FLUX.1 for export: its transformer's ends and blocks, its text encoders and VAE.

[schnell] has no guidance embedding, so its program has no input `guidance`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2m.families.generation_defaults import generation_defaults
from export.families import modulation
from export.families.configs import config
from export.families.encoders import T5, TRANSFORMERS, VAE, clip_program, pooled
from export.families.ends import Final, packed_latents, unpacked
from export.families.family import Encoder, Family
from export.graph.attention import ExportAttention
from export.graph.program import Environment, Row, Tracing
from export.graph.trace import Spec
from runtime.families.flux import REFERENCE
from runtime.files.checked_json import read_json

KONTEXT = "FluxKontextPipeline"  # whose transformer is [dev]'s by its config
STREAMS = ("hidden_states", "encoder_hidden_states")
BLOCK_INPUTS = (*STREAMS, "temb", "rope_cos", "rope_sin")


class Embed(nn.Module):
    """What FluxTransformer2DModel does before its blocks; parameter names are the model's."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.x_embedder = model.x_embedder
        self.context_embedder = model.context_embedder
        self.time_text_embed = model.time_text_embed
        modulation.attach(model, self)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        guidance: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """-> image tokens [B, T, D], text tokens [B, Tt, D], temb [B, D], maybe modulation."""
        image = self.x_embedder(hidden_states)
        times = [timestep.to(image.dtype) * 1000]
        if guidance is not None:
            times.append(guidance.to(image.dtype) * 1000)
        temb = self.time_text_embed(*times, pooled_projections)
        text = self.context_embedder(encoder_hidden_states)
        return image, text, temb, *modulation.output(self, temb)


def call_block(run: Callable[..., Any], tensors: dict[str, Tensor]) -> Any:
    """diffusers' Flux blocks, double and single, share one signature: -> (text, image).

    temb is what their norms read and nothing else: the shared modulation, where a model has one.
    """
    rotary = tensors["rope_cos"], tensors["rope_sin"]
    return run(
        hidden_states=tensors["hidden_states"],
        encoder_hidden_states=tensors["encoder_hidden_states"],
        temb=modulation.block_embedding(tensors),
        image_rotary_emb=rotary,
    )


ROWS = {
    "FluxTransformerBlock": Row("double", BLOCK_INPUTS, STREAMS[::-1], call_block),
    "FluxSingleTransformerBlock": Row("single", BLOCK_INPUTS, STREAMS[::-1], call_block),
}


def environment(model: Any, dtype: torch.dtype) -> Environment:
    """The tensors of the program: the component's inputs, those between blocks, its outputs.

    timestep (sigma in [0, 1]), guidance and the rotary tables are float32 in any bundle. A model
    without guidance_embeds has no guidance, one in AdaLN mode full no shared modulation.
    """
    inputs, inner = tensors_before_the_end(model, dtype)
    image = inputs["hidden_states"].shape[:2]
    return inputs, inner, {"sample": Spec(dtype, (*image, model.proj_out.out_features))}


def tensors_before_the_end(
    model: Any, dtype: torch.dtype
) -> tuple[dict[str, Spec], dict[str, Spec]]:
    """Inputs and tensors between blocks, of the transformer or a ControlNet."""
    config = model.config
    width = config.num_attention_heads * config.attention_head_dim
    image, text = ("batch", "image_tokens"), ("batch", "text_tokens")
    scalar = Spec(torch.float32, ("batch",))
    rotary = Spec(torch.float32, ("tokens", config.attention_head_dim))
    tables = {"rope_cos": rotary, "rope_sin": rotary}
    inputs = {
        "hidden_states": Spec(dtype, (*image, config.in_channels)),
        "encoder_hidden_states": Spec(dtype, (*text, config.joint_attention_dim)),
        "pooled_projections": Spec(dtype, ("batch", config.pooled_projection_dim)),
        "timestep": scalar,
    }
    if config.guidance_embeds:
        inputs["guidance"] = scalar
    inner = {
        "hidden_states": Spec(dtype, (*image, width)),
        "encoder_hidden_states": Spec(dtype, (*text, width)),
        "temb": Spec(dtype, ("batch", width)),
    }
    return inputs | tables, inner | modulation.spec(model, dtype) | tables


def lengths(directory: Path) -> dict[str, int]:
    """Tokens of CLIP and of T5."""
    clip = config(directory, "text_encoder")
    return {
        "tokenizer": clip["max_position_embeddings"],
        "tokenizer_2": generation_defaults(directory)["max_sequence_length"],
    }


def latents(
    transformer: Mapping[str, Any], vae: Mapping[str, Any], directory: Path
) -> dict[str, Any]:
    """The manifest's `latents`; `condition` where a token is more than 2 x 2 latents, or there are
    more tokens than the noise has.

    "reference": those of an image behind them, as FLUX.1 Kontext sees one; "control": the latents
    of a control image too, as FLUX.1 Canny and Depth read them; "fill": those of the masked image
    and all pixels of the mask, as FLUX.1 Fill does. ValueError where numbers of channels are of
    neither.
    """
    channels = 4 * vae["latent_channels"]
    pixels = 4 ** len(vae["block_out_channels"])  # of a mask in a token
    written = transformer.get("out_channels") or transformer.get("in_channels")
    known = {2 * channels: "control", 2 * channels + pixels: "fill"}
    condition = known.get(transformer.get("in_channels", 0)) if written == channels else None
    if condition is None:
        plain = packed_latents(transformer, vae, directory)
        edits = read_json(directory / "model_index.json")["_class_name"] == KONTEXT
        return plain | ({"condition": REFERENCE} if edits else {})
    plain = packed_latents({**transformer, "in_channels": channels}, vae, directory)
    return plain | {"condition": condition}


def text_tokens(lengths: Mapping[str, int]) -> dict[str, int]:
    """What reads how many tokens: the transformer and T5 as many."""
    return {"": lengths["tokenizer_2"], "text_encoder": lengths["tokenizer"]}


# ---------------------------------------------------------------- torch's side of parity


def block_inputs(keywords: Mapping[str, Any]) -> dict[str, Tensor]:
    """A block's keywords as the program's tensors."""
    cos, sin = keywords["image_rotary_emb"]
    return {name: keywords[name] for name in (*STREAMS, "temb")} | {
        "rope_cos": cos,
        "rope_sin": sin,
    }


def model_inputs(
    model: Any, keywords: Mapping[str, Any], first: Mapping[str, Any]
) -> dict[str, Any]:
    """The forward's keywords, with rotary tables in place of positions."""
    names = (*STREAMS, "pooled_projections", "timestep", "guidance")
    found = {name: keywords[name] for name in names if keywords.get(name) is not None}
    return found | {name: first[name] for name in ("rope_cos", "rope_sin")}


def given(pipe: Any, height: int, width: int) -> dict[str, Any]:
    """Images for the pipelines of Kontext, Fill, and Canny and Depth: colours that run, a square.

    Kontext keeps the size that it is asked for.
    """
    import numpy as np
    from PIL import Image

    rows, columns = np.indices((height, width)) * 255.0
    planes = (rows / height, columns / width, 255 - (rows + columns) / (height + width))
    image = Image.fromarray(np.stack(planes, axis=-1).astype(np.uint8), "RGB")
    mask = np.zeros((height, width), np.uint8)
    mask[height // 4 : height // 2, width // 4 :] = 255
    kinds: dict[str, dict[str, Any]] = {
        "FluxFillPipeline": {"image": image, "mask_image": Image.fromarray(mask, "L")},
        "FluxControlPipeline": {"control_image": image},
        KONTEXT: {"image": image, "max_area": height * width, "_auto_resize": False},
    }
    return kinds.get(type(pipe).__name__, {})


FLUX = Family(
    name="flux",
    components=(
        Encoder(
            "text_encoder", "text_encoder", TRANSFORMERS, "CLIPTextModel", clip_program, pooled
        ),
        # T5 of FLUX.1 is 9.5 GB: like the transformer's, its weights are read one by one.
        Encoder("text_encoder_2", "text_encoder_2", *T5, whole=False),
        None,
        *VAE,
    ),
    tracing=Tracing(
        environment=environment,
        embed=Embed,
        final=Final,
        row=lambda block: ROWS[type(block).__name__],
        processor=ExportAttention,
    ),
    lengths=lengths,
    latents=latents,
    text_tokens=text_tokens,
    block_inputs=block_inputs,
    model_inputs=model_inputs,
    spatial=unpacked,
    given=given,
)
