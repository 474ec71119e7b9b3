"""Every family from the real classes at a tiny size: converted, distilled, exported, drawn.

A family is a parameter: its row in tests/tiny/families.py. Nothing here knows which one it is.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from d2m.convert.streamed import block_names
from d2m.convert.teacher_inputs import TeacherInputs, dense_skeleton
from d2m.families import family_of_model, family_of_pipeline
from d2m.families.ffn_sites import sites_of
from d2m.families.flow import generator_at
from d2m.families.generation_defaults import write_defaults
from d2m.families.inputs import noised, transformer_inputs
from d2m.model.sparse_transformer import sparse_model_of
from d2m.model.surgery import identity_error, set_top_k, sparse_ffns
from d2m.recipe.recipe import from_dict
from d2m.recipe.structure import Blocks
from d2m.shards import open_shards
from runtime.families import is_guided
from tests.conftest import exported
from tests.tiny.families import FAMILIES, SIZE, Tiny

PROMPTS = ["a red circle", "two blue squares and a green ring"]
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", params=list(FAMILIES))
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def pipe(tiny: Tiny) -> Any:
    built = tiny.build()
    built.set_progress_bar_config(disable=True)
    return built


@pytest.fixture(scope="module")
def dense_dir(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("family") / "dense"
    pipe.save_pretrained(path)
    write_defaults(path, height=SIZE, width=SIZE)  # where a pipeline's own are of no config
    return path


def batches(pipe: Any) -> Any:
    """Random latents and real texts: what the family's transformer takes."""
    family = family_of_pipeline(pipe)

    @torch.no_grad()
    def batch(step: int, size: int) -> dict[str, torch.Tensor]:
        draw = generator_at(0, "data", step)
        texts = [PROMPTS[i % 2] for i in range(size)]
        found = family.data.encode_text(pipe, texts, family.data.text_length(pipe))
        found["latents"] = torch.stack([family.data.noise(pipe, SIZE, SIZE, draw) for _ in texts])
        return found | family.data.position_ids(pipe, found, SIZE, SIZE)

    return batch


def recipe(**blocks: Any) -> Any:
    stage = {"train": ["shared", "experts", "gate"], "top_k": 2, "steps": 6, "lr": 3e-3}
    stage |= {"batch_size": 2, "losses": {"output": 1.0, "feature": 1.0}, "name": "all"}
    calibration = {"batches": 1, "batch_size": 2}
    facts = {"name": "tiny", "stages": [stage], "calibration": calibration, "split": "magnitude"}
    return from_dict(facts | ({"blocks": blocks} if blocks else {}), "test")


def sparse_of(pipe: Any, made: Any, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """(dense, sparse) transformers, gates that leave no doubt."""
    import copy

    from calib.measure.importance import magnitudes, scores_of

    dense = copy.deepcopy(pipe.transformer).to(dtype)
    sparse = sparse_model_of(dense, scores_of(dense, magnitudes), made, family_of_pipeline(pipe))
    generator = torch.Generator().manual_seed(3)
    for ffn in sparse_ffns(sparse).values():
        torch.nn.init.normal_(ffn.gate.weight, generator=generator)
    return dense, sparse


def inputs_of(pipe: Any, dense: Any, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    batch = {name: each.to(dtype) for name, each in batches(pipe)(0, 2).items()}
    x, t, _ = noised(dense, batch, generator_at(0, "test"))
    return transformer_inputs(dense, batch, x, t.to(dtype))


def answer_of(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """What a transformer predicts."""
    predicted = family_of_model(model).data.predicted
    return predicted(model(**inputs, return_dict=False)[0])


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_all_experts_on_is_the_dense_model(pipe: Any, dtype: torch.dtype, limit: float) -> None:
    dense, sparse = sparse_of(pipe, recipe(), dtype)
    names = {name for name, _, _ in sites_of(dense.state_dict(), family_of_pipeline(pipe))}
    assert names == set(sparse_ffns(sparse))
    inputs = inputs_of(pipe, dense, dtype)
    assert identity_error(sparse, dense, inputs) < limit
    with torch.no_grad():
        different = answer_of(sparse, inputs) - answer_of(dense, inputs)
    assert float(different.norm()) > 1e-3  # two experts of twelve are another model


def test_groups_where_they_work_and_one_sentence_where_not(tiny: Tiny, pipe: Any) -> None:
    from d2m.model.block_group import block_groups, set_kappa

    dense, sparse = sparse_of(pipe, recipe(groups=tiny.groups, kappa=1), torch.float64)
    inputs = inputs_of(pipe, dense, torch.float64)
    assert len(block_groups(sparse)) == sum(map(len, tiny.groups.values()))
    assert identity_error(sparse, dense, inputs) < 1e-12
    with torch.no_grad():
        set_kappa(sparse, 1)
        few = answer_of(sparse, inputs)
        alone = [
            answer_of(sparse, one(inputs, i)) for i in range(2)
        ]  # every sample chooses for itself
    assert torch.allclose(few, torch.cat(alone), rtol=1e-9, atol=1e-9)
    if tiny.refused:
        with pytest.raises(ValueError, match=r"the recipe's group .* expected groups of blocks"):
            sparse_of(pipe, recipe(groups=tiny.refused, kappa=1))


def test_what_enters_ffns_block_by_block_is_what_enters_them(pipe: Any, dense_dir: Path) -> None:
    """Every token of every FFN, of two batches at the same time, one block's weights in memory."""
    family, model = family_of_pipeline(pipe), pipe.transformer.eval()
    calls = []
    for step in (0, 1):
        batch = batches(pipe)(step, 1 + step)
        x, t, _ = noised(model, batch, generator_at(step, "test"))
        calls.append(transformer_inputs(model, batch, x, t))
    expected: dict[str, list[torch.Tensor]] = {}
    hooks = []
    for site, block, where in sites_of(model.state_dict(), family):

        def keep(module: Any, given: Any, site: str = site) -> None:
            expected.setdefault(site, []).append(given[0].flatten(0, -2))

        linear = model.get_submodule(f"{block}.{where.fc1}")
        hooks.append(linear.register_forward_pre_hook(keep))
    with torch.no_grad():
        for call in calls:
            model(**call)
    for hook in hooks:
        hook.remove()
    folder = dense_dir / "transformer"
    source, skeleton = open_shards(folder), dense_skeleton(folder, family)
    blocks = block_names(source, family)
    seen = {}
    for block, kept in TeacherInputs(skeleton, source, family, blocks, calls, rows=1_000_000):
        assert all(site.startswith(f"{block}.") for site in kept)
        inside = tuple(f"{name}." for name in blocks)
        parameters = skeleton.named_parameters()
        assert all(value.is_meta for key, value in parameters if key.startswith(inside))
        seen |= kept
    assert seen.keys() == expected.keys() and seen

    def by_rows(x: torch.Tensor) -> torch.Tensor:
        return x[x[:, :3].double().sum(1).argsort()]

    for site, parts in expected.items():
        whole = torch.cat(parts)
        assert seen[site].shape == whole.shape
        assert torch.allclose(by_rows(seen[site]), by_rows(whole), atol=1e-4), site


def mode_of(tiny: Tiny) -> str:
    """A mode of modulation that it can have."""
    return "lowrank" if tiny.modulated else "full"


def one(inputs: dict[str, Any], i: int) -> dict[str, Any]:
    return {n: t if n.endswith("_ids") else t[i : i + 1] for n, t in inputs.items()}  # lists too


@pytest.mark.parametrize("mode", ["full", "single", "lowrank"])
def test_a_distillation_step(tiny: Tiny, pipe: Any, tmp_path: Path, mode: str) -> None:
    """Shared modulation, groups, and losses that are finite and fall."""
    from d2m.convert.modulation_fit import compress_adaln, modulation_moments
    from d2m.distill.loop import distill
    from d2m.recipe.structure import AdaLN

    made = recipe(groups=tiny.groups, kappa=1)
    if mode != "full" and not tiny.modulated:
        asked = dataclasses.replace(made, adaln=AdaLN(mode))
        with pytest.raises(ValueError, match=r"adaln.mode is .* expected full"):
            modulation_moments(pipe.transformer, batches(pipe), asked)
        return
    made = dataclasses.replace(made, adaln=AdaLN(mode))
    made = dataclasses.replace(
        made, stages=tuple(dataclasses.replace(s, kappa=1) for s in made.stages)
    )
    dense, sparse = sparse_of(pipe, made)
    data = batches(pipe)
    if mode != "full":
        compress_adaln(sparse, made.adaln, modulation_moments(dense, data, made))
    same = lambda step, size: data(0, size)  # noqa: E731 (one batch, which it must learn)
    history = distill(sparse, dense, made, same, workdir=tmp_path, log_every=1, log=lambda _: None)
    losses = [line["output"] for line in history]
    assert np.isfinite(losses).all()
    assert min(losses[3:]) < losses[0]  # every step is at another noise level


def test_a_lora_of_the_dense_model_is_the_sparse_models(
    tiny: Tiny, pipe: Any, dense_dir: Path, tmp_path: Path
) -> None:
    """float64, all experts on, every Linear changed: the dense model with the LoRA, exactly."""
    from d2m.lora.fuse import lora
    from d2m.model.sparse_transformer import sparse_class
    from tests.tiny.lora import factors, peft, write

    dense, sparse = sparse_of(pipe, recipe(groups=tiny.groups, kappa=1), torch.float64)
    family = family_of_pipeline(pipe)
    sparse.save_pretrained(tmp_path / "sparse" / "transformer")
    index = json.loads((dense_dir / "model_index.json").read_text())
    index = {name: value for name, value in index.items() if name.startswith("_")}
    index["transformer"] = ["d2m", family.names.sparse_class]  # and no other component
    (tmp_path / "sparse" / "model_index.json").write_text(json.dumps(index))
    changes = factors(dense)
    answer = lora(
        write(tmp_path / "lora.safetensors", peft(changes, alpha=3.0)),
        tmp_path / "sparse",
        tmp_path / "made",
        scale=0.5,
    )
    assert answer["layers"] == len(changes) and 0 < answer["routed_share"] < 1
    kinds = set(answer["shares"]) - {"dense"}  # of refiners, which keep their FFNs
    assert kinds == {"attention", "modulation", "shared", "routed", "other"}
    made = sparse_class(family).from_pretrained(
        tmp_path / "made" / "transformer", torch_dtype=torch.float64
    )
    inputs = inputs_of(pipe, dense, torch.float64)
    with torch.no_grad():
        before = answer_of(dense, inputs)
        for name, (up, down) in changes.items():  # rank 3, alpha 3
            dense.get_submodule(name).weight += 0.5 * up @ down
        assert float((answer_of(dense, inputs) - before).norm()) > 1e-3
    assert identity_error(made.eval(), dense, inputs) < 1e-12


def test_a_budget_is_kept(tiny: Tiny, pipe: Any, dense_dir: Path) -> None:
    """`--budget`: blocks that cost otherwise, that no group may hold, or that have no text."""
    from calib.budget.recipe import recipe_for
    from calib.measure.importance import magnitudes, scores_of
    from d2m.plan.count import plan
    from d2m.recipe.recipe import to_dict

    base, scores = recipe(), scores_of(pipe.transformer, magnitudes)

    def asked(budget: float) -> tuple[Any, dict[str, Any]]:
        return recipe_for(dense_dir, pipe.transformer, batches(pipe), scores, budget, base)

    with pytest.raises(
        ValueError, match=r"--budget is 0.01, but .* expected (0\.\d+) or more"
    ) as e:
        asked(0.01)
    assert ("groups of up to" in str(e.value)) == bool(tiny.groups)
    for budget in (float(str(e.value).rsplit("expected ", 1)[1].split()[0]), 0.97):
        made, facts = asked(budget)
        file = dense_dir.with_name(f"{tiny.family}-{budget:g}.json")
        file.write_text(json.dumps(to_dict(made)))
        counted = plan(dense_dir, recipe=file)["flops_vs_dense"]
        assert counted == pytest.approx(facts["flops_vs_dense"]) and counted <= budget + 1e-9
        assert facts["smallest"] <= counted
    dense, sparse = sparse_of(pipe, made, torch.float64)
    assert identity_error(sparse, dense, inputs_of(pipe, dense, torch.float64)) < 1e-12


def test_streamed_conversion_with_shared_modulation(
    tiny: Tiny, pipe: Any, dense_dir: Path, tmp_path: Path
) -> None:
    """Block by block from file to file, and read by diffusers."""
    from diffusers import DiffusionPipeline

    from calib.measure.importance import magnitudes
    from d2m.convert.streamed import convert_stream
    from d2m.recipe.structure import AdaLN

    made = dataclasses.replace(recipe(), adaln=AdaLN(mode_of(tiny)))
    answer = convert_stream(
        dense_dir, tmp_path / "out", made, magnitudes, "magnitude", log=lambda _: None
    )
    assert answer["checked"] and max(answer["checked"].values()) < 1e-5
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "out", local_files_only=True)
    inputs = inputs_of(pipe, pipe.transformer)
    with torch.no_grad():
        assert torch.isfinite(answer_of(loaded.transformer, inputs)).all()


def test_a_batch_teaches_what_its_samples_teach(tiny: Tiny, pipe: Any) -> None:
    """Alone a text has no padding, or less: none of it counts in features or experts' loads."""
    from d2m.distill.batch_rows import cut
    from d2m.distill.features import block_features, feature_errors, feature_names, without_padding
    from d2m.distill.losses import choices
    from d2m.model.block_group import TEXT_MASK, set_kappa

    teacher, student = sparse_of(pipe, recipe(groups=tiny.groups, kappa=1), torch.float64)
    set_top_k(student, 2)
    set_kappa(student, 1)
    sites = sparse_ffns(student)
    for site in sites.values():
        site.record = True
    batch = {name: each.double() for name, each in batches(pipe)(0, 4).items()}
    noisy, times, _ = noised(teacher, batch, generator_at(0, "test"))
    names = feature_names(student)

    @torch.no_grad()
    def learnt(first: int, end: int) -> list[torch.Tensor]:
        part, rows = cut(batch, (first, end)), slice(first, end)
        inputs = transformer_inputs(teacher, part, noisy[rows], times[rows].double())
        with block_features(student) as mine, block_features(teacher, names) as aims:
            with without_padding(student):
                student(**inputs)
                teacher(**inputs)
            errors, norms, powers = feature_errors(mine, aims, names, inputs.get(TEXT_MASK))
        loads = torch.zeros(len(sites), 12)
        for load, site in zip(loads, sites.values()):
            if site.last_logits is not None:
                load += choices(site.last_logits.flatten(0, -2), 2)[1]
            site.last_logits = None
        return [errors / 4, powers / 4, norms.square(), loads]

    whole = learnt(0, 4)
    alone = [sum(each) for each in zip(*(learnt(i, i + 1) for i in range(4)))]
    assert torch.equal(whole[3], alone[3]) and whole[3].sum() > 0
    for ours, theirs, share in zip(whole, alone, (4, 4, 1)):
        torch.testing.assert_close(ours * share, theirs, rtol=1e-9, atol=1e-12)


def test_diffusers_gradient_checkpointing_gives_the_same_gradients(tiny: Tiny, pipe: Any) -> None:
    """It hands blocks, and groups of them, all that they take by place."""
    from d2m.model.block_group import set_kappa

    found = []
    for checkpointing in (False, True):
        dense, sparse = sparse_of(pipe, recipe(groups=tiny.groups, kappa=1), torch.float64)
        set_kappa(sparse, 1)
        sparse.train()
        if checkpointing:
            if not family_of_pipeline(pipe).blocks.recomputed:
                with pytest.raises(ValueError, match="does not support gradient checkpointing"):
                    sparse.enable_gradient_checkpointing()
                return
            sparse.enable_gradient_checkpointing()
        inputs = inputs_of(pipe, dense, torch.float64)
        answer_of(sparse, inputs).square().mean().backward()
        found.append({n: p.grad for n, p in sparse.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 10
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-9, atol=1e-12)


def test_data_of_the_family(pipe: Any, dense_dir: Path, tmp_path: Path) -> None:
    """Prompts alone and shapes make batches; what it cannot learn from is refused with the cure."""
    from calib.data.option import check_data, open_data
    from calib.shapes.batches import shapes_batches
    from calib.shapes.world import World
    from d2m.generate import settings

    (tmp_path / "prompts.txt").write_text("a red circle\ntwo blue squares\n")
    told = settings(dense_dir, height=SIZE, width=SIZE, num_inference_steps=2)
    prompts = open_data(str(tmp_path / "prompts.txt"), lambda: told, log=lambda _: None)
    check_data(dense_dir, prompts)
    for batch in (prompts.batches(pipe, 0)(0, 2), shapes_batches(pipe, World(size=32))(0, 2)):
        x, t = batch.get("noisy", batch["latents"]), torch.rand(2)
        with torch.no_grad():
            found = pipe.transformer(
                **transformer_inputs(pipe.transformer, batch, x, t), return_dict=False
            )[0]
        assert family_of_pipeline(pipe).data.predicted(found).shape == batch["latents"].shape
    with pytest.raises(ValueError, match="--data is shapes, but .* generates 16 pixels.* expected"):
        check_data(dense_dir, open_data("shapes", lambda: told))


@pytest.fixture(scope="module")
def sparse_dir(tiny: Tiny, pipe: Any, dense_dir: Path) -> Path:
    """Converted without training, with groups and shared modulation; gates that leave no doubt."""
    from safetensors.torch import load_file, save_file

    from calib.measure.importance import importance_from_option
    from d2m.convert.in_memory import Options, Report, convert
    from d2m.recipe.structure import AdaLN

    out = dense_dir.with_name(f"{tiny.family}-{tiny.build.__name__}")
    neurons, _, _ = importance_from_option("magnitude")
    made = dataclasses.replace(recipe(groups=tiny.groups, kappa=1), adaln=AdaLN(mode_of(tiny)))
    answer = convert(
        dense_dir,
        out,
        dataclasses.replace(made, stages=()),
        lambda p, seed: batches(p),
        neurons,
        options=Options(device="cpu"),
        report=Report(write=False),
        log=lambda _: None,
    )
    assert answer["identity_error"] < 1e-5
    file = out / "transformer" / "diffusion_pytorch_model.safetensors"
    state, generator = load_file(file), torch.Generator().manual_seed(3)
    for name in sorted(state):
        if name.endswith("gate.weight"):
            torch.nn.init.normal_(state[name], generator=generator)
    save_file(state, file, metadata={"format": "pt"})
    return out


def test_loads_saves_and_is_named_rightly(tiny: Tiny, sparse_dir: Path, dense_dir: Path) -> None:
    from diffusers import DiffusionPipeline

    import d2m  # noqa: F401 (tells diffusers the transformer's class)
    from d2m.plan.count import plan
    from runtime.inspect.directory import inspect, summary_lines

    loaded = DiffusionPipeline.from_pretrained(sparse_dir, local_files_only=True)
    dense = DiffusionPipeline.from_pretrained(dense_dir, local_files_only=True).transformer
    sites = sites_of(dense.state_dict(), family_of_pipeline(loaded))
    assert len(sparse_ffns(loaded.transformer)) == len(sites) > 0
    card = (sparse_dir / "README.md").read_text()
    assert f"({tiny.title})" in card and "text-to-image" in card
    for path in (sparse_dir, dense_dir):
        told = inspect(path)
        assert told["model"] == tiny.title and f"model: {tiny.title}" in summary_lines(told)
        total = sum(p.numel() for p in loaded.transformer.parameters())
        assert told["parameters"]["transformer"]["total"] == total or path == dense_dir
    counted = plan(sparse_dir)
    assert counted["family"] == tiny.title and counted["total_params"] == total


@pytest.mark.parametrize("mode", ["full", "single", "lowrank"])
def test_a_plan_counts_the_models_own_weights(
    pipe: Any, tiny: Tiny, dense_dir: Path, tmp_path: Path, mode: str
) -> None:
    from d2m.families.weights import Structure
    from d2m.model.sparse_transformer import sparse_class, structure
    from d2m.plan.count import plan
    from d2m.plan.model_config import sizes
    from d2m.recipe.recipe import SparseSpec, to_dict
    from d2m.recipe.structure import AdaLN

    family = family_of_pipeline(pipe)
    raw = {k: v for k, v in pipe.transformer.config.items() if not k.startswith("_")}
    config = sizes(json.loads(json.dumps(raw)) | {"_class_name": family.names.dense_class}, "test")
    made = recipe(groups=tiny.groups, kappa=1)
    if mode != "full" and not tiny.modulated:
        path = tmp_path / "recipe.json"
        path.write_text(json.dumps(to_dict(dataclasses.replace(made, adaln=AdaLN(mode)))))
        with pytest.raises(ValueError, match="adaln.mode is .* expected full"):
            plan(dense_dir, recipe=path)
        return
    with torch.device("meta"):
        model = sparse_class(family)(**raw, **structure(made), adaln=mode)
    blocks = Blocks(**{k: tuple(map(tuple, v)) for k, v in tiny.groups.items()})
    stacks = family.plan.weights(config, Structure(SparseSpec(), blocks, AdaLN(mode)), 16, 8)
    total = sum(stack.count * w.size for stack in stacks for w in stack.weights)
    assert total == sum(p.numel() for p in model.parameters())


@pytest.fixture(scope="module")
def bundle(sparse_dir: Path, pytestconfig: pytest.Config) -> Path:
    """Its bundle; kept from run to run as long as no source changes."""
    return exported(pytestconfig, sparse_dir, top_k=(2,))


def test_blocks_and_the_whole_graph_are_torchs(tiny: Tiny, bundle: Path, sparse_dir: Path) -> None:
    """Portable graphs in ONNX Runtime: encoders, blocks one by one, routers, whole, trajectory."""
    from export.parity.run import parity
    from runtime.bundle.directory import open_bundle

    manifest = open_bundle(bundle).manifest
    assert manifest["family"] == tiny.family and manifest["model"] == tiny.title
    program = manifest["components"]["transformer"]["program"]
    assert tuple(call["type"] for call in program) == tiny.kinds
    answer = parity(sparse_dir, bundle, steps=2)
    assert answer["passed"], answer["failures"]
    rows = [*answer["components"], *answer["blocks"]]
    assert len(answer["blocks"]) >= 2 * len(program)
    assert {"vae_decoder", "vae_encoder"} <= {row["place"] for row in rows}
    assert max(row["relative_error"] for row in rows) < 2e-5
    assert answer["trajectory"]["steps"][-1]["relative_error"] < 1e-4  # guided, from one noise


def test_steps_are_cached(bundle: Path) -> None:
    """Bit-equal where nothing is skipped; the formulas have their own tests."""
    from runtime.image import settings_of
    from runtime.pipeline import Pipeline

    blocks = Pipeline(bundle, "ort", threads=1, mode="blocks")
    guided = {"negative": "a black star"} if is_guided(blocks.manifest) else {}
    asked: dict[str, Any] = {"steps": 4, "guidance": 4.0, "seed": [1, 2], **guided}
    exact, same, cached = (
        blocks(PROMPTS, cache=cache, **asked)
        for cache in ("none", "first-block:0.0000001", "taylor:interval:2")
    )
    for one, other, skipped in zip(exact, same, cached, strict=True):
        assert one.tobytes() == other.tobytes() and one.tobytes() != skipped.tobytes()
        counts = [settings_of(image)["steps_skipped"] for image in (other, skipped)]
        assert counts == [0, 2]


def test_quantising_reaches_every_product_of_a_block(bundle: Path) -> None:
    """All but modulation and routers, whatever the family calls them."""
    import onnx

    from export.quant.formats import FORMATS
    from export.quant.program import quantised
    from tests.tiny.bundle import program_of

    program = program_of(bundle, "transformer")
    found = quantised(program, FORMATS["int8"])
    ends = {kind for kind, prefix in found.calls if not prefix}
    total = 0
    for name, row in found.types.items():
        chosen = {part.weight for part in row.parts.values()}
        assert (name in ends) == (not chosen), name
        for model in row.graphs.values():
            onnx.checker.check_model(model)
            read = {name for node in model.graph.node for name in node.input[1:2]}
            left = {n for n in read & set(row.weights) - chosen if n in row.linears}
            assert name in ends or all(
                any(part in each for part in ("norm", "gate", "mod", "adaLN")) for each in left
            ), left
            total += len(chosen)
    assert total


@pytest.mark.parametrize("guidance", [0.0, 4.0])
def test_draws_as_diffusers_does(
    tiny: Tiny, bundle: Path, sparse_dir: Path, guidance: float
) -> None:
    """From the same latents: ids, texts, sigmas, guidance and the VAE are the family's."""
    from diffusers import DiffusionPipeline

    import runtime

    pipe = DiffusionPipeline.from_pretrained(sparse_dir, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    set_top_k(pipe.transformer, 2)
    family = family_of_pipeline(pipe)
    draw = generator_at(0, "draw")
    height, width = tiny.size
    noise = torch.stack([family.data.noise(pipe, height, width, draw) for _ in PROMPTS])
    drawer = runtime.load(bundle, "ort", threads=1)
    options: dict[str, Any] = {"height": height, "width": width}
    guided = is_guided(drawer.manifest)
    against = {"negative": "a black star"} if guided else {}
    ours = drawer(PROMPTS, latents=noise.numpy(), steps=3, guidance=guidance, **options, **against)
    if guided:
        options["negative_prompt"] = ["a black star"] * 2
    with torch.no_grad():
        options |= {"latents": noise, "num_inference_steps": 3, "guidance_scale": guidance}
        options |= {"max_sequence_length": family.data.text_length(pipe), "output_type": "np"}
        theirs = family.data.generate(pipe, {"prompt": PROMPTS, **options}).images
    for mine, other in zip(ours, theirs, strict=True):
        assert np.abs(np.asarray(mine, np.float32) / 255 - other).max() < 1.5 / 255
    if not guided:
        with pytest.raises(ValueError, match="negative is .* expected none"):
            drawer(PROMPTS[0], negative="a star")


# diffusers' pipelines that change images: by strength alone, and with a mask.
CHANGING = {
    "flux": ("FluxImg2ImgPipeline", "FluxInpaintPipeline"),
    "sd3": ("StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"),
    "qwen": ("QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline"),
    "chroma": ("ChromaImg2ImgPipeline", "ChromaInpaintPipeline"),
    "zimage": ("ZImageImg2ImgPipeline", "ZImageInpaintPipeline"),
}


def joint_mask(
    self: Any, batch_size: int, sequence_length: int, dtype: Any, attention_mask: torch.Tensor
) -> torch.Tensor:
    """Of text and image, true and false."""
    image = torch.ones(batch_size, sequence_length, dtype=torch.bool)
    return torch.cat([attention_mask.bool(), image], dim=1)


@pytest.mark.parametrize("masked", [False, True])
def test_changes_an_image_as_diffusers_does(
    tiny: Tiny, bundle: Path, sparse_dir: Path, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the same noise; diffusers takes the mean of the encoded image too, and no sample."""
    import diffusers
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from PIL import Image

    import runtime

    if tiny.family not in CHANGING:
        pytest.skip("diffusers has no such pipeline of this family")
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator: self.mean)
    pipe = diffusers.DiffusionPipeline.from_pretrained(sparse_dir, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    set_top_k(pipe.transformer, 2)
    data = family_of_pipeline(pipe).data
    height, width = tiny.size
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
    repainted = np.zeros((height, width), np.uint8)
    repainted[2:7, 5:] = 255
    given = {"image": image, "strength": 0.55 if masked else 0.7}
    changed = getattr(diffusers, CHANGING[tiny.family][masked]).from_pipe(pipe)
    changed.set_progress_bar_config(disable=True)
    theirs: dict[str, Any] = given | {"mask_image": Image.fromarray(repainted)} if masked else given
    shape = (2, 4, height // 2, width // 2)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(5)).numpy()
    drawer, found = runtime.load(bundle, "ort", threads=1), []
    against = {"negative": "a black star"} if is_guided(drawer.manifest) else {}
    drawer(
        PROMPTS,
        latents=noise,
        steps=5,
        guidance=4.0,
        callback=lambda done, steps, latents: found.append((done, steps, latents)),
        **(given | {"mask": repainted} if masked else given),
        **against,
    )
    if against:
        theirs["negative_prompt"] = ["a black star"] * 2
    if tiny.family == "sd3":
        changed.transformer.register_to_config(in_channels=16)  # it paints for these alone
    if tiny.family == "chroma":
        # As released it asks for a field that Chroma's config lacks, and makes floats of masks,
        # which mask nothing (diffusers' issue 12116).
        changed.transformer.register_to_config(guidance_embeds=False)
        monkeypatch.setattr(type(changed), "_prepare_attention_mask", joint_mask)
    with torch.no_grad():
        expected = data.generate(
            changed,
            {
                "prompt": list(PROMPTS),
                "height": height,
                "width": width,
                "num_inference_steps": 5,
                "guidance_scale": 4.0,
                "generator": torch.Generator().manual_seed(5),
                "max_sequence_length": data.text_length(pipe),
                "output_type": "latent",
                **theirs,
            },
        ).images
    assert [row[:2] for row in found] == [(i, len(found)) for i in range(1, len(found) + 1)]
    assert len(found) == (3 if masked else 4)
    # Chroma's tiny model errs most: 3.4e-4 of latents over 6, at this guidance.
    size = np.abs(expected.numpy()).max() if tiny.family == "chroma" else 1.0
    assert np.abs(found[-1][2] - expected.numpy()).max() < 1e-4 * size


def test_sees_references_as_diffusers_does(tiny: Tiny, bundle: Path, sparse_dir: Path) -> None:
    """Two, of which one is cut to whole tokens, with guidance; or none."""
    from diffusers import DiffusionPipeline
    from PIL import Image

    import runtime

    drawer, rng = runtime.load(bundle, "ort", threads=1), np.random.default_rng(0)
    sizes = [(66, 73), (80, 64)]  # diffusers takes none with a side below 64
    seen = [Image.fromarray(rng.integers(0, 256, (*each, 3), np.uint8)) for each in sizes]
    if not drawer.family.references(drawer.manifest):
        with pytest.raises(ValueError, match="references are given, expected none: .*--image"):
            drawer(PROMPTS[0], references=seen[:1])
        return
    pipe = DiffusionPipeline.from_pretrained(sparse_dir, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    set_top_k(pipe.transformer, 2)
    data = family_of_pipeline(pipe).data
    noise = torch.stack([data.noise(pipe, *tiny.size, generator_at(0, "draw")) for _ in PROMPTS])
    found: list[np.ndarray] = []
    height, width = tiny.size
    options: dict[str, Any] = {"height": height, "width": width}
    drawer(
        PROMPTS,
        references=seen,
        negative="a black star",
        latents=noise.numpy(),
        steps=2,
        guidance=4.0,
        callback=lambda done, steps, latents: found.append(latents),
        **options,
    )
    with torch.no_grad():
        options |= {"prompt": PROMPTS, "negative_prompt": ["a black star"] * 2, "image": seen}
        options |= {"latents": noise, "num_inference_steps": 2, "guidance_scale": 4.0}
        options |= {"max_sequence_length": data.text_length(pipe), "output_type": "latent"}
        expected = data.generate(pipe, options).images.numpy()
    assert np.abs(found[-1] - expected).max() < 1e-4


def test_outside_a_mask_latents_are_the_images(tiny: Tiny, bundle: Path) -> None:
    """Of families that diffusers has no pipeline for, too: the same rule for all."""
    import runtime
    from runtime.sampling import encode_image

    height, width = tiny.size
    image = np.random.default_rng(0).uniform(0, 1, (height, width, 3)).astype(np.float32)
    mask = np.zeros((height, width), np.uint8)
    mask[:, width // 2 :] = 255
    drawer, found = runtime.load(bundle, "ort", threads=1), []
    after = {"callback": lambda done, steps, latents: found.append(latents)}
    drawer(PROMPTS[0], image=image, mask=mask, steps=3, strength=0.7, **after)
    family, settings = drawer.family, drawer.manifest["latents"]
    pixels = (2 * image - 1).transpose(2, 0, 1)[None]
    kept, made = (
        family.image_latents(latents, settings, (height // 2, width // 2))[..., : width // 4]
        for latents in (encode_image(drawer, pixels), found[-1])
    )
    np.testing.assert_allclose(made, kept, atol=1e-6)
    first, last = (
        family.image_latents(each, settings, (height // 2, width // 2)) for each in found[::2]
    )
    assert np.abs((last - first)[..., width // 4 :]).max() > 1e-3


def test_what_stands_at_padding_is_not_seen(pipe: Any, bundle: Path) -> None:
    """Where a family masks its text: the masks are diffusers', and they are exact."""
    import runtime
    from runtime.sampling import denoise, encode, prepare_latents

    drawer = runtime.load(bundle, "ort", threads=1)
    texts = ["", "A red <pad> Circle ", PROMPTS[1]]
    conditions = encode(drawer, texts)
    if not (masks := [name for name in conditions if name.endswith("mask")]):
        pytest.skip("this family masks nothing")
    mask, states = conditions[masks[0]], conditions["encoder_hidden_states"]
    data = family_of_pipeline(pipe).data
    theirs = data.encode_text(pipe, texts, data.text_length(pipe))
    assert np.array_equal(mask, theirs[masks[0]].numpy()) and 0 < mask.mean() < 1
    noise = prepare_latents(drawer, range(3), (8, 8))

    def draw(states: np.ndarray) -> np.ndarray:
        given = conditions | {"encoder_hidden_states": states}
        return denoise(drawer, noise, given, latent_size=(8, 8), top_k=[2, 2], guidance=1.0)

    drawn = draw(states)
    assert np.array_equal(drawn, draw(np.where(mask[..., None] > 0, states, np.float32(50))))
    seen = np.where(np.arange(states.shape[1])[:, None] > 0, states, np.float32(50))
    assert np.abs(drawn - draw(seen)).max() > 1e-3


@pytest.mark.tensorrt
def test_plans_of_all_components_build_without_a_gpu(bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    from export.plans.build import build_plans, default_profiles

    manifest = json.loads((bundle / "manifest.json").read_text())
    graphs = {key: bundle / path for key, path in graphs_of(manifest).items()}
    built = build_plans(
        graphs,
        tmp_path,
        api="tensorrt_rtx",
        dtype=manifest["compute_dtype"],
        profiles=default_profiles(manifest),
    )
    (target,) = built.values()
    assert set(target["files"]) == set(graphs)


@pytest.mark.tensorrt
@pytest.mark.slow
def test_an_exports_plans_are_bfloat16_with_every_attention_fused(
    sparse_dir: Path, tmp_path: Path
) -> None:
    """What `d2m export --trt-rtx` leaves; a plan that leaves an attention in pieces is refused."""
    pytest.importorskip("tensorrt_rtx")
    from export.bundle import export_bundle

    export_bundle(sparse_dir, tmp_path / "out", trt_rtx=True, top_k=(2,))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    (target,) = manifest["plans"].values()
    assert target["dtype"] == "bfloat16" and set(target["files"]) == set(graphs_of(manifest))
    fused = {key.split("/")[0] for key, row in target["layers"].items() if row["fused_attention"]}
    texts = {name for name in manifest["components"] if name.startswith("text_encoder")}
    assert fused >= {"transformer", *texts}


def graphs_of(manifest: dict[str, Any]) -> dict[str, str]:
    """Plan -> block graph, of all components."""
    from runtime.trt.launch_schedule import plan_key

    return {
        plan_key(name, kind, key): path
        for name, component in manifest["components"].items()
        for kind, row in component["types"].items()
        for key, path in row["graphs"].items()
    }


def close(found: np.ndarray, expected: np.ndarray) -> float:
    """|found - expected| / |expected|"""
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
