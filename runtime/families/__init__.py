"""Families in the runtime, in numpy: what diffusers' pipelines do around their models.

One file a family; schedulers and latents, which families share, stand beside them.

    family         What a family of models is to the runtime: its components, and numpy functions
                   around them
    known          The families of models that bundles may hold, by the name in their manifest
    flux           FLUX.1 [dev] and [schnell] in the runtime: what FluxPipeline does around its
                   models
    sd3            Stable Diffusion 3 and 3.5 in the runtime: what StableDiffusion3Pipeline does
                   around its models
    pixart         PixArt-Sigma in the runtime: what PixArtSigmaPipeline does around its models
    qwen           Qwen-Image in the runtime: what QwenImagePipeline does around its models
    latents        Latents in numpy, as several families have them: noise, patches as tokens,
                   positions, scaling
    flow_matching  Flow matching in numpy: what diffusers' FlowMatchEulerDiscreteScheduler does in
                   torch
    dpm_solver     DPM-Solver++ of order 1 and 2 in numpy: what diffusers'
                   DPMSolverMultistepScheduler does
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtime.files.lazy import lazy

if TYPE_CHECKING:
    from runtime.families.family import Family
    from runtime.families.known import FAMILIES, family_of, title_of

__all__ = ["FAMILIES", "Family", "family_of", "title_of"]
__getattr__, __dir__ = lazy(
    __name__,
    {
        "FAMILIES": "runtime.families.known",
        "Family": "runtime.families.family",
        "family_of": "runtime.families.known",
        "title_of": "runtime.families.known",
    },
)
