"""LoRAs on an open bundle: what `d2m lora` fuses, by values; changed, mixed and taken off."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runtime.bundle.directory import open_bundle
from runtime.bundle.lora_record import placement_of
from runtime.image import settings_of
from runtime.lora.file import read_lora
from runtime.lora.placement import Adapted, Adapters
from runtime.ort.component import open_component
from runtime.pipeline import Pipeline
from tests.cases.executor_inputs import inputs
from tests.conftest import exported
from tests.tiny.lora import factors, kohya, peft, write
from tests.tiny.pipeline import tiny_transformer

DEPTH = {"num_layers": 4, "num_single_layers": 5}  # of tests/tiny/grouped.py
DROPPED = "single_transformer_blocks.4."


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two LoRAs of every Linear of the grouped model: diffusers' names, kohya's."""
    folder, dense = tmp_path_factory.mktemp("loras"), tiny_transformer(**DEPTH)
    one = {name: each for name, each in factors(dense).items() if DROPPED not in name}
    two = {name: each for name, each in kohya(dense, 3).items() if "single_blocks_4_" not in name}
    first = write(folder / "first.safetensors", peft(one, alpha=2.0))
    return [first, write(folder / "second.safetensors", two)]


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory, files: list[Path]) -> Callable[[Path], Path]:
    """A pipeline with both LoRAs fused by d2m, at .8 and -.5."""
    from d2m.lora.fuse import lora

    def made(source: Path) -> Path:
        folder = tmp_path_factory.mktemp("fused")
        lora(files[0], source, folder / "one", scale=0.8)
        out = folder / f"{source.name}-fused"  # by its name the export is kept
        lora(files[1], folder / "one", out, scale=-0.5)
        return out

    return made


def test_every_tensor_is_the_one_of_the_fused_pipeline(
    tiny_grouped_dir: Path,
    tiny_grouped_bundle: Path,
    files: list[Path],
    fused: Callable[[Path], Path],
    pytestconfig: pytest.Config,
) -> None:
    """Of a sparse model with groups: attention, modulation, shared and routed experts, ends."""
    expected = open_bundle(exported(pytestconfig, fused(tiny_grouped_dir), top_k=(1, 2)))
    bundle = open_bundle(tiny_grouped_bundle)
    placement, plain = placement_of(bundle), bundle.weights("transformer")
    several = [(read_lora(files[0], placement.linears), 0.8)]
    several.append((read_lora(files[1], placement.linears), -0.5))
    assert set(several[0][0]) == set(placement.linears) - placement.nowhere
    assert placement.nowhere and all(DROPPED in name for name in placement.nowhere)
    lost = {next(iter(placement.nowhere)): next(iter(several[0][0].values()))}
    with pytest.raises(ValueError, match="changes 1 layers that the model has no place for"):
        placement.tensors_of(lost)
    adapted = Adapted(plain, Adapters(placement, several))
    other = expected.weights("transformer")
    assert plain.tensors.keys() == other.tensors.keys()
    changed = set()
    for name in plain.tensors:
        found = adapted.array(name, "float32")
        np.testing.assert_allclose(found, other.array(name, "float32"), rtol=2e-5, atol=2e-6)
        if not np.array_equal(found, plain.array(name, "float32")):
            changed.add(name)
    assert changed == adapted.changed
    assert all(n.endswith(("weight", "w1", "w2")) for n in changed) and len(changed) > 20
    assert not any("router" in name or "gate" in name for name in changed)


def answers(executor: Any, feed: dict[str, np.ndarray], **knobs: Any) -> np.ndarray:
    sample: np.ndarray = executor(feed, 2, **knobs)["sample"]
    return sample


def test_executors_change_and_forget(
    tiny_grouped_bundle: Path, tmp_path: Path, files: list[Path]
) -> None:
    """Whole graph, blocks, streamed blocks and plans: the same images with a LoRA; without it,
    the very bits of before."""
    from tests.runtime.trt.test_component_groups import plans_of
    from tests.stand_ins.device import bundle_with_plans

    bundle = bundle_with_plans(tiny_grouped_bundle, tmp_path / "plans")
    feed, placement = inputs(bundle, "transformer"), placement_of(bundle)
    one, two = (read_lora(file, placement.linears) for file in files)
    some = Adapters(placement, [(one, 0.8), (two, -0.5)])
    more = Adapters(placement, [(one, 0.3)])
    options: list[dict[str, Any]] = [{}, {"mode": "blocks"}, {"offload": "block"}]
    executors = [open_component(bundle, "transformer", threads=1, **each) for each in options]
    executors.append(plans_of(bundle, graphs=True))
    found = []
    for executor in executors:
        for _ in range(2):  # recorded, and bound, before it changes
            plain = answers(executor, feed)
        steps = []
        for adapters in (some, more, some, None):
            executor.adapt(adapters)  # type: ignore[attr-defined]
            steps.append(answers(executor, feed))
        assert np.array_equal(steps[0], steps[2]) and np.array_equal(steps[3], plain)
        assert np.abs(steps[0] - steps[1]).max() > 1e-2 < np.abs(steps[1] - plain).max()
        found.append(steps[:2])
    for steps in found[1:]:
        np.testing.assert_allclose(steps, found[0], rtol=2e-3, atol=2e-4)


def test_images_with_loras(tiny_bundle: Path, files: list[Path]) -> None:
    """From loading, between calls, said by images, and refused in one sentence."""
    dense = tiny_transformer()
    style = write(files[0].with_name("style.safetensors"), peft(factors(dense), alpha=2.0))
    other = write(files[0].with_name("other.safetensors"), kohya(dense, 3))
    asked: dict[str, Any] = {"seed": 3, "steps": 2}
    pipeline = Pipeline(tiny_bundle, "ort", threads=1, loras={style: 0.8, other: -0.5})
    with_both = pipeline("a red circle", **asked)
    rows = settings_of(with_both)["loras"]
    assert [row["strength"] for row in rows] == [0.8, -0.5] and rows[0]["file"] == style.name
    plain = Pipeline(tiny_bundle, "ort", threads=1)
    expected = plain("a red circle", **asked)
    plain.set_loras({style: 0.8, other: -0.5})
    assert plain("a red circle", **asked).tobytes() == with_both.tobytes() != expected.tobytes()
    for none in ({style: 0}, {}, None):
        plain.set_loras(none)
        assert plain("a red circle", **asked).tobytes() == expected.tobytes()
    assert "loras" not in settings_of(plain("a red circle", **asked))

    changes = factors(dense)
    wrong = {name: (up[:-1], down) for name, (up, down) in changes.items()}
    bad = write(style.with_name("bad.safetensors"), peft(wrong))
    pipeline.set_loras({style: 0.8})
    kept = pipeline("a red circle", **asked)
    for loras, sentence in (
        ({bad: 1.0}, "has factors of shape"),
        ({style.with_name("none.safetensors"): 1.0}, "is no file"),
        ({style: float("nan")}, "expected -100 to 100"),
        ({style: "much"}, "expected a number"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=sentence):
            pipeline.set_loras(loras)
        assert pipeline("a red circle", **asked).tobytes() == kept.tobytes()  # nothing changed


def test_a_bundle_without_a_record_and_a_broken_one(tiny_bundle: Path, files: list[Path]) -> None:
    bundle = open_bundle(tiny_bundle)
    record = bundle.manifest.pop("lora")
    with pytest.raises(ValueError, match="does not say where a LoRA's changes go.*export it again"):
        placement_of(bundle)
    bundle.manifest["lora"] = record
    good = json.loads(bundle.read(record["map"]))
    name = next(key for key, rows in good["parts"].items() if len(rows) > 1)
    for change, sentence in (
        ({"parts": {name: [["nothing", "plain", None, None, 0, 1]]}}, "no tensor 'nothing'"),
        ({"parts": {name: [good["parts"][name][0][:4] + [0, 1 << 40]]}}, "does not fit its shape"),
        ({"parts": {name: [good["parts"][name][0][:2] + [[0, 9999], None, 0, 1]]}}, "places outs"),
        ({"linears": {name: [1]}}, "expected \\[O, I\\]"),
        ({"parts": 3}, "expected an object"),
    ):
        bundle.read = lambda *_, made=change: json.dumps({**good, **made}).encode()  # type: ignore[method-assign]
        with pytest.raises(ValueError, match=f"cannot be used: its lora.json .*{sentence}"):
            placement_of(bundle)


# ---------------------------------------------------------------- other kinds of adapters


def test_loha_and_lokr_are_their_products(tmp_path: Path) -> None:
    """Against LyCORIS's formulas in float64, in fused layers too; DoRA is refused."""
    shapes = {"proj_out": (6, 8)} | {
        f"transformer_blocks.0.attn.{each}": (4, 6) for each in ("to_q", "to_k", "to_v")
    }
    r = torch.Generator().manual_seed(0)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=r)

    loha = {f"hada_w{i}_{half}": made(*shape) for i in (1, 2) for half, shape in PAIR.items()}
    lokr = {"lokr_w1": made(2, 2), "lokr_w2_a": made(6, 3), "lokr_w2_b": made(3, 3)}
    tensors = {f"lora_unet_proj_out.{key}": value for key, value in loha.items()}
    tensors["lora_unet_proj_out.alpha"] = torch.tensor(6.0)
    qkv = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors |= {f"{qkv}.{key}": value for key, value in lokr.items()}
    tensors[f"{qkv}.alpha"] = torch.tensor(1.5)
    found = read_lora(write(tmp_path / "a.safetensors", tensors), shapes)
    a = {key: value.double() for key, value in loha.items()}
    whole = 2.0 * (a["hada_w1_a"] @ a["hada_w1_b"]) * (a["hada_w2_a"] @ a["hada_w2_b"])
    np.testing.assert_allclose(found["proj_out"].part(None, None, np.float64), whole, rtol=1e-6)
    rows, columns = np.array([5, 0, 2]), np.array([7, 1])
    cut = whole.numpy()[rows][:, columns]
    np.testing.assert_allclose(found["proj_out"].part(rows, columns, np.float64), cut, rtol=1e-6)
    right = lokr["lokr_w2_a"].double() @ lokr["lokr_w2_b"].double()
    product = 0.5 * torch.kron(lokr["lokr_w1"].double(), right).numpy()  # [12, 6]
    for index, each in enumerate(("to_q", "to_k", "to_v")):
        change = found[f"transformer_blocks.0.attn.{each}"]
        own = product[4 * index : 4 * index + 4]
        np.testing.assert_allclose(change.part(None, None, np.float64), own, rtol=1e-5, atol=1e-6)
        cut = own[[3, 1]][:, columns % 6].T
        turned = change.transposed(np.array([3, 1]), columns % 6, np.float64)
        np.testing.assert_allclose(turned, cut, rtol=1e-5, atol=1e-6)
    tensors["lora_unet_proj_out.dora_scale"] = made(6, 1)
    with pytest.raises(ValueError, match="is of a DoRA, which also divides by the norm"):
        read_lora(write(tmp_path / "b.safetensors", tensors), shapes)


PAIR = {"a": (6, 3), "b": (3, 8)}


def test_xlabs_names_mean_what_diffusers_takes_them_for(tmp_path: Path) -> None:
    from diffusers.loaders.lora_conversion_utils import _convert_xlabs_flux_lora_to_diffusers

    dense = tiny_transformer()
    modules = dense.named_modules()
    shapes = {n: tuple(m.weight.shape) for n, m in modules if isinstance(m, torch.nn.Linear)}
    width, layers = dense.inner_dim, {}
    for i in range(len(dense.transformer_blocks)):
        for end in ("1", "2"):
            layers[f"double_blocks.{i}.processor.qkv_lora{end}"] = 3 * width
            layers[f"double_blocks.{i}.processor.proj_lora{end}"] = width
    for i in range(len(dense.single_transformer_blocks)):
        layers[f"single_blocks.{i}.processor.qkv_lora"] = 3 * width
    tensors = {}
    for seed, (name, rows) in enumerate(layers.items()):
        r = torch.Generator().manual_seed(seed)
        tensors[f"{name}.down.weight"] = torch.randn(4, width, generator=r)
        tensors[f"{name}.up.weight"] = torch.randn(rows, 4, generator=r)
    found = read_lora(write(tmp_path / "xlabs.safetensors", tensors), shapes)
    theirs = _convert_xlabs_flux_lora_to_diffusers(dict(tensors))
    names = {key.removeprefix("transformer.").rsplit(".lora_", 1)[0] for key in theirs}
    assert names == set(found)
    for name, change in found.items():
        up, down = (theirs[f"transformer.{name}.lora_{each}.weight"] for each in "BA")
        np.testing.assert_allclose(
            change.part(None, None, np.float32), up @ down, rtol=1e-4, atol=1e-5
        )
