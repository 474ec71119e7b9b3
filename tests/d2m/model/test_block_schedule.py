"""With alpha 0 the schedule of a generation is known before its first step, and kept."""

import pytest
import torch

from d2m.model.block_group import block_groups, set_kappa
from d2m.recipe.structure import Blocks
from tests.cases.block_schedule import block_schedule
from tests.tiny.pair import BLOCKS, grouped_pair, tiny_pair
from tests.tiny.pipeline import build_pipeline, tiny_inputs

KNOWN = Blocks(BLOCKS.double, BLOCKS.single, alpha=0.0)


def watched(model):
    """{group name: [first chosen block of every sample, per call]}, filled by the calls."""
    seen = {name: [] for name in block_groups(model)}
    for name, group in block_groups(model).items():
        group.record = True

        def keep(module, args, output, name=name):
            start = module.last_logits.argmax(-1) + module.indices[0]
            seen[name].append(start)

        group.register_forward_hook(keep)
    return seen


@pytest.mark.parametrize("kappa", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_schedule_is_what_the_pipeline_then_runs(kappa, dtype):
    """A whole generation by diffusers' pipeline: four prompts, five steps, two kinds of groups."""
    blocks = Blocks(((1, 2, 3),), ((2, 3, 4),), alpha=0.0)
    model, _ = grouped_pair(blocks=blocks)
    for group in block_groups(model).values():
        group.router.embedding.weight.data *= 3  # so that steps and prompts choose differently
    set_kappa(model, kappa)
    pipe = build_pipeline()
    pipe.register_modules(transformer=model)
    pipe = pipe.to(dtype)
    for group in block_groups(model).values():
        group.router.float()  # as from_pretrained keeps it
    pipe.set_progress_bar_config(disable=True)
    prompts = ["a red circle", "two blue squares", "a ring", "three green stars below a cross"]
    seen = watched(model)
    with torch.no_grad():
        text, pooled, _ = pipe.encode_prompt(prompts, None, max_sequence_length=16)
        pipe(
            prompt_embeds=text,
            pooled_prompt_embeds=pooled,
            height=16,
            width=16,
            num_inference_steps=5,
            guidance_scale=2.5,
            output_type="latent",
        )
    times = pipe.scheduler.timesteps.to(dtype) / 1000
    schedule = block_schedule(model, times, pooled, guidance=2.5)
    assert schedule.keys() == seen.keys()
    for name, chosen in schedule.items():
        assert chosen.shape == (5, 4)
        assert torch.equal(chosen, torch.stack(seen[name])), name
    assert any(len(chosen.unique()) > 1 for chosen in schedule.values())


def test_the_image_does_not_matter_with_alpha_0():
    model, _ = grouped_pair(blocks=KNOWN)
    inputs, seen = tiny_inputs(), watched(model)
    with torch.no_grad():
        model(**inputs)
        model(**inputs | {"hidden_states": -inputs["hidden_states"]})
    assert all(torch.equal(*calls) for calls in seen.values())
    schedule = block_schedule(
        model, inputs["timestep"][:1], inputs["pooled_projections"][:1], guidance=[3.5]
    )
    assert {name: chosen[0, 0] for name, chosen in schedule.items()} == {
        name: calls[0][0] for name, calls in seen.items()
    }


def test_refusals():
    pooled = tiny_inputs()["pooled_projections"]
    with pytest.raises(ValueError, match="transformer_blocks.1 has alpha 0.5, .* expected 0"):
        block_schedule(grouped_pair()[0], [0.5], pooled, 3.5)
    with pytest.raises(ValueError, match="has no groups of blocks"):
        block_schedule(tiny_pair()[0], [0.5], pooled, 3.5)
    with pytest.raises(ValueError, match="guidance is None; this model embeds it"):
        block_schedule(grouped_pair(blocks=KNOWN)[0], [0.5], pooled)
