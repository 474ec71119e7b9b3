"""Z-Image in d2m: what it is called with, its weights by name, converted and distilled."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from calib.measure.importance import magnitudes, neuron_importance, scores_of
from d2m.convert.streamed import convert_stream
from d2m.distill.loop import distill
from d2m.families import family_of_pipeline
from d2m.families.flow import generator_at
from d2m.families.inputs import generate_latents, noised, transformer_inputs
from d2m.families.known import ZIMAGE
from d2m.families.weights import Structure
from d2m.families.zimage import MASK, STATES
from d2m.families.zimage.weights import filled, weights
from d2m.generate import load_pipeline
from d2m.lora.fuse import lora
from d2m.model.block_group import block_groups
from d2m.model.sparse_transformer import sparse_class, sparse_model_of, structure
from d2m.model.surgery import identity_error, sparse_ffns, unit_gates
from d2m.plan.count import plan
from d2m.plan.model_config import sizes, subject_of
from d2m.plan.presets import preset_file
from d2m.recipe.recipe import SparseSpec, from_dict, load
from tests.cases import flops
from tests.tiny import lora as tinylora
from tests.tiny.pipeline import IMAGE_SIZE
from tests.tiny.zimage import ZIMAGE_CONFIG, zimage, zimage_transformer

PROMPTS = ["a red circle", "two blue squares and a green ring " * 4]
LENGTH = 40  # the second fills two times 32 tokens, the first one
pytestmark = pytest.mark.filterwarnings("ignore")
flops.register()


@pytest.fixture(scope="module")
def pipe() -> Any:
    built = zimage()
    built.set_progress_bar_config(disable=True)
    return built


def batches(pipe: Any, size: tuple[int, int] = (IMAGE_SIZE, IMAGE_SIZE)) -> Any:
    @torch.no_grad()
    def batch(step: int, count: int) -> dict[str, torch.Tensor]:
        draw, data = generator_at(0, "data", step), ZIMAGE.data
        found = data.encode_text(pipe, [PROMPTS[i % 2] for i in range(count)], LENGTH)
        found["latents"] = torch.stack([data.noise(pipe, *size, draw) for _ in range(count)])
        return found | data.position_ids(pipe, found, *size)

    return batch


def recipe(**more: Any) -> Any:
    stage = {"train": ["shared", "experts", "gate"], "top_k": 2, "steps": 24, "lr": 3e-3}
    stage |= {"batch_size": 2, "losses": {"output": 1.0, "feature": 1.0, "balance": 0.01}}
    facts = {"name": "tiny", "stages": [stage | {"name": "all"}]}
    calibration = {"batches": 1, "batch_size": 2}
    return from_dict(facts | {"calibration": calibration, "split": "magnitude"} | more, "test")


def inputs_of(pipe: Any, dtype: torch.dtype) -> dict[str, Any]:
    batch = {n: v.to(dtype) if v.is_floating_point() else v for n, v in batches(pipe)(0, 2).items()}
    x, t, _ = noised(pipe.transformer, batch, generator_at(0, "test"))
    return transformer_inputs(pipe.transformer, batch, x, t.to(dtype))


def test_the_family_is_known(pipe: Any) -> None:
    assert family_of_pipeline(pipe) is ZIMAGE
    assert subject_of("z-image").family is ZIMAGE


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_all_experts_on_is_the_dense_model(pipe: Any, dtype: torch.dtype, limit: float) -> None:
    """Rotation is complex64 in diffusers, of queries in float32 whatever the model has."""
    dense = zimage_transformer().to(dtype)
    sparse = sparse_model_of(dense, scores_of(dense, magnitudes), recipe(), ZIMAGE)
    assert set(sparse_ffns(sparse)) == {f"layers.{i}.feed_forward" for i in range(3)}
    assert all(ffn.experts.b1 is None for ffn in sparse_ffns(sparse).values())
    inputs = inputs_of(pipe, dtype)
    assert len({len(text) for text in inputs["cap_feats"]}) == 2
    assert identity_error(sparse, dense, inputs) < (1e-8 if dtype == torch.float64 else limit)
    with torch.no_grad(), unit_gates(sparse):
        for before, after in zip(dense.layers, sparse.layers):
            x = torch.randn(2, 7, 48, dtype=dtype)
            error = (after.feed_forward(x) - before.feed_forward(x)).norm()
            assert float(error / before.feed_forward(x).norm()) < limit


def test_time_and_velocity_are_turned_around(pipe: Any) -> None:
    """One step of the pipeline is an Euler step of what d2m makes of the model's answer."""
    family, draw = ZIMAGE, torch.Generator().manual_seed(1)
    text = family.data.encode_text(pipe, PROMPTS, LENGTH)
    noise = torch.randn(2, 4, 8, 8, generator=draw)
    seen = {}

    def keep(_: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
        seen[step] = values["latents"].clone()
        return values

    keywords = {"num_inference_steps": 2, "guidance_scale": 1.0, "height": 16, "width": 16}
    keywords |= {"callback_on_step_end": keep, "max_sequence_length": LENGTH}
    generate_latents(pipe, noise, text, None, **keywords)
    times = family.data.times(pipe.scheduler)
    batch = text | {"latents": noise}
    with torch.no_grad():
        inputs = transformer_inputs(pipe.transformer, batch, noise, times[:1].expand(2))
        velocity = family.data.predicted(pipe.transformer(**inputs, return_dict=False)[0])
    assert torch.allclose(noise + (times[1] - times[0]) * velocity, seen[0], atol=1e-5)


def test_guidance_is_written_as_others_write_it(pipe: Any) -> None:
    """w means without + w (with - without); the pipeline's own number is 1 less."""
    noise, data = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2)), ZIMAGE.data
    words = [data.encode_text(pipe, [prompt], LENGTH) for prompt in ("a red circle", "")]
    same = {"num_inference_steps": 1, "height": 16, "width": 16, "max_sequence_length": LENGTH}

    def last(scale: float, *texts: Any) -> torch.Tensor:
        return generate_latents(pipe, noise, *texts, guidance_scale=scale, **same)

    alone = [last(1.0, each, None) for each in words]
    guided = last(3.0, *words)
    assert torch.allclose(guided, alone[1] + 3.0 * (alone[0] - alone[1]), atol=1e-4)
    given = {"prompt": ["a red circle"], "guidance_scale": 3.0, "output_type": "latent"}
    assert torch.allclose(data.generate(pipe, given | same | {"latents": noise}).images, guided)


@pytest.mark.parametrize("top_k", [None, 0, 2])
def test_every_weight_and_flop(pipe: Any, top_k: int | None) -> None:
    """Names and sizes against the class on the meta device, FLOPs against FlopCounterMode."""
    spec = None if top_k is None else SparseSpec(top_k=top_k)
    more = {} if top_k is None else {"top_k": top_k}
    cls = ZImageTransformer2DModel if top_k is None else sparse_class(ZIMAGE)
    for config in (ZIMAGE_CONFIG, dict(subject_of("z-image").config)):
        known = {key: value for key, value in config.items() if key != "out_channels"}
        with torch.device("meta"):
            model = cls(**known, **more)
        real = {name: parameter.numel() for name, parameter in model.named_parameters()}
        found = {}
        read = sizes({"_class_name": "ZImageTransformer2DModel", **config}, "tiny")
        for stack in weights(read, Structure(spec), 16, 24):
            for weight in stack.weights:
                for i in range(stack.count) if weight.size else ():
                    found[stack.prefix.replace("*", str(i)) + weight.name] = weight.size
        assert found == real
    assert top_k is not None or sum(real.values()) == 6_154_908_736
    model = zimage_transformer() if top_k is None else cls(**ZIMAGE_CONFIG, **more)
    one = {"x": torch.randn(1, 4, 1, 8, 8), "t": torch.ones(1), "cap_feats": torch.randn(1, 24, 24)}
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**one)
    read = sizes({"_class_name": "ZImageTransformer2DModel", **ZIMAGE_CONFIG}, "tiny")
    stacks = weights(read, Structure(spec), 16, 24)
    counted = sum(stack.active * w.flops for stack in stacks for w in stack.weights)
    assert counted == counter.get_total_flops()


@pytest.mark.parametrize("name", ["M", "S", "XS"])
def test_presets_of_the_published_depth(name: str) -> None:
    """What they plan is what the class has on the meta device, routers of both widths too."""
    subject = subject_of("z-image")
    made = load(preset_file(name, ZIMAGE, subject.depth))
    known = {key: value for key, value in subject.config.items() if key != "out_channels"}
    with torch.device("meta"):
        model = sparse_class(ZIMAGE)(**known, **structure(made))
    answer = plan("z-image", preset=name)
    assert answer["total_params"] == sum(p.numel() for p in model.parameters())
    groups = block_groups(model).values()
    assert [*groups][0].router.embedding.weight.shape == (3, 256)
    assert answer["flops_vs_dense"] < plan("z-image", preset="L")["flops_vs_dense"] - 0.14


def test_a_distillation_step(pipe: Any, tmp_path: Path) -> None:
    made = recipe(split="taylor")
    scores = neuron_importance(pipe.transformer, batches(pipe), made)
    assert {score.numel() for score in scores.values()} == {128}
    student = sparse_model_of(pipe.transformer, scores, made, ZIMAGE)
    lines = distill(student, pipe.transformer, made, batches(pipe), workdir=tmp_path, log_every=1)
    losses = [line["output"] for line in lines]
    assert len(losses) == 24 and all(loss == loss for loss in losses)
    assert sum(losses[16:]) < sum(losses[:8]), losses
    assert set(lines[0]["features"]) == {f"layers.{i}.image" for i in range(3)}


def test_blocks_left_out_and_a_group_of_prompts_of_two_lengths(pipe: Any) -> None:
    """Left out for good, a block answers what it is given; a group's router reads a text alone as
    beside a longer one, by its mask."""
    scores = scores_of(pipe.transformer, magnitudes)
    inputs = inputs_of(pipe, torch.float32)
    lengths = {filled(len(text)) for text in inputs["cap_feats"]}
    made = recipe(blocks={"drop": {"double": [1]}})
    left = sparse_model_of(pipe.transformer, scores, made, ZIMAGE)
    dense = zimage_transformer()
    del dense.layers[1]
    with torch.no_grad(), unit_gates(left):
        expected = torch.stack(dense(**inputs, return_dict=False)[0])
        found = torch.stack(left(**inputs, return_dict=False)[0])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    made = recipe(blocks={"groups": {"double": [[0, 1, 2]]}, "kappa": 1})
    grouped = sparse_model_of(pipe.transformer, scores, made, ZIMAGE)
    (group,) = block_groups(grouped).values()
    group.record = True
    assert group.router.embedding.weight.shape == (3, 48) and len(lengths) == 2
    logits = []
    with torch.no_grad():
        for rows in (slice(0, 2), slice(0, 1), slice(1, 2)):
            part = {name: each[rows] for name, each in inputs.items()}
            grouped(**part)
            logits.append(group.last_logits)
    torch.testing.assert_close(logits[0], torch.cat(logits[1:]), rtol=1e-4, atol=1e-5)


def test_converted_from_disk_with_a_lora(pipe: Any, tmp_path: Path) -> None:
    """Block by block without loading the model; a LoRA fused afterwards is one fused before."""
    pipe.save_pretrained(tmp_path / "dense")
    made = dataclasses.replace(recipe(), stages=())
    answer = convert_stream(
        tmp_path / "dense", tmp_path / "sparse", made, magnitudes, "magnitude", log=lambda _: None
    )
    assert max(answer["checked"].values()) < 1e-5 and len(answer["checked"]) >= 1
    loaded = load_pipeline(tmp_path / "sparse", device="cpu", dtype="fp32")
    inputs = inputs_of(pipe, torch.float32)
    assert identity_error(loaded.transformer, pipe.transformer, inputs) < 1e-5
    found = tinylora.factors(pipe.transformer, 3)
    file = tinylora.write(tmp_path / "a.safetensors", tinylora.peft(found))
    told = lora(file, tmp_path / "sparse", tmp_path / "fused", scale=0.5)
    assert told["routed_share"] > 0.05 and sum(told["shares"].values()) == pytest.approx(1)
    fused = load_pipeline(tmp_path / "fused", device="cpu", dtype="fp32")
    dense = zimage_transformer()
    with torch.no_grad():
        for name, (up, down) in found.items():
            dense.get_submodule(name).weight += 0.5 * up @ down
    assert identity_error(fused.transformer, dense, inputs) < 1e-5


def test_texts_are_masked(pipe: Any) -> None:
    """The mask says which states are a prompt's; a prompt beside a longer one is what it was."""
    both = ZIMAGE.data.encode_text(pipe, list(PROMPTS), LENGTH)
    alone = ZIMAGE.data.encode_text(pipe, PROMPTS[:1], LENGTH)
    assert both[MASK].sum(1).tolist() != [LENGTH, LENGTH]
    assert torch.allclose(both[STATES][:1], alone[STATES], atol=1e-5)
    assert not both[STATES][~both[MASK]].any()


def test_a_text_encoder_stored_with_its_head_is_read_one_tensor_at_a_time(
    pipe: Any, tmp_path: Path
) -> None:
    """As of published Qwen3 files: `model.` before every name, though the class has no head."""
    from safetensors.torch import load_file, save_file

    from export.checkpoint.pipeline import open_components

    pipe.save_pretrained(tmp_path)
    file = tmp_path / "text_encoder/model.safetensors"
    plain = load_file(file)
    save_file({f"model.{key}": value for key, value in plain.items()}, file, {"format": "pt"})
    found = next(c for c in open_components(tmp_path, False, ()) if c.name == "text_encoder")
    assert next(found.model.parameters()).is_meta
    assert plain and all(torch.equal(found.get(key), value) for key, value in plain.items())
