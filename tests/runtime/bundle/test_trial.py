"""Foreign bundles are tried in a process of its own: what kills or stalls it kills no user's."""

import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("onnx")

from onnx import NodeProto
from onnx import TensorProto as T
from onnx import helper as h

from runtime.bundle import trial
from runtime.bundle.directory import open_bundle
from runtime.opened import default_bundle
from runtime.pipeline import Pipeline

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals and limits of POSIX")


@pytest.fixture(autouse=True)
def foreign(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("D2M_TRIAL", "foreign")
    monkeypatch.setenv("D2M_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """The bundle that ships as someone else's: another name, so another digest."""
    target = Path(shutil.copytree(default_bundle(), tmp_path / "bundle", copy_function=os.link))
    write(target, lambda manifest: manifest.update(name="else"))
    return target


def write(bundle: Path, change: Callable[[dict], object]) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest)
    (bundle / "manifest.json").unlink()
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def encoder(*nodes: NodeProto, **constants: list[int]) -> bytes:
    """CLIP's place in the bundle: ids [batch, tokens] in, "y", as floats, out."""
    numbers = [h.make_tensor(name, T.INT64, [len(v)], v) for name, v in constants.items()]
    ids = h.make_tensor_value_info("input_ids", T.INT64, ["batch", "text_tokens"])
    pooled = h.make_tensor_value_info("pooled", T.FLOAT, ["batch", 64])
    last = h.make_node("Cast", ["y"], ["pooled"], to=T.FLOAT)
    graph = h.make_graph([*nodes, last], "g", [ids], [pooled], initializer=numbers)
    sets = [h.make_opsetid("", 20)]
    return h.make_model(graph, opset_imports=sets, ir_version=9).SerializeToString()


def node(kind: str, inputs: str, out: str, **attributes: object) -> NodeProto:
    return h.make_node(kind, inputs.split(), [out], **attributes)


MINIMUM = {"least": [-(1 << 63)], "minus": [-1], "zero": [0]}
HOSTILE: dict[str, tuple[bytes, str]] = {
    "constant folded": (
        encoder(node("Div", "least minus", "q"), node("Add", "q input_ids", "y"), **MINIMUM),
        r"ended the process that tried them \(SIGFPE\); fetch it",
    ),
    "quotient of inputs": (
        encoder(
            node("Mul", "input_ids zero", "none"), node("Add", "none least", "a"),
            node("Add", "none minus", "b"), node("Div", "a b", "y"), **MINIMUM,
        ),
        r"ended the process that tried them \(SIGFPE\); fetch it",
    ),
    "multiplies for ever": (
        encoder(
            node("Gather", "input_ids zero", "one", axis=1), node("Cast", "one", "f", to=T.FLOAT),
            node("Expand", "f shape", "m0"),
            *(node("MatMul", f"m{i} m{i}", f"m{i + 1}") for i in range(99)),
            node("Identity", "m99", "y"), zero=[0], shape=[8, 1024, 1024],
        ),
        "did not end within 30? s (of processor time )?in the process .* set D2M_TRIAL=never",
    ),
    "fills memory": (
        encoder(node("Expand", "input_ids shape", "y"), shape=[1 << 30, 1, 1]),
        "its graphs failed in a process with 1.1 GiB .there is not enough memory",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_graph_that_would_end_this_process(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    data, words = HOSTILE[name]
    row = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    (bundle / "text_encoder.onnx").unlink()
    (bundle / "text_encoder.onnx").write_bytes(data)
    write(bundle, lambda manifest: manifest["files"].update({"text_encoder.onnx": row}))
    monkeypatch.setattr(trial, "SECONDS", 2)
    monkeypatch.setattr(trial, "MEMORY", 1 << 30)
    pipeline = Pipeline(bundle, "ort", threads=1)
    began = time.monotonic()
    with pytest.raises(ValueError, match=words) as info:
        pipeline("a", steps=1)
    assert time.monotonic() - began < 60 and str(bundle) in str(info.value)
    assert trial.read_verdicts(pipeline.bundle.digest) == {}


def test_a_good_one_is_tried_once(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = Pipeline(None, "ort", threads=1)("a", steps=1, seed=7)
    assert not caplog.messages  # what ships is not tried
    opened = Pipeline(bundle, "ort", threads=1)
    assert opened("a", steps=1, seed=7).tobytes() == expected.tobytes()
    assert "was made elsewhere" in caplog.text
    monkeypatch.setattr(trial, "run_trial", forbidden)
    again = Pipeline(bundle, "ort", threads=1)
    again.execute("text_encoder", again.tokenizers["tokenizer"](["a"]))
    assert again.bundle.trusted == "tried"
    with pytest.raises(AssertionError):  # streamed, graphs are opened otherwise
        Pipeline(bundle, "ort", threads=1, offload="block").warm()


def forbidden(*_: object) -> None:
    raise AssertionError("tried")


def test_who_vouches(bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    from runtime.bundle.signing import make_key, sign

    monkeypatch.setattr(trial, "run_trial", forbidden)
    assert trial.vouched_for(open_bundle(bundle)) is None
    make_key(tmp_path / "key")
    sign(bundle, tmp_path / "key")
    signed = open_bundle(bundle, key=tmp_path / "key.pub")
    trial.try_foreign(signed, "ort", 1, {})
    unasked = open_bundle(bundle)  # anyone can sign
    with pytest.raises(AssertionError):
        trial.try_foreign(unasked, "ort", 1, {})
    trial.made_here(unasked.digest)
    trial.try_foreign(open_bundle(bundle), "ort", 1, {})
    monkeypatch.setenv("D2M_TRIAL", "sometimes")
    with pytest.raises(ValueError, match="D2M_TRIAL is 'sometimes', expected one of foreign, nev"):
        trial.try_foreign(unasked, "ort", 1, {})


def test_no_process_to_try_it_in(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object, **__: object) -> None:
        raise FileNotFoundError(2, "No such file")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(OSError, match="no process could be started .* set D2M_TRIAL=never"):
        Pipeline(bundle, "ort", threads=1).warm()
