"""Which plans run here, among those of a quantised bundle."""

from pathlib import Path
from typing import Any

import pytest

from runtime.bundle.directory import Bundle
from runtime.trt.plan_choice import choose_target


def test_plans_of_the_format_go_before_those_in_sixteen_bits() -> None:
    def row(*sm: int, **more: Any) -> dict[str, Any]:
        return {"api": "tensorrt_rtx", "version": "1.7", "compute_capabilities": [*sm], **more}

    plans = {
        "trt-rtx-portable": row(),
        "trt-rtx-sm86": row(86),
        "trt-rtx-sm89-sm120-fp8": row(89, 120, quant="fp8"),
    }
    bundle = Bundle(Path("b"), {"plans": plans}, "")
    chosen = {sm: choose_target(bundle, "tensorrt_rtx", "1.7", sm) for sm in (80, 86, 89, 100, 120)}
    assert chosen == {
        80: "trt-rtx-portable",
        86: "trt-rtx-sm86",
        89: "trt-rtx-sm89-sm120-fp8",
        100: "trt-rtx-portable",
        120: "trt-rtx-sm89-sm120-fp8",
    }
    with pytest.raises(ValueError, match="expected plans for tensorrt_rtx 1.7 and .* 7.5"):
        choose_target(bundle, "tensorrt_rtx", "1.7", 75)
