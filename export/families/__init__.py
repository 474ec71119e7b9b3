"""Families for export: how each transformer is cut into blocks, its encoders and VAE.

One file a family; what families share stands beside them.

    family      What a family of models is to export: how its transformer is cut into blocks, its
                other parts
    known       The families that export knows, by the name of their row in d2m/families/known.py
    flux        FLUX.1 for export: its transformer's ends and blocks, its text encoders and VAE
    sd3         Stable Diffusion 3 and 3.5 for export: the transformer's ends and blocks, its text
                encoders, VAE
    pixart      PixArt-Sigma for export: the transformer's ends and blocks, its text encoder and
                VAE
    qwen        Qwen-Image for export: the transformer's ends and blocks, its text encoder, its VAE
    qwen_vae    Qwen-Image's VAE for export: a video's decoder on one frame, without its
                convolutions in time
    encoders    Text encoders and VAE decoder as programs of one call: what FluxPipeline asks of
                each
    attention   FLUX attention written for export: the same arithmetic as diffusers', in few ONNX
                nodes
    modulation  Shared modulation in a program: the embed call writes it, blocks read it in place
                of temb
    ends        What transformers and VAEs of several families have in common at their ends:
                patches, `Final`
    configs     The configs of a pipeline directory's components
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtime.files.lazy import lazy

if TYPE_CHECKING:
    from export.families.known import FAMILIES, export_family

__all__ = ["FAMILIES", "export_family"]
__getattr__, __dir__ = lazy(
    __name__,
    {
        "FAMILIES": "export.families.known",
        "export_family": "export.families.known",
    },
)
