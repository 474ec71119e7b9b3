"""Families in the runtime, in numpy: what diffusers' pipelines do around their models.

One file a family; schedulers and latents, which families share, stand beside them.

    family         What a family of models is to the runtime: its components
    known          The families of models that bundles may hold, by the name in their manifest
    flux           FLUX.1 [dev] and [schnell] in the runtime
    flux2          FLUX.2 [klein] and [dev] in the runtime
    chroma         Chroma in the runtime: what ChromaPipeline does around its models
    sd3            Stable Diffusion 3 and 3.5 in the runtime
    pixart         PixArt-Sigma in the runtime: what PixArtSigmaPipeline does around its models
    qwen           Qwen-Image in the runtime: what QwenImagePipeline does around its models
    zimage         Z-Image in the runtime: what ZImagePipeline does around its models
    latents        Latents in numpy, as several families have them: noise, patches as tokens
    flow_matching  Flow matching in numpy
    dpm_solver     DPM-Solver++ of order 1 and 2 in numpy
"""

from typing import TYPE_CHECKING

from runtime.files.lazy import lazy

if TYPE_CHECKING:
    from runtime.families.family import Family
    from runtime.families.known import FAMILIES, family_of, is_guided, title_of

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "runtime.families.family": "Family",
        "runtime.families.known": "FAMILIES family_of is_guided title_of",
    },
)
