"""Decoder-only language models as text encoders: a program of one call a layer, as transformers
are.

    input_ids, attention_mask [batch, text_tokens] -> states [batch, text_tokens, n width]

The states of `layers` lie side by side, each as the layer before wrote it; what comes after the
last of them is in no bundle. A layer's graph is traced once and takes its weights as inputs, so a
model of any size is exported tensor by tensor. Layers are transformers' own modules (Qwen3,
Mistral, Llama and relatives: grouped keys, norms of queries and keys, any rotary table); ours is
what stands around them: the rotary table, the masks, and attention in the form that is fused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from export.graph.attention import attended
from export.graph.blocks import block_type, call_by_name
from export.graph.program import Program
from export.graph.trace import Spec

ATTENTION = "d2m_export"  # the name under which transformers knows `attention`
IDS = Spec(torch.int64, ("batch", "text_tokens"))
MASKED = 30000.0  # taken off a score: e^-30000 is 0 in every type, and float16 holds it
LONGEST = 4096  # tokens; a shorter sliding window would show


class Embed(nn.Module):
    """What a decoder does before its layers; parameter names are the model's."""

    def __init__(self, language: Any) -> None:
        super().__init__()
        self.embed_tokens = language.embed_tokens
        self.rotary_emb = language.rotary_emb

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """-> states [B, T, D], what is added to scores [B, 1, T, T], 1 where a token sees any
        [B, T, 1], cosines and sines [1, T, C].

        A token sees those up to itself that are no padding, as transformers masks them; its
        position is counted from the row's beginning, padding or not.
        """
        states = self.embed_tokens(input_ids)
        position = torch.arange(input_ids.shape[1])
        later = (position[None, :] > position[:, None]).to(states.dtype)[None]
        padding = 1 - attention_mask.to(states.dtype)[:, None]
        hidden = torch.maximum(later, padding)
        seen = 1 - hidden.amin(-1, keepdim=True)
        cos, sin = self.rotary_emb(states.float(), position[None])
        return states, -MASKED * hidden[:, None], seen, cos, sin


class States(nn.Module):
    """The states that are read, side by side."""

    def forward(self, **states: Tensor) -> Tensor:
        """n of [B, T, D] -> [B, T, n D], in the order of their names."""
        rows = [states[name] for name in sorted(states)]
        return rows[0].clone() if len(rows) == 1 else torch.cat(rows, dim=-1)


class Keep(nn.Module):
    """Hands a tensor on under another name."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states.clone()


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    seen: Tensor,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' interface: [B, H, T, C] of queries, [B, G, T, C] of keys and values.

    Of a token that sees none (padding on the left) comes zero, as of torch's own attention.
    """
    wanted = query.shape[-1] ** -0.5
    assert abs(scaling - wanted) < 1e-9, (scaling, wanted)
    groups = module.num_key_value_groups
    key, value = (_repeated(each.to(value.dtype), groups) for each in (key, value))
    output = attended(query.to(value.dtype), key, value, attention_mask) * seen
    return output.unflatten(-1, (query.shape[1], -1)), None


def _repeated(x: Tensor, groups: int) -> Tensor:
    """[B, G, T, C] -> [B, G n, T, C], n = `groups` neighbouring heads alike."""
    batch, heads, tokens, size = x.shape
    if groups == 1:
        return x
    wide = x[:, :, None].expand(batch, heads, groups, tokens, size)
    return wide.reshape(batch, heads * groups, tokens, size)


def call_layer(run: Callable[..., Any], tensors: dict[str, Tensor]) -> Any:
    """A layer of transformers'."""
    return run(
        hidden_states=tensors["hidden_states"],
        attention_mask=tensors["bias"],
        position_embeddings=(tensors["rope_cos"], tensors["rope_sin"]),
        seen=tensors["seen"],
    )


def decoder_program(
    model: Any, language: str, layers: Sequence[int], dtype: torch.dtype
) -> Program:
    """The program of `model`'s submodule `language` that gives the states after `layers` layers.

    language: "" for the model itself. layers: rising; 1 is what the first layer writes. The last
    may not be the model's last, whose states its norm changes. ValueError for what it does not
    compile: too few layers, or a sliding window that is shorter than texts may be.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, attention)
    decoder, last = model.get_submodule(language), layers[-1]
    check(decoder, layers)
    model.set_attn_implementation(ATTENTION)
    width = decoder.config.hidden_size
    size = getattr(decoder.config, "head_dim", None) or width // decoder.config.num_attention_heads
    sequence = ("batch", "text_tokens")
    states, scalar = Spec(dtype, (*sequence, width)), Spec(dtype, (*sequence, 1))
    rope = Spec(torch.float32, (1, "text_tokens", size))
    inputs = {"input_ids": IDS, "attention_mask": IDS}
    inner = {
        "hidden_states": states,
        "bias": Spec(dtype, ("batch", 1, "text_tokens", "text_tokens")),
        "seen": scalar,
        "rope_cos": rope,
        "rope_sin": rope,
    }
    kept = [f"hidden_states_{index}" for index in range(len(layers) - 1)]
    # In the order of the names, which is that of the layers.
    read = dict.fromkeys([*kept, f"hidden_states_{len(kept)}"], states)
    outputs = {"states": Spec(dtype, (*sequence, len(layers) * width))}
    first = decoder.layers[0]
    types = {
        "embed": block_type("embed", Embed(decoder), call_by_name, inputs, inner, dtype),
        "layer": block_type("layer", first, call_layer, inner, {"hidden_states": states}, dtype),
    }
    place = f"{language}." if language else ""
    calls = [("embed", place)]
    hidden = {"hidden_states": states}
    for index in range(last):
        calls.append(("layer", f"{place}layers.{index}."))
        if index + 1 in layers:
            name = f"hidden_states_{layers.index(index + 1)}"
            kind = f"keep_{layers.index(index + 1)}"
            types[kind] = block_type(kind, Keep(), call_by_name, hidden, {name: states}, dtype)
            calls.append((kind, ""))
    types["states"] = block_type("states", States(), call_by_name, read, outputs, dtype)
    calls.append(("states", ""))
    return Program(types, calls, inputs, outputs)


def check(decoder: Any, layers: Sequence[int]) -> None:
    """ValueError, one sentence, for a decoder that `decoder_program` cannot compile."""
    config, last = decoder.config, layers[-1]
    name = type(decoder).__name__
    if not last < config.num_hidden_layers:
        raise ValueError(
            f"the text encoder, a {name}, has {config.num_hidden_layers} layers, expected more than"
            f" the {last} whose states the transformer reads; give the model that it was trained"
            " with."
        )
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    if window and window < LONGEST and "sliding_attention" in kinds[:last]:
        raise ValueError(
            f"the text encoder, a {name}, has a sliding window of {window} tokens, expected none or"
            f" {LONGEST} and more: export does not compile a shorter one."
        )
    if {shapes(layer) for layer in decoder.layers[:last]} != {shapes(decoder.layers[0])}:
        raise ValueError(
            f"the text encoder, a {name}, has layers of several kinds, expected one kind: export"
            " compiles a layer once and runs it with every layer's weights."
        )


def shapes(layer: nn.Module) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Names and shapes of a layer's weights."""
    return tuple((name, tuple(each.shape)) for name, each in layer.named_parameters())
