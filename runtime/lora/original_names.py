"""What the makers of a model call its layers: names of single-file checkpoints and of LoRAs.

read: diffusers' single-file conversions. Black Forest Labs' names for FLUX.1 (and Chroma) and for
FLUX.2, Alibaba's for Z-Image; ComfyUI stores under the same. A layer of theirs can be several of
diffusers' Linears, whose outputs follow one another.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
ADDED_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
LAST_MODULATION = "final_layer.adaLN_modulation.1"
# A norm's only parameter is called so; everywhere else names end alike.
SCALE = ("scale", "weight")


@dataclass(frozen=True)
class OriginalNames:
    """layers: the original name of a layer, {i} a block's number -> diffusers' names in order.

    swapped: layers whose outputs are shift and scale, in diffusers scale and shift.
    """

    layers: Mapping[str, tuple[str, ...]]
    swapped: tuple[str, ...] = ()

    def find(self, name: str, *, flat: bool = False) -> tuple[list[str], bool]:
        """(diffusers' names of a layer, whether its halves are swapped); [] if it is none.

        flat: dots are underscores in `name`, as kohya's sd-scripts write it.
        """
        for pattern, original, names in _compiled(tuple(self.layers.items()), flat):
            if found := pattern.fullmatch(name):
                number = found.groupdict().get("i", "")
                return [each.replace("{i}", number) for each in names], original in self.swapped
        return [], False


@lru_cache(maxsize=16)
def _compiled(
    layers: tuple[tuple[str, tuple[str, ...]], ...], flat: bool
) -> list[tuple[re.Pattern[str], str, tuple[str, ...]]]:
    rows = []
    for original, names in layers:
        name = original.replace(".", "_") if flat else original
        pattern = re.escape(name).replace(r"\{i\}", r"(?P<i>\d+)")
        rows.append((re.compile(pattern), original, names))
    return rows


def blocks(prefix: str, target: str, layers: Mapping[str, tuple[str, ...]]) -> Iterator[tuple]:
    """Rows of a list of blocks: `prefix`.{i}.layer -> `target`.{i}.names."""
    for layer, names in layers.items():
        yield f"{prefix}.{{i}}.{layer}", tuple(f"{target}.{{i}}.{name}" for name in names)


_ENDS = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "final_layer.linear": ("proj_out",),
    LAST_MODULATION: ("norm_out.linear",),
}
_ATTENTION = {
    "img_attn.qkv": QKV,
    "img_attn.proj": ("attn.to_out.0",),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.qkv": ADDED_QKV,
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
}
_NORMS = {"norm.query_norm": ("attn.norm_q",), "norm.key_norm": ("attn.norm_k",)}


def _embedders(module: str, **embedders: str) -> dict[str, tuple[str, ...]]:
    """Rows of two-layer embedders: the original's name -> that inside diffusers' `module`."""
    return {
        f"{original}.{layer}": (f"{module}.{name}.{linear}",)
        for original, name in embedders.items()
        for layer, linear in (("in_layer", "linear_1"), ("out_layer", "linear_2"))
    }


BFL_FLUX_1 = OriginalNames(
    {
        **_ENDS,
        **_embedders(
            "time_text_embed",
            time_in="timestep_embedder",
            vector_in="text_embedder",
            guidance_in="guidance_embedder",
        ),
        **dict(
            blocks(
                "double_blocks",
                "transformer_blocks",
                _ATTENTION
                | {
                    "img_mlp.0": ("ff.net.0.proj",),
                    "img_mlp.2": ("ff.net.2",),
                    "img_mod.lin": ("norm1.linear",),
                    "txt_mlp.0": ("ff_context.net.0.proj",),
                    "txt_mlp.2": ("ff_context.net.2",),
                    "txt_mod.lin": ("norm1_context.linear",),
                },
            )
        ),
        **dict(
            blocks(
                "single_blocks",
                "single_transformer_blocks",
                _NORMS
                | {
                    "linear1": (*QKV, "proj_mlp"),
                    "linear2": ("proj_out",),
                    "modulation.lin": ("norm.linear",),
                },
            )
        ),
        # Chroma's approximator of all modulation.
        **{
            f"distilled_guidance_layer.{layer}": (f"distilled_guidance_layer.{name}",)
            for layer, name in {
                "in_proj": "in_proj",
                "out_proj": "out_proj",
                "layers.{i}.in_layer": "layers.{i}.linear_1",
                "layers.{i}.out_layer": "layers.{i}.linear_2",
                "norms.{i}": "norms.{i}",
            }.items()
        },
    },
    swapped=(LAST_MODULATION,),
)
BFL_FLUX_2 = OriginalNames(
    {
        **_ENDS,
        **_embedders(
            "time_guidance_embed", time_in="timestep_embedder", guidance_in="guidance_embedder"
        ),
        **{
            f"{name}.lin": (f"{name}.linear",)
            for name in (
                "double_stream_modulation_img",
                "double_stream_modulation_txt",
                "single_stream_modulation",
            )
        },
        **dict(
            blocks(
                "double_blocks",
                "transformer_blocks",
                _ATTENTION
                | {
                    "img_mlp.0": ("ff.linear_in",),
                    "img_mlp.2": ("ff.linear_out",),
                    "txt_mlp.0": ("ff_context.linear_in",),
                    "txt_mlp.2": ("ff_context.linear_out",),
                },
            )
        ),
        **dict(
            blocks(
                "single_blocks",
                "single_transformer_blocks",
                _NORMS | {"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)},
            )
        ),
    },
    swapped=(LAST_MODULATION,),
)
Z_IMAGE = OriginalNames(
    {
        "x_embedder": ("all_x_embedder.2-1",),
        "final_layer.linear": ("all_final_layer.2-1.linear",),
        LAST_MODULATION: ("all_final_layer.2-1.adaLN_modulation.1",),
        **{
            f"{group}.{{i}}.attention.{layer}": tuple(
                f"{group}.{{i}}.attention.{name}" for name in names
            )
            for group in ("layers", "noise_refiner", "context_refiner")
            for layer, names in {
                "qkv": ("to_q", "to_k", "to_v"),
                "out": ("to_out.0",),
                "q_norm": ("norm_q",),
                "k_norm": ("norm_k",),
            }.items()
        },
    }
)
ORIGINALS = (BFL_FLUX_1, BFL_FLUX_2, Z_IMAGE)
# XLabs' LoRAs of FLUX.1 are named by what processes an attention.
XLABS = OriginalNames(
    {
        **dict(
            blocks(
                "double_blocks",
                "transformer_blocks",
                {
                    "processor.qkv_lora1": QKV,
                    "processor.proj_lora1": ("attn.to_out.0",),
                    "processor.qkv_lora2": ADDED_QKV,
                    "processor.proj_lora2": ("attn.to_add_out",),
                },
            )
        ),
        **dict(
            blocks(
                "single_blocks",
                "single_transformer_blocks",
                {"processor.qkv_lora": QKV, "processor.proj_lora": ("proj_out",)},
            )
        ),
    }
)
