"""Graphs are looked at before ONNX Runtime opens them; the ones made to harm are refused."""

import json
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("onnx")

from runtime.bundle.directory import open_bundle
from runtime.bundle.onnx_file import check_onnx
from runtime.opened import default_bundle
from runtime.ort.component import open_session
from tests.cases import hostile_graphs as hostile
from tests.cases.hostile_graphs import HOSTILE

FILES = {"w.safetensors": 56}
SECONDS = 2.0  # of this process's own time, for any of them


def refused(data: bytes) -> str:
    """The clause; its time is bounded."""
    began = time.process_time()
    with pytest.raises(ValueError) as info:
        check_onnx(data, FILES)
    assert time.process_time() - began < SECONDS
    text = str(info.value)
    assert text.isprintable() and len(text) < 300
    return text


def test_every_graph_of_the_bundle_that_ships_passes() -> None:
    bundle = open_bundle(default_bundle())
    for name in bundle.manifest["files"]:
        if name.endswith(".onnx"):
            path = bundle.file(name)
            beside = {p.name: p.stat().st_size for p in path.parent.glob("*.safetensors")}
            found = check_onnx(path.read_bytes(), beside)
            assert 0 < found.nodes < 20_000
    # Its largest weight may be converted to float32 beforehand: 768 x 128.
    row = {p.name: p.stat().st_size for p in bundle.path.glob("*.safetensors")}
    assert check_onnx((bundle.path / "transformer.onnx").read_bytes(), row).limit >= 4 * 768 * 128


def test_harmless_ones_pass() -> None:
    assert check_onnx(hostile.harmless().SerializeToString(), {}).nodes == 1
    assert check_onnx(hostile.outside().SerializeToString(), FILES).nodes == 1
    assert check_onnx(hostile.laughs(8).SerializeToString(), {}).nodes == 383
    assert check_onnx(hostile.nested(3).SerializeToString(), {}).nodes > 8


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_ones_do_not(name: str) -> None:
    make, words = HOSTILE[name]
    assert re.search(words, refused(make().SerializeToString()))


def test_wide_laughs() -> None:
    model = hostile.laughs(1)
    call = model.graph.node[0]
    functions = list(model.functions)
    from onnx import helper as h

    for i in range(1, 5):  # 40 calls each: 2.5 million
        calls = [h.make_node(f"f{i - 1}", ["x"], [f"t{j}"], domain="d") for j in range(40)]
        functions.append(
            h.make_function("d", f"f{i}", ["x"], ["t0"], calls, functions[0].opset_import)
        )
    call.op_type = "f4"
    model = hostile.model([call], (), functions)
    assert "calls, expected at most" in refused(model.SerializeToString())


def test_merged_messages_do_not_pass() -> None:
    data = hostile.harmless().SerializeToString()
    assert "two graphs" in refused(data + data)
    assert "no graph" in refused(b"")


def test_cut_and_changed_anywhere() -> None:
    data = hostile.outside().SerializeToString()
    for end in range(len(data)):
        try:
            check_onnx(data[:end], FILES)
        except ValueError as error:
            assert str(error).isprintable()


GRAPHS = [
    make().SerializeToString()
    for make in (hostile.harmless, hostile.outside, hostile.huge_constant, hostile.forever)
]
SMALL = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@SMALL
@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    try:
        check_onnx(data, FILES)
    except ValueError as error:
        assert str(error).isprintable() and len(str(error)) < 300


@SMALL
@given(st.data())
def test_any_change(data: st.DataObject) -> None:
    model = bytearray(data.draw(st.sampled_from(GRAPHS)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(model) - 1))
        model[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
        if not model:
            return
    try:
        check_onnx(bytes(model), FILES)
    except ValueError as error:
        assert str(error).isprintable() and len(str(error)) < 300


# ---------------------------------------------------------------- handed to ONNX Runtime


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    return Path(shutil.copytree(default_bundle(), tmp_path / "bundle"))


def replace(bundle: Path, data: bytes, name: str = "vae_decoder.onnx") -> None:
    """Put a graph into a bundle, with its hash, as whoever made it would."""
    import hashlib

    (bundle / name).write_bytes(data)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def test_a_pipeline_with_a_hostile_graph(broken: Path) -> None:
    from runtime.pipeline import Pipeline

    replace(broken, hostile.outside(location="../secret").SerializeToString())
    pipeline = Pipeline(broken, "ort", threads=1)
    with pytest.raises(ValueError, match=r"its vae_decoder\.onnx is not safe to open: a tensor"):
        pipeline.executor("vae_decoder")


MEASURE = """
import resource, sys, time
from runtime.bundle.directory import open_bundle
from runtime.ort.component import open_session
import onnxruntime
bundle = open_bundle(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    open_session(bundle, "vae_decoder.onnx", 1)
except ValueError as error:
    print(error, file=sys.stderr)
used = resource.getrusage(resource.RUSAGE_SELF)
print((used.ru_maxrss - before) // 1024, used.ru_utime)
"""


@pytest.mark.parametrize("make", [hostile.huge_constant, lambda: hostile.doubling(18)])
def test_opening_computes_no_huge_constants(broken: Path, make) -> None:
    replace(broken, make().SerializeToString())
    command = [sys.executable, "-c", MEASURE, str(broken)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    megabytes, seconds = map(float, answer.stdout.split())
    assert megabytes < 600 and seconds < 10, answer.stderr


def test_a_session_of_another_format_is_not_opened(broken: Path) -> None:
    manifest = json.loads((broken / "manifest.json").read_text())
    (broken / "vae_decoder.onnx").rename(broken / "vae_decoder.ort")
    manifest["files"]["vae_decoder.ort"] = manifest["files"].pop("vae_decoder.onnx")
    manifest["components"]["vae_decoder"]["onnx"] = "vae_decoder.ort"
    (broken / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"onnx in its manifest\.json .* name ends in \.onnx"):
        open_bundle(broken)


def test_weights_are_converted_while_a_graph_opens(tmp_path: Path) -> None:
    """The limit leaves room for what is meant to be computed beforehand: bfloat16 weights."""
    bundle = open_bundle(default_bundle())
    assert bundle.manifest["storage_dtype"] == "bfloat16"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    session = open_session(bundle, "transformer.onnx", 1, fully=False)
    assert session.get_inputs() and before
