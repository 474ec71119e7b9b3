"""A dense LoRA on a sparse model: with all experts on it is the dense model with the LoRA."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file

import d2m  # noqa: F401 - diffusers finds our class in a module that is imported
from d2m.families import FLUX
from d2m.lora.file import read_lora
from d2m.lora.fuse import lora, with_changes
from d2m.lora.parts import dense_linears, parts_of
from d2m.model.sparse_transformer import SparseFluxTransformer2DModel
from d2m.model.surgery import identity_error, sparse_ffns
from d2m.recipe.structure import Blocks, Shares
from d2m.shards import open_shards, shard_name, write_index, write_shard
from tests.tiny import lora as tinylora
from tests.tiny.pair import BLOCKS, DEPTH, RECIPE, grouped_pair, tiny_pair
from tests.tiny.pipeline import tiny_inputs

TEACHER = Path(__file__).resolve().parents[3] / "models/shapes-dense"


def saved(folder, model, files=1):
    """The model as a checkpoint directory, in so many shards."""
    model.save_pretrained(folder)
    if files > 1:
        state = load_file(folder / "diffusion_pytorch_model.safetensors")
        names = sorted(state)
        for i in range(files):
            part = {name: state[name] for name in names[i::files]}
            write_shard(folder / shard_name(i + 1, files), part)
        (folder / "diffusion_pytorch_model.safetensors").unlink()
        write_index(folder, [shard_name(i + 1, files) for i in range(files)])
    return folder


def pipeline(folder, model, files=1):
    """What `lora` needs of a pipeline directory."""
    saved(folder / "transformer", model, files)
    name = type(model).__name__
    library = "d2m" if name.startswith("Sparse") else "diffusers"
    index = {"_class_name": "FluxPipeline", "transformer": [library, name]}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "README.md").write_text("# A model\n")
    return folder


CASES = {
    "plain": lambda: tiny_pair(dtype=torch.float64),
    "groups": lambda: grouped_pair(1, BLOCKS, torch.float64),
    "sizes": lambda: tiny_pair(
        recipe=replace(RECIPE, shares=Shares(double=(1.0, 0.25), single=(2.5, 1.0))),
        dtype=torch.float64,
    ),
}


@pytest.mark.parametrize("names", ["peft", "kohya"])
@pytest.mark.parametrize("case", CASES)
def test_all_experts_on_it_is_the_dense_model_with_the_lora(case, names, tmp_path):
    """float64; every Linear of the model has a change, read back from files in three shards."""
    student, teacher = CASES[case]()
    inputs = tiny_inputs(5, torch.float64)
    assert identity_error(student, teacher, inputs) < 1e-12
    if names == "peft":
        file = tinylora.write(
            tmp_path / "a.safetensors", tinylora.peft(tinylora.factors(teacher), alpha=4.5)
        )
    else:
        file = tinylora.write(tmp_path / "a.safetensors", tinylora.kohya(teacher, alpha=4.5))
    sparse = pipeline(tmp_path / "sparse", student, 3)
    answer = lora(file, sparse, tmp_path / "out", scale=0.8)
    assert sum(answer["shares"].values()) == pytest.approx(1)
    made = SparseFluxTransformer2DModel.from_pretrained(
        tmp_path / "out/transformer", torch_dtype=torch.float64
    ).eval()
    with torch.no_grad():
        before = teacher(**inputs, return_dict=False)[0].clone()
        for name, change in read_lora(file, dense_linears(teacher.config, FLUX)).items():
            whole = 0.8 * change.scale * (change.up.double() @ change.down.double())
            teacher.get_submodule(name).weight += whole
        after = teacher(**inputs, return_dict=False)[0]
    assert float((after - before).norm() / before.norm()) > 0.05  # it does something
    assert identity_error(made, teacher, inputs) < 1e-12
    for ffn in sparse_ffns(made).values():  # routing is as it was
        assert ffn.top_k == 2
    gates = {n: t for n, t in student.state_dict().items() if "gate" in n or "router" in n}
    shards = open_shards(tmp_path / "out/transformer")
    assert gates and all(torch.equal(shards.read([n])[n], t) for n, t in gates.items())


def test_shares_are_those_of_the_products(tmp_path):
    student, teacher = tiny_pair(dtype=torch.float64)
    found = tinylora.factors(teacher, 3)
    file = tinylora.write(tmp_path / "a.safetensors", tinylora.peft(found))
    sparse = pipeline(tmp_path / "sparse", student)
    answer = lora(file, sparse)
    assert answer["out"] is None and answer["layers"] == len(found) and answer["rank"] == 3
    sums = {"routed": 0.0, "all": 0.0}
    for name, (up, down) in found.items():
        product = (up @ down).square()
        sums["all"] += float(product.sum())
        block = ".".join(name.split(".")[:2])
        for site in FLUX.blocks.sites:
            if site.blocks != name.split(".")[0]:
                continue
            tail = student.get_submodule(f"{block}.{site.module}").neurons[32:]
            if name == f"{block}.{site.fc1}":
                sums["routed"] += float(product[tail].sum())
            if name == f"{block}.{site.fc2}":
                sums["routed"] += float(product[:, -128:][:, tail].sum())
    assert answer["routed_share"] == pytest.approx(sums["routed"] / sums["all"])
    assert answer["shares"].keys() == {"attention", "modulation", "shared", "routed", "other"}


def test_a_change_of_one_expert_is_seen_where_it_is_chosen(tmp_path):
    """The change of one neuron's row reaches the row of its expert, and no other tensor."""
    student, teacher = tiny_pair(dtype=torch.float64)
    neurons = student.transformer_blocks[0].ff.neurons
    up = torch.zeros(128, 1, dtype=torch.float64)
    up[neurons[32 + 8 * 3 + 2]] = 1  # expert 3, its neuron 2
    down = torch.ones(1, 32, dtype=torch.float64)
    tensors = tinylora.peft({"transformer_blocks.0.ff.net.0.proj": (up, down)})
    file = tinylora.write(tmp_path / "a.safetensors", tensors)
    answer = lora(file, pipeline(tmp_path / "sparse", student), tmp_path / "out")
    assert answer["routed_share"] == 1
    before = load_file(tmp_path / "sparse/transformer/diffusion_pytorch_model.safetensors")
    after = load_file(tmp_path / "out/transformer/diffusion_pytorch_model.safetensors")
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["transformer_blocks.0.ff.experts.w1"]
    difference = after[changed[0]] - before[changed[0]]
    assert difference.abs().sum() == difference[3, :, 2].sum() == 32


def test_zero_scale_changes_no_bit(tmp_path):
    """The identity: bfloat16 weights with a change of nothing are the same bytes."""
    student, teacher = tiny_pair(dtype=torch.bfloat16)
    file = tinylora.write(tmp_path / "a.safetensors", tinylora.peft(tinylora.factors(teacher)))
    sparse = pipeline(tmp_path / "sparse", student, 2)
    lora(file, sparse, tmp_path / "out", scale=0.0)
    for path in sparse.rglob("*.safetensors"):
        a, b = load_file(path), load_file(tmp_path / "out" / path.relative_to(sparse))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_new_card_and_report_in_place_of_the_old_ones(tmp_path):
    """Scores and figures of the model before are not true of the new one; its licence is kept."""
    student, teacher = tiny_pair()
    file = tinylora.write(tmp_path / "a.safetensors", tinylora.peft(tinylora.factors(teacher)))
    sparse = pipeline(tmp_path / "sparse", student)
    card = "---\nlicense: mit\ntags: [shapes]\n---\n# Old\nscore .9\n"
    kept = {"LICENSE": "as is", "recipe.json": "{}", "README.md": card}
    for name, text in (
        kept | dict.fromkeys(("report.html", "report.json", "a.svg"), "old")
    ).items():
        (sparse / name).write_text(text)
    answer = lora(file, sparse, tmp_path / "out", scale=0.5, steps=4)
    names = {"LICENSE", "README.md", "defaults.json", "model_index.json", "recipe.json"}
    names |= {"report.html", "report.json", "transformer"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    card = (tmp_path / "out/README.md").read_text()
    for words in (
        "license: mit",
        "- shapes",
        "- lora",
        "`a.safetensors`",
        "at scale 0.5",
        "import d2m",
    ):
        assert words in card
    assert "Old" not in card and "score .9" not in card and "num_inference_steps=4" in card
    assert f"| routed experts | {100 * answer['routed_share']:.1f} % |" in card
    told = json.loads((tmp_path / "out/report.json").read_text())
    assert told["base_model"] == str(sparse) and told["lora"]["shares"] == answer["shares"]
    page = (tmp_path / "out/report.html").read_text()
    assert "a.safetensors" in page and "routed experts" in page and "old" not in page


def test_shared_modulation_and_dropped_blocks_have_no_place(tmp_path):
    blocks = Blocks(double=((1, 2),), drop_single=(4,))
    recipe = replace(RECIPE, blocks=blocks)
    student, teacher = tiny_pair(0, recipe, **DEPTH)
    config = {k: v for k, v in student.config.items() if not k.startswith("_")}
    shared = SparseFluxTransformer2DModel(**{**config, "adaln": "single"}).eval()
    sparse = pipeline(tmp_path / "sparse", shared)
    file = tinylora.write(tmp_path / "a.safetensors", tinylora.peft(tinylora.factors(teacher)))
    with pytest.raises(ValueError) as caught:
        lora(file, sparse, tmp_path / "out")
    assert "% of the LoRA's change has no place" in str(caught.value)
    assert "--lossy" in str(caught.value) and not (tmp_path / "out").exists()
    answer = lora(file, sparse, tmp_path / "out", lossy=True)
    assert 0 < answer["shares"]["nowhere"] < 1
    shards = open_shards(sparse / "transformer")
    lost = {
        name
        for name in dense_linears(shared.config, FLUX)
        if parts_of(name, shared.config, shards, FLUX)[0].tensor is None
    }
    assert all("norm" in name or name.startswith("single_transformer_blocks.4.") for name in lost)
    assert "norm_out.linear" not in lost and len(lost) == 2 * 4 + 5 + 5


def test_every_shape_is_kept(tmp_path):
    """parts cover a Linear once: rows and columns of all parts are those of the dense weight."""
    student, teacher = grouped_pair(1, BLOCKS)
    shards = open_shards(saved(tmp_path / "t", student))
    for name, (outputs, inputs) in dense_linears(student.config, FLUX).items():
        found = parts_of(name, student.config, shards, FLUX)
        cover = torch.zeros(outputs, inputs)
        for part in found:
            rows, columns = torch.zeros(outputs, 1), torch.zeros(inputs)
            rows[slice(None) if part.rows is None else part.rows] = 1
            columns[slice(None) if part.columns is None else part.columns] = 1
            cover += rows * columns
        assert (cover == 1).all(), name


def test_onto_a_dense_model(tmp_path):
    """The same command fuses into a teacher."""
    _, teacher = tiny_pair()
    found = tinylora.factors(teacher)
    file = tinylora.write(tmp_path / "a.safetensors", tinylora.peft(found))
    dense = pipeline(tmp_path / "dense", teacher)
    answer = lora(file, dense, tmp_path / "out", steps=8)
    assert answer["routed_share"] == 0 and answer["shares"]["dense"] > 0
    expected = tinylora.fused(teacher, found).state_dict()
    made = load_file(tmp_path / "out/transformer/diffusion_pytorch_model.safetensors")
    assert all(torch.allclose(made[name], tensor, atol=1e-6) for name, tensor in expected.items())
    assert json.loads((tmp_path / "out/defaults.json").read_text()) == {"num_inference_steps": 8}


def test_refusals(tmp_path):
    student, teacher = tiny_pair()
    file = tinylora.write(tmp_path / "a.safetensors", tinylora.peft(tinylora.factors(teacher)))
    sparse = pipeline(tmp_path / "sparse", student)
    with pytest.raises(ValueError, match="sparse exists and is not empty"):
        lora(file, sparse, sparse)
    with pytest.raises(ValueError, match="--steps is 8; expected 1 or more, and an output"):
        lora(file, sparse, steps=8)
    with pytest.raises(FileNotFoundError, match="no model_index.json"):
        lora(file, tmp_path)
    with pytest.raises(FileNotFoundError, match="is no directory"):
        lora(file, tmp_path / "none")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "sparse"]


@pytest.mark.skipif(not TEACHER.is_dir(), reason="no models/shapes-dense")
def test_fusing_first_and_mapping_afterwards_are_the_same_on_the_shapes_model(tmp_path):
    """convert(teacher + LoRA) == convert(teacher) + mapped LoRA, both split by one importance.

    The recipe for step-distilled LoRAs fuses first: the split then sees the changed weights.
    """
    from calib.measure.importance import magnitudes, scores_of
    from d2m.model.sparse_transformer import sparse_model_of
    from d2m.recipe import recipe as recipes

    dense = tmp_path / "dense"  # in float32: the embedded one is rounded to bfloat16
    shutil.copytree(TEACHER, dense)
    teacher = FluxPipeline.from_pretrained(TEACHER).transformer
    teacher.save_pretrained(dense / "transformer")
    found = tinylora.factors(teacher, 1, rank=4)
    file = tinylora.write(tmp_path / "eight-steps.safetensors", tinylora.peft(found))
    answer = lora(file, dense, tmp_path / "fused", steps=8)
    assert answer["shares"].keys() == {"attention", "modulation", "dense", "other"}
    fused = FluxPipeline.from_pretrained(tmp_path / "fused").transformer
    defaults = json.loads((tmp_path / "fused/defaults.json").read_text())
    own = json.loads((TEACHER / "defaults.json").read_text())
    assert defaults == own | {"num_inference_steps": 8}
    recipe, scores = recipes.preset("L"), scores_of(teacher, magnitudes)
    first = sparse_model_of(fused, scores, recipe, FLUX)
    sparse = pipeline(tmp_path / "sparse", sparse_model_of(teacher, scores, recipe, FLUX))
    mapped = lora(file, sparse, tmp_path / "mapped")
    assert 0 < mapped["routed_share"] < mapped["shares"]["shared"] + mapped["routed_share"] < 1
    made = load_file(tmp_path / "mapped/transformer/diffusion_pytorch_model.safetensors")
    for name, tensor in first.state_dict().items():
        assert torch.allclose(made[name], tensor, atol=1e-5), name


def test_some_tensors_at_a_time(tmp_path):
    """What a shard does not hold is left alone."""
    student, teacher = tiny_pair()
    file = tinylora.write(tmp_path / "a.safetensors", tinylora.peft(tinylora.factors(teacher)))
    shards = open_shards(saved(tmp_path / "t", student))
    changes = read_lora(file, dense_linears(student.config, FLUX))
    parts = {name: parts_of(name, student.config, shards, FLUX) for name in changes}
    state = student.state_dict()
    some = {
        "proj_out.weight": state["proj_out.weight"],
        "x_embedder.bias": state["x_embedder.bias"],
    }
    made = with_changes(some, changes, parts)
    assert made.keys() == some.keys() and made["x_embedder.bias"] is some["x_embedder.bias"]
    assert not torch.equal(made["proj_out.weight"], some["proj_out.weight"])
