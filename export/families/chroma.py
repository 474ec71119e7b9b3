"""Chroma for export: the transformer's ends and blocks, its text encoder and VAE.

The embed call writes all vectors of modulation, and a block gathers its own by a weight that no
checkpoint holds: which of them they are. So all blocks of a kind are one type, and a group may
leave any of them out. Single blocks are called with both streams apart. What the text's mask leaves
out weighs exactly nothing, and attends to nothing, as in diffusers with masks that are no floats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2m.families.chroma import APPROXIMATOR, MASK, STATES, modulations_of, vectors_of, waves
from d2m.families.chroma.weights import LISTS, vectors
from d2m.families.generation_defaults import generation_defaults
from export.families.encoders import MASKED_T5, VAE
from export.families.ends import packed_latents, unpacked
from export.families.family import Family, apart
from export.graph.attention import ExportAttention, rms_norm
from export.graph.prepare import Sinusoid
from export.graph.program import Environment, Row, Tracing
from export.graph.routers import placed_blocks
from export.graph.trace import VECTORS, Spec

STREAMS = ("hidden_states", STATES)
MODULATIONS = "modulations"
ROPE = ("rope_cos", "rope_sin")
BLOCK_INPUTS = (*STREAMS, MASK, MODULATIONS, *ROPE)


class Embed(nn.Module):
    """What ChromaTransformer2DModel does before its blocks; parameter names are the model's."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.x_embedder = model.x_embedder
        self.context_embedder = model.context_embedder
        self.distilled_guidance_layer = getattr(model, APPROXIMATOR)
        self.time_proj = model.time_text_embed.time_proj
        still = Sinusoid(model.time_text_embed.guidance_proj)(torch.zeros(1))
        places = torch.cat([still.expand(vectors(model.config), -1), waves(model.config)], dim=-1)
        self.register_buffer("places", places, persistent=False)

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor
    ) -> tuple[Tensor, ...]:
        """-> image tokens [B, T, D], text tokens [B, L, D], temb [B, D], modulations [B, N, D]."""
        image = self.x_embedder(hidden_states)
        waves = self.time_proj(timestep.to(image.dtype) * 1000).to(image.dtype)
        count, size = self.places.shape[0], waves.shape[0]
        places = self.places.to(image.dtype)[None].expand(size, -1, -1)
        x = torch.cat([waves[:, None].expand(-1, count, -1), places], dim=-1)
        approximator = self.distilled_guidance_layer
        x = approximator.in_proj(x)
        for layer, norm in zip(approximator.layers, approximator.norms):
            x = x + layer(rms_norm(x, norm))
        found = approximator.out_proj(x)
        return image, self.context_embedder(encoder_hidden_states), found.mean(1), found


class Final(nn.Module):
    """What the model does after its blocks; the last two vectors are its norm's."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.norm_out = model.norm_out
        self.proj_out = model.proj_out

    def forward(self, hidden_states: Tensor, modulations: Tensor) -> Tensor:
        """[B, T, D], [B, N, D] -> velocity [B, T, channels]."""
        sample: Tensor = self.proj_out(self.norm_out(hidden_states, modulations[:, -2:]))
        return sample


def prepare(model: Any) -> None:
    """Every block knows which vectors are its own, and takes them of all that it is called with."""

    def choose(module: Any, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, given | {"temb": given["temb"][:, getattr(module, VECTORS).long()]}

    for name in LISTS.values():
        for prefix, block, _ in placed_blocks(model, name):
            index = int(prefix.rstrip(".").rpartition(".")[2])
            own = torch.tensor(vectors_of(model.config, name, index), dtype=torch.float32)
            block.register_parameter(VECTORS, nn.Parameter(own, requires_grad=False))
            block.register_forward_pre_hook(choose, with_kwargs=True)


def common(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The keywords of a block beside its streams."""
    image = tensors["hidden_states"]
    reach = torch.cat([tensors[MASK].to(image.dtype), torch.ones_like(image[..., 0])], dim=1)
    return {
        "temb": tensors[MODULATIONS],
        "image_rotary_emb": tuple(tensors[name] for name in ROPE),
        "joint_attention_kwargs": {"reach": reach},
    }


def call_double(run: Callable[..., Any], tensors: dict[str, Tensor]) -> Any:
    """A double block: -> (text, image)."""
    return run(**{name: tensors[name] for name in STREAMS}, **common(tensors))


def call_single(run: Callable[..., Any], tensors: dict[str, Tensor]) -> Any:
    """A single block: -> (text, image)."""
    image, text = (tensors[name] for name in STREAMS)
    output = run(hidden_states=torch.cat([text, image], dim=1), **common(tensors))
    return output[:, : text.shape[1]], output[:, text.shape[1] :]


ROWS = {
    "ChromaTransformerBlock": Row("double", BLOCK_INPUTS, STREAMS[::-1], call_double),
    "ChromaSingleTransformerBlock": Row("single", BLOCK_INPUTS, STREAMS[::-1], call_single),
}


def environment(model: Any, dtype: torch.dtype) -> Environment:
    """The tensors of the program.

    timestep (sigma in [0, 1]), the mask (1 where text is) and rotary tables are float32 everywhere.
    """
    config, width = model.config, model.inner_dim
    image, text = ("batch", "image_tokens"), ("batch", "text_tokens")
    rotary = Spec(torch.float32, ("tokens", config.attention_head_dim))
    passed = {MASK: Spec(torch.float32, text), **dict.fromkeys(ROPE, rotary)}
    inputs = {
        "hidden_states": Spec(dtype, (*image, config.in_channels)),
        STATES: Spec(dtype, (*text, config.joint_attention_dim)),
        "timestep": Spec(torch.float32, ("batch",)),
    }
    inner = {
        "hidden_states": Spec(dtype, (*image, width)),
        STATES: Spec(dtype, (*text, width)),
        "temb": Spec(dtype, ("batch", width)),
        MODULATIONS: Spec(dtype, ("batch", vectors(config), width)),
    }
    sample = Spec(dtype, (*image, model.proj_out.out_features))
    return inputs | passed, inner | passed, {"sample": sample}


def lengths(directory: Path) -> dict[str, int]:
    """Tokens of T5."""
    return {"tokenizer": generation_defaults(directory)["max_sequence_length"]}


# ---------------------------------------------------------------- torch's side of parity


def block_inputs(keywords: Mapping[str, Any]) -> dict[str, Tensor]:
    """A block's keywords as the program's tensors, but for modulation, of which it gets a part."""
    found = {name: keywords[name] for name in STREAMS}
    found[MASK] = keywords["attention_mask"][:, : found[STATES].shape[1]].float()
    return found | dict(zip(ROPE, keywords["image_rotary_emb"]))


def model_inputs(
    model: Any, keywords: Mapping[str, Any], first: Mapping[str, Any]
) -> dict[str, Any]:
    """The forward's keywords, with rotary tables in place of positions, and the text's mask."""
    found = {name: keywords[name] for name in (*STREAMS, "timestep")}
    return found | {name: first[name] for name in (MASK, *ROPE)}


def modulations(model: Any, keywords: Mapping[str, Any]) -> dict[str, Tensor]:
    """All vectors of modulation [B, N, D]."""
    return {MODULATIONS: modulations_of(model, keywords["timestep"])}


CHROMA = Family(
    name="chroma",
    components=(MASKED_T5, None, *VAE),
    tracing=Tracing(
        environment=environment,
        embed=Embed,
        final=Final,
        row=lambda block: ROWS[type(block).__name__],
        processor=ExportAttention,
        prepare=prepare,
        final_inputs=("hidden_states", MODULATIONS),
    ),
    lengths=lengths,
    latents=packed_latents,
    text_tokens=lambda lengths: {"": lengths["tokenizer"], "text_encoder": lengths["tokenizer"]},
    block_inputs=block_inputs,
    model_inputs=model_inputs,
    spatial=unpacked,
    told=modulations,
    unread=lambda model, keywords: {"temb": modulations(model, keywords)[MODULATIONS].mean(1)},
    apart=lambda keywords, output, text: apart({STATES: None, **keywords}, output, text),
)
