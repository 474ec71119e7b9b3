"""The routed experts from a package of kernels, on the host device: packing, scratch, order, grids.

A "cubin" here names its kernel, and a launch runs that kernel in numpy on the very addresses that
it is given (tests/stand_ins/kernels.py); so what is tested is all but the machine code.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from d2m.kernels import package
from d2m.kernels.configs import tiles_for
from d2m.kernels.plan import Sizes, forward_plan
from runtime.bundle.kernel_package import Kernels, open_kernels
from runtime.trt.expert_kernels import Cubins, choose_plan, make_call
from tests.stand_ins.device import HostDevice, view
from tests.stand_ins.kernels import stand_in

D, E, H = 32, 5, 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("kernels") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(package, "triton_version", lambda: "3.7.1")
        package.build(out, Sizes(1, D, E, H, 1, "fp32"), [80, 90], [1, 2, 5], compile=stand_in)
    return out


@pytest.fixture(scope="module")
def kernels(folder: Path) -> Kernels:
    return open_kernels(folder)


def given(tokens: int, routing: str, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((tokens, E))
    if routing == "one expert":
        logits[:, 3] += 1e3
    if routing == "ties":
        logits[...] = 0.0
    x, w1 = rng.standard_normal((tokens, D)), rng.standard_normal((E, D, H)) / D**0.5
    b1, w2 = rng.standard_normal((E, H)), rng.standard_normal((E, H, D)) / H**0.5
    named = {"x": x, "logits": logits, "w1": w1, "b1": b1, "w2": w2}
    return {name: array.astype(np.float32) for name, array in named.items()}


def reference(given: dict[str, np.ndarray], top_k: int) -> np.ndarray:
    import torch

    from d2m.model.routing import routed_experts_reference

    tensors = [torch.from_numpy(array).double() for array in given.values()]
    return routed_experts_reference(*tensors, top_k).numpy()


def launched(cubins: Cubins, given: dict[str, np.ndarray], top_k: int) -> np.ndarray:
    device = cubins.device
    tokens = given["x"].shape[0]
    call = cubins.prepare(tokens, top_k)
    addresses = {name: device.malloc(array.nbytes) for name, array in given.items()}
    for name, array in given.items():
        device.upload(addresses[name], array)
    addresses["y"] = device.malloc(tokens * D * 4)
    scratch = device.malloc(call.scratch)
    guards = [*addresses.values(), scratch]
    ends = {at: bytes(device.memory[at][-1:]) for at in guards}
    cubins.run(call, addresses, scratch)
    assert all(bytes(device.memory[at][-1:]) == end for at, end in ends.items())
    return view(addresses["y"], (tokens, D), "f4").copy()


@pytest.mark.parametrize("tokens", [1, 2, 7, 85, 300])
@pytest.mark.parametrize("routing", ["random", "one expert", "ties"])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_op_equals_the_reference(kernels: Kernels, tokens: int, routing: str, k: int) -> None:
    cubins, tensors = Cubins(kernels, HostDevice()), given(tokens, routing, tokens)
    np.testing.assert_allclose(
        launched(cubins, tensors, k), reference(tensors, k), rtol=2e-4, atol=2e-5
    )


@pytest.mark.parametrize("bias", [True, False])
def test_gated_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bias: bool) -> None:
    """A package of format 2: what its manifest says, and the op from its launches."""
    import torch

    from d2m.model.routing import routed_experts_reference

    monkeypatch.setattr(package, "triton_version", lambda: "3.7.1")
    sizes = Sizes(1, D, E, H, 1, "fp32", "swiglu", bias)
    package.build(tmp_path / "k", sizes, [90], [2], compile=stand_in)
    opened = open_kernels(tmp_path / "k")
    said = {name: opened.manifest[name] for name in ("format", "activation", "bias")}
    assert said == {"format": 2, "activation": "swiglu", "bias": bias}
    tensors = given(40, "random")
    rng = np.random.default_rng(3)
    tensors["w1"] = (rng.standard_normal((E, D, 2 * H)) / D**0.5).astype("f4")
    tensors["b1"] = rng.standard_normal((E, 2 * H)).astype("f4")
    if not bias:
        del tensors["b1"]
    found = launched(Cubins(opened, HostDevice()), tensors, 2)
    doubles = {name: torch.from_numpy(array).double() for name, array in tensors.items()}
    doubles.setdefault("b1", None)
    wanted = routed_experts_reference(**doubles, top_k=2, activation="swiglu").numpy()
    np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=2e-5)
    # A manifest that says another kind has other inputs, or is no manifest.
    file = tmp_path / "k/kernels.json"
    for change, words in (
        ({"activation": "silu"}, "inputs"),
        ({"activation": "relu"}, "activation"),
        ({"bias": not bias}, "inputs"),
        ({"bias": 1}, "bias"),
        ({"format": 3}, "format"),
    ):
        file.write_text(json.dumps(opened.manifest | change))
        with pytest.raises(ValueError, match=f"cannot be used: .*{words}"):
            open_kernels(tmp_path / "k")


def test_a_recorded_call_runs_again_on_new_numbers(kernels: Kernels) -> None:
    device = HostDevice()
    cubins, first, second = Cubins(kernels, device), given(40, "random"), given(40, "random", 9)
    call = cubins.prepare(40, 2)
    at = {name: device.malloc(array.nbytes) for name, array in first.items()}
    at["y"], scratch = device.malloc(40 * D * 4), device.malloc(call.scratch)
    device.begin_capture()
    cubins.run(call, at, scratch)
    graph = device.end_capture()
    for tensors in (first, second):
        for name, array in tensors.items():
            device.upload(at[name], array)
        device.replay(graph)
        found = view(at["y"], (40, D), "f4")
        np.testing.assert_allclose(found, reference(tensors, 2), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("tokens", [1, 512, 2047, 2048, 36864])
def test_calls_are_what_the_plan_says(kernels: Kernels, tokens: int) -> None:
    sizes = Sizes(tokens, D, E, H, 2, "fp32")
    wanted = forward_plan(sizes, tiles_for(90, "fp32", tokens, D, H))
    call = make_call(choose_plan(kernels, 90, tokens, 2), E, tokens)
    for launch, row in zip(call.launches, wanted.launches, strict=True):
        assert launch.grid == (*row.grid, 1, 1)[:3]
        assert list(launch.arguments) == [value for _, value in row.arguments]
    bytes_of = {"fp32": 4, "i32": 4}
    spans = sorted(
        (at, at + int(np.prod(wanted.work[name][1])) * bytes_of[wanted.work[name][0]])
        for name, at in call.work.items()
    )
    assert set(call.work) == set(wanted.work) and spans[-1][1] <= call.scratch
    assert all(a[1] <= b[0] and b[0] % 256 == 0 for a, b in zip(spans, spans[1:]))


def test_code_is_chosen_by_cudas_rule(kernels: Kernels) -> None:
    assert choose_plan(kernels, 89, 10, 1)["sm"] == 80
    assert choose_plan(kernels, 90, 10, 1)["sm"] == 90
    for sm, k in ((100, 1), (75, 1), (90, 3)):
        with pytest.raises(ValueError, match=f"no plan for sm_{sm}, top_k {k} and 10 tokens"):
            choose_plan(kernels, sm, 10, k)


def broken(folder: Path, root: Path, change: Any) -> Path:
    shutil.copytree(folder, root)
    manifest = json.loads((root / "kernels.json").read_text())
    change(manifest)
    (root / "kernels.json").write_text(json.dumps(manifest))
    return root


def first_kernel(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["kernels"][manifest["plans"][0]["launches"][0]["kernel"]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(format=3), "format in its kernels.json is 3"),
        (lambda m: m.update(width=1 << 40), "width in its kernels.json"),
        (lambda m: m["files"].update({"../x": {}}), "relative path inside"),
        (lambda m: first_kernel(m).update(cubin="/etc/passwd"), "a path listed under files"),
        (lambda m: first_kernel(m).update(block=4096), "from 32 to 1024"),
        (lambda m: first_kernel(m).update(shared=1 << 30), ".shared in its kernels.json"),
        (lambda m: first_kernel(m).update(entry="a b"), "a function's name"),
        (lambda m: m["plans"][0]["launches"][0]["arguments"].pop(), "one for every parameter"),
        (
            lambda m: m["plans"][0]["launches"][2]["arguments"].__setitem__(0, "gatez"),
            "a tensor of",
        ),
        (lambda m: m["plans"][0]["launches"][0].update(grid=["T**2"]), "multiples of one of"),
        (lambda m: m["plans"][0]["launches"][0].update(grid=[0]), "multiples of one of"),
        (lambda m: m["plans"][0]["inputs"]["x"].update(shape=["T", 64]), "the op's"),
        (lambda m: m["plans"][0].update(tokens=[5, 1]), "the least number of tokens"),
        (lambda m: m.update(plans=[]), "a list of 1 to 1000 plans"),
    ],
)
def test_a_wrong_manifest_is_one_sentence(
    folder: Path, tmp_path: Path, change: Any, words: str
) -> None:
    root = broken(folder, tmp_path / "k", change)
    with pytest.raises(ValueError, match="cannot be used") as error:
        open_kernels(root)
    assert words in str(error.value) and str(error.value).endswith("; build them again.")


def test_changed_code_and_links_are_refused(folder: Path, tmp_path: Path) -> None:
    root = broken(folder, tmp_path / "a", lambda m: None)
    cubin = next(root.rglob("*.cubin"))
    data = bytearray(cubin.read_bytes())
    data[5] ^= 1
    cubin.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="SHA-256"):
        open_kernels(root)
    os.replace(cubin, tmp_path / "elsewhere")
    cubin.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="a link that leaves the directory"):
        open_kernels(root)
    with pytest.raises(FileNotFoundError, match=r"has no kernels.json, expected a package"):
        open_kernels(tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 77, 2500])
def test_op_on_the_gpu(tmp_path: Path, tokens: int) -> None:
    """The same op test with real cubins on a real device, through cuda-bindings, no torch."""
    import subprocess
    import sys

    from runtime.program.executor import gpu_count

    if not gpu_count():
        pytest.skip("no GPU is visible")
    pytest.importorskip("triton")
    from runtime.cuda.device import Device

    device = Device()
    sizes = f"--width {D} --experts {E} --hidden {H} --dtype fp32 --top-k 2"
    command = [sys.executable, "-m", "d2m.kernels", "build", "--sm", str(device.capability)]
    subprocess.run([*command, *sizes.split(), "-o", str(tmp_path / "k")], check=True)
    cubins, tensors = Cubins(open_kernels(tmp_path / "k"), device), given(tokens, "random")
    call = cubins.prepare(tokens, 2)
    addresses = {name: device.malloc(array.nbytes) for name, array in tensors.items()}
    for name, array in tensors.items():
        device.upload(addresses[name], array)
    addresses["y"] = device.malloc(tokens * D * 4)
    cubins.run(call, addresses, device.malloc(call.scratch))
    found = np.empty((tokens, D), np.float32)
    device.download(addresses["y"], found)
    np.testing.assert_allclose(found, reference(tensors, 2), rtol=2e-4, atol=2e-5)
