"""What ONNX Runtime raises while it computes reaches the user as one sentence of ours."""

from pathlib import Path

import numpy as np
import pytest

from d2m.cli.terminal import explain
from runtime.bundle.directory import open_bundle
from runtime.ort.sessions import errors_of
from runtime.pipeline import Pipeline


@pytest.mark.parametrize("mode", ["graph", "blocks"])
def test_ids_beyond_the_embedding_name_the_bundle(tiny_bundle: Path, mode: str) -> None:
    pipeline = Pipeline(tiny_bundle, "ort", threads=1, mode=mode)
    ids = np.full((1, 16), 10**6, np.int64)
    with pytest.raises(ValueError, match="cannot be used: ONNX Runtime fails to run its ") as info:
        pipeline.execute("text_encoder", ids)
    sentence, code = explain(info.value)
    assert code == 2 and str(tiny_bundle) in sentence and "fault" not in sentence


def test_memory_that_is_not_there_is_no_fault_of_a_bundle(tiny_bundle: Path) -> None:
    from onnxruntime.capi.onnxruntime_pybind11_state import RuntimeException

    bundle = open_bundle(tiny_bundle)
    with pytest.raises(OSError, match="not enough memory to run block 3 .* generate a smaller"):
        with errors_of(bundle, "block 3"):
            raise RuntimeException("Failed to allocate memory for requested buffer of size 9")
    with pytest.raises(KeyError):
        with errors_of(bundle, "block 3"):
            raise KeyError("ours")
