"""FLUX.2 for export: the transformer's ends and blocks, its text encoder and VAE.

Modulation is the model's, not the blocks': the embed call writes all three, and blocks read theirs
in place of temb. Single blocks are called with both streams apart, which diffusers' own take too.
[klein] has no guidance embedding, so its program has no input `guidance`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2m.families.flux2 import LAYERS, embeds_guidance, is_guided
from d2m.families.generation_defaults import generation_defaults
from d2m.shards import open_shards
from export.families.encoders import (
    TRANSFORMERS,
    first,
    latent_mean,
    vae_encoder_program,
    vae_program,
)
from export.families.ends import Final, check_packed
from export.families.family import Encoder, Family
from export.graph import references
from export.graph.attention import (
    ExportAttention,
    attended,
    heads,
    rms_norm,
    rotate,
    with_references,
)
from export.graph.program import Environment, Program, Row, Tracing
from export.graph.trace import VECTORS, Spec
from export.text.chat_template import chat_record
from export.text.decoder import decoder_program
from runtime.families.flux2 import STATES

KEPT = "Flux2KleinKVPipeline"  # whose reference tokens' keys and values are kept
STREAMS = ("hidden_states", "encoder_hidden_states")
ROPE = ("rope_cos", "rope_sin")
# Tensor of the program -> the model's submodule that makes it of temb, and its vectors of D.
MODULATIONS = {
    "modulation_image": ("double_stream_modulation_img", 6),
    "modulation_text": ("double_stream_modulation_txt", 6),
    "modulation_single": ("single_stream_modulation", 3),
}
# The keywords under which blocks take them.
KEYWORDS = dict(zip(MODULATIONS, ("temb_mod_img", "temb_mod_txt", "temb_mod")))
LANGUAGE = {  # where the language model is in the text encoder
    "Qwen3ForCausalLM": "model",
    "Mistral3ForConditionalGeneration": "model.language_model",
}


class Embed(nn.Module):
    """What Flux2Transformer2DModel does before its blocks; parameter names are the model's."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.x_embedder = model.x_embedder
        self.context_embedder = model.context_embedder
        self.time_guidance_embed = model.time_guidance_embed
        for name, _ in MODULATIONS.values():
            setattr(self, name, getattr(model, name))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        guidance: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """-> image tokens [B, T, D], text tokens [B, L, D], temb [B, D], MODULATIONS [B, n D]."""
        image = self.x_embedder(hidden_states)
        if guidance is not None:
            guidance = guidance.to(image.dtype) * 1000
        temb = self.time_guidance_embed(timestep.to(image.dtype) * 1000, guidance)
        modulations = (getattr(self, name)(temb) for name, _ in MODULATIONS.values())
        return image, self.context_embedder(encoder_hidden_states), temb, *modulations


class ParallelAttention:
    """Processor for Flux2ParallelSelfAttention: attention and FFN of a single block.

    The same arithmetic as diffusers' Flux2ParallelSelfAttnProcessor, in the form of
    export/graph/attention.py.
    """

    _attention_backend = None  # what diffusers reads on every processor
    _parallel_config = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        references: Tensor | None = None,
        kept: list[Tensor] | None = None,
    ) -> Tensor:
        """hidden_states [B, T, D] -> the same shape; image_rotary_emb: cos, sin [T, C].

        references: see export.graph.attention.with_references; kept: gets the keys and values.
        """
        assert image_rotary_emb is not None
        sizes = [3 * attn.inner_dim, attn.mlp_hidden_dim * attn.mlp_mult_factor]
        qkv, hidden = attn.to_qkv_mlp_proj(hidden_states).split(sizes, dim=-1)
        query, key, value = heads(qkv, attn.head_dim)
        query, key = rms_norm(query, attn.norm_q), rms_norm(key, attn.norm_k)
        query, key = rotate(query, *image_rotary_emb), rotate(key, *image_rotary_emb)
        if kept is not None:
            kept.extend((key, value))
        if references is not None:
            key, value = with_references(key, value, references)
        output = attended(query, key, value)
        joined: Tensor = attn.to_out(torch.cat([output, attn.mlp_act_fn(hidden)], dim=-1))
        return joined


def prepare(model: Any) -> None:
    """Single blocks have a processor of their own; blocks that read STATES a number."""
    for module in model.modules():
        if hasattr(module, "to_qkv_mlp_proj"):
            module.set_processor(ParallelAttention())
    if keeps_references(model):
        references.number(model)


def keeps_references(model: Any) -> bool:
    """Whether keys and values of reference tokens are kept from step to step: the transformer's
    config does not say so, its pipeline's class does, and the processors that this sets."""
    attention = getattr(model.transformer_blocks[0], "attn", None)
    processor = type(getattr(attention, "processor", None)).__name__
    return processor == "Flux2KVAttnProcessor" or getattr(model, "pipeline", None) == KEPT


def beside(model: Any, dtype: torch.dtype, top_k: Sequence[int]) -> dict[str, Program]:
    """The program of STATES, where a model has one."""
    if not keeps_references(model):
        return {}
    return {STATES: references.reference_program(model, dtype, top_k)}


def seen(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """A block's keyword for STATES."""
    return {"joint_attention_kwargs": {STATES: tensors[STATES]}} if STATES in tensors else {}


def call_double(run: Callable[..., Any], tensors: dict[str, Tensor]) -> Any:
    """A double block: -> (text, image)."""
    return run(
        hidden_states=tensors["hidden_states"],
        encoder_hidden_states=tensors["encoder_hidden_states"],
        temb_mod_img=tensors["modulation_image"],
        temb_mod_txt=tensors["modulation_text"],
        image_rotary_emb=(tensors["rope_cos"], tensors["rope_sin"]),
        **seen(tensors),
    )


def call_single(run: Callable[..., Any], tensors: dict[str, Tensor]) -> Any:
    """A single block: -> (text, image)."""
    return run(
        hidden_states=tensors["hidden_states"],
        encoder_hidden_states=tensors["encoder_hidden_states"],
        temb_mod=tensors["modulation_single"],
        image_rotary_emb=(tensors["rope_cos"], tensors["rope_sin"]),
        split_hidden_states=True,
        **seen(tensors),
    )


DOUBLE = (*STREAMS, "modulation_image", "modulation_text", *ROPE)
ROWS = {
    "Flux2TransformerBlock": Row("double", DOUBLE, STREAMS[::-1], call_double),
    "Flux2SingleTransformerBlock": Row(
        "single", (*STREAMS, "modulation_single", *ROPE), STREAMS[::-1], call_single
    ),
}


def row(block: Any) -> Row:
    """How a block is called; one that has a number reads STATES too."""
    found = ROWS[type(block).__name__]
    return replace(found, inputs=(*found.inputs, STATES)) if hasattr(block, VECTORS) else found


def environment(model: Any, dtype: torch.dtype) -> Environment:
    """The tensors of the program.

    timestep (sigma in [0, 1]), guidance and the rotary tables are float32 in any bundle.
    """
    config, width = model.config, model.inner_dim
    image, text = ("batch", "image_tokens"), ("batch", "text_tokens")
    scalar = Spec(torch.float32, ("batch",))
    tables = dict.fromkeys(ROPE, Spec(torch.float32, ("tokens", config.attention_head_dim)))
    if keeps_references(model):
        tables[STATES] = references.states_spec(model, dtype, "reference_tokens")
    inputs = {
        "hidden_states": Spec(dtype, (*image, config.in_channels)),
        "encoder_hidden_states": Spec(dtype, (*text, config.joint_attention_dim)),
        "timestep": scalar,
    }
    if embeds_guidance(config):
        inputs["guidance"] = scalar
    inner = {
        "hidden_states": Spec(dtype, (*image, width)),
        "encoder_hidden_states": Spec(dtype, (*text, width)),
        "temb": Spec(dtype, ("batch", width)),
    }
    inner |= {
        name: Spec(dtype, ("batch", count * width)) for name, (_, count) in MODULATIONS.items()
    }
    sample = Spec(dtype, (*image, model.proj_out.out_features))
    return inputs | tables, inner | tables, {"sample": sample}


# ---------------------------------------------------------------- the other components


def text_program(model: Any, dtype: torch.dtype) -> Program:
    """The language model up to the last layer whose states are read."""
    cls = type(model).__name__
    return decoder_program(model, LANGUAGE[cls], LAYERS[cls], dtype)


def states(model: Any, output: Any) -> tuple[Tensor, ...]:
    """Of either text encoder, asked for its hidden states."""
    read = (output.hidden_states[index] for index in LAYERS[type(model).__name__])
    return (torch.cat(list(read), dim=-1),)


def stored_name(name: str) -> str:
    """A parameter's name in files: transformers writes Mistral 3 under its first release's."""
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    inside, written = "model.language_model.", "language_model.model."
    return written + name.removeprefix(inside) if inside in name else name.removeprefix("model.")


def lengths(directory: Path) -> dict[str, int]:
    """Tokens of the template and of the prompt together."""
    return {"tokenizer": generation_defaults(directory)["max_sequence_length"]}


def tokens_record(tokenizer: Any, length: int, index: Mapping[str, Any]) -> dict[str, Any]:
    """The chat template, as the pipelines ask for it."""
    if index["_class_name"] in ("Flux2KleinPipeline", KEPT):
        return chat_record(
            tokenizer,
            length,
            lambda text: [{"role": "user", "content": text}],
            add_generation_prompt=True,
            enable_thinking=False,
        )
    from diffusers.pipelines.flux2.pipeline_flux2 import format_input

    # The processor adds special tokens where the template begins with none (read).
    (message,) = format_input([""])
    text = tokenizer.apply_chat_template(message, tokenize=False)
    special = not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
    return chat_record(
        tokenizer,
        length,
        lambda prompt: format_input([prompt])[0],
        removed=("[IMG]",),
        special_tokens=special,
    )


def latents(
    transformer: Mapping[str, Any], vae: Mapping[str, Any], directory: Path
) -> dict[str, Any]:
    """The manifest's `latents`; the statistics are buffers of the VAE.

    ValueError where the transformer packs another VAE's latents.
    """
    channels = vae["latent_channels"]
    check_packed(transformer, channels, directory)
    names = ("bn.running_mean", "bn.running_var")
    stored = open_shards(directory / "vae").read(names)
    mean, variance = (stored[name].float() for name in names)
    return {
        "channels": channels,
        "vae_scale_factor": 2 ** (len(vae["block_out_channels"]) - 1),
        "scaling_factor": 1.0,
        "mean": mean.tolist(),
        "std": (variance + vae["batch_norm_eps"]).sqrt().tolist(),
        "patch": 2,
        "rope_axes": list(transformer["axes_dims_rope"]),
        "rope_theta": transformer["rope_theta"],
    }


def text_tokens(lengths: Mapping[str, int]) -> dict[str, int]:
    """The transformer reads all that the text encoder does."""
    return {"": lengths["tokenizer"], "text_encoder": lengths["tokenizer"]}


# ---------------------------------------------------------------- torch's side of parity


def block_inputs(keywords: Mapping[str, Any]) -> dict[str, Tensor]:
    """A block's keywords as the program's tensors."""
    found = {name: keywords[name] for name in STREAMS}
    found |= {name: keywords[each] for name, each in KEYWORDS.items() if each in keywords}
    return found | dict(zip(ROPE, keywords["image_rotary_emb"]))


def model_inputs(
    model: Any, keywords: Mapping[str, Any], first: Mapping[str, Any]
) -> dict[str, Any]:
    """The forward's keywords, with rotary tables in place of positions."""
    names = (*STREAMS, "timestep", "guidance")
    found = {name: keywords[name] for name in names if keywords.get(name) is not None}
    return found | {name: first[name] for name in (*ROPE, STATES) if name in first}


def told(model: Any, keywords: Mapping[str, Any]) -> dict[str, Tensor]:
    """STATES of no reference, of a model that keeps them: parity gives it none."""
    if not keeps_references(model):
        return {}
    tokens = keywords["hidden_states"]
    count = len(references.blocks_of(model))
    return {STATES: tokens.new_zeros(len(tokens), count, 0, 2 * model.inner_dim)}


def unread(model: Any, keywords: Mapping[str, Any]) -> dict[str, Tensor]:
    """temb and the modulations, of which each kind of block reads its own."""
    scale: Any = lambda value: None if value is None else value * 1000  # noqa: E731
    temb = model.time_guidance_embed(scale(keywords["timestep"]), scale(keywords.get("guidance")))
    return {"temb": temb} | {
        name: getattr(model, module)(temb) for name, (module, _) in MODULATIONS.items()
    }


def spatial(pipe: Any, latents: Tensor, height: int, width: int) -> Tensor:
    """Packed latents -> [n, C, h, w], as the VAE has them."""
    side = 2 * pipe.vae_scale_factor
    patches = latents.transpose(1, 2).unflatten(2, (height // side, width // side))
    norm = pipe.vae.bn
    std = (norm.running_var + pipe.vae.config.batch_norm_eps).sqrt()
    patches = patches * std.view(1, -1, 1, 1) + norm.running_mean.view(1, -1, 1, 1)
    unpacked: Tensor = pipe._unpatchify_latents(patches)
    return unpacked


VAE = ("vae", "diffusers", "AutoencoderKLFlux2")
FLUX2 = Family(
    name="flux2",
    components=(
        # 8 to 48 GB: its weights are read one by one.
        Encoder(
            "text_encoder",
            "text_encoder",
            TRANSFORMERS,
            "Qwen3ForCausalLM",
            text_program,
            states,
            whole=False,
            stored_name=stored_name,
            others=("Mistral3ForConditionalGeneration",),
            read=("input_ids", "attention_mask"),
        ),
        None,
        Encoder("vae_decoder", *VAE, vae_program, first),
        Encoder("vae_encoder", *VAE, vae_encoder_program, latent_mean),
    ),
    tracing=Tracing(
        environment=environment,
        embed=Embed,
        final=Final,
        row=row,
        processor=ExportAttention,
        prepare=prepare,
        beside=beside,
    ),
    lengths=lengths,
    latents=latents,
    text_tokens=text_tokens,
    block_inputs=block_inputs,
    model_inputs=model_inputs,
    unread=unread,
    told=told,
    spatial=spatial,
    tokens_record=tokens_record,
    guided=is_guided,
)
