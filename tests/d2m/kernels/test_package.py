"""Packages of kernels: the manifest gives every plan again, the PTX is a plugin's, bytes repeat."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from d2m.kernels import package
from d2m.kernels.__main__ import main, sizes_of
from d2m.kernels.configs import tiles_for
from d2m.kernels.extents import counts, fit
from d2m.kernels.package import build
from d2m.kernels.plan import Sizes, forward_plan
from d2m.kernels.ptx import parameters, reorder
from tests.stand_ins.kernels import stand_in

FLUX = Sizes(1, 3072, 12, 768, 1, "bf16")


@pytest.fixture(autouse=True, scope="module")
def without_triton() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(package, "triton_version", lambda: "3.7.1")
        yield


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, without_triton: None) -> Path:
    out = tmp_path_factory.mktemp("kernels") / "out"
    build(out, FLUX, [90], [1, 2, 12], compile=stand_in)
    return out


def value(extent: Any, known: dict[str, int]) -> int:
    if isinstance(extent, int):
        return extent
    factor, _, name = extent.rpartition("*")
    return int(factor or 1) * known[name]


@pytest.mark.parametrize("tokens", [1, 3, 85, 512, 2047, 2048, 4608, 18432, 36864])
@pytest.mark.parametrize("k", [1, 2, 12])
def test_manifest_gives_every_plan_again(built: Path, tokens: int, k: int) -> None:
    manifest = json.loads((built / "kernels.json").read_text())
    sizes = Sizes(tokens, 3072, 12, 768, k, "bf16")
    tiles = tiles_for(90, "bf16", tokens, 3072, 768)
    plan, known = forward_plan(sizes, tiles), counts(sizes, tiles)
    (row,) = [
        row
        for row in manifest["plans"]
        if row["tokens"][0] <= tokens <= (row["tokens"][1] or tokens) and row["top_k"] == k
    ]
    assert (row["block_m"], row["block_t"]) == (tiles.m, tiles.block_t)
    for side in ("inputs", "outputs", "work"):
        found = {
            name: (tensor["dtype"], tuple(value(size, known) for size in tensor["shape"]))
            for name, tensor in row[side].items()
        }
        assert found == getattr(plan, side)
    for launch, wanted in zip(row["launches"], plan.launches, strict=True):
        kernel = manifest["kernels"][launch["kernel"]]
        assert tuple(value(size, known) for size in launch["grid"]) == wanted.grid
        arguments = {
            name: given if kind[0] == "*" else value(given, known)
            for (name, kind), given in zip(kernel["parameters"], launch["arguments"], strict=True)
        }
        assert arguments == dict(wanted.arguments)
        assert (kernel["entry"], kernel["block"]) == (wanted.kernel, 32 * wanted.warps)


def test_files_are_hashed_shared_and_the_same_every_time(tmp_path: Path) -> None:
    for name in ("a", "b", "a"):  # a second time over the first
        manifest = build(
            tmp_path / name, FLUX, [120, 90], [1, 2], streams=["text"], compile=stand_in
        )
    for path, row in manifest["files"].items():
        data = (tmp_path / "a" / path).read_bytes()
        assert data == (tmp_path / "b" / path).read_bytes()
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (row["sha256"], row["size"])
    assert (tmp_path / "a/kernels.json").read_bytes() == (tmp_path / "b/kernels.json").read_bytes()
    # per architecture: up and down once, the other three for both numbers of experts
    assert len(manifest["kernels"]) == 2 * (2 + 3 * 2)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_plugin_ptx_takes_inputs_integers_outputs(built: Path) -> None:
    manifest = json.loads((built / "kernels.json").read_text())
    orders = {row["entry"]: row["plugin"] for row in manifest["kernels"].values()}
    assert orders["route"] == ["logits", "T", "gates", "chosen", "counts"]
    assert orders["place"][:6] == ["chosen", "gates", "counts", "T", "blocks", "tiles"]
    assert orders["place"][6:8] == ["slots", "slot_token"]
    for entry, last in (("up", "hidden"), ("down", "out"), ("combine", "y")):
        assert orders[entry][-1] == last
    for row in manifest["kernels"].values():
        text = (built / row["ptx"]).read_text()
        names = [name for _, name in parameters(text, row["entry"])]
        assert names == [f"{row['entry']}_{name}" for name in row["plugin"]]
        assert "secret" not in text and ".reqntid 128" in text


def test_a_parameter_that_is_read_is_not_left_out() -> None:
    ptx = (
        ".visible .entry f(\n .param .u64 f_0,\n .param .u32 f_1\n)\n{ ld.param.u32 %r1, [f_1]; }\n"
    )
    assert [n for _, n in parameters(reorder(ptx, "f", [1, 0]), "f")] == ["f_1", "f_0"]
    assert [n for _, n in parameters(reorder(ptx, "f", [1]), "f")] == ["f_1"]
    with pytest.raises(ValueError, match="reads its parameters f_1"):
        reorder(ptx, "f", [0])
    with pytest.raises(ValueError, match="no entry g"):
        reorder(ptx, "g", [0])


def test_what_is_no_multiple_is_an_error() -> None:
    cases = [{"T": 10, "tiles": 3}, {"T": 20, "tiles": 7}]
    assert (fit([5, 5], cases), fit([20, 40], cases), fit([3, 7], cases)) == (5, "2*T", "tiles")
    with pytest.raises(ValueError, match="no fixed multiple"):
        fit([11, 21], cases)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sm", "75"], "--sm is 75, expected some of 80, 86"),
        (["--sm", "x"], "--sm is 'x', expected whole numbers"),
        (["--top-k", "0"], "--top-k is 0, expected numbers from 1 to 12"),
        (["--dtype", "int8"], "--dtype is 'int8', expected one of fp32"),
        (["--width", "0"], "--width is 0, expected 1 to"),
        (["--streams", "sound"], "the streams are ['sound'], expected some of"),
        (["--sparse", "/nowhere"], "/nowhere holds no transformer/config.json"),
    ],
)
def test_errors_are_one_sentence(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", "-o", str(tmp_path / "out"), *arguments]) == 2
    said = capsys.readouterr().err
    assert words in said and said.startswith("error: ") and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_another_directory_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds no kernels.json"):
        build(tmp_path, FLUX, [90], [2], compile=stand_in)


def test_sizes_come_from_a_models_config(tmp_path: Path) -> None:
    values = {"num_attention_heads": 4, "attention_head_dim": 32, "num_experts": 12}
    (tmp_path / "config.json").write_text(json.dumps({**values, "expert_ratio": 0.25}))
    assert sizes_of(tmp_path, "fp16") == Sizes(1, 128, 12, 32, 1, "fp16")
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="no expert_ratio, expected a sparse model"):
        sizes_of(tmp_path, "bf16")


@pytest.mark.slow
def test_real_kernels_hold_no_path_and_repeat(compiled: Any, tmp_path: Path) -> None:
    """Triton itself: same bytes from two caches, PTX 8.7 in the plugin's order, no file names."""
    arguments = ["build", "--sm", "90", "--width", "64", "--experts", "4", "--hidden", "32"]
    for name in ("a", "b"):
        out = str(tmp_path / name)
        assert compiled(main, [*arguments, "--streams", "text", "--top-k", "2", "-o", out]) == 0
    manifest = json.loads((tmp_path / "a/kernels.json").read_text())
    assert len(manifest["kernels"]) == 5
    for path in manifest["files"]:
        data = (tmp_path / "a" / path).read_bytes()
        assert data == (tmp_path / "b" / path).read_bytes()
        assert b".py" not in data
    for row in manifest["kernels"].values():
        text = (tmp_path / "a" / row["ptx"]).read_text()
        assert ".version 8.7" in text
        assert len(parameters(text, row["entry"])) == len(row["parameters"])
