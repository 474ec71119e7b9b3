"""Blocks whose FFNs differ in size are block types of their own, and compose to torch's sample."""

import dataclasses
from pathlib import Path

import torch

from d2m.recipe.recipe import preset
from d2m.recipe.structure import Shares
from export.checkpoint.weights import Checkpoint, place, write
from export.families.flux import FLUX
from export.graph.blocks import transformer_program
from export.graph.compose import compose
from export.graph.prepare import prepare
from tests.tiny.bundle import relative, session
from tests.tiny.pair import tiny_pair
from tests.tiny.pipeline import tiny_inputs


def test_two_sizes_are_two_types(tmp_path: Path) -> None:
    shares = Shares((2.5, 1.0), (1.0, 1.0))
    recipe = dataclasses.replace(preset("L"), shares=shares, stages=())
    model, _ = tiny_pair(0, recipe)
    for name, parameter in model.named_parameters():
        if ".gate." in name:  # in no doubt about whom they choose
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    given = tiny_inputs(0)
    with torch.no_grad():
        expected = model(**given).sample
    cos, sin = model.pos_embed(torch.cat((given["txt_ids"], given["img_ids"])))
    feed = {name: tensor for name, tensor in given.items() if not name.endswith("_ids")}
    feed |= {"rope_cos": cos, "rope_sin": sin}
    model.save_pretrained(tmp_path / "model")
    checkpoint, weights = Checkpoint(tmp_path / "model"), tmp_path / "w.safetensors"
    program = transformer_program(prepare(model, FLUX.tracing), FLUX.tracing, torch.float32, (2,))
    kinds = [kind for kind, _ in program.calls]
    assert kinds == ["embed", "double", "double_2", "single", "single", "final"]
    shapes = [program.types[kind].weights["ff.experts.w1"].shape for kind in kinds[1:3]]
    assert shapes == [(12, 32, 4), (12, 32, 8)]
    write(weights, place(program, checkpoint.dtype), checkpoint.get)
    (tmp_path / "m.onnx").write_bytes(compose(program, weights, 2).SerializeToString())
    arrays = {name: tensor.float().numpy() for name, tensor in feed.items()}
    (sample,) = session(tmp_path / "m.onnx").run(["sample"], arrays)
    assert relative(sample, expected) < 1e-5
