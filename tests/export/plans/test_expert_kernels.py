"""`--cubins`: what is refused, how blocks are cut and named, and the plans of their segments."""

import functools
import math
from pathlib import Path

import pytest

from d2m.kernels import package
from d2m.kernels.package import SM
from export.bundle import export_bundle
from export.plans.build import build_plans, default_profiles
from export.plans.expert_kernels import PORTABLE, build_kernels, check_cubins, cut_blocks, kernel_sm
from runtime.bundle.directory import open_bundle
from runtime.bundle.kernel_package import open_kernels
from runtime.trt.experts import choose_experts
from tests.stand_ins.kernels import stand_in


@pytest.fixture(scope="module")
def graphs(tiny_bundle: Path) -> dict[str, Path]:
    bundle = open_bundle(tiny_bundle)
    return {
        f"transformer/{kind}{f'.k{key}' if key else ''}": bundle.file(path)
        for kind, row in bundle.component("transformer")["types"].items()
        for key, path in row["graphs"].items()
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((False, True, False, ()), "--cubins is given without --trt or --trt-rtx, expected plans"),
        ((True, False, False, ()), "--cubins is given for a dense pipeline, expected plans of a"),
        ((True, True, True, ()), "--cubins is given with --plugin, expected"),
        ((True, True, False, (75, 89)), "--sm is 75 with --cubins, expected some of 80, 86"),
    ],
)
def test_what_cannot_be_is_one_sentence(arguments: tuple, words: str) -> None:
    with pytest.raises(ValueError) as error:
        check_cubins(*arguments)
    assert words in str(error.value) and str(error.value).count(". ") == 0


def test_a_dense_pipeline_is_refused_before_it_is_traced(
    tiny_dense_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="given for a dense pipeline"):
        export_bundle(tiny_dense_dir, tmp_path / "out", trt_rtx=True, cubins=True)
    assert not (tmp_path / "out").exists()


def test_kernels_are_for_the_plans_gpus() -> None:
    assert kernel_sm(["tensorrt_rtx"], ()) == list(PORTABLE)
    assert kernel_sm(["tensorrt_rtx"], (120, 86)) == [86, 120]
    assert set(PORTABLE) <= set(SM)


def test_blocks_are_cut_once_for_every_top_k(graphs: dict[str, Path], tmp_path: Path) -> None:
    pieces = cut_blocks(graphs, tmp_path)
    assert set(pieces.segments) == {
        f"transformer/{kind}.k{k}" for kind in ("double", "single") for k in (1, 2, 4)
    }
    assert pieces.segments["transformer/double.k4"] == [
        *("transformer/double.0", "transformer/double.k4.experts.0"),
        *("transformer/double.k4.experts.1", "transformer/double.1"),
    ]
    assert {name: k for name, k in pieces.experts.items() if "single" in name} == {
        f"transformer/single.k{k}.experts.0": k for k in (1, 2, 4)
    }
    assert sorted(pieces.graphs) == [
        f"transformer/{kind}.{place}" for kind in ("double", "single") for place in (0, 1)
    ]
    for key in ("1", "4"):  # the same bytes from whichever graph they are cut
        alone = {n: p for n, p in graphs.items() if n.endswith(f".k{key}")}
        again = cut_blocks(alone, tmp_path / key)
        for name, path in again.graphs.items():
            assert path.read_bytes() == pieces.graphs[name].read_bytes()


def test_every_size_of_experts_has_its_package(
    graphs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks whose shared experts differ have experts of other sizes."""
    pieces = cut_blocks(graphs, tmp_path / "cut")
    for name, row in pieces.tensors.items():
        if "single" in name:
            row["inputs"][2]["shape"], row["inputs"][4]["shape"] = [12, 32, 16], [12, 16, 32]
    monkeypatch.setattr(package, "triton_version", lambda: "3.7.1")
    monkeypatch.setattr(package, "build", functools.partial(package.build, compile=stand_in))
    build_kernels(tmp_path, pieces, "fp32", (90,))
    hidden = {
        path.name: open_kernels(path).manifest["hidden"] for path in tmp_path.glob("kernels/*")
    }
    assert hidden == {"fp32-12x32x8": 8, "fp32-12x32x16": 16}
    row: dict = {"tensors": {}}
    pieces.add_to(row, "fp32")
    found = {(name.partition(".")[0], entry["kernels"]) for name, entry in row["experts"].items()}
    assert found == {
        ("transformer/double", "kernels/fp32-12x32x8"),
        ("transformer/single", "kernels/fp32-12x32x16"),
    }


def test_experts_of_one_size_and_a_gpu_are_needed(graphs: dict[str, Path], tmp_path: Path) -> None:
    pieces = cut_blocks(graphs, tmp_path)
    with pytest.raises(ValueError, match="there is no GPU, expected"):
        build_kernels(tmp_path / "k", pieces, "fp32", ())
    next(iter(pieces.tensors.values()))["inputs"][4]["shape"] = [12, 16, 32]
    with pytest.raises(ValueError, match="there is experts of 2 sizes, expected one size"):
        build_kernels(tmp_path / "k", pieces, "fp32", (90,), ptx=True)


@pytest.mark.tensorrt
def test_plans_of_segments_are_built(
    tiny_bundle: Path, graphs: dict[str, Path], tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    bundle = open_bundle(tiny_bundle)
    pieces = cut_blocks(graphs, tmp_path / "cut")
    profiles = default_profiles(bundle.manifest)
    (entry,) = build_plans(
        pieces.graphs, tmp_path, api="tensorrt_rtx", dtype="float32", profiles=profiles
    ).values()
    assert set(entry["files"]) == set(pieces.graphs)
    assert not any(row["conditionals"] + row["host_copies"] for row in entry["layers"].values())
    kinds = bundle.component("transformer")["types"]
    for key, io in entry["tensors"].items():
        row = kinds[key.partition("/")[2].partition(".")[0]]
        data = (tmp_path / entry["files"][key]).read_bytes()
        for tensor in io["inputs"]:
            assert tensor["name"].encode() in data  # a plan keeps what only gives a shape
            if weight := row["weights"].get(tensor["name"]):
                assert math.prod(weight["shape"]) == math.prod(tensor["shape"])


@pytest.mark.slow
@pytest.mark.tensorrt
def test_a_bundle_with_segments_and_kernels(tiny_sparse_dir: Path, tmp_path: Path) -> None:
    """The whole export, real plans and real cubins: it opens and chooses (minutes)."""
    pytest.importorskip("tensorrt_rtx")
    pytest.importorskip("triton")
    export_bundle(
        tiny_sparse_dir, tmp_path / "a", trt_rtx=True, cubins=True, sm=(89,), top_k=(0, 2)
    )
    bundle = open_bundle(tmp_path / "a")
    (row,) = bundle.manifest["plans"].values()
    assert {row["top_k"] for row in row["experts"].values()} == {2}
    assert {f"kernels/bf16-12x32x8/sm89/{n}-image.cubin" for n in ("up", "down")} <= set(
        bundle.manifest["files"]
    )
    assert not any(name.endswith(".ptx") for name in bundle.manifest["files"])
    assert row["layers"]["transformer/double.0"]["fused_attention"] == 1
    assert row["layers"]["transformer/single.1"]["fused_attention"] == 1
    kernels, reason = choose_experts(bundle, "trt-rtx-sm89", 89)
    assert kernels and reason == "kernels for sm_89"
