"""Which compiler, for which GPUs; what a refused graph says."""

import pytest
from onnx import helper

from export.plans.compiler import build, check_sm, load_api, target_name
from tests.tiny.graph import info, model_of

rtx = pytest.importorskip("tensorrt_rtx")
pytestmark = pytest.mark.tensorrt


def test_which_library_and_which_gpus():
    assert load_api("tensorrt_rtx") is rtx
    with pytest.raises(ValueError, match="the plan api is 'onnx', expected auto"):
        load_api("onnx")
    assert check_sm(rtx, [120, 86, 86]) == (86, 120)
    with pytest.raises(ValueError, match="--sm is 90, expected some of 75, 80"):
        check_sm(rtx, [86, 90])
    assert target_name("tensorrt_rtx", ()) == "trt-rtx-portable"
    assert target_name("tensorrt", (90,)) == "trt-sm90"


def test_tensorrt_is_named_with_its_cure_where_it_is_missing():
    try:
        import tensorrt  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match=r"install with: pip install .*\[trt\]'"):
            load_api("tensorrt")
        assert load_api("auto") is rtx


def test_tensorrt_proper_says_that_it_needs_a_gpu():
    pytest.importorskip("cuda.bindings")
    from export.plans.compiler import local_sm

    class Proper:  # only what check_sm reads of the module
        __name__, __version__ = "tensorrt", "10.9.0"

    if local_sm() is None:
        with pytest.raises(OSError, match="this machine has none; build with --trt-rtx"):
            check_sm(Proper, ())


def test_a_node_that_is_refused_is_named():
    node = helper.make_node("Foo", ["x"], ["y"], domain="d2m", name="my_foo")
    with pytest.raises(ValueError, match=r"plan t/foo: node 'my_foo' \(Foo\) is refused"):
        build(rtx, model_of([node], [info("x", [8])], [info("y", [8])]), {}, name="t/foo")
