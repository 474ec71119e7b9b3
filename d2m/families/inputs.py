"""From a batch of data to what a transformer or its pipeline is called with, by its family.

B batch, D width; latents are as the family's transformer takes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from d2m.families.known import family_of_model, family_of_pipeline

if TYPE_CHECKING:
    from torch import Tensor, nn


def transformer_inputs(
    model: nn.Module, batch: Mapping[str, Tensor], x: Tensor, t: Tensor
) -> dict[str, Any]:
    """What `model(**inputs)` takes, tensors on the model's device.

    Args:
        batch: the family's conditions (`Data.inputs`).
        x [B, ...]: noisy latents.
        t [B]: their times in [0, 1], 1 pure noise.
    """
    inputs = family_of_model(model).data.inputs(model, batch, x, t)
    device = next(model.parameters()).device
    return {n: each.to(device) if hasattr(each, "to") else each for n, each in inputs.items()}


def prediction(model: nn.Module, output: Any, x: Tensor) -> Tensor:
    """What `model` answers to noisy latents x, of x's shape: a pipeline throws the rest away.

    An editor's reference tokens come after those of x and have outputs, too.
    """
    found = family_of_model(model).data.predicted(output)
    return found[:, : x.shape[1]]


def noised(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    generator: Any,
    mean: float = 1.2,
    std: float = 1.2,
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents of a batch made noisy as `model` knows noise: (x_t, t [B], what it is to predict)."""
    return family_of_model(model).data.noised(batch, generator, mean, std)


def global_embedding(model: nn.Module, batch: Mapping[str, Tensor], t: Tensor) -> Tensor:
    """temb [B, D], what feeds AdaLN and the groups' routers, as the model's forward computes it.

    batch: what `Data.embedding` reads; t [B]: times in [0, 1].
    """
    embedder = getattr(model, "time_text_embed", None) or model.time_guidance_embed
    device = next(embedder.parameters()).device  # type: ignore[union-attr]
    there = {name: each.to(device) for name, each in batch.items()}
    return family_of_model(model).data.embedding(model, there, t.to(device))


def generate_latents(
    pipe: Any,
    latents: Tensor,
    text: Mapping[str, Tensor],
    negative: Mapping[str, Tensor] | None,
    **settings: Any,
) -> Tensor:
    """The pipeline's last latents when it starts from `latents` [n, ...].

    text: conditions [n, ...] of the prompts (`Data.encode_text`); negative: of what they are guided
    against, None where that is nothing; settings: FluxPipeline's keywords.
    """
    data, device = family_of_pipeline(pipe).data, pipe.transformer.device
    given = {"latents": latents, "output_type": "latent", **settings}
    for prefix, words in (("", text), ("negative_", negative)):
        if words is not None:
            for keyword, name in data.prompt_embeds.items():
                given[prefix + keyword] = words[name].to(device)
    last: Tensor = data.generate(pipe, given).images
    return last
