"""Families for export: how each transformer is cut into blocks, its encoders and VAE.

One file a family; what families share stands beside them.

    family      What a family of models is to export: how its transformer is cut into blocks
    known       The families that export knows, by the name of their row in d2m/families/known.py
    flux        FLUX.1 for export: its transformer's ends and blocks, its text encoders and VAE
    flux2       FLUX.2 for export: the transformer's ends and blocks, its text encoder
    chroma      Chroma for export: the transformer's ends and blocks, its text encoder and VAE
    sd3         Stable Diffusion 3 and 3.5 for export: the transformer's ends and blocks
    pixart      PixArt-Sigma for export: the transformer's ends and blocks
    qwen        Qwen-Image for export: the transformer's ends and blocks, its text encoder, its VAE
    qwen_vae    Qwen-Image's VAE for export: a video's on one frame
    zimage      Z-Image for export: the transformer's ends and blocks
    encoders    Text encoders and VAE as programs of one call
    modulation  Shared modulation in a program: the embed call writes it
    ends        What transformers and VAEs of several families have in common at their ends
    configs     The configs of a pipeline directory's components
"""

from typing import TYPE_CHECKING

from runtime.files.lazy import lazy

if TYPE_CHECKING:
    from export.families.known import FAMILIES, export_family

__getattr__, __dir__, __all__ = lazy(__name__, {"export.families.known": "FAMILIES export_family"})
