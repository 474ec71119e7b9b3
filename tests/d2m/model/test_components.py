"""Weights that do not fit their class and config are refused by every path, the tensor named."""

import inspect
import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file

from calib.measure.importance import magnitudes
from d2m.cli import main
from d2m.convert.dense import dense_family
from d2m.convert.streamed import convert_stream
from d2m.families import family_of
from d2m.generate import load_pipeline
from d2m.lora.fuse import lora
from d2m.model.components import check_components, check_weights, model_classes, read_config
from d2m.plan.model_config import sizes
from d2m.recipe.recipe import preset
from d2m.unpack.single_file import unpack_single_file
from export.bundle import export_bundle
from export.checkpoint.pipeline import empty_transformer, manifest_entries
from export.checkpoint.weights import Checkpoint
from export.families.configs import config
from export.families.known import FAMILIES as EXPORTED
from tests.tiny.families import FAMILIES
from tests.tiny.lora import factors, peft, write
from tests.tiny.pipeline import TRANSFORMER_CONFIG, build_pipeline

RECIPE = preset("L")

BUILDS = {"flux": build_pipeline} | {name: tiny.build for name, tiny in FAMILIES.items()}


@pytest.fixture(scope="module", params=BUILDS)
def pipeline(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline") / request.param
    BUILDS[request.param]().save_pretrained(folder)
    return folder


@pytest.fixture
def broken(tiny_dense_dir, tmp_path):
    """The pipeline with one component's tensors changed by a function."""

    def make(name, change):
        folder = tmp_path / "broken"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tiny_dense_dir, folder)
        rewrite(folder / name, change)
        return folder

    return make


def rewrite(folder, change):
    [file] = folder.glob("*.safetensors")
    save_file(change(load_file(file)), file, {"format": "pt"})


def without(key):
    return lambda tensors: {name: t for name, t in tensors.items() if not name.endswith(key)}


def cast(key, dtype):
    return lambda tensors: {
        name: t.to(dtype) if name.endswith(key) else t for name, t in tensors.items()
    }


SURPLUS = {"other.weight": torch.zeros(3)}
CHANGES = {
    "missing": (lambda key: without(key), "lacks the tensor .*{key}"),
    "surplus": (lambda key: lambda t: t | SURPLUS, "holds the tensor other.weight"),
    "shape": (
        lambda key: (
            lambda t: {n: v[..., :1].contiguous() if n.endswith(key) else v for n, v in t.items()}
        ),
        r"the tensor .*{key} is \[\d+, 1\], expected \[",
    ),
    "int8": (lambda key: cast(key, torch.int8), "stores the tensor .*{key} as I8, expected one"),
    "fp8": (lambda key: cast(key, torch.float8_e4m3fn), "stores the tensor .*{key} as F8_E4M3"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_component_of_every_family(pipeline, change, tmp_path):
    check_components(pipeline)
    make, words = CHANGES[change]
    for name, cls in model_classes(pipeline):
        shutil.copytree(pipeline / name, tmp_path / name)
        tensors = load_file(next((tmp_path / name).glob("*.safetensors")))
        matrices = sorted(n for n, t in tensors.items() if t.ndim == 2 and n.endswith("weight"))
        if not matrices:
            continue
        key = matrices[len(matrices) // 2].split(".", 3)[-1]
        rewrite(tmp_path / name, make(key))
        with pytest.raises(ValueError, match=words.format(key=key.replace(".", r"\."))) as caught:
            check_weights(tmp_path / name, cls)
        assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("change", ["missing", "surplus", "int8"])
@pytest.mark.parametrize("name", ["transformer", "text_encoder_2", "vae"])
def test_on_every_path(name, change, broken, tmp_path):
    key = {
        "transformer": "transformer_blocks.1.attn.to_k.weight",
        "text_encoder_2": "block.1.layer.0.SelfAttention.k.weight",
        "vae": "decoder.conv_in.weight",
    }[name]
    make, words = CHANGES[change]
    folder = broken(name, make(key))
    file = write(tmp_path / "a.safetensors", peft(factors(build_pipeline().transformer)))
    for run in (
        lambda: load_pipeline(folder),  # convert in memory, parity, eval
        lambda: convert_stream(folder, tmp_path / "out", "L", magnitudes, "magnitude"),
        lambda: export_bundle(folder, tmp_path / "out"),
        lambda: lora(file, folder, tmp_path / "out"),
    ):
        with pytest.raises(ValueError, match=words.format(key=key)):
            run()
        assert not (tmp_path / "out").exists()


def test_the_cure_for_float8_weights(broken, tmp_path):
    """The transformer's is a command that reads them; an encoder's are to be had elsewhere."""
    folder = broken(
        "transformer", cast("transformer_blocks.1.attn.to_k.weight", torch.float8_e4m3fn)
    )
    with pytest.raises(ValueError, match=r"in bfloat16: d2m convert .* -o NEW\.$") as caught:
        check_components(folder)
    command = shlex.split(str(caught.value).rpartition(": ")[2])
    file, base = Path(command[2]), Path(command[4])
    found = unpack_single_file(file, base, tmp_path / "out", str(base), log=print)
    check_components(found)
    folder = broken("text_encoder_2", cast("SelfAttention.k.weight", torch.float8_e4m3fn))
    with pytest.raises(ValueError, match="take the weights in bfloat16 or float16"):
        check_components(folder)


def test_a_family_without_the_transformer(broken):
    folder = broken("transformer", without("to_k.weight"))
    check_components(folder, transformer=False)


def test_the_commands_answer_2(broken, tmp_path, capsys):
    folder = broken("text_encoder_2", without("layer.0.SelfAttention.k.weight"))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n")
    for command in (["convert", "--init-only", "--data", str(prompts)], ["export"]):
        assert main([command[0], str(folder), *command[1:], "-o", str(tmp_path / "out")]) == 2
        assert "lacks the tensor encoder.block.0.layer.0.Self" in capsys.readouterr().err


def test_older_names_and_buffers_are_right(broken):
    """What published checkpoints hold: CLIP's prefix and position ids, T5's embedding under one
    name or two."""

    def clip(tensors):
        old = {f"text_model.{n}": t for n, t in tensors.items() if not n.startswith("text_model.")}
        return old | {"text_model.embeddings.position_ids": torch.arange(16)[None]}

    check_components(broken("text_encoder", clip))

    def both(tensors):
        twice = {"shared.weight", "encoder.embed_tokens.weight"}
        [one] = twice & tensors.keys()
        return tensors | {name: tensors[one].clone() for name in twice}

    def other(tensors):
        table = both(tensors)
        del table["shared.weight"]
        return table

    check_components(broken("text_encoder_2", both))
    check_components(broken("text_encoder_2", other))


def test_no_weights_and_no_config(broken):
    folder = broken("vae", lambda tensors: tensors)
    file = folder / "vae/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "block_out_channels": "wide"}))
    with pytest.raises(ValueError, match="config.json does not make a AutoencoderKL"):
        check_components(folder)
    next((folder / "text_encoder").glob("*.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match="text_encoder lacks .safetensors files"):
        check_components(folder)


@pytest.mark.slow
def test_old_position_ids_do_not_hinder_an_export(broken, tmp_path):
    ids = {"text_model.embeddings.position_ids": torch.arange(16)[None]}
    folder = broken("text_encoder", lambda tensors: tensors | ids)
    export_bundle(folder, tmp_path / "out")


def stripped(folder, **more):
    """A config.json without the fields that have their class's default; `more`: others."""
    file = folder / "config.json"
    told = json.loads(file.read_text())
    cls = dict(model_classes(folder.parent))[folder.name]
    if hasattr(cls, "config_class"):
        defaults = cls.config_class().to_dict()
    else:
        defaults = {n: row.default for n, row in inspect.signature(cls.__init__).parameters.items()}
    kept = {k: v for k, v in told.items() if k.startswith("_") or not same(v, defaults.get(k, ...))}
    assert len(kept) < len(told)
    file.write_text(json.dumps(kept | more))


def same(a, b):
    return json.dumps(a, default=str) == json.dumps(b, default=str)


def test_configs_that_leave_out_what_has_a_default(pipeline, tmp_path):
    """Every component of every family is read as before."""
    shutil.copytree(pipeline, tmp_path / "pipe")
    before = {name: read_config(pipeline / name, cls) for name, cls in model_classes(pipeline)}
    for name, cls in model_classes(pipeline):
        stripped(tmp_path / "pipe" / name)
        found = read_config(tmp_path / "pipe" / name, cls)
        assert same(found, before[name])
    check_components(tmp_path / "pipe")
    family = family_of(pipeline)
    fields = [name for name in family.plan.sizes if name in before["transformer"]]
    assert len(fields) > 3
    assert dense_family(tmp_path / "pipe", RECIPE) is family
    raw = json.loads((tmp_path / "pipe/transformer/config.json").read_text())
    assert {n: sizes(raw, "x")[n] for n in fields} == {n: before["transformer"][n] for n in fields}
    row = EXPORTED[family.names.name]
    found = row.latents(
        *(config(tmp_path / "pipe", n) for n in ("transformer", "vae")), tmp_path / "pipe"
    )
    assert found == row.latents(before["transformer"], before["vae"], pipeline)


def test_an_early_flux_without_its_rope_axes(tmp_path):
    """Converted, and read by an export; the axes are the class's."""
    pipe = build_pipeline()
    fields = TRANSFORMER_CONFIG | {"attention_head_dim": 128, "axes_dims_rope": (16, 56, 56)}
    pipe.register_modules(transformer=FluxTransformer2DModel(**fields))
    pipe.save_pretrained(tmp_path / "dense")
    stripped(tmp_path / "dense/transformer")
    told = json.loads((tmp_path / "dense/transformer/config.json").read_text())
    assert "axes_dims_rope" not in told and "attention_head_dim" not in told
    convert_stream(tmp_path / "dense", tmp_path / "sparse", RECIPE, magnitudes, "magnitude")
    made = json.loads((tmp_path / "sparse/transformer/config.json").read_text())
    assert made["axes_dims_rope"] == [16, 56, 56]
    # What export reads of the config, without tracing blocks of a head that no other test has.
    for folder, sparse in ((tmp_path / "dense", False), (tmp_path / "sparse", True)):
        checkpoint = Checkpoint(folder / "transformer")
        entries = manifest_entries(folder, checkpoint, sparse)
        assert entries["latents"]["rope_axes"] == [16, 56, 56]
        assert list(empty_transformer(folder).config.axes_dims_rope) == [16, 56, 56]


@pytest.mark.slow
def test_the_class_that_published_pixart_configs_name(tmp_path):
    """Transformer2DModel, with fields that PixArtTransformer2DModel does not have."""
    folder = tmp_path / "dense"
    FAMILIES["pixart"].build().save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["transformer"] = ["diffusers", "Transformer2DModel"]
    (folder / "model_index.json").write_text(json.dumps(index))
    file = folder / "transformer/config.json"
    old = {"_class_name": "Transformer2DModel", "double_self_attention": False}
    old |= {"num_vector_embeds": None, "only_cross_attention": False}
    file.write_text(
        json.dumps(json.loads(file.read_text()) | old | {"use_linear_projection": False})
    )
    assert type(load_pipeline(folder).transformer).__name__ == "PixArtTransformer2DModel"
    convert_stream(folder, tmp_path / "sparse", RECIPE, magnitudes, "magnitude")
    made = json.loads((tmp_path / "sparse/transformer/config.json").read_text())
    assert not set(old) & set(made) - {"_class_name"}
    assert not set(export_bundle(folder, tmp_path / "bundle")) - set(
        export_bundle(tmp_path / "sparse", tmp_path / "sparse-bundle")
    )
