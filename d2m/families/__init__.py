"""Families of diffusion transformers, one folder a family: `ls families`.

A folder holds the family's row, its list of weights, published configs and presets. What families
share stands beside them; none imports another. docs/families.md shows how to add one.

    family               What a family of models is to d2m: a row of four records
    site                 An FFN's place in a block, and what kind of FFN it is
    known                Families of diffusion transformers: which there are
    weights              What the weights of all families are put together from
    ffn_sites            Where a model's blocks keep their FFNs: sites by name, and their weights
    flow                 Flow matching: the noisy latents a teacher and its student are compared on
    inputs               From a batch of data to what a transformer or its pipeline is called with
    latents              What several families share: an AutoencoderKL's latents, noise
    encoders             Sizes of the text encoders and VAEs of published models
    generation_defaults  How a pipeline directory wants to generate: size, steps, guidance
"""

from typing import TYPE_CHECKING

from runtime.files.lazy import lazy

if TYPE_CHECKING:
    from d2m.families.family import Family
    from d2m.families.known import (
        FAMILIES,
        FLUX,
        PIXART,
        QWEN,
        SD3,
        family_of,
        family_of_model,
        family_of_pipeline,
        pairs_for,
    )
    from d2m.families.site import Site

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "d2m.families.family": "Family",
        "d2m.families.known": "FAMILIES FLUX PIXART QWEN SD3"
        " pairs_for family_of family_of_model family_of_pipeline",
        "d2m.families.site": "Site",
    },
)
