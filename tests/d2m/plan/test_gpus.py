"""What fits on how many GPUs: the counts are a real model's, the page in docs/ is the command's."""

import re
import shlex
from pathlib import Path

import pytest

from d2m.cli import main
from d2m.plan.gpus import activations, counted, fits
from d2m.units import GB

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("preset", ["L", "S"])
def test_counts_are_those_of_the_real_model(preset):
    import torch
    from diffusers import FluxTransformer2DModel

    from d2m.distill import learner
    from d2m.model.grouping import dense_name
    from d2m.model.sparse_transformer import SparseFluxTransformer2DModel, structure
    from d2m.model.surgery import sparse_ffns
    from d2m.plan.model_config import subject_of
    from d2m.plan.presets import preset_of
    from d2m.recipe.recipe import load

    path = ROOT / "models/shapes-dense"
    recipe = load(preset_of(preset, path))
    config = {k: v for k, v in subject_of(path).config.items() if not k.startswith("_")}
    with torch.device("meta"):
        dense = FluxTransformer2DModel(**config)
        student = SparseFluxTransformer2DModel(**config, **structure(recipe))
    gates = {f"{name}.gate.weight" for name in sparse_ffns(student)}
    kept = {n for n, _ in student.named_parameters() if ".router." in n} | gates
    sizes = {name: p.numel() for name, p in student.named_parameters()}

    def size(names):
        return sum(sizes[name] for name in names if name not in kept)

    found = counted(path, preset=preset)
    assert found.dense == sum(p.numel() for p in dense.parameters())
    assert found.routing == sum(sizes[name] for name in kept)
    stages = [set(learner.trainable(student, stage)) for stage in recipe.stages]
    assert found.stage == pytest.approx(max(map(size, stages)), rel=1e-3)
    assert found.learnt == pytest.approx(size(set().union(*stages)), rel=1e-3)
    theirs = {name for name, _ in dense.named_parameters()}
    ours = set(sizes) - set().union(*stages) - {n for n in sizes if dense_name(n) in theirs}
    assert found.frozen == pytest.approx(size(ours), rel=1e-2)
    blocks = [*student.transformer_blocks, *student.single_transformer_blocks]
    inside = [
        sum(
            p.numel()
            for n, p in each.named_parameters()
            if ".router." not in n and "gate." not in n
        )
        for each in blocks
        if not hasattr(each, "router")
    ]
    assert found.block == pytest.approx(max(inside), rel=0.01)


def test_more_gpus_and_fewer_rows_need_less():
    rows = fits("flux-dev", (1, 8, 32), 80, preset="L")
    totals = [row["total"] for row in rows]
    assert totals == sorted(totals, reverse=True) and [row["fits"] for row in rows] == [0, 1, 1]
    for row in rows:
        parts = ("weights", "learning", "blocks", "activations", "encoders", "reserve")
        assert sum(row[part] for part in parts) == row["total"]
    eight = rows[1]
    # By hand: (2 x (11.90 + .36) + 4 x 5.80) / 8 and 12 x 4.36 / 8, in GB, and gates of 4 bytes.
    assert eight["weights"] == pytest.approx(5.97 * GB, rel=0.01)
    assert eight["learning"] == pytest.approx(6.54 * GB, rel=0.01)
    (more,) = fits("flux-dev", (8,), 80, preset="L", rows=eight["rows"])
    (many,) = fits("flux-dev", (8,), 80, preset="L", rows=eight["rows"] + 1)
    assert more["fits"] and not many["fits"]


def test_activations_by_hand():
    found = counted("flux-dev", preset="S")
    plain, kept, away = (activations(found, *each) for each in ((0, 0), (1, 0), (1, 1)))
    assert plain > 4 * kept and away <= kept
    assert kept == 4608 * 3072 * (2 * 57 + 2 * 27 + 10 * found.compared)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpus", "8"], "needs one: add --preset"),
        (["--gpus", "0", "--preset", "L"], "expected numbers of 1 or more"),
        (["--gpus", "x", "--preset", "L"], "expected whole numbers"),
        (["--gpus", "8", "--preset", "L", "--precision", "fp8"], "expected one of float32, bfl"),
    ],
)
def test_refusals(arguments, words, capsys):
    assert main(["plan", "flux-dev", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_the_page_is_the_commands_output(capsys):
    page = (ROOT / "docs/many-gpus.md").read_text("utf-8")
    (command, shown) = re.search(r"^```\n\$ d2m ([^\n]*)\n(.*?)^```$", page, re.M | re.S).groups()
    assert main(shlex.split(command)) == 0
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert [line.rstrip() for line in shown.splitlines()] == lines
