"""What a LoRA file calls the layers of a model: diffusers' and peft's names, kohya's, the makers'.

Diffusers' names, with dots or underlines, are those of every family; the makers' own are those of
runtime.lora.original_names.

Every name ends as that of a Linear in diffusers' dense model. Some of kohya's stand for several,
whose outputs follow one another.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

from runtime.lora.original_names import ORIGINALS, XLABS

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
    "down": "down",  # of XLabs, whose layers' own names end in lora
    "up": "up",
}
_ENDING = re.compile(
    r"\.(?:(lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up|(?<=_lora\.)(?:down|up)"
    r"|(?<=_lora[12]\.)(?:down|up))(?:\.default(?:_0)?)?\.weight|alpha)$"
)
_OTHER = re.compile(r"\.(hada_w[12]_[ab]|lokr_w[12](?:_[ab])?)$")  # LyCORIS


def split_key(key: str) -> tuple[str, str]:
    """A key of a file -> (what it calls the layer, "down", "up", "alpha" or LyCORIS's factor).

    ValueError, in one sentence, for anything but factors of a product.
    """
    if other := _OTHER.search(key):
        return key[: other.start()], other[1]
    found = _ENDING.search(key)
    if key.endswith((".dora_scale", ".lora_magnitude_vector", ".lora_magnitude_vector.weight")):
        raise ValueError(
            f"the key {key!r} is of a DoRA, which also divides by the norm of the weight that it "
            "changes: it cannot be mapped; expected a LoRA, LoHa or LoKr."
        )
    if not found:
        raise ValueError(
            f"the key {key!r} is not understood; expected LAYER.lora_A.weight and lora_B.weight "
            "(diffusers, peft) or LAYER.lora_down.weight, lora_up.weight and alpha (kohya): "
            "other kinds of adapter (changed biases, convolutions) cannot be mapped."
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
            f"the layer {name!r} belongs to a text encoder; only what lies on the "
            "transformer is mapped: save the LoRA without its text encoders' layers."
        )
    flat = without_prefix(name).replace(".", "_")
    if found := _flat(known).get(flat):
        return [found], False
    for original in (*ORIGINALS, XLABS):
        names, swapped = original.find(flat, flat=True)
        if names and known.issuperset(names):
            return names, swapped
    raise ValueError(
        f"the layer {name!r} is none of this model's; expected names as diffusers, peft or kohya "
        "write them for it, such as transformer.transformer_blocks.0.attn.to_q: is the LoRA made "
        "for another model?"
    )


@lru_cache(maxsize=4)
def _flat(modules: frozenset[str]) -> dict[str, str]:
    return {name.replace(".", "_"): name for name in modules}
