"""What a LoRA file calls the layers of a model: diffusers' and peft's names, kohya's, BFL's own.

Diffusers' names, with dots or underlines, are those of every family; BFL's are FLUX.1's.

Every name ends as that of a Linear in diffusers' dense model. Some of kohya's stand for several,
whose outputs follow one another.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

# Before a layer's name, outermost first. read: diffusers, peft, ComfyUI and sd-scripts write these.
PEFT = "base_model.model."
PREFIXES = (
    PEFT,
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "lora_unet_",
    "lora_transformer_",
)
TEXT = ("lora_te", "text_encoder", "te1.", "te2.")
# After it: which factor of the product it is. `alpha` is a number.
FACTORS = {
    "lora_A": "down",
    "lora_down": "down",
    "lora.down": "down",
    "lora_B": "up",
    "lora_up": "up",
    "lora.up": "up",
}
_ENDING = re.compile(
    r"\.(?:(lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)(?:\.default(?:_0)?)?\.weight|alpha)$"
)

_DOUBLE = {
    "attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn_proj": ("attn.to_out.0",),
    "mlp_0": ("ff.net.0.proj",),
    "mlp_2": ("ff.net.2",),
    "mod_lin": ("norm1.linear",),
}
_TEXT_ATTENTION = {
    "attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "attn_proj": ("attn.to_add_out",),
}
_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation_lin": ("norm.linear",),
}
_ENDS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in_in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in_out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in_in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in_out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in_in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in_out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer_linear": "proj_out",
    "final_layer_adaLN_modulation_1": "norm_out.linear",
}
SWAPPED = "final_layer_adaLN_modulation_1"  # BFL: shift, scale; diffusers: scale, shift


def split_key(key: str) -> tuple[str, str]:
    """A key of a file -> (what it calls the layer, "down", "up" or "alpha").

    ValueError, in one sentence, for anything but a LoRA's factors.
    """
    found = _ENDING.search(key)
    if not found:
        raise ValueError(
            f"the key {key!r} is not understood; expected LAYER.lora_A.weight and lora_B.weight "
            "(diffusers, peft) or LAYER.lora_down.weight, lora_up.weight and alpha (kohya): "
            "other kinds of adapter (DoRA, LoKr, LoHa, changed biases) cannot be mapped."
        )
    return key[: found.start()], FACTORS[found[1]] if found[1] else "alpha"


def without_prefix(name: str) -> str:
    """What a file calls a layer, without what the library that wrote it puts before."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def layers_of(name: str, modules: Iterable[str]) -> tuple[list[str], bool]:
    """What a file's name of a layer stands for: (Linears of the dense model, halves swapped).

    modules: the dense model's Linears. ValueError, in one sentence, if it is none of them.
    """
    known = frozenset(modules)
    if name.startswith(TEXT):
        raise ValueError(
            f"the layer {name!r} belongs to a text encoder; d2m lora maps what lies on the "
            "transformer: save the LoRA without its text encoders' layers."
        )
    flat = without_prefix(name).replace(".", "_")
    if found := _flat(known).get(flat):
        return [found], False
    names = _bfl(flat)
    if names and known.issuperset(names):
        return names, flat == SWAPPED
    raise ValueError(
        f"the layer {name!r} is none of this model's; expected names as diffusers, peft or kohya "
        "write them for it, such as transformer.transformer_blocks.0.attn.to_q: is the LoRA made "
        "for another model?"
    )


@lru_cache(maxsize=4)
def _flat(modules: frozenset[str]) -> dict[str, str]:
    return {name.replace(".", "_"): name for name in modules}


def _bfl(flat: str) -> list[str]:
    """Black Forest Labs' name, dots as underscores -> diffusers' names; [] if it is none."""
    if found := re.fullmatch(r"double_blocks_(\d+)_(img|txt)_(\w+)", flat):
        index, stream, part = found.groups()
        names = _DOUBLE.get(part, ())
        if stream == "txt":
            # ff -> ff_context, norm1 -> norm1_context; attention has names of its own.
            other = (re.sub(r"^(ff|norm1)", r"\1_context", each) for each in names)
            names = _TEXT_ATTENTION.get(part, tuple(other))
        return [f"transformer_blocks.{index}.{each}" for each in names]
    if found := re.fullmatch(r"single_blocks_(\d+)_(\w+)", flat):
        index, part = found.groups()
        return [f"single_transformer_blocks.{index}.{each}" for each in _SINGLE.get(part, ())]
    return [_ENDS[flat]] if flat in _ENDS else []
